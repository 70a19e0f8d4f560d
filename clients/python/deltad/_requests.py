"""From dictionaries in OpenAI's form and keyword arguments to deltad.v1 messages. Errors name what and where."""
import json

from ._proto import message

_ROLES = {"system": 1, "user": 2, "assistant": 3, "tool": 4, "developer": 5}
_MODES = {"auto": 1, "none": 2, "required": 3}
_PRIORITIES = {"low": 1, "normal": 2, "high": 3}
_SAMPLING = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "seed")


def _text_of(content, where):
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    out = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            out.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            out.append(part["text"])
        else:
            kind = part.get("type", "?") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where}.content[{i}]: a part of type {kind} is not text")
    return out


def message_of(m, where="message"):
    role = m.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where}.role: {role!r} is not one of {', '.join(_ROLES)}")
    out = message("deltad.v1.Message")(role=_ROLES[role], tool_call_id=m.get("tool_call_id") or "")
    for text in _text_of(m.get("content"), where):
        out.parts.add(text=text)
    reasoning = m.get("reasoning_content", m.get("reasoning"))
    if reasoning is not None:
        out.reasoning = reasoning
    for i, c in enumerate(m.get("tool_calls") or []):
        f = c.get("function", c)
        if not f.get("name"):
            raise ValueError(f"{where}.tool_calls[{i}]: there is no name")
        arguments = f.get("arguments", {})
        out.tool_calls.add(id=c.get("id") or "", name=f["name"],
                           arguments_json=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
    return out


def add_messages(q, messages):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    q.messages.extend(message_of(m, f"messages[{i}]") for i, m in enumerate(messages))


def add_tools(q, tools):
    for t in tools or []:
        q.tools.add(openai_json=t if isinstance(t, str) else json.dumps(t, ensure_ascii=False))


def _tool_choice(to, choice):
    """OpenAI's forms: a word, {"type": "function", "function": {"name"}}, {"type": "allowed_tools", ...}."""
    if isinstance(choice, str):
        if choice not in _MODES:
            raise ValueError(f"tool_choice: {choice!r} is not one of {', '.join(_MODES)}")
        to.mode = _MODES[choice]
        return
    if choice.get("type") == "allowed_tools":
        a = choice.get("allowed_tools", choice)
        to.allowed.mode = _MODES[a.get("mode", "auto")]
        to.allowed.names.extend(t.get("function", t)["name"] for t in a["tools"])
        return
    to.name = choice.get("function", choice)["name"]


def _format(to, f):
    """OpenAI's response_format, or one of {"regex": ...}, {"choice": [...]}, {"grammar": ...}, {"json_schema": schema}."""
    kind = f.get("type")
    if kind == "text":
        return
    if kind == "json_object":
        to.json_object = True
    elif "json_schema" in f:
        schema = f["json_schema"]
        schema = schema.get("schema", schema) if kind == "json_schema" else schema
        to.json_schema = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    elif "regex" in f:
        to.regex = f["regex"]
    elif "grammar" in f:
        to.grammar = f["grammar"]
    elif "choice" in f:
        to.choice.choices.extend(f["choice"])
    else:
        raise ValueError(f"response_format: {sorted(f)} is none that is known")


def _generation(q, o):
    """Takes what it knows out of o; the rest is an error."""
    for name in _SAMPLING:
        value = o.pop(name, None)
        if value is not None:
            setattr(q.sampling, name, value)
    for token, bias in (o.pop("logit_bias", None) or {}).items():
        q.sampling.logit_bias.add(token_id=int(token), bias=bias)
    for name in ("max_tokens", "min_tokens"):
        value = o.pop(name, None)
        if value is not None:
            setattr(q.stopping, name, value)
    stop = o.pop("stop", None) or []
    q.stopping.stop.extend([stop] if isinstance(stop, str) else stop)
    q.stopping.stop_token_ids.extend(o.pop("stop_token_ids", None) or [])
    q.stopping.ignore_eos = bool(o.pop("ignore_eos", False))
    top = o.pop("top_logprobs", None)
    if o.pop("logprobs", False) or top:
        q.logprobs.enabled = True
        q.logprobs.top = top or 0
    for number, name in ((1, "tokens"), (2, "prefill"), (3, "queued")):
        if o.pop(f"include_{name}", False):
            q.include.append(number)
    f = o.pop("response_format", None)
    if f is not None:
        _format(q.format, f)
    priority = o.pop("priority", None)
    if priority is not None:
        if priority not in _PRIORITIES:
            raise ValueError(f"priority: {priority!r} is not one of {', '.join(_PRIORITIES)}")
        q.scheduling.priority = _PRIORITIES[priority]
    for name, field in (("max_queue", "max_queue_ns"), ("max_wall_time", "max_wall_time_ns")):
        seconds = o.pop(name, None)
        if seconds is not None:
            setattr(q.scheduling, field, int(seconds * 1e9))
    for name in ("salt", "bypass"):
        value = o.pop("cache_" + name, None)
        if value is not None:
            setattr(q.cache, name, value)
    q.cache.checkpoint_messages.extend(o.pop("checkpoint_messages", ()))
    if o:
        raise TypeError(f"unknown option {next(iter(o))}")


def chat(messages, tools=None, thinking=True, session_id="", request_id="", budget_tokens=None, preserve_thinking=None,
         expect_generation=None, tool_choice=None, parallel_tool_calls=None, detach=False, idempotency_key="", **options):
    q = message("deltad.v1.ChatRequest")(session_id=session_id, request_id=request_id, detach=detach,
                                         idempotency_key=idempotency_key)
    add_messages(q, messages)
    add_tools(q, tools)
    q.reasoning.mode = 1 if thinking else 2
    for to, name, value in ((q.reasoning, "budget_tokens", budget_tokens), (q.reasoning, "preserve", preserve_thinking),
                            (q, "expect_generation", expect_generation), (q, "parallel_tool_calls", parallel_tool_calls)):
        if value is not None:
            setattr(to, name, value)
    if tool_choice is not None:
        _tool_choice(q.tool_choice, tool_choice)
    _generation(q, options)
    return q


def generate(prompt, request_id="", plain_text=False, **options):
    q = message("deltad.v1.GenerateRequest")(request_id=request_id, plain_text=plain_text)
    if isinstance(prompt, str):
        q.text = prompt
    else:
        q.ids.ids.extend(prompt)
    _generation(q, options)
    return q


def create_session(tools=None, name="", messages=(), thinking=True, ctx_tokens=None, idle_timeout=None):
    q = message("deltad.v1.CreateSessionRequest")(name=name)
    add_tools(q, tools)
    add_messages(q, messages)
    q.reasoning.mode = 1 if thinking else 2
    if ctx_tokens is not None:
        q.ctx_tokens = ctx_tokens
    if idle_timeout is not None:
        q.idle_timeout_ns = int(idle_timeout * 1e9)
    return q


def parse(output, tools=None, thinking=True, cut=False, tool_choice=None):
    q = message("deltad.v1.ParseOutputRequest")(thinking=thinking, cut=cut)
    for chunk in [output] if isinstance(output, (str, bytes)) else output:
        q.chunks.append(chunk.encode() if isinstance(chunk, str) else chunk)
    add_tools(q, tools)
    if tool_choice is not None:
        _tool_choice(q.tool_choice, tool_choice)
    return q

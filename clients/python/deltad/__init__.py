"""A client of deltad over gRPC.

    with Client() as c:
        for event in c.chat([{"role": "user", "content": "Hello"}]):
            if isinstance(event, Text):
                print(event.text, end="")

Messages and tools are dictionaries in OpenAI's form (content as text or parts; tool_calls, tool_call_id,
reasoning_content). Answers are dataclasses. Errors are DeltadError. Iterating less than the whole answer and
closing the iterator cancels the request. A Client may be used from several threads.
"""
import contextlib
import json
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional

import grpc

from ._proto import message

__all__ = ["Client", "Session", "DeltadError", "Accepted", "Reasoning", "Text", "ToolCallStart", "ToolCallArgs", "ToolCall",
           "Finished", "Reply"]

_ROLES = {"system": 1, "user": 2, "assistant": 3, "tool": 4, "developer": 5}
_REASONS = ["unspecified", "stop", "tool_calls", "length", "time", "cancelled"]
_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class DeltadError(Exception):
    """code: gRPC's name of the status; reason: deltad's own ("CONTEXT_LENGTH"); retry_after in seconds or None."""

    def __init__(self, code, reason, text, fields, retry_after):
        super().__init__(f"{code} {reason}: {text}")
        self.code, self.reason, self.message, self.fields, self.retry_after = code, reason, text, fields, retry_after


@dataclass
class Accepted:
    request_id: str
    session_id: str
    seed: int
    prompt_tokens: int


@dataclass
class Reasoning:
    text: str


@dataclass
class Text:
    text: str


@dataclass
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass
class ToolCallArgs:
    index: int
    json: str  # the next piece


@dataclass
class ToolCall:
    """Whole. complete False: it was cut and must not be run."""
    index: int
    id: str
    name: str
    arguments_json: str
    complete: bool

    @property
    def arguments(self) -> Dict[str, Any]:
        return json.loads(self.arguments_json)


@dataclass
class Finished:
    reason: str  # stop, tool_calls, length, time, cancelled
    seed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    first_token_s: float
    total_s: float


@dataclass
class Reply:
    text: str = ""
    reasoning: str = ""
    tool_calls: List[ToolCall] = field(default_factory=list)
    finished: Optional[Finished] = None

    def as_message(self) -> Dict[str, Any]:
        """The assistant's message, to be put into the history."""
        m: Dict[str, Any] = {"role": "assistant", "content": self.text, "reasoning_content": self.reasoning}
        calls = [c for c in self.tool_calls if c.complete]
        if calls:
            m["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments_json}}
                               for c in calls]
        return m


def _error(e: grpc.RpcError) -> DeltadError:
    reason, fields, retry = "", [], None
    for key, value in e.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for any_ in message("google.rpc.Status").FromString(value).details:
            name = any_.type_url.rsplit("/", 1)[-1]
            if name == "google.rpc.ErrorInfo":
                reason = message(name).FromString(any_.value).reason
            elif name == "google.rpc.BadRequest":
                fields = [v.field for v in message(name).FromString(any_.value).field_violations]
            elif name == "google.rpc.RetryInfo":
                d = message(name).FromString(any_.value).retry_delay
                retry = d.seconds + d.nanos * 1e-9
    return DeltadError(e.code().name, reason, e.details(), fields, retry)


def _message(m):
    content = m.get("content")
    parts = [content] if isinstance(content, str) else [p["text"] for p in content or []]
    out = message("deltad.v1.Message")(role=_ROLES[m["role"]], tool_call_id=m.get("tool_call_id", ""))
    for text in parts:
        out.parts.add(text=text)
    reasoning = m.get("reasoning_content", m.get("reasoning"))
    if reasoning is not None:
        out.reasoning = reasoning
    for c in m.get("tool_calls") or []:
        f = c.get("function", c)
        arguments = f.get("arguments", {})
        out.tool_calls.add(id=c.get("id", ""), name=f["name"],
                           arguments_json=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
    return out


def _sampling(q, options):
    for name in _FLOATS:
        if options.get(name) is not None:
            setattr(q.sampling, name, options.pop(name))
    for name in ("top_k", "seed"):
        if options.get(name) is not None:
            setattr(q.sampling, name, options.pop(name))
    if options.get("max_tokens") is not None:
        q.stopping.max_tokens = options.pop("max_tokens")
    q.stopping.stop.extend(options.pop("stop", None) or [])
    unknown = [k for k, v in options.items() if v is not None]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]}")


def _event(e):
    kind = e.WhichOneof("event")
    v = getattr(e, kind)
    if kind == "accepted":
        return Accepted(v.request_id, v.session_id, v.sampling.seed, v.prompt_tokens)
    if kind == "reasoning":
        return Reasoning(v.text)
    if kind == "text":
        return Text(v.text)
    if kind == "call_start":
        return ToolCallStart(v.index, v.id, v.name)
    if kind == "call_args":
        return ToolCallArgs(v.index, v.json)
    if kind == "call_end":
        return ToolCall(v.index, v.id, v.name, v.arguments_json, v.state == 1)
    if kind == "finished":
        u, t = v.usage, v.timings
        return Finished(_REASONS[v.reason], v.seed, u.prompt_tokens, u.cached_tokens, u.completion_tokens, u.reasoning_tokens,
                        t.first_token_ns * 1e-9, t.total_ns * 1e-9)
    return None


class Client:
    """address: "unix:///run/deltad/deltad.sock" or "127.0.0.1:PORT"."""

    def __init__(self, address="unix:///run/deltad/deltad.sock"):
        self._channel = grpc.insecure_channel(address)

    def close(self):
        self._channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _unary(self, method, request, answer, timeout=None):
        call = self._channel.unary_unary(f"/deltad.v1.{method}", lambda m: m.SerializeToString(),
                                         message(f"deltad.v1.{answer}").FromString)
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as e:
            raise _error(e) from None

    def _stream(self, method, request, answer, timeout):
        call = self._channel.unary_stream(f"/deltad.v1.{method}", lambda m: m.SerializeToString(),
                                          message(f"deltad.v1.{answer}").FromString)(request, timeout=timeout)
        try:
            for e in call:
                event = _event(e)
                if event is not None:
                    yield event
        except grpc.RpcError as e:
            raise _error(e) from None
        finally:
            call.cancel()

    def chat(self, messages, tools=None, thinking=True, session_id="", request_id="", timeout=None, **sampling) -> Iterator:
        """Events of one answer. sampling: temperature, top_p, top_k, min_p, seed, max_tokens, stop, ..._penalty."""
        q = message("deltad.v1.ChatRequest")(session_id=session_id, request_id=request_id)
        q.messages.extend(_message(m) for m in messages)
        for t in tools or []:
            q.tools.add(openai_json=json.dumps(t, ensure_ascii=False))
        q.reasoning.mode = 1 if thinking else 2
        _sampling(q, sampling)
        return self._stream("InferenceService/Chat", q, "ChatEvent", timeout)

    def ask(self, messages, **options) -> Reply:
        """The whole answer. messages may be one text."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        reply = Reply()
        for e in self.chat(messages, **options):
            if isinstance(e, Text):
                reply.text += e.text
            elif isinstance(e, Reasoning):
                reply.reasoning += e.text
            elif isinstance(e, ToolCall):
                reply.tool_calls.append(e)
            elif isinstance(e, Finished):
                reply.finished = e
        return reply

    def generate(self, text, request_id="", timeout=None, **sampling) -> Iterator:
        q = message("deltad.v1.GenerateRequest")(text=text, request_id=request_id)
        _sampling(q, sampling)
        return self._stream("InferenceService/Generate", q, "GenerateEvent", timeout)

    @contextlib.contextmanager
    def session(self, tools=None, name=""):
        """A Session that is closed at the end of the block."""
        q = message("deltad.v1.CreateSessionRequest")(name=name)
        for t in tools or []:
            q.tools.add(openai_json=json.dumps(t, ensure_ascii=False))
        s = Session(self, self._unary("SessionService/CreateSession", q, "CreateSessionResponse").session.id)
        try:
            yield s
        finally:
            self._unary("SessionService/CloseSession", message("deltad.v1.CloseSessionRequest")(session_id=s.id),
                        "CloseSessionResponse")

    def cancel(self, request_id):
        self._unary("InferenceService/Cancel", message("deltad.v1.CancelRequest")(request_id=request_id), "CancelResponse")

    def tokenize(self, text) -> List[int]:
        return list(self._unary("InferenceService/Tokenize", message("deltad.v1.TokenizeRequest")(text=text),
                                "TokenizeResponse").ids)

    def detokenize(self, ids, skip_special=False) -> str:
        return self._unary("InferenceService/Detokenize",
                           message("deltad.v1.DetokenizeRequest")(ids=ids, skip_special=skip_special), "DetokenizeResponse").text

    def model_info(self):
        """deltad.v1.GetModelInfoResponse"""
        return self._unary("ModelService/GetModelInfo", message("deltad.v1.GetModelInfoRequest")(), "GetModelInfoResponse")

    def stats(self):
        """deltad.v1.GetStatsResponse"""
        return self._unary("ModelService/GetStats", message("deltad.v1.GetStatsRequest")(), "GetStatsResponse")


class Session:
    """A conversation whose state stays with the daemon: every turn sends only what is new."""

    def __init__(self, client, id):
        self.client, self.id = client, id

    def chat(self, messages, **options) -> Iterator:
        return self.client.chat(messages, session_id=self.id, **options)

    def ask(self, messages, **options) -> Reply:
        return self.client.ask(messages, session_id=self.id, **options)

    def append(self, messages):
        """Computes messages now; the answer is asked for later."""
        q = message("deltad.v1.AppendMessagesRequest")(session_id=self.id)
        q.messages.extend(_message(m) for m in messages)
        return self.client._unary("SessionService/AppendMessages", q, "AppendMessagesResponse")

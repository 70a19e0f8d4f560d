"""Transcripts of agent conversations: JSON Lines, read and written. The format is in README.md."""
import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Union

LIVE = "live"


class Malformed(ValueError):
    pass


@dataclass
class Turn:
    """One request: the messages that come before it, and the answer that stands in the history behind it."""
    messages: List[Dict[str, Any]]          # of user and tool, in order; new since the turn before
    answer: Union[str, Dict[str, Any]]      # LIVE, or the message that is put there
    max_tokens: int
    thinking: bool
    pause_s: float = 0.0                    # before the request: what the user or the tool took


@dataclass
class Conversation:
    name: str
    system: str = ""
    tools: List[Dict[str, Any]] = field(default_factory=list)
    turns: List[Turn] = field(default_factory=list)


def _need(ok, where, text):
    if not ok:
        raise Malformed(f"{where}: {text}")


def _answer(a, where):
    if a == LIVE:
        return LIVE
    _need(isinstance(a, dict), where, '"assistant" is "live" or an object with content, reasoning, tool_calls')
    extra = set(a) - {"content", "reasoning", "tool_calls"}
    _need(not extra, where, f"unknown key {sorted(extra)[:1]} in the answer")
    m = {"role": "assistant", "content": a.get("content", "")}
    if a.get("reasoning"):
        m["reasoning_content"] = a["reasoning"]
    for i, c in enumerate(a.get("tool_calls", [])):
        _need(isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("arguments", {}), dict), where,
              f'tool_calls[{i}] needs "name", and "arguments" as an object')
        m.setdefault("tool_calls", []).append({"type": "function", "function": {
            "name": c["name"], "arguments": json.dumps(c.get("arguments", {}), ensure_ascii=False)}})
    return m


def read(lines, where="transcript") -> List[Conversation]:
    """lines: of a file. Ids of recorded calls are made here: a tool message answers the calls before it in their order."""
    conversations, names = [], set()
    waiting, open_calls, defaults = [], [], {}
    for number, line in enumerate(lines, 1):
        at = f"{where}:{number}"
        if not line.strip():
            continue
        try:
            r = json.loads(line)
        except json.JSONDecodeError as e:
            raise Malformed(f"{at}: no JSON: {e}") from None
        _need(isinstance(r, dict), at, "a line is one object")
        kinds = [k for k in ("conversation", "user", "tool", "assistant") if k in r]
        _need(len(kinds) == 1, at, "a line has exactly one of conversation, user, tool, assistant")
        kind = kinds[0]
        known = {"conversation": {"system", "tools", "thinking", "max_tokens"}, "assistant": {"max_tokens", "thinking", "pause_s"}}
        extra = set(r) - {kind} - known.get(kind, set())
        _need(not extra, at, f"unknown key {sorted(extra)[:1]}")
        if kind == "conversation":
            _need(not waiting, at, "messages without an answer behind them: add an assistant line")
            _need(isinstance(r[kind], str) and r[kind] not in names, at, '"conversation" is a name that no other has')
            names.add(r[kind])
            conversations.append(Conversation(r[kind], r.get("system", ""), r.get("tools", [])))
            defaults = {"thinking": r.get("thinking", True), "max_tokens": r.get("max_tokens", 1024)}
            open_calls = []
            continue
        _need(conversations, at, "the first line begins a conversation")
        c = conversations[-1]
        if kind == "assistant":
            _need(waiting, at, "an answer to nothing: a user or tool line comes before it")
            answer = _answer(r[kind], at)
            turn = Turn(waiting, answer, r.get("max_tokens", defaults["max_tokens"]), r.get("thinking", defaults["thinking"]),
                        r.get("pause_s", 0.0))
            _need(isinstance(turn.max_tokens, int) and turn.max_tokens > 0, at, '"max_tokens" is a number above 0')
            open_calls = []
            if answer != LIVE:
                for i, call in enumerate(answer.get("tool_calls", [])):
                    call["id"] = f"call_{c.name}_{len(c.turns)}_{i}"
                    open_calls.append(call["id"])
            c.turns.append(turn)
            waiting = []
            continue
        _need(isinstance(r[kind], str), at, f'"{kind}" is a text')
        m = {"role": kind, "content": r[kind]}
        if kind == "tool":
            _need(c.turns, at, "a tool result before the first answer")
            if c.turns[-1].answer != LIVE:
                _need(open_calls, at, "a tool result that no call of the answer before waits for")
                m["tool_call_id"] = open_calls.pop(0)
        waiting.append(m)
    _need(not waiting, where, "messages without an answer at the end: add an assistant line")
    _need(conversations and all(c.turns for c in conversations), where, "a conversation without turns")
    return conversations


def load(paths) -> List[Conversation]:
    out, names = [], set()
    for path in paths:
        with open(path, encoding="utf-8") as f:
            for c in read(f, str(path)):
                _need(c.name not in names, str(path), f"conversation {c.name} is in another file too: rename one")
                names.add(c.name)
                out.append(c)
    return out


def line(record) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def all_live(conversations):
    for c in conversations:
        for t in c.turns:
            t.answer = LIVE
            for m in t.messages:
                m.pop("tool_call_id", None)
    return conversations


def make_fresh(conversations, word):
    """A word before all that the server could know. Tools come before the system text in the prompt."""
    for c in conversations:
        c.system = f"{word} {c.system}"
        for tool in c.tools[:1]:
            f = tool.get("function", tool)
            f["description"] = f"{word} {f.get('description', '')}"


def history(c: Conversation) -> List[Dict[str, Any]]:
    return [{"role": "system", "content": c.system}] if c.system else []


def for_calls(messages, calls: Optional[List[str]]):
    """A turn's messages behind a live answer. calls: ids of its calls. Each result answers the next call, and the last one the
    calls that are left; without calls there is nothing to answer, and a result comes as a message of the user."""
    left, out, last = list(calls or []), [], None
    for m in messages:
        if m["role"] != "tool":
            out.append(m)
        elif left:
            last = {**m, "tool_call_id": left.pop(0)}
            out.append(last)
        elif last is None:
            out.append({"role": "user", "content": m["content"]})
    if last is not None:
        at = out.index(last) + 1
        out[at:at] = [{**last, "tool_call_id": id_} for id_ in left]
    elif left:  # calls that the transcript has no result for
        out[:0] = [{"role": "tool", "content": "ok", "tool_call_id": id_} for id_ in left]
    return out

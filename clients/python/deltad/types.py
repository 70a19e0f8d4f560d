"""What comes back: the events of an answer, and an answer as a whole."""
import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

_REASONS = {1: "stop", 2: "tool_calls", 3: "length", 4: "time", 5: "cancelled"}


@dataclass
class Accepted:
    """The first event. generation: the session's turn counter."""
    request_id: str
    session_id: str
    generation: int
    seed: int
    prompt_tokens: int


@dataclass
class Queued:
    position: int  # requests before it


@dataclass
class Prefill:
    done: int
    total: int
    cached: int


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
class Token:
    """logprob: of the raw model; None if not asked for. top: (id, bytes, logprob) of the alternatives."""
    id: int
    bytes: bytes
    logprob: Optional[float]
    top: List[tuple] = field(default_factory=list)


@dataclass
class Finished:
    """The last event. reason: stop, tool_calls, length, time, cancelled, or "unknown" from a newer daemon."""
    reason: str
    seed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    matched_stop: str
    generation: int
    queue_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float
    total_s: float


@dataclass
class Reply:
    text: str = ""
    reasoning: str = ""
    tool_calls: List[ToolCall] = field(default_factory=list)
    tokens: List[Token] = field(default_factory=list)
    finished: Optional[Finished] = None
    reason: str = ""  # finished.reason; of Client.parse(), what it would have been

    def add(self, event):
        if isinstance(event, Text):
            self.text += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, ToolCall):
            self.tool_calls.append(event)
        elif isinstance(event, Token):
            self.tokens.append(event)
        elif isinstance(event, Finished):
            self.finished, self.reason = event, event.reason

    def as_message(self) -> Dict[str, Any]:
        """The assistant's message, to be put into the history. A cut call is no call."""
        m: Dict[str, Any] = {"role": "assistant", "content": self.text, "reasoning_content": self.reasoning}
        calls = [c for c in self.tool_calls if c.complete]
        if calls:
            m["tool_calls"] = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments_json}}
                               for c in calls]
        return m


def events_of(e, logprobs=False):
    """The events of a ChatEvent or GenerateEvent; none for a kind that this version does not know. logprobs: they were
    asked for."""
    kind = e.WhichOneof("event")
    v = getattr(e, kind) if kind else None
    if kind == "accepted":
        yield Accepted(v.request_id, v.session_id, v.generation, v.sampling.seed, v.prompt_tokens)
    elif kind == "queued":
        yield Queued(v.position)
    elif kind == "prefill":
        yield Prefill(v.done, v.total, v.cached)
    elif kind == "reasoning":
        yield Reasoning(v.text)
    elif kind == "text":
        yield Text(v.text)
    elif kind == "call_start":
        yield ToolCallStart(v.index, v.id, v.name)
    elif kind == "call_args":
        yield ToolCallArgs(v.index, v.json)
    elif kind == "call_end":
        yield call_of(v)
    elif kind == "tokens":
        for x in v.tokens:
            yield Token(x.token_id, x.token, x.logprob if logprobs else None, [(a.token_id, a.token, a.logprob) for a in x.top])
    elif kind == "finished":
        u, t = v.usage, v.timings
        yield Finished(_REASONS.get(v.reason, "unknown"), v.seed, u.prompt_tokens, u.cached_tokens, u.completion_tokens,
                       u.reasoning_tokens, v.matched_stop, v.generation, t.queue_ns * 1e-9, t.prefill_ns * 1e-9,
                       t.decode_ns * 1e-9, t.first_token_ns * 1e-9, t.total_ns * 1e-9)


def call_of(v):
    return ToolCall(v.index, v.id, v.name, v.arguments_json, v.state == 1)


def reason_name(reason):
    return _REASONS.get(reason, "unknown")

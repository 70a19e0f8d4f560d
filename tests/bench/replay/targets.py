"""Who is played against: deltad by gRPC, or an OpenAI-compatible server by HTTP. One object is one client's connection.

ask() sends a request and gives an Answer: the message, the server's counts, and this clock's time of each piece that
carried tokens. on_piece is called with those times as they come; if it returns True the request is cancelled.
"""
import http.client
import json
import pathlib
import sys
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "clients/python"))


class Failed(Exception):
    pass


@dataclass
class Answer:
    message: Dict[str, Any] = field(default_factory=dict)
    arrivals_s: List[float] = field(default_factory=list)
    total_s: float = 0.0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    server_first_s: Optional[float] = None
    reason: str = ""
    note: str = ""


class Grpc:
    sessions = True

    def __init__(self, address, timeout=600, bypass=False):
        try:
            import grpc
            import deltad
            from deltad import _requests, client, errors, types
        except ImportError as e:
            raise Failed(f"{e}: install grpcio, grpcio-tools and protobuf for {sys.executable} (Debian: python3-grpcio, "
                         "python3-grpc-tools, and /usr/bin/python3)") from None
        self.deltad, self.requests, self.stub, self.errors, self.types = deltad, _requests, client.stub, errors, types
        self.rpc_error, self.timeout, self.bypass = grpc.RpcError, timeout, bypass
        if address.startswith("unix:/") and not address.startswith("unix://"):
            address = "unix://" + address[5:]
        self.client = deltad.Client(address, timeout)
        # a connection of its own, as another program has
        self.client.close()
        self.client._channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)])

    def close(self):
        self.client.close()

    def describe(self):
        try:
            i = self.client.model_info()
        except self.deltad.DeltadError as e:
            raise Failed(f"{e}; is deltad running there?") from None
        return {"server": "deltad", "version": i.version, "model": i.name, "backend": i.backend, "quantization": i.quantization,
                "ctx_max": i.ctx_max, "max_sessions": i.max_sessions, "checkpoints": i.checkpoints}

    def cache_stats(self):
        c = self.client.stats().cache
        return {f.name: getattr(c, f.name) for f in c.DESCRIPTOR.fields}

    def ask(self, messages, tools, thinking, max_tokens, session="", preserve=None, ignore_eos=False, options=None, on_piece=None):
        q = self.requests.chat(messages, tools=None if session else tools, thinking=thinking, max_tokens=max_tokens, session_id=session,
                               preserve_thinking=preserve, ignore_eos=ignore_eos, include_tokens=True, **(options or {}))
        if self.bypass:
            q.cache.bypass = True
        reply, a, note = self.types.Reply(), Answer(), ""
        begin = time.perf_counter()
        call = self.stub(self.client._channel, "unary_stream", "InferenceService/Chat", "ChatEvent")(q, timeout=self.timeout)
        try:
            for e in call:
                now = time.perf_counter() - begin
                kind = e.WhichOneof("event")
                if kind == "tokens":  # text of the same tokens comes in events of its own
                    a.arrivals_s.append(now)
                    if on_piece and on_piece(begin + now):
                        call.cancel()
                        break
                    continue
                if kind == "finished":
                    note = e.finished.usage.cache_note
                for event in self.types.events_of(e):
                    reply.add(event)
        except self.rpc_error as e:
            raise Failed(str(self.errors.from_rpc(e))) from None
        a.total_s = time.perf_counter() - begin
        if reply.finished:
            f = reply.finished
            a.prompt, a.cached, a.completion, a.reasoning = f.prompt_tokens, f.cached_tokens, f.completion_tokens, f.reasoning_tokens
            a.server_first_s, a.reason, a.note = f.first_token_s, f.reason, note
        a.message = reply.as_message()
        return a

    def count(self, messages, preserve):
        """Tokens that these messages add to a conversation, with the beginning of the next answer. The last is of user or tool;
        the first may be an answer, whose head was in the prompt that asked for it."""
        q = self.deltad.message("deltad.v1.RenderPromptRequest")(omit_ids=True)
        before = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        q.chat.CopyFrom(self.requests.chat(before + messages, preserve_thinking=preserve))
        try:
            r = self.client._unary("InferenceService/RenderPrompt", q)
            text = r.text.encode()[r.spans[2].begin:].decode()
            if messages[0]["role"] == "assistant":
                text = text.removeprefix("<|im_start|>assistant\n")
            return len(self.client.tokenize(text))
        except self.deltad.DeltadError as e:
            raise Failed(str(e)) from None

    def create_session(self, messages, tools, thinking):
        try:
            return self.client.create_session(messages=messages, tools=tools, thinking=thinking)
        except self.deltad.DeltadError as e:
            raise Failed(str(e)) from None

    def rewind(self, session, n_messages):
        try:
            session.rewind(n_messages)
        except self.deltad.DeltadError as e:
            raise Failed(str(e)) from None

    def close_session(self, session):
        try:
            session.close()
        except self.deltad.DeltadError:
            pass  # the daemon may have ended it


class OpenAI:
    sessions = False

    def __init__(self, url, timeout=600, model="", key=""):
        u = urllib.parse.urlsplit(url if "//" in url else "http://" + url)
        if u.scheme not in ("http", "https") or not u.hostname:
            raise Failed(f"{url}: not http://HOST:PORT or https://HOST:PORT")
        self.kind = http.client.HTTPSConnection if u.scheme == "https" else http.client.HTTPConnection
        self.host, self.port, self.timeout = u.hostname, u.port, timeout
        path = u.path.rstrip("/")
        self.path = path if path.endswith("/v1") else path + "/v1"
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.model, self.connection = model, None

    def close(self):
        if self.connection:
            self.connection.close()
            self.connection = None

    def _send(self, method, path, body=None):
        """A kept connection may have been closed by the server meanwhile: one more try on a fresh one."""
        for last in (self.connection is None, True):
            try:
                if self.connection is None:
                    self.connection = self.kind(self.host, self.port, timeout=self.timeout)
                self.connection.request(method, self.path + path, body, self.headers)
                return self.connection.getresponse()
            except (OSError, http.client.HTTPException) as e:
                self.close()
                if last:
                    raise Failed(f"http://{self.host}:{self.port or ''}: {e or type(e).__name__}; is a server running there?") from None

    def describe(self):
        r = self._send("GET", "/models")
        body = r.read()
        if r.status == 200 and not self.model:
            try:
                self.model = json.loads(body)["data"][0]["id"]
            except (ValueError, KeyError, IndexError, TypeError):
                pass
        if not self.model:
            raise Failed(f"{self.path}/models names no model (status {r.status}): say it with --model")
        return {"server": "openai", "url": f"{self.host}:{self.port or ''}{self.path}", "model": self.model}

    def cache_stats(self):
        return {}

    def count(self, messages, preserve):
        return None

    def ask(self, messages, tools, thinking, max_tokens, session="", preserve=None, ignore_eos=False, options=None, on_piece=None):
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "stream": True,
                "stream_options": {"include_usage": True}, **(options or {})}
        kwargs = {"enable_thinking": thinking, **({} if preserve is None else {"preserve_thinking": preserve})}
        body["chat_template_kwargs"] = kwargs
        if tools:
            body["tools"] = tools
        if ignore_eos:
            body["ignore_eos"] = True
        payload = json.dumps(body, ensure_ascii=False).encode()
        a, text, reasoning, calls, usage, found = Answer(), [], [], {}, {}, None
        begin = time.perf_counter()
        r = self._send("POST", "/chat/completions", payload)
        if r.status != 200:
            raise Failed(f"HTTP {r.status}: {r.read(2000).decode(errors='replace')}")
        ended = False
        try:
            while not ended:
                line = r.readline()
                if not line:
                    break
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    ended = True
                    break
                now = time.perf_counter() - begin
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Failed(f"the server says in the stream: {chunk['error']}")
                usage = chunk.get("usage") or usage
                found = (chunk.get("timings") or {}).get("cache_n", found)  # of llama.cpp
                carried = False
                for choice in chunk.get("choices", []):
                    d = choice.get("delta") or {}
                    thought = d.get("reasoning_content") or d.get("reasoning") or ""
                    text.append(d.get("content") or "")
                    reasoning.append(thought)
                    carried = carried or bool(d.get("content") or thought or d.get("tool_calls"))
                    for c in d.get("tool_calls") or []:
                        k = calls.setdefault(c.get("index", 0), {"id": "", "name": "", "arguments": ""})
                        f = c.get("function") or {}
                        k["id"], k["name"] = c.get("id") or k["id"], f.get("name") or k["name"]
                        k["arguments"] += f.get("arguments") or ""
                    a.reason = choice.get("finish_reason") or a.reason
                if carried:
                    a.arrivals_s.append(now)
                    if on_piece and on_piece(begin + now):
                        self.close()  # which is how a request is cancelled
                        break
        except (OSError, http.client.HTTPException, ValueError) as e:
            self.close()
            raise Failed(f"the stream broke: {e or type(e).__name__}") from None
        except Failed:
            self.close()
            raise
        if ended:
            r.read()
        elif self.connection:
            self.close()
        a.total_s = time.perf_counter() - begin
        a.prompt, a.completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        told = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        found = found if told is None else told
        a.cached = min(found or 0, a.prompt)
        if found is None:
            a.note = "the server does not tell cached tokens (vLLM: --enable-prompt-tokens-details, SGLang: --enable-cache-report)"
        a.reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
        a.message = {"role": "assistant", "content": "".join(text)}
        if any(reasoning):
            a.message["reasoning_content"] = "".join(reasoning)
        if calls and a.reason != "length":  # a cut call is no call
            a.message["tool_calls"] = [{"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                                       for _, c in sorted(calls.items())]
        return a

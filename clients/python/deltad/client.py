"""The client that waits: Client and Session."""
import contextlib
from typing import Iterator, List

import grpc

from . import _requests as requests
from ._proto import message
from .errors import from_rpc
from .types import Reply, call_of, events_of, reason_name

ADDRESS = "unix:///run/deltad/deltad.sock"


def _serialize(m):
    return m.SerializeToString()


def stub(channel, kind, method, answer):
    """kind: "unary_unary" or "unary_stream"."""
    return getattr(channel, kind)(f"/deltad.v1.{method}", _serialize, message(f"deltad.v1.{answer}").FromString)


class Client:
    """address: "unix:///run/deltad/deltad.sock" or "127.0.0.1:PORT"; timeout: seconds for the calls that take none of
    their own, and None for no limit."""

    def __init__(self, address=ADDRESS, timeout=None):
        self._channel = grpc.insecure_channel(address)
        self._timeout = timeout

    def close(self):
        self._channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _unary(self, method, request, timeout=None):
        answer = type(request).DESCRIPTOR.name.removesuffix("Request") + "Response"
        try:
            return stub(self._channel, "unary_unary", method, answer)(request, timeout=timeout or self._timeout)
        except grpc.RpcError as e:
            raise from_rpc(e) from None

    def _stream(self, method, request, answer, timeout, logprobs=False):
        call = stub(self._channel, "unary_stream", method, answer)(request, timeout=timeout)
        try:
            for e in call:
                yield from events_of(e, logprobs)
        except grpc.RpcError as e:
            raise from_rpc(e) from None
        finally:
            call.cancel()

    # ---- answers

    def chat(self, messages, timeout=None, **options) -> Iterator:
        """Events of one answer: Accepted first, Finished last. Leaving the loop or closing the iterator cancels.

        messages: dictionaries in OpenAI's form, or one text. options: tools, tool_choice, parallel_tool_calls,
        response_format (all in OpenAI's form), thinking, budget_tokens, preserve_thinking; temperature, top_p, top_k, min_p,
        presence_penalty, frequency_penalty, repetition_penalty, seed, logit_bias; max_tokens, min_tokens, stop,
        stop_token_ids, ignore_eos; logprobs, top_logprobs, include_tokens, include_prefill, include_queued; priority,
        max_queue and max_wall_time in seconds; request_id; cache_salt, cache_bypass, checkpoint_messages; detach and
        idempotency_key: the answer outlives the call, see resume()."""
        q = requests.chat(messages, **options)
        return self._stream("InferenceService/Chat", q, "ChatEvent", timeout, q.logprobs.enabled)

    def ask(self, messages, **options) -> Reply:
        """The whole answer; options as chat()."""
        reply = Reply()
        for e in self.chat(messages, **options):
            reply.add(e)
        return reply

    def generate(self, prompt, timeout=None, **options) -> Iterator:
        """Events of a continuation, without template or parser. prompt: a text, or a list of token ids. options as
        chat()'s that are not about conversations, and plain_text: "<|im_end|>" and the like are ordinary text."""
        q = requests.generate(prompt, **options)
        return self._stream("InferenceService/Generate", q, "GenerateEvent", timeout, q.logprobs.enabled)

    def resume(self, request_id, from_seq=0, logprobs=False, timeout=None) -> Iterator:
        """Events of a chat with detach or an idempotency_key, from number from_seq on. logprobs: it asked for them."""
        q = message("deltad.v1.ResumeRequest")(request_id=request_id, from_seq=from_seq)
        return self._stream("InferenceService/Resume", q, "ChatEvent", timeout, logprobs)

    def cancel(self, request_id):
        self._unary("InferenceService/Cancel", message("deltad.v1.CancelRequest")(request_id=request_id))

    # ---- sessions

    @contextlib.contextmanager
    def session(self, **options):
        """A Session that is closed at the end of the block. options: tools, name, messages, thinking, ctx_tokens,
        idle_timeout in seconds."""
        s = self.create_session(**options)
        try:
            yield s
        except BaseException:
            with contextlib.suppress(Exception):  # the block's own error is the one to be told
                s.close()
            raise
        s.close()

    def create_session(self, **options) -> "Session":
        q = requests.create_session(**options)
        return Session(self, self._unary("SessionService/CreateSession", q).session.id)

    def import_session(self, export) -> "Session":
        """A new session that goes on from an export of this or another daemon."""
        q = message("deltad.v1.CreateSessionRequest")(name=export.name, tools=export.tools, messages=export.messages,
                                                      reasoning=export.reasoning)
        return Session(self, self._unary("SessionService/CreateSession", q).session.id)

    def restore(self, name) -> "Session":
        """A new session that goes on, bit for bit, from a save of this user's (Session.save)."""
        q = message("deltad.v1.RestoreSessionRequest")(name=name)
        return Session(self, self._unary("SessionService/RestoreSession", q).session.id)

    def saves(self) -> list:
        """[deltad.v1.Save] of this user."""
        return list(self._unary("SessionService/ListSaves", message("deltad.v1.ListSavesRequest")()).saves)

    def delete_save(self, name):
        self._unary("SessionService/DeleteSave", message("deltad.v1.DeleteSaveRequest")(name=name))

    def sessions(self, all_users=False) -> list:
        """[deltad.v1.Session]; all_users is for administrators."""
        return list(self._unary("SessionService/ListSessions", message("deltad.v1.ListSessionsRequest")(all_users=all_users)).sessions)

    # ---- text

    def render(self, messages, timeout=None, **options):
        """(text, ids) of the prompt that chat() would send to the model; options as chat()."""
        q = message("deltad.v1.RenderPromptRequest")(chat=requests.chat(messages, **options))
        a = self._unary("InferenceService/RenderPrompt", q, timeout)
        return a.text, list(a.ids)

    def parse(self, output, timeout=None, **options) -> Reply:
        """What chat() would have made of the model's output, a text or its pieces. options: tools, tool_choice, thinking
        (the prompt left an open think block), cut (the token limit ended it)."""
        a = self._unary("InferenceService/ParseOutput", requests.parse(output, **options), timeout)
        return Reply(a.content, a.reasoning, [call_of(c) for c in a.calls], reason=reason_name(a.reason))

    def tokenize(self, text, plain_text=False) -> List[int]:
        q = message("deltad.v1.TokenizeRequest")(text=text, plain_text=plain_text)
        return list(self._unary("InferenceService/Tokenize", q).ids)

    def detokenize(self, ids, skip_special=False) -> str:
        q = message("deltad.v1.DetokenizeRequest")(ids=ids, skip_special=skip_special)
        return self._unary("InferenceService/Detokenize", q).text

    # ---- the daemon

    def model_info(self):
        """deltad.v1.GetModelInfoResponse"""
        return self._unary("ModelService/GetModelInfo", message("deltad.v1.GetModelInfoRequest")())

    def stats(self):
        """deltad.v1.GetStatsResponse"""
        return self._unary("ModelService/GetStats", message("deltad.v1.GetStatsRequest")())

    def is_ready(self) -> bool:
        """The model is loaded and the daemon takes requests. False also if nobody listens."""
        call = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            return call(b"", timeout=self._timeout or 5) == b"\x08\x01"  # status: SERVING
        except grpc.RpcError:
            return False


class Session:
    """A conversation whose state stays with the daemon: every turn sends only what is new."""

    def __init__(self, client, id):
        self.client, self.id = client, id

    def chat(self, messages, **options) -> Iterator:
        return self.client.chat(messages, session_id=self.id, **options)

    def ask(self, messages, **options) -> Reply:
        return self.client.ask(messages, session_id=self.id, **options)

    def append(self, messages):
        """Computes messages now; the answer is asked for later. deltad.v1.AppendMessagesResponse"""
        q = message("deltad.v1.AppendMessagesRequest")(session_id=self.id)
        requests.add_messages(q, messages)
        return self.client._unary("SessionService/AppendMessages", q)

    def fork(self, count=1, n_messages=None, name="") -> list:
        """[Session]: new ones that begin as this one is, or as its first n_messages; nothing is computed again."""
        q = message("deltad.v1.ForkSessionRequest")(session_id=self.id, count=count, name=name)
        if n_messages is not None:
            q.n_messages = n_messages
        return [Session(self.client, s.id) for s in self.client._unary("SessionService/ForkSession", q).sessions]

    def rewind(self, n_messages):
        """Takes back all but the first n_messages. deltad.v1.Session"""
        q = message("deltad.v1.RewindSessionRequest")(session_id=self.id, n_messages=n_messages)
        return self.client._unary("SessionService/RewindSession", q).session

    def pin(self, unpin=False):
        """Keeps it: it is not closed for resting, and makes room after those that are not pinned. deltad.v1.Session"""
        q = message("deltad.v1.PinSessionRequest")(session_id=self.id, unpin=unpin)
        return self.client._unary("SessionService/PinSession", q).session

    def save(self, name):
        """Conversation and state to a file of this user's on the daemon's disk; Client.restore(name) goes on from there.
        deltad.v1.SaveSessionResponse"""
        q = message("deltad.v1.SaveSessionRequest")(session_id=self.id, name=name)
        return self.client._unary("SessionService/SaveSession", q)

    def export(self, with_sampled=False):
        """The conversation, to be carried away: deltad.v1.SessionExport. with_sampled: the answers as they were sampled,
        too. Client.import_session() goes on with it."""
        q = message("deltad.v1.ExportSessionRequest")(session_id=self.id, with_sampled=with_sampled)
        call = stub(self.client._channel, "unary_stream", "SessionService/ExportSession", "ExportSessionResponse")
        try:
            return message("deltad.v1.SessionExport").FromString(
                b"".join(e.piece for e in call(q, timeout=self.client._timeout)))
        except grpc.RpcError as e:
            raise from_rpc(e) from None

    def get(self, with_messages=False):
        """deltad.v1.GetSessionResponse"""
        q = message("deltad.v1.GetSessionRequest")(session_id=self.id, with_messages=with_messages)
        return self.client._unary("SessionService/GetSession", q)

    def close(self):
        self.client._unary("SessionService/CloseSession", message("deltad.v1.CloseSessionRequest")(session_id=self.id))

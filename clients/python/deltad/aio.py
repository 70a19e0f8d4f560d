"""The client for asyncio: AsyncClient. Requests, events and errors are those of Client.

    async with AsyncClient() as c:
        async for event in c.chat("Hello"):
            ...
"""
import grpc

from . import _requests as requests
from ._proto import message
from .client import ADDRESS, stub
from .errors import from_rpc
from .types import Reply, events_of


class AsyncClient:
    def __init__(self, address=ADDRESS):
        self._channel = grpc.aio.insecure_channel(address)

    async def close(self):
        await self._channel.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def _stream(self, method, request, answer, timeout, logprobs=False):
        call = stub(self._channel, "unary_stream", method, answer)(request, timeout=timeout)
        try:
            async for e in call:
                for event in events_of(e, logprobs):
                    yield event
        except grpc.RpcError as e:
            raise from_rpc(e) from None
        finally:
            call.cancel()

    def chat(self, messages, timeout=None, **options):
        """As Client.chat(), for `async for`. Cancelling the task cancels the request."""
        q = requests.chat(messages, **options)
        return self._stream("InferenceService/Chat", q, "ChatEvent", timeout, q.logprobs.enabled)

    def resume(self, request_id, from_seq=0, logprobs=False, timeout=None):
        q = message("deltad.v1.ResumeRequest")(request_id=request_id, from_seq=from_seq)
        return self._stream("InferenceService/Resume", q, "ChatEvent", timeout, logprobs)

    def generate(self, prompt, timeout=None, **options):
        q = requests.generate(prompt, **options)
        return self._stream("InferenceService/Generate", q, "GenerateEvent", timeout, q.logprobs.enabled)

    async def ask(self, messages, **options) -> Reply:
        reply = Reply()
        async for e in self.chat(messages, **options):
            reply.add(e)
        return reply

    async def unary(self, method, request, timeout=None):
        """Any call with one answer, by its name: ("SessionService/CreateSession", a message)."""
        answer = type(request).DESCRIPTOR.name.removesuffix("Request") + "Response"
        try:
            return await stub(self._channel, "unary_unary", method, answer)(request, timeout=timeout)
        except grpc.RpcError as e:
            raise from_rpc(e) from None

    async def cancel(self, request_id):
        await self.unary("InferenceService/Cancel", message("deltad.v1.CancelRequest")(request_id=request_id))

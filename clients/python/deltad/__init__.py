"""A client of deltad over gRPC.

    with Client() as c:
        for event in c.chat("Hello"):
            if isinstance(event, Text):
                print(event.text, end="")

Messages and tools are dictionaries in OpenAI's form (content as text or parts; tool_calls, tool_call_id,
reasoning_content). Answers are dataclasses (types.py). Errors are DeltadError; what is wrong before anything is sent
is a ValueError or TypeError. A Client may be used from several threads. AsyncClient is the same for asyncio. What has no
method here is in the messages: message("deltad.v1.ChatRequest") is the class of one.
"""
from ._proto import message
from .aio import AsyncClient
from .client import Client, Session
from .errors import DeltadError
from .types import (Accepted, Finished, Prefill, Queued, Reasoning, Reply, Text, Token, ToolCall, ToolCallArgs,
                    ToolCallStart)

__all__ = ["Client", "AsyncClient", "Session", "DeltadError", "Accepted", "Queued", "Prefill", "Reasoning", "Text", "ToolCallStart",
           "ToolCallArgs", "ToolCall", "Token", "Finished", "Reply", "message"]

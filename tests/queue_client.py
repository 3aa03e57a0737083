"""`run(server, prompt)`: queue one API prompt and wait; the client is the one that ./run uses."""

import asyncio

from slipstream.bench.queue_client import (
    Prompt,
    PromptFailed,
    PromptInterrupted,
    PromptRejected,
    QueueClient,
    Result,
)
from slipstream.bench.server import Server

__all__ = [
    "Prompt",
    "PromptFailed",
    "PromptInterrupted",
    "PromptRejected",
    "QueueClient",
    "Result",
    "run",
]


def run(server: Server, prompt: Prompt, *, timeout_s: float = 120) -> Result:
    """The finished prompt. Raises PromptRejected, PromptFailed, PromptInterrupted."""

    async def queue() -> Result:
        async with QueueClient(server.address, timeout_s=timeout_s) as client:
            return await client.run(prompt)

    return asyncio.run(queue())

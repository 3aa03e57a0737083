"""Queue an API prompt and wait for its end over the websocket, as API users do. Needs aiohttp.

    async with QueueClient(address) as client:
        result = await client.run(prompt, on_step=print)

The socket opens before the prompt is posted: messages sent before that are lost.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Prompt = dict[str, Any]
_PROGRESS_TEXT = 3  # kind of a binary frame: text for a node; the others are previews


class PromptRejected(Exception):  # noqa: N818 - what happened, not an error of ours
    """HTTP 400: nothing ran. node_errors: node id -> {"class_type", "errors": [...]}."""

    def __init__(self, body: dict[str, Any]):
        self.body = body
        self.node_errors: dict[str, Any] = body.get("node_errors") or {}
        super().__init__(json.dumps(body)[:2000])


class PromptFailed(Exception):  # noqa: N818
    """A node raised: its type, the message that users see, the traceback."""

    def __init__(self, event: dict[str, Any]):
        self.node_type: str = event["node_type"]
        self.message: str = event["exception_message"]
        self.traceback = "".join(event["traceback"])
        super().__init__(f"{self.node_type}: {self.message}")


class PromptInterrupted(Exception):  # noqa: N818
    """Somebody interrupted the prompt."""


@dataclass
class Result:
    """A finished prompt. outputs: node id -> what it shows ("ui"); cached: ids that did not run;
    progress_text: node id -> the last text it sent while running; steps: (node id, value, max)."""

    prompt_id: str
    seconds: float = 0.0
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    progress_text: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, int, int]] = field(default_factory=list)


class QueueClient:
    """One websocket to a server; `run` may be called again and again, one prompt at a time."""

    def __init__(self, address: str, *, timeout_s: float = 120):
        self.address, self.timeout_s, self.client_id = address, timeout_s, uuid.uuid4().hex

    async def __aenter__(self) -> "QueueClient":
        self._http = aiohttp.ClientSession(f"http://{self.address}")
        try:
            self._socket = await self._http.ws_connect(
                f"/ws?clientId={self.client_id}", max_msg_size=0
            )
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._socket.close()
        await self._http.close()

    async def run(
        self, prompt: Prompt, *, on_step: Callable[[str, int, int], None] | None = None
    ) -> Result:
        """Queue `prompt` and wait for its end. on_step(node id, steps done, steps in all).

        Raises PromptRejected, PromptFailed, PromptInterrupted; TimeoutError after timeout_s
        without any message.
        """
        started = time.monotonic()
        result = Result(await self._post(prompt))
        while True:
            message = await asyncio.wait_for(self._socket.receive(), self.timeout_s)
            if message.type == aiohttp.WSMsgType.BINARY:
                _take_text(message.data, result)
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ConnectionError(f"ComfyUI closed the connection during {result.prompt_id}")
            event = json.loads(message.data)
            if event.get("data", {}).get("prompt_id") != result.prompt_id:
                continue
            num_steps = len(result.steps)
            if _take_event(event["type"], event["data"], result):
                result.seconds = time.monotonic() - started
                return result
            if on_step is not None and len(result.steps) > num_steps:
                on_step(*result.steps[-1])

    async def _post(self, prompt: Prompt) -> str:
        body = {"prompt": prompt, "client_id": self.client_id}
        async with self._http.post("/prompt", json=body) as reply:
            answer = await reply.json()
            if reply.status != 200:
                raise PromptRejected(answer)
            return answer["prompt_id"]


def _take_event(kind: str, event: dict[str, Any], result: Result) -> bool:
    """Note one message of our prompt; True when it is the last one."""
    if kind == "executed":
        result.outputs[event["node"]] = event["output"]
    elif kind == "execution_cached":
        result.cached = list(event["nodes"])
    elif kind == "progress":
        result.steps.append((event["node"], event["value"], event["max"]))
    elif kind == "execution_error":
        raise PromptFailed(event)
    elif kind == "execution_interrupted":
        raise PromptInterrupted(f"prompt {result.prompt_id} was interrupted")
    return kind == "execution_success"


def _take_text(frame: bytes, result: Result) -> None:
    """A frame of progress text: kind, length of the node id (4 bytes each), node id, text."""
    if int.from_bytes(frame[:4], "big") != _PROGRESS_TEXT:
        return
    end = 8 + int.from_bytes(frame[4:8], "big")
    result.progress_text[frame[8:end].decode()] = frame[end:].decode()

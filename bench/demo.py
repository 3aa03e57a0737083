"""The full demo of `./run`: a private ComfyUI server, one prompt, the report. Runs in its Python.

Output goes to output/ in the pack; the server's own folder is thrown away unless --keep is given.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import demo_models
from .launch import MODELS
from .progress import Progress
from .server import Server, ServerError, free_port, is_port_free
from .setup_env import OWN, PACK_ROOT, SetupError

PROMPT = PACK_ROOT / "workflows" / "api" / "quickstart.json"
DEMO_PACK = PACK_ROOT / "bench" / "demo_pack"
OUTPUT = PACK_ROOT / "output"
USUAL_PORT = 8188
_READY_TIMEOUT_S = 300


def run(options: argparse.Namespace) -> int:
    """Start, sample, report, stop; with --serve wait for Ctrl-C before the last. The exit code."""
    comfyui = Path(options.comfyui)
    port = pick_port(options)
    models = demo_folder(comfyui)
    cpu = options.cpu or not has_gpu()
    print(f"Starting ComfyUI on 127.0.0.1:{port}, {'on the CPU' if cpu else 'with the GPU'}")
    with base_folder(options.keep) as base:
        server = Server(
            comfyui,
            packs={"ComfyUI-Slipstream": PACK_ROOT, "slipstream-demo": DEMO_PACK},
            models=models,
            port=port,
            base=base,
            cpu=cpu,
            ready_timeout_s=_READY_TIMEOUT_S,
        )
        try:
            with server:
                print(f"Ready after {server.ready_s:.0f} s", flush=True)
                show(server, sample(server, options.steps))
                if options.serve:
                    serve(server)
        except ServerError as error:
            raise SetupError(str(error)) from error
    return 0


def pick_port(options: argparse.Namespace) -> int:
    """--port if it is free; else with --serve ComfyUI's usual one if free; else any."""
    if options.port is not None:
        if not is_port_free(options.port):
            raise SetupError(
                f"Port {options.port} is in use: choose another with --port, or leave --port out"
            )
        return options.port
    return USUAL_PORT if options.serve and is_port_free(USUAL_PORT) else free_port()


def demo_folder(comfyui: Path) -> Path:
    """The demo models, written once per version of demo_models.py and of the trained weights."""
    digest = hashlib.sha256(Path(demo_models.__file__).read_bytes())
    digest.update((demo_models.WEIGHTS / demo_models.FLUX).read_bytes())
    folder = OWN / f"demo-models-{digest.hexdigest()[:8]}"
    if not folder.is_dir():
        print("Laying out the demo models", flush=True)
        shutil.rmtree(folder.with_name(folder.name + ".part"), ignore_errors=True)
        # A process of its own: ComfyUI's modules need 1 GB that the server will want.
        command = [sys.executable, str(PACK_ROOT / "run"), "--part", MODELS]
        command += ["--comfyui", str(comfyui), "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not folder.is_dir():
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SetupError(f"The demo models cannot be made with {comfyui}: {said}")
    return folder


def has_gpu() -> bool:
    """Whether this Python's torch sees a GPU that ComfyUI would use."""
    import torch

    xpu = getattr(torch, "xpu", None)
    mps = torch.backends.mps.is_available()
    return torch.cuda.is_available() or mps or (xpu is not None and xpu.is_available())


@contextlib.contextmanager
def base_folder(keep: bool) -> Iterator[Path]:
    """The server's base directory; kept ones are named at the end."""
    if keep:
        OWN.mkdir(exist_ok=True)
        kept = Path(tempfile.mkdtemp(prefix="server-", dir=OWN))
        try:
            yield kept
        finally:
            print(f"Kept: {kept} (server.log, output, user)")
    else:
        with tempfile.TemporaryDirectory(prefix="slipstream-run-") as folder:
            yield Path(folder)


def sample(server: Server, num_steps: int | None) -> dict[str, dict[str, Any]]:
    """Queue the demo prompt with a line of progress; output of the nodes by class."""
    from .queue_client import PromptFailed, PromptInterrupted, PromptRejected, QueueClient

    prompt = json.loads(PROMPT.read_text(encoding="utf-8"))
    for node in prompt.values():
        if node["class_type"] == "KSampler" and num_steps is not None:
            node["inputs"]["steps"] = num_steps

    async def queue(progress: Progress) -> Any:
        async with QueueClient(server.address, timeout_s=_READY_TIMEOUT_S) as client:
            return await client.run(prompt, on_step=lambda _, n, most: progress.show(n, most))

    try:
        with Progress("Sampling") as progress:
            result = asyncio.run(queue(progress))
    except PromptRejected as error:
        raise SetupError(f"ComfyUI refused {PROMPT.name}: {error}") from error
    except PromptFailed as error:
        raise SetupError(f"{error.node_type} failed: {error.message}\n{error.traceback}") from error
    except PromptInterrupted as error:
        raise SetupError(str(error)) from error
    except (ConnectionError, TimeoutError) as error:
        raise SetupError(f"ComfyUI does not answer any more:\n{server.log_tail()}") from error
    return {prompt[node]["class_type"]: out for node, out in result.outputs.items()}


def show(server: Server, outputs: dict[str, dict[str, Any]]) -> None:
    """Print the report; save its picture, its JSON and what was sampled under output/."""
    report = outputs["SlipstreamReport"]
    print("\n" + report["text"][0] + "\n")
    OUTPUT.mkdir(exist_ok=True)
    sampled = OUTPUT / "slipstream-demo.png"
    sampled.write_bytes(download(server, outputs["SaveImage"]["images"][0]))
    print(f"What was sampled, plain and with Slipstream: {sampled}")
    picture = OUTPUT / "slipstream-report.png"
    picture.write_bytes(download(server, report["images"][0]))
    print(f"The report as a picture: {picture}")
    if "PreviewAny" in outputs:
        text = OUTPUT / "slipstream-report.json"
        text.write_text(outputs["PreviewAny"]["text"][0] + "\n", encoding="utf-8")
        print(f"The report as JSON:      {text}")


def download(server: Server, image: dict[str, str]) -> bytes:
    """An image that a node shows."""
    query = urllib.parse.urlencode(
        {"filename": image["filename"], "subfolder": image["subfolder"], "type": image["type"]}
    )
    with urllib.request.urlopen(f"http://{server.address}/view?{query}", timeout=30) as reply:
        return reply.read()


def serve(server: Server) -> None:
    """Wait until Ctrl-C, or until the server ends by itself."""
    print(f"\nComfyUI is at http://{server.address} (Ctrl-C stops it).")
    print("Workflow > Browse Templates > ComfyUI-Slipstream has this pack's workflows.", flush=True)
    assert server.process is not None
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("\nStopping ComfyUI")
        return
    raise SetupError(f"ComfyUI ended by itself:\n{server.log_tail()}")

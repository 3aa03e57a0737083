"""Sequence parallel against one device, through a private ComfyUI server: seconds per step.

    python bench parallel                                    ranks of one CPU thread each, small Wan
    python bench parallel --devices cuda:0,cuda:1 --model wan-1.3b            GPUs, random weights
    python bench parallel --devices cuda:0,cuda:1 --prompt X.json --models FOLDER  your own workflow

Sides take turns in one server; a ratio is a median of paired ratios. An own prompt is an API prompt
with one SlipstreamSequenceParallel node. On a CPU every rank has one thread, so the server has too.
"""

import argparse
import asyncio
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .environment import environment
from .paired import AGAIN, BASELINE, noise_band, ratio, take_turns, verdict
from .parallel_page import parallel_page
from .server import Server
from .setup_env import PACK_ROOT, SetupError, find_comfyui

OUTPUT = PACK_ROOT / "output" / "bench"
COMMAND = "python bench parallel --out docs/benchmarks"
NODE = "SlipstreamSequenceParallel"
# name -> the network, and the latent's width, height and frames (in pixels)
MODELS: dict[str, tuple[dict[str, int], tuple[int, int, int]]] = {
    "wan-small": ({"dim": 512, "ffn_dim": 2048, "num_heads": 4, "num_layers": 3}, (512, 512, 13)),
    "wan-1.3b": (
        {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, (832, 480, 81)
    ),
}  # fmt: skip
CPU_SIDES = ("cpu,cpu", "cpu,cpu,cpu,cpu")
GOALS = {"cpu,cpu": 1.7, "cpu,cpu,cpu,cpu": 2.8}
_FILE = "slipstream_bench_wan.safetensors"
_TEXT_DIM = 1024  # core's LotusConditioning gives [1, 2, 1024]

Json = dict[str, Any]


def wan_prompt(size: tuple[int, int, int], steps: int) -> Json:
    """A prompt of core nodes around ours."""
    width, height, frames = size
    return {
        "model": _node("UNETLoader", unet_name=_FILE, weight_dtype="default"),
        "parallel": _node(NODE, model=["model", 0], workers=1, devices=""),
        "text": _node("LotusConditioning"),
        "latent": _node(
            "EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=1
        ),
        "sampler": _node(
            "KSampler", model=["parallel", 0], positive=["text", 0], negative=["text", 0],
            latent_image=["latent", 0], seed=0, steps=steps, cfg=1.0, sampler_name="euler",
            scheduler="simple", denoise=1.0,
        ),
        "report": _node("SlipstreamReport", latent=["sampler", 0], model=["parallel", 0]),
        "json": _node("PreviewAny", source=["report", 3]),
    }  # fmt: skip


def _node(class_type: str, **inputs: Any) -> Json:
    return {"class_type": class_type, "inputs": inputs}


def side_prompt(prompt: Json, devices: str, seed: int) -> Json:
    """The prompt with these devices ("" = one) and this seed."""
    found = copy.deepcopy(prompt)
    for node in found.values():
        if node["class_type"] == NODE:
            workers = 0 if devices else 1
            node["inputs"].update(workers=workers, devices=devices, timeout_s=600, cfg=1)
        for name in ("seed", "noise_seed"):
            if name in node["inputs"]:
                node["inputs"][name] = seed
    return found


def seconds_per_step(server: Server, prompt: Json) -> tuple[float, Json]:
    """Of all steps but the first, as the queue's messages come; and the outputs."""
    from .queue_client import QueueClient

    times: list[float] = []

    async def queue() -> Json:
        async with QueueClient(server.address, timeout_s=3600) as client:
            run = await client.run(prompt, on_step=lambda *_: times.append(time.perf_counter()))
            return run.outputs

    outputs = asyncio.run(queue())
    if len(times) < 2:
        raise SetupError("The prompt must sample two steps or more")
    return (times[-1] - times[0]) / (len(times) - 1), outputs


def measure(server: Server, prompt: Json, devices: Sequence[str], num_rounds: int) -> list[Json]:
    """One row per side: ratio to one device, and where the time of its latest run went."""
    reports: dict[str, Json] = {}

    def side(name: str) -> Callable[[int], float]:
        def run(number: int) -> float:
            where = "" if name in (BASELINE, AGAIN) else name
            seconds, outputs = seconds_per_step(server, side_prompt(prompt, where, side.seed))
            side.seed += 1  # type: ignore[attr-defined]
            if "json" in outputs:
                reports[name] = json.loads(outputs["json"]["text"][0]).get("parallel", {})
            print(f"round {number + 1}: {name:24} {seconds:8.3f} s per step", flush=True)
            return seconds

        return run

    side.seed = 1  # type: ignore[attr-defined]
    for name in devices:  # workers start, models load, caches warm
        side(name)(-1)
    seconds = take_turns({n: side(n) for n in (BASELINE, AGAIN, *devices)}, num_rounds)
    band = noise_band(ratio(seconds[BASELINE], seconds[AGAIN]))
    rows = []
    for name in devices:
        found = ratio(seconds[BASELINE], seconds[name])
        rows.append({
            "devices": name,
            "seconds_per_step": [round(s, 4) for s in seconds[name]],
            "one_device": [round(s, 4) for s in seconds[BASELINE]],
            "speed": found.to_json(),
            "noise": [round(edge, 4) for edge in band],
            "verdict": verdict(found.median, band),
            "goal": GOALS.get(name),
            "report": reports.get(name, {}),
        })  # fmt: skip
    return rows


def write_model(comfyui: Path, folder: Path, model: str) -> None:
    """A Wan of random weights that ComfyUI's loader accepts, in <folder>/diffusion_models."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ops
    import torch
    from comfy.ldm.wan.model import WanModel
    from safetensors.torch import save_file

    from .demo_models import _weights

    sizes, _ = MODELS[model]
    dtype = torch.float32 if model == "wan-small" else torch.bfloat16
    network = WanModel(
        model_type="t2v", in_dim=16, out_dim=16, text_dim=_TEXT_DIM, **sizes,
        dtype=dtype, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    place = folder / "diffusion_models"
    place.mkdir(parents=True, exist_ok=True)
    config = {"config": json.dumps({"transformer": {"text_dim": _TEXT_DIM}})}
    weights = {name: value.to(dtype) for name, value in _weights(network, 1).items()}
    save_file(weights, place / _FILE, metadata=config)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--devices", action="append", help="a side; may be given several times")
    parser.add_argument("--model", choices=sorted(MODELS), default="wan-small")
    parser.add_argument("--prompt", type=Path, help="an API prompt instead of the random Wan")
    parser.add_argument("--models", type=Path, help="models folder of --prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        raise SetupError("ComfyUI not found: set COMFYUI_PATH to a ComfyUI checkout")
    if options.write is not None:
        write_model(comfyui, options.write, options.model)
        return 0
    devices = options.devices or list(CPU_SIDES)
    cpu = all(name.startswith("cpu") for name in devices)
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as temporary:
        models, prompt = options.models, wan_prompt(MODELS[options.model][1], options.steps)
        if options.prompt is not None:
            prompt = json.loads(options.prompt.read_text("utf-8"))
        else:
            models = Path(temporary)
            command = [sys.executable, str(PACK_ROOT / "bench"), "parallel", "--write", temporary]
            subprocess.run([*command, "--model", options.model], check=True)
        threads = {"OMP_NUM_THREADS": "1"} if cpu else {}
        packs = {"ComfyUI-Slipstream": PACK_ROOT}
        with Server(comfyui, packs=packs, models=models, cpu=cpu, environment=threads) as server:
            rows = measure(server, prompt, devices, options.rounds)
    found = {
        "schema": 1, "command": COMMAND, "environment": environment(comfyui=comfyui),
        "model": str(options.prompt.name) if options.prompt else options.model, "rows": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "parallel.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "parallel.md").write_text(parallel_page(found), "utf-8")
    for row in rows:
        print(said(row))
    return 0


def said(row: Json) -> str:
    """One side in a sentence."""
    seconds = row["report"].get("seconds", {})
    total = sum(seconds.values()) or 1.0
    shares = ", ".join(f"{name} {value / total:.1%}" for name, value in seconds.items())
    goal = f", goal {row['goal']}" if row["goal"] else ""
    return (
        f"{row['devices']}: {row['speed']['median']:.2f} times as fast as one device "
        f"({row['verdict']}{goal}); of a shared call: {shares}"
    )

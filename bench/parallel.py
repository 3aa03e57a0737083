"""Sequence parallel against one device, through a private ComfyUI server: seconds per step.

    python bench parallel                     ranks of one CPU thread each, small Wan, 8,192 tokens
    python bench parallel --frames 13                                    the same with 4,096 tokens
    python bench parallel --devices cuda:0,cuda:1 --model wan-1.3b            GPUs, random weights
    python bench parallel --devices cuda:0,cuda:1 --prompt X.json --models FOLDER  your own workflow
    python bench parallel --batch 4 --model sdxl                  rows of a batch; also flux and wan

Sides take turns in one server; a ratio is a median of paired ratios. An own prompt is an API prompt
with one SlipstreamSequenceParallel node. On a CPU every rank has one thread, so the server has too,
and every round also measures what the machine itself could give (parallel_ceiling.py).
"""

import argparse
import asyncio
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from .environment import environment
from .paired import AGAIN, BASELINE, noise_band, ratio, take_turns, verdict
from .parallel_ceiling import Shares, serve_shares
from .parallel_models import FILE, SUBJECTS, WAN, Subject, write_model
from .parallel_page import met, parallel_page, shares_of
from .server import Server
from .setup_env import PACK_ROOT, SetupError, find_comfyui

OUTPUT = PACK_ROOT / "output" / "bench"
NODE = "SlipstreamSequenceParallel"
CPU_SIDES = ("cpu,cpu", "cpu,cpu,cpu,cpu")
GOALS = {"cpu,cpu": 1.7, "cpu,cpu,cpu,cpu": 2.8}
BATCH_GOALS = {"cpu,cpu": 1.85, "cpu,cpu,cpu,cpu": 3.4}
BENCH_PACK = Path(__file__).with_name("parallel_pack")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
NUM_ROUNDS, NUM_STEPS = 5, 3

Json = dict[str, Any]


def prompt_of(subject: Subject, steps: int) -> Json:
    """A prompt of core nodes around ours; what no core node gives without a file, parallel_pack."""
    text = _node("LotusConditioning")
    if subject.family != WAN:
        text = _node(
            "SlipstreamBenchPrompt", tokens=subject.text_tokens, width=subject.text,
            pooled=subject.pooled,
        )  # fmt: skip
    latent, sizes = subject.latent_node
    return {
        "model": _node("UNETLoader", unet_name=FILE, weight_dtype="default"),
        "parallel": _node(NODE, model=["model", 0], workers=1, devices=""),
        "text": text,
        "latent": _node(latent, **sizes),
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


def measure(
    server: Server,
    prompt: Json,
    devices: Sequence[str],
    num_rounds: int,
    shares: Shares | None,
    goals: Mapping[str, float],
) -> list[Json]:
    """One row per side: ratio to one device, and where the time of its latest run went."""
    import psutil  # a requirement of ComfyUI

    reports: dict[str, Json] = {}
    stolen: dict[str, list[float]] = {}
    seeds = iter(range(1, 1 << 30))  # ComfyUI answers an equal prompt from its cache

    def side(name: str) -> Callable[[int], float]:
        def run(number: int) -> float:
            where = "" if name in (BASELINE, AGAIN) else name
            before = psutil.cpu_times()
            seconds, outputs = seconds_per_step(server, side_prompt(prompt, where, next(seeds)))
            if number >= 0:
                stolen.setdefault(name, []).append(stolen_share(before, psutil.cpu_times()))
            if "json" in outputs:
                reports[name] = json.loads(outputs["json"]["text"][0]).get("parallel", {})
            print(f"round {number + 1}: {name:24} {seconds:8.3f} s per step", flush=True)
            return seconds

        return run

    def at_once(num_ranks: int) -> Callable[[int], float]:
        return lambda number: shares.seconds(num_ranks) if shares is not None else 0.0

    sides = {name: side(name) for name in (BASELINE, AGAIN, *devices)}
    if shares is not None:
        sides |= {_share(n): at_once(n) for n in (1, *map(num_ranks_of, devices))}
    for name in sides:  # workers start, models load, caches warm
        sides[name](-1)
    seconds = take_turns(sides, num_rounds)
    return [
        _row(n, seconds, reports.get(n, {}), stolen[n][:num_rounds], goals.get(n)) for n in devices
    ]


def stolen_share(before: Any, after: Any) -> float:
    """Of the time in which processors had work, what the host of a virtual machine gave to others.

    before, after: psutil.cpu_times(). 0 where the system does not count it.
    """
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    worked = sum(after[:3]) - sum(before[:3])  # user, nice, system on Linux
    return stolen / (worked + stolen) if stolen > 0 else 0.0


def _row(
    name: str,
    seconds: dict[str, list[float]],
    report: Json,
    stolen: Sequence[float],
    goal: float | None,
) -> Json:
    band = noise_band(ratio(seconds[BASELINE], seconds[AGAIN]))
    found = ratio(seconds[BASELINE], seconds[name])
    row = {
        "devices": name,
        "seconds_per_step": [round(s, 4) for s in seconds[name]],
        "one_device": [round(s, 4) for s in seconds[BASELINE]],
        "speed": found.to_json(),
        "noise": [round(edge, 4) for edge in band],
        "verdict": verdict(found.median, band),
        "goal": goal,
        "stolen": round(statistics.median(stolen), 4),
        "report": report,
    }
    share = _share(num_ranks_of(name))
    if share in seconds:
        row["ceiling"] = ratio(seconds[_share(1)], seconds[share]).to_json()
    return row


def num_ranks_of(devices: str) -> int:
    """Processes that a side names."""
    return len(devices.split(","))


def _share(num_ranks: int) -> str:
    return f"shares of {num_ranks}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--devices", action="append", help="a side; may be given several times")
    parser.add_argument("--model", choices=sorted(SUBJECTS), default="wan-small")
    parser.add_argument("--prompt", type=Path, help="an API prompt instead of the random Wan")
    parser.add_argument("--models", type=Path, help="models folder of --prompt")
    parser.add_argument("--frames", type=int, help="of the random Wan's video: 4n + 1")
    parser.add_argument("--batch", type=int, default=1, help="pictures or videos at once")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        raise SetupError("ComfyUI not found: set COMFYUI_PATH to a ComfyUI checkout")
    subject = SUBJECTS[options.model]
    if options.frames:
        subject = replace(subject, frames=options.frames)
    if options.batch > 1:
        subject = replace(subject, batch=options.batch)
    if options.write is not None:
        write_model(comfyui, options.write, subject)
        return 0
    if options.share is not None:
        serve_shares(comfyui, subject, options.share)
        return 0
    cpu = all(name.startswith("cpu") for name in options.devices or CPU_SIDES)
    made = environment(comfyui=comfyui, cpu=cpu)  # before: it says how busy the machine was
    rows = _rows(comfyui, options, subject)
    if cpu:
        made["threads"] = 1
    found = {
        "schema": 2,
        "command": _command(options),
        "environment": made,
        "model": options.prompt.name if options.prompt else str(subject),
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "parallel.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "parallel.md").write_text(parallel_page(found), "utf-8")
    for row in rows:
        print(said(row))
    return 0


def _rows(comfyui: Path, options: argparse.Namespace, subject: Subject) -> list[Json]:
    devices = options.devices or list(CPU_SIDES)
    cpu = all(name.startswith("cpu") for name in devices)
    packs = {"ComfyUI-Slipstream": PACK_ROOT, "slipstream-bench": BENCH_PACK}
    with tempfile.TemporaryDirectory(prefix="slipstream-bench-") as temporary:
        if options.prompt is not None:
            models, prompt = options.models, json.loads(options.prompt.read_text("utf-8"))
        else:
            models, prompt = Path(temporary), prompt_of(subject, options.steps)
            command = [sys.executable, str(PACK_ROOT / "bench"), "parallel", "--write", temporary]
            subprocess.run([*command, "--model", options.model], check=True)
        shares: Any = nullcontext()
        if cpu and options.prompt is None:
            most = max(map(num_ranks_of, devices))
            choice = [f"--model={options.model}", f"--batch={subject.batch}"]
            choice += [f"--frames={subject.frames}"]
            shares = Shares(choice, most, {**os.environ, **ONE_THREAD})
        threads = ONE_THREAD if cpu else {}
        with (
            shares as machine,
            Server(comfyui, packs=packs, models=models, cpu=cpu, environment=threads) as server,
        ):
            goals = BATCH_GOALS if subject.batch > 1 else GOALS
            return measure(server, prompt, devices, options.rounds, machine, goals)


def _command(options: argparse.Namespace) -> str:
    """What to type to have this page again."""
    words = [f"--devices {name}" for name in options.devices or ()]
    words += [f"--model {options.model}"] if options.model != "wan-small" else []
    words += [f"--frames {options.frames}"] if options.frames else []
    words += [f"--batch {options.batch}"] if options.batch > 1 else []
    words += [f"--prompt {options.prompt.name} --models FOLDER"] if options.prompt else []
    words += [f"--rounds {options.rounds}"] if options.rounds != NUM_ROUNDS else []
    words += [f"--steps {options.steps}"] if options.steps != NUM_STEPS else []
    return " ".join(["python bench parallel", *words, "--out docs/benchmarks"])


def said(row: Json) -> str:
    """One side in a sentence."""
    shares = ", ".join(f"{name} {part:.1%}" for name, part in shares_of(row).items())
    goal = f", goal {row['goal']}: {met(row)}" if row["goal"] else ""
    ceiling = f", the machine's ceiling {row['ceiling']['median']:.2f}" if "ceiling" in row else ""
    return (
        f"{row['devices']}: {row['speed']['median']:.2f} times as fast as one device "
        f"({row['verdict']}{goal}{ceiling}); of a shared call: {shares}"
    )

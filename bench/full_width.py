"""Measure techniques on models of full width, in turn with plain ComfyUI; needs a GPU.

    python bench full_width [--models flux wan-video] [--seconds 300] [--out FOLDER] [--resume]

Random weights: speed is meant, never the picture. Each model has a process of its own and
--seconds for itself: one run of every side, then as many rounds as fit. Sides: every attention
policy, one cache, offload, and core's own for the same purpose; --all: every side of the suite.
FOLDER gets full-width.json, .md and .png; --resume keeps what it holds from the same GPU, versions
and commit.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import children, tables
from .chart import draw_suite
from .children import write_text
from .environment import environment, same_machine
from .in_process import use_comfyui
from .setup_env import PACK_ROOT, SetupError
from .subjects_gpu import FULL_WIDTH, full_width
from .suite_measure import measure
from .variants import Variant, variants

OUTPUT = PACK_ROOT / "output" / "bench"
MODELS = tuple(one.model for one in FULL_WIDTH)
CACHES = ("cache, ratio 0.5", "EasyCache")  # ours and core's, with their defaults
NO_GPU = "bench full_width needs a CUDA GPU: torch sees none"
MOST_ROUNDS = 8

Json = dict[str, Any]


def sides(*, everything: bool = False) -> list[Variant]:
    """What stands beside plain: every attention policy first, it is worth the most."""
    found = variants()
    if everything:
        return list(found)
    by_name = {variant.name: variant for variant in found}
    chosen = [variant for variant in found if variant.technique == "attention"]
    chosen += [by_name[name] for name in CACHES]
    return [*chosen, *(variant for variant in found if variant.technique == "offload")]


def child(model: str, options: argparse.Namespace) -> int:
    """The inner process: answers with one model's part."""
    from tqdm import tqdm

    ends = time.monotonic() + options.seconds
    comfyui = use_comfyui(cpu=not torch.cuda.is_available())
    made = environment(comfyui=comfyui)
    one = next(one for one in FULL_WIDTH if one.model == model)
    started = time.monotonic()
    with tqdm(mininterval=1) as bar:
        subject = full_width(one, rehearse=options.rehearse)
        chosen = sides(everything=options.all)
        rounds = 1 if options.rehearse else MOST_ROUNDS
        part = measure(subject, chosen, rounds, bar, made=made, ends=ends)
    part |= {"model": model, "seconds": round(time.monotonic() - started, 1)}
    children.answer(part)
    return 0


def ask(model: str, options: argparse.Namespace) -> Json:
    """One child process's part, or {"error": what it said last}."""
    arguments = ["--child", model, "--seconds", str(options.seconds)]
    arguments += [f"--{name}" for name in ("rehearse", "all") if getattr(options, name)]
    return {"model": model, **children.ask("full_width", *arguments)}


def save(found: Json, folder: Path) -> None:
    """full-width.json, full-width.md and, with Pillow, full-width.png."""
    write_text(folder / "full-width.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "full-width.md", tables.full_width_page(found))
    if not found["subjects"]:
        return
    try:
        draw_suite(found).save(folder / "full-width.png")
    except ImportError:
        print("No chart: Pillow is not installed")


def kept(folder: Path, found: Json, asked: Sequence[str]) -> list[Json]:
    """Parts of an earlier run on this machine, but those of the models asked for again."""
    path = folder / "full-width.json"
    if not path.is_file():
        return []
    before = json.loads(path.read_text("utf-8"))
    if not same_machine(before, found):
        return []
    return [part for part in before["subjects"] if part["model"] not in asked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seconds", type=float, default=600.0, help="for each model")
    parser.add_argument("--all", action="store_true", help="every side that the suite has")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--resume", action="store_true", help="keep other models' results")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.child:
            return child(options.child, options)
        if not torch.cuda.is_available():
            raise SetupError(NO_GPU)
        comfyui = use_comfyui(cpu=False)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    found: Json = {
        "schema": 1,
        "command": "python bench full_width --out docs/benchmarks",
        "environment": environment(comfyui=comfyui),
        **({"rehearsal": True} if options.rehearse else {}),
        "subjects": [],
        "failed": {},
    }
    found["subjects"] = kept(options.out, found, options.models) if options.resume else []
    for model in options.models:
        part = ask(model, options)
        if "error" in part:
            found["failed"][model] = part["error"]
        else:
            found["subjects"].append(part)
        found["subjects"].sort(key=lambda part: MODELS.index(part["model"]))
        save(found, options.out)
    print(tables.full_width_page(found))
    return 1 if found["failed"] else 0

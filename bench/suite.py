"""Measure every technique against plain ComfyUI, core's own and other packs; JSON, table, chart.

    python bench suite [--quick] [--out FOLDER] [--only TEXT] [--threads N] [--packs FOLDER]

All sides of a subject take turns in this process; plain runs twice in a round, which gives the
noise. FOLDER (default output/bench) gets suite.json after every subject (suite-quick.json with
--quick), so Ctrl-C keeps what is finished; .png and .md come from that JSON. A loss is reported
as a loss. With a CUDA device there are subjects of full width too.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import suite_peers, tables
from .chart import draw_suite
from .environment import environment
from .in_process import use_comfyui
from .setup_env import PACK_ROOT
from .subjects import Subject, trained_subject, wan_subject
from .suite_measure import measure
from .trained import CLOCK_HELP, CLOCKS, TrainedModel
from .variants import variants

SCHEMA = 2  # 2: sides are perf dumps with all their fields; seconds of every subject
OUTPUT = PACK_ROOT / "output" / "bench"
COMMAND = "python bench suite"
# Rounds of each subject; a round runs every side once. Few for the large ones: a run takes seconds.
_ROUNDS, _QUICK_ROUNDS = (20, 6, 8), (10, 3, 4)
_GPU_ROUNDS, _QUICK_GPU_ROUNDS = 4, 2

Plan = list[tuple[Callable[[], Subject], int]]  # what makes a subject, its rounds


def plan(demo: TrainedModel, folder: Path, *, quick: bool, rehearse: bool = False) -> Plan:
    """The subjects in the order in which they are measured; those of full width need a GPU.

    rehearse: one of the trained model's, and the first of full width in its narrow form.
    """
    makers: list[Callable[[], Subject]] = [
        lambda: trained_subject(demo, size=64),
        lambda: trained_subject(demo, size=512, num_steps=12),
        lambda: wan_subject(demo, folder),
    ]
    if rehearse:
        from .subjects_gpu import FULL_WIDTH, full_width

        return [(makers[0], 1), (lambda: full_width(FULL_WIDTH[0], rehearse=True), 1)]
    found = list(zip(makers, _QUICK_ROUNDS if quick else _ROUNDS, strict=True))
    if torch.cuda.is_available():
        from .subjects_gpu import gpu_subjects

        rounds = _QUICK_GPU_ROUNDS if quick else _GPU_ROUNDS
        found += [(maker, rounds) for maker in gpu_subjects()]
    return found


def save(found: dict[str, Any], folder: Path) -> None:
    """suite.json, suite.md and, with Pillow, suite.png; suite-quick.* of a quick run."""
    folder.mkdir(parents=True, exist_ok=True)
    name = tables.suite_name(found)
    text = json.dumps(found, indent=1) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / f"{name}.md").write_text(tables.suite_page(found), encoding="utf-8")
    try:
        draw_suite(found).save(folder / f"{name}.png")
    except ImportError:
        print("No chart: Pillow is not installed")


def run(found: dict[str, Any], planned: Plan, measured: Callable[..., Any], out: Path) -> bool:
    """Fill found["subjects"], saving after each. False: Ctrl-C ended it, and `found` says where."""
    started = time.monotonic()
    try:
        for maker, num_rounds in planned:
            part = measured(maker(), num_rounds)
            found["subjects"].append(part)
            found["seconds"] = round(time.monotonic() - started, 1)
            if part["num_rounds"] < num_rounds:
                raise KeyboardInterrupt
            save(found, out)
    except KeyboardInterrupt:
        last = found["subjects"][-1] if found["subjects"] else {"name": "-", "num_rounds": 0}
        found["interrupted"] = (
            f"stopped with {len(found['subjects'])} of {len(planned)} subjects measured, "
            f"{last['name']} in {last['num_rounds']} rounds"
        )
        if found["subjects"]:
            save(found, out)
        return False
    return True


def main() -> int:
    from tqdm import tqdm

    options = _options()
    torch.set_num_threads(options.threads)
    comfyui = use_comfyui(cpu=not torch.cuda.is_available())
    packs = options.packs or comfyui / "custom_nodes"
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "command": _command(options),
        "quick": options.quick,
        **({"rehearsal": True} if options.rehearse else {}),
        "environment": environment(comfyui=comfyui) | {"clock": options.clock},
        "subjects": [],
    }
    chosen = [v for v in variants(clock=options.clock) if options.only in v.name]
    with tempfile.TemporaryDirectory() as place, tqdm(mininterval=1) as bar:
        demo = TrainedModel(clock=CLOCKS[options.clock])
        planned = plan(demo, Path(place), quick=options.quick, rehearse=options.rehearse)
        if options.peer:
            return suite_peers.child(options.peer, planned[options.subject], packs, bar, found)

        def measured(subject: Subject, num_rounds: int) -> dict[str, Any]:
            started = time.monotonic()
            part = measure(subject, chosen, num_rounds, bar, made=found["environment"])
            if part["num_rounds"] == num_rounds:
                index = len(found["subjects"])
                suite_peers.add(part, index, packs, options, bar)
            return part | {"seconds": round(time.monotonic() - started, 1)}

        try:
            finished = run(found, planned, measured, options.out)
        finally:
            _stop_workers()
    if found["subjects"]:
        print(tables.suite_page(found))
        print(f"Saved in {options.out}")
    if not finished:
        print(f"Interrupted: {found['interrupted']}")
        return 130
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under 10 minutes")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--only", default="", help="only sides with this text in their name")
    parser.add_argument("--threads", type=int, default=1, help="models this small gain from none")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=CLOCK_HELP)
    parser.add_argument("--packs", type=Path, help="other packs (default: custom_nodes)")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--subject", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _command(options: argparse.Namespace) -> str:
    command = COMMAND + (" --quick" if options.quick else "")
    command += f" --only '{options.only}'" if options.only else ""
    command += " --packs FOLDER" if options.packs else ""
    return command + f" --threads {options.threads} --clock {options.clock}"


def _stop_workers() -> None:
    """Sequence Parallel's processes, if a side has started them."""
    from ..parallel.apply import pool

    pool().close()

"""Other packs' caches in the suite, found in custom_nodes or in a folder of clones.

Some of them patch globals or the MODEL for good, so each runs in a process of its own, after plain
ComfyUI there, not in turns with it. What loads them is cache_peers.py.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..backends.frame_room import with_room
from .cache_models import FAMILIES
from .cache_peers import SIDES, failure
from .paired import AGAIN, BASELINE, noise_band, ratio
from .subjects import Subject
from .suite_measure import row
from .trained import Sampled
from .variants import Variant

OWNER = "other pack"
MARK = "suite peer: "
PEERS = {name: pack for name, (pack, _) in SIDES.items() if pack is not None}


def add(
    part: dict[str, Any], index: int, packs: Path, options: argparse.Namespace, bar: Any
) -> None:
    """Put the packs' rows into a subject's part, or why there are none. index: of the subject."""
    wanted = {name: pack for name, pack in PEERS.items() if options.only in name}
    bar.reset(total=len(wanted))
    bar.set_description(f"{part['name']}: other packs")
    for name, pack in wanted.items():
        if (packs / pack).is_dir():
            _merge(part, _in_own_process(name, index, packs, options))
        else:
            part["not_measured"][name] = f"{pack} is not in custom_nodes or in --packs FOLDER"
        bar.update()


def _merge(part: dict[str, Any], own: dict[str, Any]) -> None:
    for key in ("failed", "not_measured"):
        part[key] |= own[key]
    part["sides"] += own["sides"]


def _in_own_process(
    name: str, index: int, packs: Path, options: argparse.Namespace
) -> dict[str, Any]:
    command = [sys.executable, "-P", str(Path(__file__).parent), "suite", "--peer", name]
    command += ["--subject", str(index), "--packs", str(packs), "--threads", str(options.threads)]
    command += ["--clock", options.clock, *(["--quick"] if options.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return json.loads(lines[-1][len(MARK) :])
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"sides": [], "not_measured": {}, "failed": {name: f"its process ended: {last[0]}"}}


def child(
    name: str,
    planned: tuple[Callable[[], Subject], int],
    packs: Path,
    bar: Any,
    found: dict[str, Any],
) -> int:
    """The inner process: plain, then one pack, as a line of JSON."""
    maker, num_rounds = planned
    subject = maker()
    part: dict[str, Any] = {"sides": [], "not_measured": {}, "failed": {}}
    if subject.family not in FAMILIES:
        part["not_measured"][name] = "has no setting for this model"
    else:
        try:
            part["sides"].append(_after_plain(subject, name, num_rounds, packs, bar, found))
        except Exception as error:  # noqa: BLE001 - another pack's failure is a row of the page
            part["failed"][name] = failure(error)
    print(MARK + json.dumps(part))
    return 0


def _after_plain(
    subject: Subject, name: str, num_rounds: int, packs: Path, bar: Any, found: dict[str, Any]
) -> dict[str, Any]:
    bar.reset(total=3 * num_rounds)
    runs: dict[str, list[Sampled]] = {BASELINE: [], AGAIN: [], name: []}

    def series(side: str, model: Any) -> None:
        subject.run(model, 0)
        for number in range(num_rounds):
            runs[side].append(with_room(partial(subject.run, model, number)))
            bar.update()

    for side in (BASELINE, AGAIN):
        series(side, subject.model)
    series(name, SIDES[name][1](subject.model, subject.family, packs))
    times = {side: [run.seconds for run in done] for side, done in runs.items()}
    band = noise_band(ratio(times[BASELINE], times[AGAIN]))
    about = f"in a process of its own, after plain; noise there {band[0]:.2f} to {band[1]:.2f}"
    variant = Variant(name, OWNER, "cache", lambda s: s.model, about=about)
    made = found["environment"]
    return row(subject, variant, name, runs[BASELINE], runs[name], band, made)

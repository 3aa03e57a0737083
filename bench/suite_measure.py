"""Measure one subject: every side in turn, its speed, its verdict, its difference to plain."""

import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .in_process import lacking
from .judge import psnr, ssim
from .paired import AGAIN, BASELINE, noise_band, ratio, take_turns, verdict_of
from .perf_dump import perf_dump
from .setup_env import PACK_ROOT
from .subjects import Subject
from .trained import Sampled
from .variants import CORE, NotHereError, Variant

_PLAIN = Variant(BASELINE, CORE, "", lambda subject: subject.model)


@dataclass
class Sides:
    """The sides that run, and why the others do not: absent by design, failed by mistake."""

    models: dict[str, Any]
    variants: dict[str, Variant]
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(
    subject: Subject,
    chosen: Sequence[Variant],
    num_rounds: int,
    bar: Any,
    *,
    made: dict[str, Any] | None = None,
    ends: float = math.inf,
) -> dict[str, Any]:
    """One subject's part of the JSON. made: the environment(); bar: of tqdm.

    Ctrl-C in the rounds keeps those that are complete; num_rounds of the result tells. ends: of
    time.monotonic(); half of the time until then may go into first runs, and no round begins that
    would not be over.
    """
    bar.reset(total=len(chosen) + 1)
    bar.set_description(f"{subject.name}: first runs")
    now = time.monotonic()
    sides = prepare(subject, chosen, bar, ends=now + (ends - now) / 2)
    bar.reset(total=num_rounds * len(sides.models))
    bar.set_description(subject.name)
    runs: dict[str, list[Sampled]] = {name: [] for name in sides.models}

    def runner(name: str) -> Any:
        def once(number: int) -> float:
            runs[name].append(_run(subject, sides.variants[name], sides.models[name], number))
            return runs[name][-1].seconds

        return once

    turns = {name: runner(name) for name in sides.models}
    seconds = take_turns(turns, num_rounds, on_run=bar.update, ends=ends)
    band = noise_band(ratio(seconds[BASELINE], seconds[AGAIN]))
    rows = []
    for name, series in seconds.items():
        kept, plain = (runs[side][: len(series)] for side in (name, BASELINE))
        rows.append(row(subject, sides.variants[name], name, plain, kept, band, made))
    return {
        "name": subject.name,
        "about": subject.about,
        "num_rounds": len(seconds[BASELINE]),
        "noise_band": [round(edge, 4) for edge in band],
        "sides": rows,
        "not_measured": sides.absent,
        "failed": sides.failed,
    }


def row(
    subject: Subject,
    variant: Variant,
    name: str,
    plain: Sequence[Sampled],
    runs: Sequence[Sampled],
    band: tuple[float, float],
    made: dict[str, Any] | None,
) -> dict[str, Any]:
    """A side's JSON: its speed, its verdict, its perf dump and its difference to plain runs."""
    speed = ratio([run.seconds for run in plain], [run.seconds for run in runs])
    found = {"name": name, "owner": variant.owner, "speed": speed.to_json()}
    found["verdict"] = verdict_of(speed, band) if name != BASELINE else "baseline"
    found |= {"about": variant.about} if variant.about else {}
    found |= perf_dump(runs, request_id=f"{subject.name}: {name}", made=made)
    return found | difference(subject, plain, runs)


def prepare(
    subject: Subject, chosen: Sequence[Variant], bar: Any, *, ends: float = math.inf
) -> Sides:
    """Make every side's MODEL and run it once: imports and kernel choice are not the claim."""
    models = {BASELINE: subject.model, AGAIN: subject.model}
    sides = Sides(models, dict.fromkeys(models, _PLAIN))
    subject.run(subject.model, 0)
    bar.update()
    for variant in chosen:
        if time.monotonic() > ends:
            sides.absent[variant.name] = "the time given was up before its first run"
            continue
        try:
            model = variant.make(subject)
            _run(subject, variant, model, 0)
        except ModuleNotFoundError as error:
            sides.absent[variant.name] = lacking(str(error))
        except (RuntimeError, ValueError, NotHereError) as error:
            _sort(error, variant, subject, sides)
        else:
            sides.models[variant.name], sides.variants[variant.name] = model, variant
        bar.update()
    return sides


def _sort(error: Exception, variant: Variant, subject: Subject, sides: Sides) -> None:
    """A sentence of ours is a fair refusal; anything else is a loss that belongs into the page."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    refused = isinstance(error, ValueError) and PACK_ROOT in raised_in.resolve().parents
    if refused or isinstance(error, NotHereError):
        sides.absent[variant.name] = str(error)
        return
    said = (str(error).strip().splitlines() or [""])[0]  # CUDA's errors go on with advice
    sides.failed[variant.name] = f"{type(error).__name__}: {said}"
    print(f"\n{subject.name}: {variant.name} FAILED: {said}", file=sys.stderr)


def _run(subject: Subject, variant: Variant, model: Any, number: int) -> Sampled:
    """One run with as many threads in all as every other side has."""
    if variant.num_processes == 1:
        return subject.run(model, number)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads // variant.num_processes, 1))
    try:
        return subject.run(model, number)
    finally:
        torch.set_num_threads(threads)


def difference(
    subject: Subject, plain: Sequence[Sampled], runs: Sequence[Sampled]
) -> dict[str, Any]:
    """Against the plain run of the same seed: bit-identical, relative error, PSNR and SSIM."""
    a, b = (torch.cat([run.latents for run in side]) for side in (runs, plain))
    found: dict[str, Any] = {
        "identical": bool(torch.equal(a, b)),
        "latent_rel_l2": float(f"{((a - b).norm() / b.norm()).item():.3g}"),
    }
    if subject.decode is not None:
        pictures, reference = subject.decode(a), subject.decode(b)
        found["psnr_db"] = round(psnr(pictures, reference).mean().item(), 2)
        found["ssim"] = round(ssim(pictures, reference).mean().item(), 4)
    return found

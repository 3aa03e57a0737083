"""Measure every technique against plain ComfyUI and core's own, and write JSON, table and chart.

    python bench suite [--quick] [--out FOLDER] [--only TEXT] [--threads N]

All sides of a subject take turns in this process; plain runs twice in a round, which gives the
noise. FOLDER (default output/bench) gets suite.json after every subject, so Ctrl-C keeps what is
finished; suite.png and suite.md come from that JSON. A loss is reported as a loss.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import demo_models, tables
from .chart import draw_suite
from .environment import environment
from .in_process import use_comfyui
from .judge import psnr, ssim
from .paired import AGAIN, BASELINE, noise_band, ratio, take_turns, verdict
from .setup_env import PACK_ROOT
from .subjects import Subject, trained_subject, wan_subject
from .trained import CLOCK_HELP, CLOCKS, Sampled, TrainedModel
from .variants import NotHereError, Variant, variants

SCHEMA = 1
OUTPUT = PACK_ROOT / "output" / "bench"
COMMAND = "python bench suite"
# Rounds of each subject; a round runs every side once. Few for the large one: a run takes seconds.
_ROUNDS, _QUICK_ROUNDS = (20, 8, 8), (10, 4, 4)


def measure(
    subject: Subject, chosen: Sequence[Variant], num_rounds: int, bar: Any
) -> dict[str, Any]:
    """One subject's part of the JSON."""
    models: dict[str, Any] = {BASELINE: subject.model, AGAIN: subject.model}
    absent: dict[str, str] = {}
    failed: dict[str, str] = {}
    subject.run(subject.model, 0)
    for variant in chosen:
        try:
            model = variant.make(subject.model)
            subject.run(model, 0)  # imports and kernel choice are not the claim
        except NotHereError as reason:
            absent[variant.name] = str(reason)
        except (RuntimeError, ValueError) as error:  # a loss that belongs into the table
            failed[variant.name] = f"{type(error).__name__}: {error}"
            print(f"\n{subject.name}: {variant.name} FAILED: {error}")
        else:
            models[variant.name] = model
    runs: dict[str, list[Sampled]] = {name: [] for name in models}

    def runner(name: str) -> Any:
        def once(number: int) -> float:
            runs[name].append(subject.run(models[name], number))
            return runs[name][-1].seconds

        return once

    bar.reset(total=num_rounds * len(models))
    bar.set_description(subject.name)
    seconds = take_turns({name: runner(name) for name in models}, num_rounds, on_run=bar.update)
    band = noise_band(ratio(seconds[BASELINE], seconds[AGAIN]))
    sides = []
    for name, series in seconds.items():
        kept = runs[name][: len(series)]
        speed = ratio(seconds[BASELINE], series)
        owner = next((v.owner for v in chosen if v.name == name), "core")
        side = {"name": name, "owner": owner, "speed": speed.to_json()}
        side["verdict"] = verdict(speed.median, band) if name != BASELINE else "baseline"
        side |= perf_dump(kept)
        plain = runs[BASELINE][: len(series)]
        side |= difference(subject, plain, kept)
        sides.append(side)
    return {
        "name": subject.name,
        "about": subject.about,
        "num_rounds": len(seconds[BASELINE]),
        "noise_band": [round(edge, 4) for edge in band],
        "sides": sides,
        "not_measured": absent,
        "failed": failed,
    }


def perf_dump(runs: Sequence[Sampled]) -> dict[str, Any]:
    """Medians over the runs, with the names of SGLang-Diffusion's perf dump."""
    steps = torch.tensor([run.step_ms for run in runs], dtype=torch.float64).median(0).values
    total = torch.tensor([run.seconds for run in runs], dtype=torch.float64).median().item() * 1000
    return {
        "total_duration_ms": round(total, 2),
        "steps": [{"name": "DenoisingStage", "duration_ms": round(total, 2)}],
        "denoise_steps_ms": [
            {"step": index, "duration_ms": round(ms, 3)} for index, ms in enumerate(steps.tolist())
        ],
    }


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


def subjects(demo: TrainedModel, folder: Path) -> list[Subject]:
    """In the order in which they are measured."""
    return [
        trained_subject(demo, size=64),
        trained_subject(demo, size=512, num_steps=12),
        wan_subject(demo, folder),
    ]


def save(found: dict[str, Any], folder: Path, only: str) -> None:
    """suite.json, suite.md and, with Pillow, suite.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "suite.json").write_text(text, encoding="utf-8")
    (folder / "suite.md").write_text(tables.suite_page(found), encoding="utf-8")
    try:
        draw_suite(found).save(folder / "suite.png")
    except ImportError:
        print("No chart: Pillow is not installed")


def main() -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under 10 minutes")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--only", default="", help="only variants with this text in their name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=CLOCK_HELP)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    comfyui = use_comfyui(cpu=not torch.cuda.is_available())
    chosen = [variant for variant in variants() if options.only in variant.name]
    command = COMMAND + (" --quick" if options.quick else "")
    command += f" --only '{options.only}'" if options.only else ""
    command += f" --threads {options.threads} --clock {options.clock}"
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "environment": environment(comfyui=comfyui) | {"clock": options.clock},
        "subjects": [],
    }
    with tempfile.TemporaryDirectory() as place, tqdm(mininterval=1) as bar:
        folder = Path(place) / "models"
        demo_models.write(comfyui, folder)
        demo = TrainedModel(clock=CLOCKS[options.clock])
        rounds = _QUICK_ROUNDS if options.quick else _ROUNDS
        try:
            for subject, num_rounds in zip(subjects(demo, folder), rounds, strict=True):
                found["subjects"].append(measure(subject, chosen, num_rounds, bar))
                save(found, options.out, options.only)
        except KeyboardInterrupt:
            print(f"\nStopped: {len(found['subjects'])} subjects are finished and saved")
            return 130
    print(tables.suite_page(found))
    print(f"Saved in {options.out}")
    return 0

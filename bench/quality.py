"""Speed against quality of every approximate technique, on the trained demo model.

    python bench quality [--out FOLDER] [--num-seeds 30] [--accuracy N] [--parts cache ...]

FOLDER (default output/bench) gets quality.json after every part, contact sheets, quality.png and
quality.md; --resume goes on where a run was interrupted. Accuracy is measured only on request, over
N pictures, 1,000 for a claim. Attention kernels that approximate need a GPU; the part attention
measures which error of its probe a picture bears.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig
from . import quality_attention, quality_cache, quality_svdquant, tables
from .chart import draw_quality
from .environment import environment
from .in_process import use_comfyui
from .quality_report import Lab
from .scores import accuracy_row
from .setup_env import PACK_ROOT
from .trained import CLOCK_HELP, CLOCKS, TrainedModel

OUTPUT = PACK_ROOT / "output" / "bench"
PARTS = {
    "cache": quality_cache.curves,
    "attention": quality_attention.curves,
    "svdquant": quality_svdquant.curves,
}
_BATCH = 50


def accuracy(lab: Lab, num: int) -> dict[str, Any]:
    """Paired: plain, and the caches at a few settings, over the same `num` seeds."""
    configs = {
        "cache, ratio 0.5 (default)": CacheConfig.from_ratio(0.5),
        "cache, scm, ratio 0.5": CacheConfig.from_ratio(0.5, strategy="scm"),
        "cache, output, ratio 0.5": CacheConfig.from_ratio(0.5, strategy="output"),
    }
    lab.bar.reset(total=len(configs) + 1)
    lab.bar.set_description(f"accuracy over {num}")
    pictures, labels = lab.demo.pictures(num, batch=_BATCH)
    plain = lab.demo.is_right(pictures, labels)
    rows = [accuracy_row("plain", plain, None)]
    lab.bar.update()
    for name, config in configs.items():
        model = apply_cache(lab.demo.model, config)
        pictures, labels = lab.demo.pictures(num, batch=_BATCH, model=model)
        rows.append(accuracy_row(name, lab.demo.is_right(pictures, labels), plain))
        lab.bar.update()
    return {"num_seeds": num, "batch": _BATCH, "rows": rows}


def save(found: dict[str, Any], folder: Path) -> None:
    """quality.json, quality.md and quality.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "quality.json").write_text(text, encoding="utf-8")
    (folder / "quality.md").write_text(tables.quality_page(found), encoding="utf-8")
    draw_quality(found).save(folder / "quality.png")


def main() -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--num-seeds", type=int, default=30)
    parser.add_argument("--accuracy", type=int, default=0, metavar="N")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--resume", action="store_true", help="keep the finished parts in FOLDER")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=CLOCK_HELP)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    comfyui = use_comfyui(cpu=not torch.cuda.is_available())
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "schema": 1,
        "command": f"python bench quality --num-seeds {options.num_seeds}"
        f" --accuracy {options.accuracy} --threads {options.threads} --clock {options.clock}"
        " --out docs/benchmarks",
        "environment": environment(comfyui=comfyui) | {"clock": options.clock},
        "num_seeds": options.num_seeds,
        "curves": [],
    }
    before = options.out / "quality.json"
    if options.resume and before.is_file():
        found["curves"] = json.loads(before.read_text(encoding="utf-8"))["curves"]
    with tqdm(mininterval=1) as bar:
        lab = Lab(TrainedModel(clock=CLOCKS[options.clock]), options.num_seeds, options.out, bar)
        try:
            for part in options.parts:
                if part not in {curve["part"] for curve in found["curves"]}:
                    mark = {"part": part, "commit": found["environment"]["commit"]}
                    found["curves"] += [mark | curve for curve in PARTS[part](lab)]
                    save(found, options.out)
            if options.accuracy:
                found["accuracy"] = accuracy(lab, options.accuracy)
                save(found, options.out)
        except KeyboardInterrupt:
            print("\nStopped: the parts that are finished are saved")
            return 130
    print(tables.quality_page(found))
    return 0

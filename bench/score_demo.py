"""Score the trained demo model: accuracy on fresh noise, file sizes, and a contact sheet.

    python bench score_demo [--folder FOLDER] [--num 200] [--out FOLDER]

Pictures are sampled by the code under the KSampler node, 20 steps euler simple, at cfg 1 and 3. The
output folder (default output/bench) gets demo-model.json, .md and .png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from . import tables
from .demo_models import WEIGHTS
from .draw import CLASSES, save_sheet
from .environment import environment
from .in_process import use_comfyui
from .setup_env import PACK_ROOT
from .trained import CFG, TrainedModel

OUTPUT = PACK_ROOT / "output" / "bench"
TRAINING = "training.json"


def scored(demo: TrainedModel, num: int, cfg: float) -> tuple[dict[str, Any], torch.Tensor]:
    """A row of the accuracy table, and the pictures."""
    pictures, labels = demo.pictures(num, cfg=cfg)
    right = demo.is_right(pictures, labels).float()
    per_class = {name: right[i :: len(CLASSES)].mean().item() for i, name in enumerate(CLASSES)}
    by_class = {name: round(share, 3) for name, share in per_class.items()}
    row = {"cfg": cfg, "num": num, "accuracy": round(right.mean().item(), 4), "by_class": by_class}
    return row, pictures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    parser.add_argument("--num", type=int, default=200, help="pictures for each cfg")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    comfyui = use_comfyui()
    demo = TrainedModel(options.folder)
    scores = []
    for cfg in (1.0, CFG):
        row, pictures = scored(demo, options.num, cfg)
        scores.append(row)
        print(json.dumps(row), flush=True)
    files = sorted(options.folder.glob("*.safetensors"))
    found = {
        "schema": 1,
        "command": f"python bench score_demo --num {options.num} --out docs/benchmarks",
        "environment": environment(comfyui=comfyui),
        "training": json.loads((options.folder / TRAINING).read_text(encoding="utf-8")),
        "scores": scores,
        "file_bytes": {path.name: path.stat().st_size for path in files},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (options.out / "demo-model.json").write_text(text, encoding="utf-8")
    (options.out / "demo-model.md").write_text(tables.model_page(found), encoding="utf-8")
    save_sheet(pictures[:60], options.out / "demo-model.png", columns=10, zoom=2)
    return 0

"""The standalone mode of `./run`: the same engine on a reference DiT, without ComfyUI. Needs torch.

Everything below the node is the pack's own code: attach, Run, dispatch, report. The patcher,
sampler and network around it are the stand-ins of reference.py and reference_sampler.py.
"""

import argparse
import os
from pathlib import Path

import torch

from ..backends import report
from ..backends.attention.apply import apply_attention
from ..backends.attention.config import AttentionConfig
from ..backends.run import run_log
from .progress import Progress
from .reference import ReferenceDiT, ReferenceModel, ReferencePatcher
from .reference_sampler import sample
from .setup_env import PACK_ROOT

OUTPUT = PACK_ROOT / "output"
DEFAULT_STEPS = 12
HOW_TO_GET_ALL = """\
For the full demo, with nodes, workflows and the browser, give ./run a ComfyUI:
  git clone it or `pip install comfy-cli && comfy install`, whose default place ./run finds;
  COMFYUI_PATH=<checkout> ./run if it is elsewhere."""


def run(options: argparse.Namespace) -> int:
    """Sample with and without the technique, print the report, save it under output/."""
    print("This is the STANDALONE mode: no ComfyUI runs here.")
    print(f"Why: {options.reason}")
    print("The pack's engine runs on a small transformer with random weights instead.\n")
    plain = ReferencePatcher(ReferenceModel(ReferenceDiT(width=256, num_heads=4, num_layers=8)))
    if torch.cuda.is_available() and not options.cpu:
        plain.model.to("cuda")
        plain.load_device = torch.device("cuda")
    else:  # one thread per core stalls as soon as anything else runs
        torch.set_num_threads(max((os.cpu_count() or 2) // 2, 1))
    patched = apply_attention(plain, AttentionConfig(policy="balanced"))
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(42))
    num_steps = options.steps or DEFAULT_STEPS
    expected = sample(plain, noise, steps=num_steps)
    with Progress("Sampling") as progress:
        latent = sample(
            patched,
            noise,
            steps=num_steps,
            callback=lambda step, denoised, x, total: progress.show(step + 1, total),
        )
    made = report.report_on(run_log(patched), latent)
    print(f"\n{made.text}\n")
    print(difference(latent, expected))
    save(made)
    print(f"\n{HOW_TO_GET_ALL}")
    return 0


def difference(latent: torch.Tensor, expected: torch.Tensor) -> str:
    """How the latent compares to one without the pack."""
    if torch.equal(latent, expected):
        return "The latent is bit-identical to one sampled without Slipstream."
    relative = ((latent - expected).norm() / expected.norm()).item()
    return f"Difference to a latent sampled without Slipstream: {relative:.1e} (relative L2)."


def save(made: report.Report) -> None:
    """The report's JSON, and its picture where Pillow is installed."""
    OUTPUT.mkdir(exist_ok=True)
    text = OUTPUT / "slipstream-report.json"
    text.write_text(made.json_text + "\n", encoding="utf-8")
    print(f"The report as JSON:      {text}")
    picture = save_picture(made, OUTPUT / "slipstream-report.png")
    print(f"The report as a picture: {picture or 'none, Pillow is not installed'}")


def save_picture(made: report.Report, path: Path) -> Path | None:
    """`path`, written; None without Pillow."""
    from ..backends import picture

    try:
        picture.draw(made).save(path)
    except ImportError:
        return None
    return path

"""Record what the default cache settings give on the trained model; CI compares against it.

    python bench quality_baseline

Writes docs/benchmarks/quality-baseline.json: PSNR pooled over a few fixed seeds at batch 1, with
one thread, and the noise: what two threads, which round otherwise, change of it, and half a dB for
machines that round otherwise again. tests/host/test_bench_quality.py measures the same seeds and
fails if the PSNR has dropped by more than the noise.
"""

import json

import torch

from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig
from .environment import environment
from .in_process import use_comfyui
from .scores import sample_singly, score
from .setup_env import PACK_ROOT
from .trained import TrainedModel

BASELINE_FILE = PACK_ROOT / "docs" / "benchmarks" / "quality-baseline.json"
NUM_SEEDS = 16
MACHINES_DB = 0.5
DEFAULT_RATIO = 0.5  # SlipstreamCache's widget


def measure(demo: TrainedModel, config: CacheConfig | None = None) -> float:
    """PSNR of the default cache settings, or of `config`, pooled over the seeds, in dB."""
    model = apply_cache(demo.model, config or CacheConfig.from_ratio(DEFAULT_RATIO))
    plain = [sample_singly(demo, demo.model, number).latents for number in range(NUM_SEEDS)]
    cached = [sample_singly(demo, model, number).latents for number in range(NUM_SEEDS)]
    found = score("default", demo.decode(torch.cat(cached)), demo.decode(torch.cat(plain)))
    return found["psnr_pooled_db"]


def main() -> int:
    comfyui = use_comfyui()
    made = {"command": "python bench quality_baseline", "environment": environment(comfyui=comfyui)}
    demo, by_threads = TrainedModel(), {}
    for num_threads in (2, 1):
        torch.set_num_threads(num_threads)
        by_threads[num_threads] = measure(demo)
    noise = abs(by_threads[2] - by_threads[1]) + MACHINES_DB
    found = {"psnr_db": by_threads[1], "noise_db": round(noise, 2), "num_seeds": NUM_SEEDS}
    BASELINE_FILE.parent.mkdir(parents=True, exist_ok=True)
    BASELINE_FILE.write_text(json.dumps(made | found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0

"""Deeper Flux and Wan with a calm time embedding: bench/cache_models.py under its test name."""

import comfy_home

comfy_home.load_pack()

from slipstream.bench.cache_models import NUM_BLOCKS, load  # noqa: E402

__all__ = ["NUM_BLOCKS", "load"]

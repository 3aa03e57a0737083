"""Which model, size and card hides the copies of streamed weights, by arithmetic alone.

    python bench offload_arithmetic     from the pack's folder, with any Python that has torch

In the event model of backends/offload/plan.py, with everything streamed and with what fits
resident. The rates of the cards are other people's figures or assumptions: run `python bench
offload` on the card itself.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..backends.offload.plan import BlockCost, largest_first, simulate

GIB = 2**30
# What a card with a screen has for ComfyUI, less its CUDA context and what comfy-aimdo leaves free.
NOT_FOR_MODELS = 0.6 * GIB + 256 * 2**20
STREAMS = 2  # ComfyUI's; each has a buffer


@dataclass(frozen=True, kw_only=True)
class Card:
    """Operations per second at 16 bits, bytes per second from pinned RAM, GB of memory.

    source: where compute_rate comes from; None: assumed, see ASSUMED_SHARE.
    """

    compute_rate: float
    copy_rate: float
    memory_gb: int = 0
    source: str | None = None


# Of NVIDIA's dense 16-bit rate with 32-bit accumulation; GeForce cards with figures: 61 to 82 %.
ASSUMED_SHARE = 2 / 3
X16_GEN4, X8_GEN4, X16_GEN5, X8_GEN5 = 25e9, 12.5e9, 52e9, 26e9

CARDS = {
    "3060": Card(compute_rate=17e12, copy_rate=X16_GEN4, memory_gb=12),
    "4060": Card(compute_rate=20e12, copy_rate=X8_GEN4, memory_gb=8),
    "4060 Ti": Card(
        compute_rate=36e12,
        copy_rate=X8_GEN4,
        memory_gb=16,
        source="gigagpu, Flux in fp16 at 0.48 it/s",
    ),
    "4070": Card(compute_rate=39e12, copy_rate=X16_GEN4, memory_gb=12),
    "5060 Ti": Card(compute_rate=32e12, copy_rate=X8_GEN5, memory_gb=16),
    "5070": Card(compute_rate=41e12, copy_rate=X16_GEN5, memory_gb=12),
    "3090": Card(
        compute_rate=47.5e12,
        copy_rate=X16_GEN4,
        source="commonly told, Flux in bf16 in 1.5 to 1.7 s",
    ),
    "4090": Card(
        compute_rate=100e12,
        copy_rate=X16_GEN4,
        source="commonly told, Flux in bf16 in 0.7 to 0.8 s",
    ),
    "5090": Card(compute_rate=140e12, copy_rate=X16_GEN5),
    "H100": Card(
        compute_rate=365e12, copy_rate=X16_GEN5, source="huggingface/diffusers#11605, Wan in 4.60 s"
    ),
}


@dataclass(frozen=True)
class Op:
    """One operation of a block: weights in parameters, work in floating point operations."""

    weights: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at one size on one card. batch: 2 where cond and uncond run together (CFG).

    activations_gib: assumed; what is left of the card's memory holds weights. None: everything
    streams.
    """

    model: str
    tokens: int
    text_tokens: int
    bytes_per_weight: int
    card: str
    batch: int = 1
    activations_gib: float | None = None

    def resident_bytes(self, buffer: int) -> int:
        """Weights of the blocks that stay beside `buffer` bytes of each of ComfyUI's streams."""
        if self.activations_gib is None:
            return 0
        taken = NOT_FOR_MODELS + self.activations_gib * GIB + STREAMS * buffer
        return max(int(CARDS[self.card].memory_gb * GIB - taken), 0)


WAN_81 = Case(model="wan", tokens=32760, text_tokens=512, bytes_per_weight=2, card="4090")
WAN_17 = replace(WAN_81, tokens=7800)
FLUX = Case(model="flux", tokens=4096, text_tokens=512, bytes_per_weight=2, card="4090")
FLUX_FP8 = replace(FLUX, bytes_per_weight=1)
QWEN = Case(model="qwen", tokens=4096, text_tokens=256, bytes_per_weight=2, card="5090")
QWEN_CFG = replace(QWEN, tokens=6889, card="4090", batch=2)
HUNYUAN = Case(model="hunyuan", tokens=38760, text_tokens=256, bytes_per_weight=2, card="4090")

CASES = {
    "Wan bf16 480p 81f, 4090": WAN_81,
    "Wan bf16 480p 17f, 4090": WAN_17,
    "Wan bf16 480p 17f, H100": replace(WAN_17, card="H100"),
    "Flux fp8 1024, 4090": FLUX_FP8,
    "Flux bf16 1024, 4090": FLUX,
    "Flux bf16 1024, 3090": replace(FLUX, card="3090"),
    "Flux bf16 1024, H100": replace(FLUX, card="H100"),
    "Qwen bf16 1024, 5090": QWEN,
    "Qwen bf16 1328 CFG, 4090": QWEN_CFG,
    "Qwen fp8 1328 CFG, 4090": replace(QWEN_CFG, bytes_per_weight=1),
    "HunyuanVideo bf16 544p 73f, 4090": HUNYUAN,
}

# Only what does not fit streams: the cards that people have.
FITTED = {
    f"{name}, {card} {CARDS[card].memory_gb} GB": replace(
        case, card=card, activations_gib=activations
    )
    for name, case, activations, cards in (
        ("Flux bf16 1024", FLUX, 1.2, ("3060", "4060", "4060 Ti", "4070", "5060 Ti", "5070")),
        ("Flux fp8 1024", FLUX_FP8, 1.2, ("3060", "4060", "4070", "5070")),
        ("Qwen bf16 1328 CFG", QWEN_CFG, 2.0, ("4060 Ti", "4070", "5070")),
        ("Qwen fp8 1328 CFG", replace(QWEN_CFG, bytes_per_weight=1), 2.0, ("3060", "4060", "4070")),
        ("Wan bf16 480p 17f", WAN_17, 1.6, ("4060 Ti", "4070")),
        ("Wan bf16 480p 81f", WAN_81, 4.0, ("4060 Ti", "4070")),
    )
    for card in cards
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    rows = {name: row(case) for name, case in (CASES | FITTED).items()}
    if parser.parse_args().json:
        print(json.dumps(rows, indent=2))
        return
    print("seconds of a step; rates partly assumed; the first rows stream everything")
    print(
        f"{'case':34} {'GB':>5} {'resident':>8} {'computing':>9} {'per module':>10} "
        f"{'prefetch':>8} {'gain':>5}  copies"
    )
    for name, one in rows.items():
        print(
            f"{name:34} {one['gigabytes']:5.1f} {one['resident']:8.1f} {one['computing']:9.2f} "
            f"{one['per_module']:10.2f} {one['prefetch']:8.2f} {gain(one):5.0%}  {verdict(one)}"
        )


def row(case: Case) -> dict[str, float]:
    """Gigabytes of block weights, all and resident without prefetch, and seconds of a step:
    computing, per module, with prefetch."""
    rate = CARDS[case.card].copy_rate
    blocks = blocks_of(case)
    sizes = [block.bytes for block in blocks]
    largest = max(size for block in blocks for size in block.modules)
    streamed = largest_first(blocks, case.resident_bytes(max(sizes)))
    resident = min(case.resident_bytes(largest), sum(sizes))
    return {
        "gigabytes": sum(sizes) / 1e9,
        "resident": resident / 1e9,
        "computing": sum(block.seconds for block in blocks),
        "per_module": sum(per_module_seconds(case, resident)),
        "prefetch": simulate(blocks, streamed, rate=rate, depth=1).seconds,
    }


def gain(one: dict[str, float]) -> float:
    """What prefetch saves of a step."""
    return round(1 - one["prefetch"] / one["per_module"], 3) + 0.0


def verdict(one: dict[str, float]) -> str:
    """Whether prefetch hides the copies."""
    return "hidden" if one["prefetch"] <= one["computing"] * 1.01 else "not hidden"


def blocks_of(case: Case) -> list[BlockCost]:
    """The model's blocks on the case's card."""
    rate = CARDS[case.card].compute_rate
    return [
        BlockCost(
            index=index,
            modules=tuple(op.weights * case.bytes_per_weight for op in ops if op.weights),
            seconds=sum(op.flops for op in ops) / rate,
        )
        for index, ops in enumerate(_ops(case))
    ]


def per_module_seconds(case: Case, resident: int = 0) -> list[float]:
    """ComfyUI's own streaming, with two streams: the copy for a module starts when computing has
    reached the module before it. Seconds of each block; resident: bytes, placed by size."""
    card = CARDS[case.card]
    blocks = [list(ops) for ops in _ops(case)]
    modules = [op.weights * case.bytes_per_weight for ops in blocks for op in ops if op.weights]
    each = [BlockCost(index=at, modules=(size,), seconds=0) for at, size in enumerate(modules)]
    now = engine = reached = 0.0
    taken: list[float] = []
    for _ in range(2):
        streamed = iter(largest_first(each, resident))
        taken = []
        for ops in blocks:
            start = now
            for op in ops:
                size = next(streamed) if op.weights else 0
                if size:
                    engine = max(engine, reached) + size / card.copy_rate
                    reached = now
                    now = max(now, engine)
                now += op.flops / card.compute_rate
            taken.append(now - start)
    return taken


def _ops(case: Case) -> Iterator[Sequence[Op]]:
    make = {"wan": _wan, "flux": _flux, "hunyuan": _hunyuan, "qwen": _qwen}[case.model]
    return make(case.tokens, case.text_tokens, case.batch)


def _linear(inputs: int, outputs: int, rows: int) -> Op:
    return Op(inputs * outputs, 2.0 * inputs * outputs * rows)


def _attention(queries: int, keys: int, width: int, batch: int) -> Op:
    return Op(0, 4.0 * queries * keys * width * batch)


def _wan(tokens: int, text: int, batch: int) -> Iterator[Sequence[Op]]:
    width, hidden, rows = 5120, 13824, tokens * batch
    for _ in range(40):
        yield (
            *(_linear(width, width, rows) for _ in range(3)),
            _attention(tokens, tokens, width, batch),
            *(_linear(width, width, rows) for _ in range(2)),
            *(_linear(width, width, text * batch) for _ in range(2)),
            _attention(tokens, text, width, batch),
            _linear(width, width, rows),
            _linear(width, hidden, rows),
            _linear(hidden, width, rows),
        )


def _double(tokens: int, text: int, batch: int, width: int = 3072) -> Sequence[Op]:
    image, words, hidden = tokens * batch, text * batch, 4 * width
    return (
        *(_linear(width, 6 * width, batch) for _ in range(2)),
        _linear(width, 3 * width, image),
        _linear(width, 3 * width, words),
        _attention(tokens + text, tokens + text, width, batch),
        _linear(width, width, image),
        _linear(width, hidden, image),
        _linear(hidden, width, image),
        _linear(width, width, words),
        _linear(width, hidden, words),
        _linear(hidden, width, words),
    )


def _single(tokens: int, text: int, batch: int, width: int = 3072) -> Sequence[Op]:
    rows, hidden = (tokens + text) * batch, 4 * width
    return (
        _linear(width, 3 * width, batch),
        _linear(width, 3 * width + hidden, rows),
        _attention(tokens + text, tokens + text, width, batch),
        _linear(width + hidden, width, rows),
    )


def _flux(
    tokens: int, text: int, batch: int, num_double: int = 19, num_single: int = 38
) -> Iterator[Sequence[Op]]:
    for _ in range(num_double):
        yield _double(tokens, text, batch)
    for _ in range(num_single):
        yield _single(tokens, text, batch)


def _hunyuan(tokens: int, text: int, batch: int) -> Iterator[Sequence[Op]]:
    return _flux(tokens, text, batch, 20, 40)


def _qwen(tokens: int, text: int, batch: int) -> Iterator[Sequence[Op]]:
    for _ in range(60):
        yield _double(tokens, text, batch)

"""Which model, size and card hides the copies of streamed weights, by arithmetic alone.

    python bench offload_arithmetic     from the pack's folder, with any Python that has torch

Everything streams, in the event model of backends/offload/plan.py. The rates of the cards are
assumptions, not measurements: run `python bench offload` on the card itself.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..backends.offload.plan import BlockCost, simulate


@dataclass(frozen=True, kw_only=True)
class Card:
    """Assumed rates: operations per second at 16 bits, bytes per second from pinned RAM."""

    compute_rate: float
    copy_rate: float


CARDS = {
    "3090": Card(compute_rate=62.5e12, copy_rate=25e9),
    "4090": Card(compute_rate=140e12, copy_rate=25e9),
    "5090": Card(compute_rate=190e12, copy_rate=52e9),
    "H100": Card(compute_rate=450e12, copy_rate=52e9),
}


@dataclass(frozen=True)
class Op:
    """One operation of a block: weights in parameters, work in floating point operations."""

    weights: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at one size on one card. batch: 2 where cond and uncond run together (CFG)."""

    model: str
    tokens: int
    text_tokens: int
    bytes_per_weight: int
    card: str
    batch: int = 1


CASES = {
    "Wan bf16 480p 81f, 4090": Case(
        model="wan", tokens=32760, text_tokens=512, bytes_per_weight=2, card="4090"
    ),
    "Wan bf16 480p 17f, 4090": Case(
        model="wan", tokens=7800, text_tokens=512, bytes_per_weight=2, card="4090"
    ),
    "Wan bf16 480p 17f, H100": Case(
        model="wan", tokens=7800, text_tokens=512, bytes_per_weight=2, card="H100"
    ),
    "Flux fp8 1024, 4090": Case(
        model="flux", tokens=4096, text_tokens=512, bytes_per_weight=1, card="4090"
    ),
    "Flux bf16 1024, 4090": Case(
        model="flux", tokens=4096, text_tokens=512, bytes_per_weight=2, card="4090"
    ),
    "Flux bf16 1024, 3090": Case(
        model="flux", tokens=4096, text_tokens=512, bytes_per_weight=2, card="3090"
    ),
    "Flux bf16 1024, H100": Case(
        model="flux", tokens=4096, text_tokens=512, bytes_per_weight=2, card="H100"
    ),
    "Qwen bf16 1024, 5090": Case(
        model="qwen", tokens=4096, text_tokens=256, bytes_per_weight=2, card="5090"
    ),
    "Qwen bf16 1328 CFG, 4090": Case(
        model="qwen", tokens=6889, text_tokens=256, bytes_per_weight=2, card="4090", batch=2
    ),
    "Qwen fp8 1328 CFG, 4090": Case(
        model="qwen", tokens=6889, text_tokens=256, bytes_per_weight=1, card="4090", batch=2
    ),
    "HunyuanVideo bf16 544p 73f, 4090": Case(
        model="hunyuan", tokens=38760, text_tokens=256, bytes_per_weight=2, card="4090"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    rows = {name: row(case) for name, case in CASES.items()}
    if parser.parse_args().json:
        print(json.dumps(rows, indent=2))
        return
    print("seconds of a step, everything streamed; assumed rates")
    print(f"{'case':34} {'GB':>5} {'computing':>9} {'per module':>10} {'prefetch':>8}  copies")
    for name, one in rows.items():
        hidden = one["prefetch"] <= one["computing"] * 1.01
        print(
            f"{name:34} {one['gigabytes']:5.1f} {one['computing']:9.2f} {one['per_module']:10.2f} "
            f"{one['prefetch']:8.2f}  {'hidden' if hidden else 'not hidden'}"
        )


def row(case: Case) -> dict[str, float]:
    """Gigabytes of block weights and seconds of a step: computing, per module, with prefetch."""
    rate = CARDS[case.card].copy_rate
    blocks = blocks_of(case)
    sizes = [block.bytes for block in blocks]
    return {
        "gigabytes": sum(sizes) / 1e9,
        "computing": sum(block.seconds for block in blocks),
        "per_module": per_module_seconds(case),
        "prefetch": simulate(blocks, sizes, rate=rate, depth=1).seconds,
    }


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


def per_module_seconds(case: Case) -> float:
    """ComfyUI's own streaming, with two streams: the copy for a module starts when computing has
    reached the module before it."""
    card = CARDS[case.card]
    now = engine = reached = start = 0.0
    for _ in range(2):
        start = now
        for op in (op for ops in _ops(case) for op in ops):
            if op.weights:
                engine = max(engine, reached) + op.weights * case.bytes_per_weight / card.copy_rate
                reached = now
                now = max(now, engine)
            now += op.flops / card.compute_rate
    return now - start


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

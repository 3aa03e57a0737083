"""A quantised weight as one run of bytes: where each part of each segment lies in it.

One buffer per layer is what ComfyUI's memory management moves, pins and maps from a file in one
piece. The parts are views of it, contiguous and at multiples of ALIGNMENT bytes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .weight import PARTS, Facts, QuantWeight, Segment

ALIGNMENT = 256  # bytes; what CUDA's own allocations keep at least, and vector loads want


@dataclass(frozen=True)
class Part:
    """One tensor of a segment: its field of Segment, and its bytes' place in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """One segment: its facts and its parts."""

    facts: Facts
    parts: tuple[Part, ...]


def aligned(num_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def places_of(weight: QuantWeight) -> tuple[tuple[Place, ...], int]:
    """Where the parts of a weight go, and how many bytes they take together."""
    places, offset = [], 0
    for segment in weight.segments:
        parts = []
        for name in PARTS:
            tensor = getattr(segment, name)
            if tensor is not None:
                part = Part(name, tensor.dtype, tuple(tensor.shape), offset)
                parts.append(part)
                offset += aligned(part.num_bytes)
        places.append(Place(segment.facts, tuple(parts)))
    return tuple(places), offset


def packed(weight: QuantWeight) -> tuple[torch.Tensor, tuple[Place, ...]]:
    """The weight's bytes as one uint8 tensor on its device; gaps are zero."""
    places, num_bytes = places_of(weight)
    device = weight.segments[0].q.device
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    views = unpacked(buffer, places, weight.shape).segments
    for source, target, place in zip(weight.segments, views, places, strict=True):
        for part in place.parts:
            getattr(target, part.name).copy_(getattr(source, part.name))
            end = part.offset + part.num_bytes
            buffer[end : aligned(end)] = 0
    return buffer, places


def unpacked(
    buffer: torch.Tensor, places: tuple[Place, ...], shape: tuple[int, int]
) -> QuantWeight:
    """The weight whose parts are views of `buffer`, wherever that was moved."""
    segments = []
    for place in places:
        parts = {
            part.name: buffer[part.offset : part.offset + part.num_bytes]
            .view(part.dtype)
            .view(part.shape)
            for part in place.parts
        }
        segments.append(Segment(place.facts, **parts))
    return QuantWeight(shape, tuple(segments))


# ---- the same as JSON, for a file's metadata ----
def places_to_json(places: tuple[Place, ...]) -> list[Any]:
    """[[facts, [[name, dtype, shape, offset], ...]], ...]"""
    return [
        [
            list(asdict(place.facts).values()),
            [
                [part.name, str(part.dtype).removeprefix("torch."), list(part.shape), part.offset]
                for part in place.parts
            ],
        ]
        for place in places
    ]


def places_from_json(value: Any, num_bytes: int) -> tuple[Place, ...]:
    """Inverse of places_to_json. Raises ValueError unless every part lies inside `num_bytes`."""
    places = []
    try:
        for facts, parts in value:
            read = []
            for name, dtype, shape, offset in parts:
                kind = getattr(torch, dtype)
                part = Part(name, kind, tuple(int(size) for size in shape), int(offset))
                inside = offset >= 0 and part.offset + part.num_bytes <= num_bytes
                if name not in PARTS or offset % ALIGNMENT or min(part.shape) < 0 or not inside:
                    raise ValueError(f"a part is not inside its layer: {name}")
                read.append(part)
            places.append(Place(Facts(*facts), tuple(read)))
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    return tuple(places)

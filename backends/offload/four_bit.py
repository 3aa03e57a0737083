"""Whether a 4-bit file of a model would fit where the model itself has to stream.

Sizes are those of a file that SlipstreamSVDQuantConvert writes: int4 codes with scales per group of
64 and a low-rank branch of rank 32, modulation layers in AWQ, everything else in 16 bits.
"""

from collections.abc import Iterator

import torch

from ..svdquant.families import FAMILIES, Family
from ..svdquant.families.data import Layer
from .blocks import parts_of

RANK, GROUP = 32, 64
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def four_bit_bytes(network: torch.nn.Module) -> int | None:
    """Bytes of weights in such a file, on the device; None where we cannot convert the model, or
    where it is quantised already."""
    names = {name for name, _ in network.named_modules()}
    names |= {name for name, _ in network.named_parameters()}
    family = next((one for one in FAMILIES if one.matches_native(names)), None)
    if family is None:
        return None
    layers = dict(_layers(network, family))
    total = 0
    for name, parameter in network.named_parameters():
        path, _, kind = name.rpartition(".")
        layer = layers.get(path)
        if layer is None or kind != "weight":
            total += 2 * parameter.numel()
            continue
        _, context = parts_of(parameter)
        if context is not None or parameter.dtype not in _PLAIN or parameter.ndim != 2:
            return None
        total += layer_bytes(layer, *parameter.shape)
    return total if layers else None


def layer_bytes(layer: Layer, num_rows: int, num_columns: int) -> int:
    """Of one layer's weight [num_rows, num_columns]. A fused layer has a branch per part."""
    codes = num_rows * num_columns // 2
    scales = 2 * num_rows * (num_columns // GROUP)
    if layer.chunks:
        return codes + 2 * scales  # and zeros
    grid = layer.choices[0]
    high, wide = len(grid), len(grid[0])
    smooth = 2 * num_columns * high
    branch = 2 * RANK * (num_rows * wide + num_columns * high)
    return codes + scales + smooth + branch


def _layers(network: torch.nn.Module, family: Family) -> Iterator[tuple[str, Layer]]:
    """Path -> Layer of the network's modules that the family quantises."""
    for block in family.blocks:
        known = {layer.target: layer for layer in block.layers}
        for path, _ in network.named_modules():
            place = block.in_target(path)
            if place is not None and place[1] in known:
                yield path, known[place[1]]

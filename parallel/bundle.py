"""A call's tensors from process 0 to the ranks of a group: small ones in one, large ones alone."""

from collections.abc import Sequence

import torch

from .comm import Group, as_bytes
from .wire import Meta

_SMALL_BYTES = 1 << 20
_ALIGNMENT = 16  # every dtype may be viewed at these offsets


def send_bundle(group: Group, tensors: Sequence[torch.Tensor]) -> None:
    """Broadcast contiguous tensors; their metas must have reached the other ranks."""
    device = group.clock.device
    metas = [Meta.of(t) for t in tensors]
    offsets, size = _layout(metas)
    if size:
        flat = torch.empty(size, dtype=torch.uint8, device=device)
        for tensor, offset in zip(tensors, offsets, strict=True):
            if offset is not None and tensor.numel():
                flat[offset : offset + tensor.nbytes].copy_(as_bytes(tensor))
        group.broadcast(flat, root=0)
    for tensor, offset in zip(tensors, offsets, strict=True):
        if offset is None:
            group.broadcast(tensor.to(device), root=0)


def receive_bundle(group: Group, metas: Sequence[Meta]) -> list[torch.Tensor]:
    """The tensors that rank 0 sends, each on the device or the CPU as it was there."""
    device = group.clock.device
    offsets, size = _layout(metas)
    flat = torch.empty(size, dtype=torch.uint8, device=device)
    group.broadcast(flat, root=0)
    received = []
    for meta, offset in zip(metas, offsets, strict=True):
        if offset is None:
            tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            group.broadcast(tensor, root=0)
        else:
            part = flat[offset : offset + meta.num_bytes]
            tensor = part.view(meta.dtype).view(meta.shape)
        received.append(tensor if meta.on_device else tensor.cpu())
    return received


def _layout(metas: Sequence[Meta]) -> tuple[list[int | None], int]:
    """Offset of each small tensor in their common buffer, None for large ones; its size."""
    offsets: list[int | None] = []
    size = 0
    for meta in metas:
        if meta.num_bytes > _SMALL_BYTES:
            offsets.append(None)
            continue
        offsets.append(size)
        size += -(-meta.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, size

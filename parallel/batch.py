"""A call's batch in parts: which rows each lane gets, cut out of the arguments, joined afterwards.

A row is one sample of a model call: an image times a prompt that ComfyUI merged into the call.
What a network does with a row does not depend on the others (backends.architectures.rows knows
the networks for which it does), so parts of any lengths give what the whole gives.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch


def latent(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The latent of a call, its first argument; the first of them where it is a list."""
    found = next(iter(arguments.values()), None)
    while isinstance(found, (list, tuple)) and found:
        found = found[0]
    return found if torch.is_tensor(found) else None


def rows(arguments: Mapping[str, Any]) -> int | None:
    """Rows of a call: the first dimension of its latent; None without one."""
    found = latent(arguments)
    return found.shape[0] if found is not None and found.ndim else None


def deal(num_rows: int, speeds: Sequence[float], *, leaves_out: bool = True) -> list[int]:
    """Whole rows for each lane, so that the slowest is done as early as can be.

    speeds: rows per second of each lane. Lane 0, this process's own, gets at least one row;
    another may get none, if leaves_out and not for want of rows.
    """
    counts = [0] * len(speeds)
    first = 1 if leaves_out else len(speeds)
    for number in range(num_rows):
        fastest = min(
            range(len(speeds)), key=lambda lane: ((counts[lane] + 1) / speeds[lane], lane)
        )
        counts[number if number < first else fastest] += 1
    return counts


def cut(value: Any, num_rows: int, start: int, length: int, whole: Collection[str] = ()) -> Any:
    """Rows start .. start + length of `value`: of its tensors with num_rows rows, at any depth.

    Other tensors are shared whole (one row for all, weights, frequencies), and so is what a dict
    has under a name in `whole`.
    """
    if torch.is_tensor(value):
        is_batch = value.ndim > 0 and value.shape[0] == num_rows
        return value.narrow(0, start, length) if is_batch else value
    if type(value) in (list, tuple):
        return type(value)(cut(one, num_rows, start, length, whole) for one in value)
    if type(value) is dict:
        return {
            name: one if name in whole else cut(one, num_rows, start, length, whole)
            for name, one in value.items()
        }
    return value


def cut_options(
    options: Mapping[str, Any], num_rows: int, start: int, length: int
) -> dict[str, Any]:
    """transformer_options of a part: what ComfyUI says of each row there, the rest as it is.

    cond_or_uncond and uuids have one entry per chunk of equally many rows, which a part need not
    consist of: then a part has one entry per row, as if every chunk had one.
    """
    found = dict(options)
    if torch.is_tensor(options.get("sigmas")):
        found["sigmas"] = cut(options["sigmas"], num_rows, start, length)
    for name in ("cond_or_uncond", "uuids"):
        chunks = options.get(name)
        if isinstance(chunks, (list, tuple)) and chunks and num_rows % len(chunks) == 0:
            found[name] = type(chunks)(_chunks(list(chunks), num_rows, start, length))
    return found


def _chunks(chunks: list[Any], num_rows: int, start: int, length: int) -> list[Any]:
    rows_each = num_rows // len(chunks)
    if start % rows_each == 0 and length % rows_each == 0:
        return chunks[start // rows_each : (start + length) // rows_each]
    return [chunk for chunk in chunks for _ in range(rows_each)][start : start + length]


def spans(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(lane, start, length) of every lane that has rows."""
    start = 0
    for lane, length in enumerate(counts):
        if length:
            yield lane, start, length
        start += length


def join(outputs: Sequence[Any]) -> Any:
    """A network's output (a tensor, or a list or tuple of such) from those of its parts."""
    if len(outputs) == 1:
        return outputs[0]
    first = outputs[0]
    if torch.is_tensor(first):
        return torch.cat(list(outputs), 0)
    if type(first) in (list, tuple):
        return type(first)(join(parts) for parts in zip(*outputs, strict=True))
    if first is None:
        return None
    raise TypeError(f"a network's output is a {type(first).__name__}")

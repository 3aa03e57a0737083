"""Prompts shared out over batches, and the CONDITIONING of one batch.

An encoded prompt is CONDITIONING as CLIP.encode_from_tokens_scheduled returns it: a list of
[tensor [1, tokens, width], dict], one entry, or one per part of a clip schedule.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .padding import Padding, common_length

Conditioning = list[list[Any]]
_MASK = "attention_mask"  # [1, tokens], 1 where there is a token


def plan(prompts: Sequence[Conditioning], padding: Padding, size: int) -> list[list[int]]:
    """Indices of the prompts of each batch, at most `size`; every prompt once.

    A prompt goes into the first batch that has room and that it fits into, so that the order stays
    where nothing hinders.
    """
    batches: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        for batch in batches:
            if len(batch) < size and fits([prompts[i] for i in batch], prompt, padding):
                batch.append(index)
                break
        else:
            batches.append([index])
    return batches


def fits(batch: Sequence[Conditioning], prompt: Conditioning, padding: Padding) -> bool:
    """Whether `prompt` can be one more row of `batch`, and all rows give what they give alone."""
    if padding.way == "alone":
        return False
    if common_length([length(p) for p in (*batch, prompt)], padding) is None:
        return False
    first = batch[0]
    return len(first) == len(prompt) and all(
        _alike(one, other, padding) for one, other in zip(first, prompt, strict=True)
    )


def join(prompts: Sequence[Conditioning], padding: Padding) -> Conditioning:
    """One CONDITIONING, row i of which is prompts[i]; they must fit by plan()."""
    if len(prompts) == 1:
        return prompts[0]
    lengths = [length(prompt) for prompt in prompts]
    target = common_length(lengths, padding)
    assert target is not None, lengths
    joined = []
    for entries in zip(*prompts, strict=True):
        rows = [_lengthened(tensor, target, padding) for tensor, _ in entries]
        extras = [extra for _, extra in entries]
        options = {
            name: torch.cat([e[name] for e in extras]) if _has_rows(value) else value
            for name, value in extras[0].items()
            if name != _MASK
        }
        if masks := _masks(extras, lengths, target, padding):
            # Some networks count a mask's ones and take the number for one row's (Lumina2, Omnigen2
            # and GenmoMochi in comfy/model_base.py): one row stands for equal ones.
            is_one = all(torch.equal(mask, masks[0]) for mask in masks)
            options[_MASK] = masks[0] if is_one else torch.cat(masks)
        joined.append([torch.cat(rows), options])
    return joined


def length(prompt: Conditioning) -> int:
    """Tokens of a prompt."""
    return int(prompt[0][0].shape[1])


def _alike(one: list[Any], other: list[Any], padding: Padding) -> bool:
    """Whether two entries differ in nothing but their rows, and in a length that can be padded."""
    (text, extra), (other_text, other_extra) = one, other
    pads = padding.way in ("repeat", "mask", "left")
    if text.ndim != 3 or text.shape[0] != 1 or text.dtype != other_text.dtype:
        return False
    if text.shape[2:] != other_text.shape[2:] or other_text.shape[0] != 1:
        return False
    if not pads and text.shape != other_text.shape:
        return False
    if not pads and not _same_mask(extra.get(_MASK), other_extra.get(_MASK)):
        return False
    names = extra.keys() - {_MASK}
    if names != other_extra.keys() - {_MASK}:
        return False
    return all(_row_of_the_same(extra[name], other_extra[name]) for name in names)


def _same_mask(mask: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two prompts have the same tokens masked; other rows would need another mask."""
    if mask is None or other is None:
        return mask is other
    return torch.equal(mask, other)


def _has_rows(value: Any) -> bool:
    """Whether an encoder's extra value has a row per prompt; core adds the axis to 1-D ones."""
    return isinstance(value, torch.Tensor) and value.ndim > 1


def _row_of_the_same(value: Any, other: Any) -> bool:
    """Whether values of two prompts can be rows of one, or are one value for the whole batch."""
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            _has_rows(value)
            and _has_rows(other)
            and value.shape == other.shape
            and value.shape[0] == 1
            and value.dtype == other.dtype
        )
    if isinstance(value, list | tuple | dict):
        return value is other or (_plain(value) and value == other)
    return type(value) is type(other) and bool(value is other or value == other)


def _plain(value: Any) -> bool:
    """Whether == of this value gives a truth: no tensor anywhere in it."""
    if isinstance(value, dict):
        return all(_plain(one) for one in value.values())
    if isinstance(value, list | tuple):
        return all(_plain(one) for one in value)
    return isinstance(value, str | int | float | bool | None)


def _lengthened(text: torch.Tensor, target: int, padding: Padding) -> torch.Tensor:
    """[1, tokens, width] to [1, target, width]."""
    missing = target - text.shape[1]
    if missing == 0:
        return text
    if padding.way == "repeat":
        return text.repeat(1, target // text.shape[1], 1)
    return torch.nn.functional.pad(text, (0, 0, *_sides(missing, padding)))


def _sides(missing: int, padding: Padding) -> tuple[int, int]:
    return (missing, 0) if padding.way == "left" else (0, missing)


def _masks(
    extras: Sequence[dict[str, Any]], lengths: Sequence[int], target: int, padding: Padding
) -> list[torch.Tensor]:
    """A mask [1, target] per prompt, or none where the prompts have none and need none."""
    is_padded = padding.way == "mask" and any(one != target for one in lengths)
    if not is_padded and not any(_MASK in extra for extra in extras):
        return []
    masks = []
    for extra, tokens in zip(extras, lengths, strict=True):
        mask = extra.get(_MASK, torch.ones(1, tokens, dtype=torch.long))
        if padding.way == "repeat":
            masks.append(mask.repeat(1, target // tokens))
        else:
            masks.append(torch.nn.functional.pad(mask, _sides(target - tokens, padding)))
    return masks

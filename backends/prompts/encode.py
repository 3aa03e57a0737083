"""Prompts through a CLIP, one at a time, into batches that a sampler takes."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import host
from .batches import Conditioning, join, length, plan
from .lines import Line, PromptsError
from .padding import Padding, padding_of

log = logging.getLogger("slipstream")


@dataclass(frozen=True)
class PromptBatch:
    """Row i of the conditioning is lines[i]; lengths: of each prompt, in tokens."""

    conditioning: Conditioning
    lines: tuple[Line, ...]
    lengths: tuple[int, ...]


def encode(clip: Any, lines: Sequence[Line], size: int) -> tuple[list[PromptBatch], Padding]:
    """Batches of at most `size` prompts, each row equal to its prompt's own encoding.

    clip: a CLIP of ComfyUI. Raises PromptsError without one; a cancel ends it between prompts.
    """
    if clip is None:
        raise PromptsError(
            "clip is empty: the checkpoint has no text encoder. Load one with Load CLIP."
        )
    padding = padding_of(clip)
    progress = host.progress(len(lines))
    encoded: list[Any] = []
    for line in lines:
        host.raise_if_cancelled()
        encoded.append(clip.encode_from_tokens_scheduled(clip.tokenize(line.text), show_pbar=False))
        progress(1)
    batches = []
    for indices in plan(encoded, padding, size):
        prompts = [encoded[i] for i in indices]
        for i in indices:
            encoded[i] = None  # a batch's rows are copies: 1000 prompts of Wan are 8 GB
        batches.append(
            PromptBatch(
                conditioning=join(prompts, padding),
                lines=tuple(lines[i] for i in indices),
                lengths=tuple(length(prompt) for prompt in prompts),
            )
        )
    return batches, padding


def tell(batches: Sequence[PromptBatch], padding: Padding, size: int, node_id: str | None) -> None:
    """Show summary() on the node, and write it to the log."""
    told = summary(batches, padding, size)
    log.info("Slipstream Prompt Batch: %s", told)
    host.show_text(told, node_id)


def summary(batches: Sequence[PromptBatch], padding: Padding, size: int) -> str:
    """What became of the prompts, in one to three sentences for the node and the log."""
    num_prompts = sum(len(batch.lines) for batch in batches)
    sizes = _listed(len(batch.lines) for batch in batches)
    told = [f"{_counted(num_prompts, 'prompt')} in {_counted(len(batches), 'batch')} of {sizes}."]
    if any(len(set(batch.lengths)) > 1 for batch in batches):
        told.append(f"{_HOW[padding.way]}: every picture is what its prompt alone gives.")
    if len(batches) > -(-num_prompts // size):
        lengths = sorted({n for batch in batches for n in batch.lengths})
        if padding.way == "alone":
            told.append(f"No two prompts share a batch: {padding.why}.")
        elif len(lengths) > 1 and padding.why:
            told.append(
                f"Prompts of {_listed(lengths)} tokens do not all share a batch: {padding.why}. "
                "The pictures are in the order of the batches; prompts and names follow them."
            )
        else:
            told.append("Prompts whose encodings differ in more than length are batches apart.")
    return " ".join(told)


_HOW = {
    "repeat": "Shorter prompts are repeated to one length",
    "mask": "Shorter prompts are padded and masked",
    "left": "Shorter prompts are padded as the network pads them",
}


def _listed(numbers: Iterable[int]) -> str:
    words = [str(number) for number in numbers]
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"

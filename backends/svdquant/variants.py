"""Models of one family that only a flag or an empty tensor tells apart (Family.variants).

ComfyUI picks how Qwen-Image-Edit-2511 treats reference images by a tensor without elements, which
files with diffusers' names do not hold: their `config` metadata says it. A name alone is a doubt
for a person to settle.
"""

import logging

from .dialects import Checkpoint
from .errors import CheckpointError
from .families import Variant

log = logging.getLogger("slipstream")


def stated_variants(checkpoint: Checkpoint) -> tuple[Variant, ...]:
    """The variants that a file is by its tensors or by the flags of its config."""
    config = checkpoint.header.json("config")
    return tuple(
        variant
        for variant in checkpoint.family.variants
        if variant.tensor in checkpoint.dense or any(config.get(f) is True for f in variant.flags)
    )


def missing_markers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The markers of ComfyUI that a file's config asks for and the file does not hold.

    Raises CheckpointError for a flag whose tensor has values and is not there.
    """
    missing = [v for v in stated_variants(checkpoint) if v.tensor not in checkpoint.dense]
    for variant in missing:
        if not variant.is_marker:
            raise CheckpointError(
                f"{checkpoint.header.path.name} lacks {variant.tensor}, which its config of "
                f"{variant.title} asks for: the file is truncated or its metadata are wrong"
            )
    return tuple(variant.tensor for variant in missing)


def variant_doubts(checkpoint: Checkpoint) -> list[str]:
    """What only the file's name says, in words; the file is loaded as if it did not say it."""
    stated, name = stated_variants(checkpoint), checkpoint.header.path.name
    return [
        f"the file's name says {v.in_name}, but neither its metadata nor its tensors do, so it is "
        f"not treated as {v.title}. If it is one, {v.advice}."
        for v in checkpoint.family.variants
        if v.in_name and v.in_name in name and v not in stated
    ]


def variant_notes(checkpoint: Checkpoint) -> list[str]:
    """The doubts as sentences for the log (written here) and the report."""
    notes = [f"SVDQuant {checkpoint.header.path.name}: {d}" for d in variant_doubts(checkpoint)]
    for note in notes:
        log.warning("%s", note)
    return notes


def variant_lines(checkpoint: Checkpoint) -> list[str]:
    """For SVDQuant Inspect."""
    stated = [f"Variant: {variant.title}." for variant in stated_variants(checkpoint)]
    return stated + [f"Doubt: {doubt}" for doubt in variant_doubts(checkpoint)]

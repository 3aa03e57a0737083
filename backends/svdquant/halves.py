"""Headers of model files, where a model may lie in two of them (Nunchaku's old folders).

The folders `svdq-int4-flux.1-*` hold the quantised blocks and the rest apart; nobody needs a
merged file to load them. Source: nunchaku, merge_safetensors.py (names of the files, no key in
both, config.json beside them).
"""

import json
from dataclasses import replace
from pathlib import Path

from .errors import CheckpointError
from .header import Header, read_header

BLOCKS, REST = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
_BLOCK_NAMES = ("transformer_blocks.", "single_transformer_blocks.")
_MAX_CONFIG_BYTES = 1_000_000


def read_model_header(path: str | Path) -> Header:
    """The checked header of a model: of one file, or of both halves whichever was chosen.

    Raises CheckpointError as `read_header` does, and naming the file that a half lacks.
    """
    path = Path(path)
    if path.is_dir() and (path / BLOCKS).is_file():
        path = path / BLOCKS
    header = read_header(path)
    other = _other_half(header)
    if other is None:
        return header
    if not other.is_file():
        held = "everything but the blocks" if other.name == BLOCKS else "only the blocks"
        raise CheckpointError(
            f"{path.name} is half of a Nunchaku model: it holds {held}. Put {other.name} of the "
            f"same model beside it (in {path.parent.name}), or download the single-file version."
        )
    return _joined(header, read_header(other))


def _other_half(header: Header) -> Path | None:
    """Where the other file must be; None for a whole model."""
    name = header.path.name
    if name == REST:
        return header.path.with_name(BLOCKS)
    quantised = any(n.endswith(".qweight") for n in header.tensors)
    only_blocks = quantised and all(n.startswith(_BLOCK_NAMES) for n in header.tensors)
    return header.path.with_name(REST) if only_blocks or name == BLOCKS else None


def _joined(chosen: Header, other: Header) -> Header:
    """Both as one. Raises CheckpointError if a tensor is in both."""
    twice = sorted(chosen.tensors.keys() & other.tensors.keys())
    if twice:
        raise CheckpointError(
            f"{chosen.path.name} and {other.path.name} both hold {twice[0]}: "
            "they are not the two halves of one model."
        )
    return replace(
        chosen,
        tensors={**chosen.tensors, **other.tensors},
        metadata={**_config_beside(chosen.path), **other.metadata, **chosen.metadata},
        size=chosen.size + other.size,
        elsewhere=dict.fromkeys(other.tensors, other.path),
    )


def _config_beside(path: Path) -> dict[str, str]:
    """The folder's config.json as the metadata that single files carry; empty if there is none."""
    config = path.with_name("config.json")
    try:
        if config.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        text = config.read_text("utf-8")
        return {"config": text} if isinstance(json.loads(text), dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}

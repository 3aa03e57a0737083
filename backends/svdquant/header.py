"""Reads and checks the header of a safetensors file, trusting nothing in it.

No tensor is read and no library is asked: the checks run before any memory is taken, so a hostile
length or offset costs nothing. What passes here, safetensors opens as well.
"""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorEntry:
    """dtype as safetensors names it; shape; start and end: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, its metadata (text to text), its size in bytes.

    A model in two files (halves.py) is one Header: path is the file that was asked for, elsewhere
    the file of each tensor that is in the other one, size the bytes of both.
    """

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int = field(default=0)
    elsewhere: dict[str, Path] = field(default_factory=dict, repr=False)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file of the model, the one that was asked for first."""
        return (self.path, *dict.fromkeys(self.elsewhere.values()))

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor; its entry's bytes count from that file's start."""
        return self.elsewhere.get(name, self.path)

    def read_bytes(self, name: str, limit: int = 65536) -> bytes:
        """The raw bytes of a small tensor. Raises CheckpointError over `limit` bytes."""
        entry = self.tensors[name]
        if entry.num_bytes > limit:
            raise CheckpointError(
                f"{self.path.name}: {name} has {entry.num_bytes} bytes where at most {limit} "
                "make sense. The file is damaged: download it again."
            )
        with self.path_of(name).open("rb") as file:
            file.seek(entry.start)
            return file.read(entry.num_bytes)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object kept as text in the metadata; empty if absent or not an object."""
        try:
            value = json.loads(self.metadata.get(name, "{}"))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def read_header(path: str | Path) -> Header:
    """The checked header of one safetensors file.

    Raises CheckpointError, naming the file, for anything a safetensors file must not be: missing,
    a folder, truncated, oversized header, bad JSON, duplicate names, wrong sizes, gaps, overlaps.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path.name} is a folder: choose a .safetensors file.")
    if not path.is_file():
        raise CheckpointError(f"{path.name} does not exist. Refresh the model list.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(path, file.read(8), size)
        text = file.read(length)
    fields = _parse(path, text)
    metadata = _metadata(path, fields.pop("__metadata__", {}))
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in fields.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata, size)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path.name} is too short for a safetensors file: download it again")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES or length < 2:
        raise CheckpointError(
            f"{path.name} is not a safetensors file (its header would have {length} bytes)"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path.name} is truncated inside its header ({size} bytes): download it again"
        )
    return length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(next(n for n in names if names.count(n) > 1))
    return found


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path.name}: its header holds the key '{error}' twice. "
            "The file was written wrongly: download it again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a damaged header ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path.name} has a damaged header (not a JSON object)")
    return fields


def _metadata(path: Path, value: Any) -> dict[str, str]:
    texts = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    if not texts:
        raise CheckpointError(f"{path.name} has damaged metadata (not text to text)")
    return dict(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        valid = (
            dtype in DTYPE_BYTES
            and isinstance(shape, list)
            and len(shape) <= 16
            and all(map(_is_count, (*shape, start, end)))
            and start <= end
        )
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path.name}: the entry of {name} in its header is damaged")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if needed != end - start:
        raise CheckpointError(
            f"{path.name}: {name} {dtype}{shape} needs {needed} bytes, "
            f"but the header gives it {end - start}: download the file again"
        )
    return TensorEntry(dtype, tuple(shape), base + start, base + end)


def _check_coverage(path: Path, tensors: dict[str, TensorEntry], start: int, size: int) -> None:
    at = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a gap"
            raise CheckpointError(f"{path.name}: {name} {kind}: the file is damaged")
        at = entry.end
    if at > size:
        raise CheckpointError(
            f"{path.name} is truncated: its header describes {at} bytes, the file has {size}. "
            "Download it again."
        )
    if at < size:
        raise CheckpointError(f"{path.name} has {size - at} bytes behind its last tensor")

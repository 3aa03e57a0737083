"""The unpacked form of a model as a safetensors file that is mapped, not read.

Tensors have ComfyUI's names. A quantised weight is one uint8 tensor, its buffer, whose places are
in the metadata; every tensor starts at a multiple of ALIGNMENT (tensors named GAP fill what is
between). A copy belongs to one source, compute dtype and state of the code that unpacks.

Whether a copy is whole: it is written under another name and renamed; once it is on the disk, its
file date is set to one that the file itself states. While the date is that one, nothing has written
to the file since, and only header and size are checked; else the checksums of all tensors are.
"""

import ast
import ctypes
import functools
import hashlib
import json
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import SlipstreamError
from .buffer import Place, aligned, packed, places_from_json, places_to_json
from .errors import CheckpointError
from .header import Header, read_header
from .weight import QuantWeight

VERSION = 1
INFO, LAYERS = "slipstream_svdquant", "slipstream_layers"  # keys of the metadata
GAP = "slipstream.gap."
HERE = Path(__file__).parent
_UNPACKERS = ("assemble.py", "buffer.py", "repacked.py")  # these and what they import
_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
_NUM_SAMPLES, _SAMPLE_BYTES = 32, 65536
_CHUNK_BYTES = 1 << 22
_NUM_WAITING = 2  # tensors to be written


class DamagedError(SlipstreamError, ValueError):
    """A copy that is not what it should be; the sentence says why, and it is made again."""


@functools.cache
def code_version() -> str:
    """Hash of the code that decides a copy's bytes, comments aside.

    So nobody has to remember to count a version up.
    """
    trees: dict[Path, ast.Module] = {}
    for name in _UNPACKERS:
        _add_imported(HERE / name, trees)
    digest = hashlib.sha256()
    for path in sorted(trees):
        digest.update(f"{path.name} {ast.dump(trees[path])}".encode())
    return digest.hexdigest()[:16]


def _add_imported(path: Path, trees: dict[Path, ast.Module]) -> None:
    """The tree of a module, and of every module of this package that it imports."""
    if path in trees or not path.is_file():
        return
    trees[path] = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(trees[path]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if not base.is_relative_to(HERE):
                continue
            for found in (base, *(base / alias.name for alias in node.names)):
                _add_imported(found.with_suffix(".py"), trees)
                _add_imported(found / "__init__.py", trees)


def identity(sources: Sequence[Path], dtype: torch.dtype) -> str:
    """What a copy of a model's files in `dtype` must say that it was made from.

    Of each source: size, date, header (names, types and places of all tensors, metadata) and 32
    samples of 64 KiB over the whole file. Hashing 12 GB would take longer than the load that the
    copy saves, and two models of the same header and date whose samples agree do not come about
    by replacing a file: training and quantising change every tensor.
    """
    digest = hashlib.sha256(f"{VERSION} {code_version()} {dtype}".encode())
    for source in sources:
        stat = source.stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        with source.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(min(length, stat.st_size)))
            for index in range(_NUM_SAMPLES):
                file.seek(max(0, stat.st_size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


# ---- writing ----
def write(
    file: BinaryIO,
    tensors: Iterable[tuple[str, "torch.Tensor | QuantWeight"]],
    *,
    num_tensors: int,
    source: Path,
    made_from: str,
) -> int:
    """Write a copy into an empty file; the date that it has to get once it is on the disk (seal).

    num_tensors: about how many the source has, for the room of the header. A thread writes while
    the next tensor is unpacked; a few are in memory at a time. Raises OSError if the disk is full.
    """
    base = 4096 * (64 + num_tensors) - 8
    file.seek(8 + base)
    entries: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    checksums: dict[str, int] = {}
    pending: deque[Future[None]] = deque()
    end = 0

    def store(name: str, tensor: torch.Tensor) -> None:
        content = _bytes_of(tensor)
        checksums[name] = zlib.crc32(content)
        file.write(content)

    with ThreadPoolExecutor(1) as writer:

        def put(name: str, tensor: torch.Tensor) -> None:
            nonlocal end
            start, end = end, end + tensor.numel() * tensor.element_size()
            dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            pending.append(writer.submit(store, name, tensor))
            while len(pending) > _NUM_WAITING:
                pending.popleft().result()

        for name, value in tensors:
            tensor = value
            if isinstance(value, QuantWeight):
                tensor, places = packed(value)
                layers[name] = [list(value.shape), places_to_json(places)]
            assert isinstance(tensor, torch.Tensor)
            put(name, tensor.contiguous())
            if gap := aligned(end) - end:
                put(f"{GAP}{end}", torch.zeros(gap, dtype=torch.uint8))
        while pending:
            pending.popleft().result()
    sealed = int(time.time()) // 2 * 2  # whole, as no write sets it; even, for FAT
    info = {
        "version": VERSION,
        "source": str(source),
        "made_from": made_from,
        "sealed": sealed,
        "checksums": checksums,
    }
    entries["__metadata__"] = {INFO: json.dumps(info), LAYERS: json.dumps(layers)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    assert len(text) <= base, "the header needs more room than 4 KiB per tensor"
    file.seek(0)
    file.write(struct.pack("<Q", base) + text.ljust(base))
    file.flush()
    return sealed


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, not copied; the tensor must outlive them."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def seal(path: Path, sealed: int) -> None:
    """Bring a copy that is known to be whole to the disk, which may take long; give it its date."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    os.utime(path, ns=(sealed * 10**9, sealed * 10**9))


# ---- reading ----
@dataclass(frozen=True)
class Layer:
    """A quantised weight of a copy: where its parts lie in its buffer, and its shape [N, K]."""

    places: tuple[Place, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Copy:
    """A copy whose header is right. names: of all tensors but the gaps."""

    header: Header
    names: tuple[str, ...]
    layers: dict[str, Layer]


def open_copy(path: Path, made_from: str, *, is_known_whole: bool = False) -> Copy:
    """The checked copy. Raises DamagedError for one of another source or code, or a damaged one.

    is_known_whole: this process has written it just now.
    """
    try:
        header = read_header(path)
        info = header.json(INFO)
        if info.get("version") != VERSION or info.get("made_from") != made_from:
            raise DamagedError("it was made from another file, or by another version")
        if not is_known_whole and path.stat().st_mtime_ns != info["sealed"] * 10**9:
            _verify(header, info["checksums"])
            seal(path, info["sealed"])
        names = tuple(name for name in header.tensors if not name.startswith(GAP))
        layers = {name: _layer(header, name, *v) for name, v in header.json(LAYERS).items()}
    except (CheckpointError, KeyError, TypeError, OSError) as error:
        raise DamagedError(f"it is damaged ({error})") from error
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"it is damaged ({error})") from error
    return Copy(header, names, layers)


def _layer(header: Header, name: str, shape: list[int], places: Any) -> Layer:
    num_rows, num_columns = (int(size) for size in shape)
    return Layer(places_from_json(places, header.tensors[name].num_bytes), (num_rows, num_columns))


def _verify(header: Header, checksums: dict[str, int]) -> None:
    """Raises DamagedError for a tensor whose bytes are not those that were written."""
    buffer = bytearray(_CHUNK_BYTES)
    with header.path.open("rb") as file:
        for name, entry in header.tensors.items():
            file.seek(entry.start)
            found, left = 0, entry.num_bytes
            while left:
                size = file.readinto(memoryview(buffer)[: min(left, _CHUNK_BYTES)])
                if not size:
                    raise DamagedError("it is shorter than it says")
                found = zlib.crc32(memoryview(buffer)[:size], found)
                left -= size
            if checksums.get(name) != found:
                raise DamagedError(f"{name} has other bytes than were written")


def read_info(path: Path) -> dict[str, Any] | None:
    """What a file says about itself if it is a copy, without checking more; else None."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                return None
            metadata = json.loads(file.read(length))["__metadata__"]
        info = json.loads(metadata[INFO])
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError):
        return None
    return info if isinstance(info, dict) and isinstance(info.get("source"), str) else None

"""The quantised layers of a file: which keys they have in each dialect, and whether they agree.

Pure header logic. Every check raises CheckpointError with the layer's name in the sentence.
"""

from dataclasses import dataclass, replace
from typing import Any

from .errors import CheckpointError
from .header import Header, TensorEntry
from .layouts import GROUP, TILE

N1, N2, LITE, KITCHEN = "nunchaku-1", "nunchaku-2", "nunchaku-lite", "comfy-kitchen"
NTEXT = "nunchaku-text"  # text encoders
FLOATS = ("BF16", "F16", "F32")

# part of a layer -> suffix of its key
_SVD = {"q": "qweight", "scale": "wscales", "bias": "bias", "tensor": "wtscale", "rows": "wcscales"}
SUFFIXES: dict[str, dict[str, str]] = {
    N1: {
        **_SVD,
        "smooth": "smooth",
        "smooth_orig": "smooth_orig",
        "down": "lora_down",
        "up": "lora_up",
    },
    N2: {
        **_SVD,
        "smooth": "smooth_factor",
        "smooth_orig": "smooth_factor_orig",
        "down": "proj_down",
        "up": "proj_up",
    },
    KITCHEN: {
        "q": "weight",
        "scale": "weight_scale",
        "smooth": "smooth_factor",
        "down": "proj_down",
        "up": "proj_up",
        "zeros": "weight_zero",
        "bias": "bias",
        "options": "comfy_quant",
    },
}
SUFFIXES[LITE] = SUFFIXES[N2]
AWQ_SUFFIXES = {"q": "qweight", "scale": "wscales", "zeros": "wzeros", "bias": "bias"}
TEXT_SUFFIXES = {"q": "qweight", "scale": "scales", "zeros": "scaled_zeros", "bias": "bias"}
TEXT_GROUP = 128  # the only one that Nunchaku's matmul of text encoders takes
# comfy-kitchen's own serialiser prefixes the parts of a weight
KITCHEN_ALIASES = {
    "weight_proj_down": "proj_down",
    "weight_proj_up": "proj_up",
    "weight_smooth_factor": "smooth_factor",
    "weight_zeros": "weight_zero",
}


@dataclass(frozen=True, kw_only=True)
class FileLayer:
    """One quantised layer of a file.

    precision: int4, nvfp4 (both with 4-bit inputs) or awq (int4 weights, 16-bit inputs);
    parts: part -> key; unsigned: as the file says it, None where topology decides; folded: the
    low-rank branch reads unsmoothed inputs (false: it must be divided by smooth first); group:
    columns to one scale (awq).
    """

    name: str
    precision: str
    num_rows: int
    num_columns: int
    rank: int
    parts: dict[str, str]
    unsigned: bool | None = None
    folded: bool = True
    group: int = GROUP["awq"]


class LayerReader:
    """Checks the parts of one layer against each other."""

    def __init__(self, header: Header, name: str, parts: dict[str, str], suffixes: dict[str, str]):
        self.header, self.name, self.parts, self.suffixes = header, name, parts, suffixes

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.header.path.name}: layer {self.name} {what}")

    def entry(self, part: str) -> TensorEntry:
        if part not in self.parts:
            raise self.fail(
                f"lacks {self.suffixes[part]}: the file is truncated or in another dialect"
            )
        return self.header.tensors[self.parts[part]]

    def check(self, part: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
        entry = self.entry(part)
        if entry.shape != shape or entry.dtype not in dtypes:
            raise self.fail(
                f"has {self.suffixes[part]} {entry.dtype}{list(entry.shape)}, "
                f"but {'/'.join(dtypes)}{list(shape)} fits the rest: the file is damaged"
            )

    def check_bias(self, num_rows: int) -> None:
        """A layer need not have one."""
        if "bias" in self.parts:
            self.check("bias", (num_rows,))

    def matrix(self, part: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        entry = self.entry(part)
        if len(entry.shape) != 2 or entry.dtype not in dtypes:
            raise self.fail(
                f"has {self.suffixes[part]} {entry.dtype}{list(entry.shape)}, "
                f"but a matrix of {'/'.join(dtypes)} is needed: the file is damaged"
            )
        return entry.shape[0], entry.shape[1]

    def tiled(self, num_rows: int, num_columns: int) -> None:
        if num_rows % TILE or num_columns % TILE or not num_rows or not num_columns:
            raise self.fail(
                f"has N={num_rows}, K={num_columns}: not a multiple of {TILE} (group 64)"
            )

    def low_rank(self, num_rows: int, num_columns: int, step: int) -> int:
        """The rank; 0 if the layer has no low-rank branch."""
        if "down" not in self.parts and "up" not in self.parts:
            return 0
        rank = self.matrix("down", FLOATS)[1]
        if rank % step:
            raise self.fail(f"has rank {rank}: not a multiple of {step}")
        self.check("down", (num_columns, rank))
        self.check("up", (num_rows, rank))
        return rank

    def scale_precision(self, num_rows: int, num_columns: int) -> str:
        groups, _ = self.matrix("scale", (*FLOATS, "F8_E4M3"))
        precision = "nvfp4" if self.entry("scale").dtype == "F8_E4M3" else "int4"
        wanted = num_columns // (16 if precision == "nvfp4" else 64)
        if groups != wanted or self.entry("scale").shape[1] != num_rows:
            raise self.fail(
                f"has {self.suffixes['scale']} {list(self.entry('scale').shape)}, but "
                f"{precision} needs [{wanted}, {num_rows}]: the file is damaged"
            )
        return precision

    def svdquant(self, dialect: str) -> FileLayer:
        num_rows, num_bytes = self.matrix("q", ("I8", "U8"))
        num_columns = num_bytes * 2
        self.tiled(num_rows, num_columns)
        precision = self.scale_precision(num_rows, num_columns)
        self.check("smooth", (num_columns,))
        self.check_bias(num_rows)
        if "rows" in self.parts:
            self.check("rows", (num_rows,), (*FLOATS, "F8_E4M3"))
        if "tensor" in self.parts and self.entry("tensor").shape not in ((), (1,)):
            raise self.fail("has a wtscale that is not one number: the file is damaged")
        return FileLayer(
            name=self.name,
            precision=precision,
            num_rows=num_rows,
            num_columns=num_columns,
            rank=self.low_rank(num_rows, num_columns, 16),
            parts=self.parts,
            unsigned=False if dialect == LITE else None,
        )

    def awq(self) -> FileLayer:
        quarter, half = self.matrix("q", ("I32",))
        num_rows, num_columns = quarter * 4, half * 2
        if not num_rows or not num_columns or num_columns % 64:
            raise self.fail(f"has N={num_rows}, K={num_columns}: not a multiple of 64")
        groups = self.matrix("scale", FLOATS)[0]
        if groups < num_columns // 64:
            raise self.fail(f"has {groups} groups of scales, but K={num_columns} needs more")
        self.check("scale", (groups, num_rows))
        self.check("zeros", (groups, num_rows))
        return self._awq(num_rows, num_columns)

    def text_awq(self) -> FileLayer:
        """A layer of Nunchaku's text encoders: its scales are padded to a multiple of 8 groups."""
        quarter, num_columns = self.matrix("q", ("I16",))
        num_rows = quarter * 4
        if not num_rows or not num_columns or num_columns % TEXT_GROUP:
            raise self.fail(f"has N={num_rows}, K={num_columns}: not a multiple of {TEXT_GROUP}")
        num_groups = -(-num_columns // (8 * TEXT_GROUP)) * 8
        self.check("scale", (num_groups, num_rows))
        self.check("zeros", (num_groups, num_rows))
        return replace(self._awq(num_rows, num_columns), group=TEXT_GROUP)

    def kitchen(self, options: dict[str, Any]) -> FileLayer:
        kind = options.get("format", "svdquant_w4a4" if "smooth" in self.parts else "")
        if kind not in ("svdquant_w4a4", "awq_w4a16"):
            raise self.fail(f"has comfy_quant format '{kind}': only svdquant_w4a4 and awq_w4a16")
        if "zeros" in self.parts:
            return self._kitchen_awq()
        num_rows, num_columns = self._kitchen_shape()
        self.check("smooth", (num_columns,))
        self.check_bias(num_rows)
        basis = options.get("lowrank_branch_input_basis", "raw")
        return FileLayer(
            name=self.name,
            precision="int4",
            num_rows=num_rows,
            num_columns=num_columns,
            rank=self._kitchen_rank(num_rows, num_columns),
            parts=self.parts,
            unsigned=bool(options.get("act_unsigned", False)),
            folded=basis == "raw" or bool(options.get("proj_down_smooth_folded", False)),
        )

    def _kitchen_shape(self) -> tuple[int, int]:
        shape = self.entry("q").shape
        if len(shape) == 4 and shape[2:] == (32, TILE):
            num_rows, num_columns = shape[0] * TILE, shape[1] * 64
            self.check("q", shape, ("I8", "U8"))
            self.check("scale", (shape[0], shape[1], TILE))
            return num_rows, num_columns
        num_rows, num_bytes = self.matrix("q", ("I8", "U8"))
        self.tiled(num_rows, num_bytes * 2)
        self.check("scale", (num_bytes // 32, num_rows))
        return num_rows, num_bytes * 2

    def _kitchen_rank(self, num_rows: int, num_columns: int) -> int:
        rank = self.matrix("down", FLOATS)[1]
        self.check("down", (num_columns, rank))
        if len(self.entry("up").shape) == 3:
            self.check("up", (num_rows // TILE, rank, TILE))
        else:
            self.check("up", (num_rows, rank))
        return rank

    def _kitchen_awq(self) -> FileLayer:
        num_rows, num_bytes = self.matrix("q", ("I8", "U8"))
        self.check("scale", (num_bytes // 32, num_rows))
        self.check("zeros", (num_bytes // 32, num_rows))
        return self._awq(num_rows, num_bytes * 2)

    def _awq(self, num_rows: int, num_columns: int) -> FileLayer:
        self.check_bias(num_rows)
        return FileLayer(
            name=self.name,
            precision="awq",
            num_rows=num_rows,
            num_columns=num_columns,
            rank=0,
            parts=self.parts,
        )

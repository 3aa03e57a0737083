"""What a conversion will write, from the source file's header alone.

A Job reads one or more layers of the source (stacked by rows), and writes one or more layers of
the target (rows or columns of the stack). Sizes are known before anything is computed, so the
target's header is written first and its layers follow one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .config import ConvertConfig
from .dialects import PREFIXES
from .errors import CheckpointError
from .families import FAMILIES, SUPPORTED, Block, Family, Layer
from .file_layers import AWQ_SUFFIXES, SUFFIXES
from .header import Header
from .layouts import TILE

Spec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, shape
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer to write: these rows and columns of the job's stacked weight.

    owns_bias: the job's bias goes here (one of two layers whose outputs are added).
    """

    name: str
    rows: slice
    columns: slice
    unsigned: bool
    owns_bias: bool = True


@dataclass(frozen=True, kw_only=True)
class Job:
    """sources: layers of the source, same input; chunks: above 0 for a modulation layer."""

    sources: tuple[str, ...]
    targets: tuple[Target, ...]
    num_rows: int
    num_columns: int
    has_bias: bool
    chunks: int = 0


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A tensor that stays 16-bit; swapped: its halves (scale, shift) are exchanged."""

    source: str
    target: str
    shape: tuple[int, ...]
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `convert` does, in the order of the target file."""

    family: Family
    prefix: str
    jobs: tuple[Job, ...]
    copies: tuple[Copy, ...]


def plan_conversion(header: Header) -> Plan:
    """The conversion of a 16-bit file in ComfyUI's names. Raises CheckpointError if impossible."""
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in header.tensors)), "")
    names = {n.removeprefix(prefix) for n in header.tensors if n.startswith(prefix)}
    family = _family(header, names)
    planner = _Planner(header, prefix, family, names)
    jobs = tuple(planner.jobs())
    return Plan(family=family, prefix=prefix, jobs=jobs, copies=tuple(planner.copies()))


def _family(header: Header, names: set[str]) -> Family:
    layers = {name.removesuffix(".weight") for name in names}
    if any(name.endswith((".qweight", ".comfy_quant", ".weight_scale")) for name in names):
        raise CheckpointError(f"{header.path.name} is quantised already: convert the 16-bit file")
    for family in FAMILIES:
        if family.matches_native(layers):
            return family
    if any(family.matches({family.canonical(name) for name in layers}) for family in FAMILIES):
        raise CheckpointError(
            f"{header.path.name} has diffusers' names: convert the file that Load Diffusion Model "
            "reads (ComfyUI's names)"
        )
    raise CheckpointError(
        f"{header.path.name} is of a family that cannot be converted. Supported: {SUPPORTED}."
    )


class _Planner:
    def __init__(self, header: Header, prefix: str, family: Family, names: set[str]):
        self.header, self.prefix, self.family, self.names = header, prefix, family, names
        self.used: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self.header.tensors[self.prefix + name]
        if entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.header.path.name}: {name} is {entry.dtype}: convert a 16-bit file"
            )
        return entry.shape

    def jobs(self) -> Iterator[Job]:
        for block in self.family.blocks:
            found = {place[0] for name in self.names if (place := block.in_target(name))}
            for index in sorted(found):
                yield from self.block(block, index)

    def block(self, block: Block, index: int) -> Iterator[Job]:
        pending: dict[str, list[str]] = {}
        for layer in block.layers:
            name = f"{block.target}.{index}.{layer.target}"
            if f"{name}.weight" not in self.names:
                raise CheckpointError(f"{self.header.path.name} lacks {name}.weight")
            piece = layer.choices[0][0][0]
            count = piece.part[1]
            if count == 1:
                yield self.job((name,), layer, block, index)
                continue
            parts = pending.setdefault(piece.name, [])
            parts.append(name)
            if len(parts) == count:
                yield self.job(tuple(parts), layer, block, index)

    def job(self, sources: tuple[str, ...], layer: Layer, block: Block, index: int) -> Job:
        shapes = [self.shape(f"{name}.weight") for name in sources]
        self.used |= {f"{name}.{kind}" for name in sources for kind in ("weight", "bias")}
        if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise CheckpointError(f"{self.header.path.name}: {sources[0]} has an odd shape")
        num_rows, num_columns = sum(shape[0] for shape in shapes), shapes[0][1]
        job = Job(
            sources=sources,
            targets=tuple(self.targets(layer, f"{block.source}.{index}.", num_rows, num_columns)),
            num_rows=num_rows,
            num_columns=num_columns,
            has_bias=f"{sources[0]}.bias" in self.names,
            chunks=layer.chunks,
        )
        self.check(job)
        return job

    def targets(self, layer: Layer, prefix: str, num_rows: int, num_columns: int) -> list[Target]:
        grid = layer.choices[0]
        pieces = [piece for row in grid for piece in row]
        by_rows = len(grid) > 1
        total, unit = (num_rows, num_columns) if by_rows else (num_columns, num_rows)
        sizes = [size * unit for size in layer.sizes]
        if sizes[-1] < 0:
            sizes[-1] = total - sum(sizes[:-1])
        found, at = [], 0
        for i, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            span = slice(at, at + size)
            found.append(
                Target(
                    name=self.family.written(prefix + piece.name),
                    rows=span if by_rows else slice(0, num_rows),
                    columns=slice(0, num_columns) if by_rows else span,
                    unsigned=piece.unsigned,
                    owns_bias=by_rows or i == len(pieces) - 1,
                )
            )
            at += size
        return found

    def check(self, job: Job) -> None:
        step = 64 if job.chunks else TILE
        for target in job.targets:
            num_rows = target.rows.stop - target.rows.start
            num_columns = target.columns.stop - target.columns.start
            if num_rows % step or num_columns % step or num_rows <= 0 or num_columns <= 0:
                raise CheckpointError(
                    f"{self.header.path.name}: layer {job.sources[0]}: N={num_rows}, "
                    f"K={num_columns} is not a multiple of {step}"
                )

    def copies(self) -> Iterator[Copy]:
        for name in sorted(self.names - self.used):
            if self.family.is_marker(name):
                continue
            target = self.family.written(self.renamed(name))
            swapped = name.rpartition(".")[0] in self.family.swapped
            yield Copy(source=name, target=target, shape=self.shape(name), swapped=swapped)

    def renamed(self, name: str) -> str:
        for block in self.family.blocks:
            place = block.in_target(name)
            if place is None:
                continue
            index, inner = place
            for theirs, ours in block.copies:
                if inner.startswith(ours + "."):
                    return f"{block.source}.{index}.{theirs}{inner[len(ours) :]}"
        for theirs, ours in self.family.rest:
            if not theirs:
                return name
            if name == ours or name.startswith(ours + "."):
                return theirs + name[len(ours) :]
        raise CheckpointError(
            f"{self.header.path.name}: {name} is not part of {self.family.title}: "
            "this variant cannot be converted"
        )


def target_tensors(plan: Plan, config: ConvertConfig) -> dict[str, Spec]:
    """Name -> (dtype, shape) of every tensor that will be written, in the order of writing."""
    found: dict[str, Spec] = {}
    for job in plan.jobs:
        for target in job.targets:
            found |= {
                f"{target.name}.{suffix}": spec
                for suffix, spec in _layer_tensors(plan.family, job, target, config).items()
            }
    for copy in plan.copies:
        found[copy.target] = ("BF16", copy.shape)
    return found


def _layer_tensors(
    family: Family, job: Job, target: Target, config: ConvertConfig
) -> dict[str, Spec]:
    num_rows = target.rows.stop - target.rows.start
    num_columns = target.columns.stop - target.columns.start
    if job.chunks:
        shapes: dict[str, Spec] = {
            "q": ("I32", (num_rows // 4, num_columns // 2)),
            "scale": ("BF16", (num_columns // 64, num_rows)),
            "zeros": ("BF16", (num_columns // 64, num_rows)),
        }
        suffixes = AWQ_SUFFIXES
    else:
        group, scale = (16, "F8_E4M3") if config.precision == "nvfp4" else (64, "BF16")
        shapes = {
            "q": ("I8", (num_rows, num_columns // 2)),
            "scale": (scale, (num_columns // group, num_rows)),
            "smooth": ("BF16", (num_columns,)),
            "smooth_orig": ("BF16", (num_columns,)),
            "down": ("BF16", (num_columns, config.rank)),
            "up": ("BF16", (num_rows, config.rank)),
        }
        if config.precision == "nvfp4":
            if family.scales_rows(target.name):
                shapes["rows"] = ("BF16", (num_rows,))
            else:
                shapes["tensor"] = ("F32", (1,))
        suffixes = SUFFIXES[family.dialect]
    if job.has_bias:
        shapes["bias"] = ("BF16", (num_rows,))
    return {suffixes[part]: spec for part, spec in shapes.items()}

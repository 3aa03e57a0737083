"""Which dialect and family a file is, from its keys and shapes; pure header logic.

`detect` never trusts a file's name. It gives a Checkpoint whose layers are complete and whose
shapes agree with each other, or raises CheckpointError with the sentence the user sees.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError
from .families import FAMILIES, SUPPORTED, Family
from .file_layers import (
    AWQ_SUFFIXES,
    KITCHEN,
    KITCHEN_ALIASES,
    LITE,
    N1,
    N2,
    NTEXT,
    SUFFIXES,
    FileLayer,
    LayerReader,
)
from .header import Header

DIALECTS = {
    N1: "Nunchaku (lora_down, smooth)",
    N2: "Nunchaku (proj_down, smooth_factor)",
    LITE: "Nunchaku Lite",
    KITCHEN: "comfy-kitchen",
    NTEXT: "Nunchaku text encoder",
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file that can be read: dense maps a tensor's name without prefix to its key."""

    header: Header
    dialect: str
    family: Family
    native: bool  # names are ComfyUI's own
    layers: dict[str, FileLayer]
    dense: dict[str, str] = field(repr=False)

    @property
    def precision(self) -> str:
        """int4, nvfp4, or both with a plus sign."""
        return "+".join(sorted({f.precision for f in self.layers.values()} - {"awq"}))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the low-rank branches, ascending."""
        return tuple(sorted({f.rank for f in self.layers.values() if f.precision != "awq"}))

    @property
    def dtype(self) -> str:
        """BF16 or F16: what most 16-bit tensors of the quantised layers have."""
        names = [self.header.tensors[f.parts["scale"]].dtype for f in self.layers.values()]
        names += [
            self.header.tensors[f.parts["smooth"]].dtype
            for f in self.layers.values()
            if "smooth" in f.parts
        ]
        halves = [name for name in names if name in ("BF16", "F16")]
        return max(set(halves), key=halves.count) if halves else "BF16"


def detect(header: Header) -> Checkpoint:
    """What `header` describes. Raises CheckpointError if the loader cannot use it."""
    keys = _without_prefix(header)
    dialect = _dialect(header, keys)
    is_kitchen = dialect == KITCHEN
    layers = kitchen_layers(header, keys) if is_kitchen else _nunchaku(header, keys, dialect)
    parts = {key for found in layers.values() for key in found.parts.values()}
    dense = {name: key for name, key in keys.items() if key not in parts}
    family, native = _family(header, dialect, layers, dense)
    if not native:
        layers = {family.canonical(n): found for n, found in layers.items()}
        dense = {family.canonical(n): key for n, key in dense.items()}
    return Checkpoint(
        header=header, dialect=dialect, family=family, native=native, layers=layers, dense=dense
    )


def _without_prefix(header: Header) -> dict[str, str]:
    """Tensor name without a checkpoint's prefix -> key."""
    names = list(header.tensors)
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return {name.removeprefix(prefix): name for name in names}
    return {name: name for name in names}


def _dialect(header: Header, keys: dict[str, str]) -> str:
    endings = {name.rpartition(".")[2] for name in keys}
    if "scaled_zeros" in endings:
        raise CheckpointError(
            f"{header.path.name} is a 4-bit text encoder. Put it into text_encoders and use "
            "Slipstream SVDQuant CLIP Loader."
        )
    if "qweight" in endings:
        if "lora_down" in endings or "smooth" in endings:
            return N1
        if header.json("quantization_config").get("quant_method") == "nunchaku_lite":
            return LITE
        return N2 if "smooth_factor_orig" in endings else LITE
    if "weight_proj_down" in endings or any(
        quant_options(header, key).get("format") == "svdquant_w4a4"
        for name, key in keys.items()
        if name.endswith(".comfy_quant")
    ):
        return KITCHEN
    raise CheckpointError(_not_svdquant(header, endings, keys))


def _not_svdquant(header: Header, endings: set[str], keys: dict[str, str]) -> str:
    file = header.path.name
    blocks = any("transformer_blocks." in name for name in keys)
    if blocks and endings & {"lora_down", "lora_up"}:
        return (
            f"{file} is a LoRA converted for nunchaku, not a model. Use the original LoRA file "
            "with a LoRA loader behind the model loader."
        )
    if any("lora" in name for name in keys):
        return f"{file} is a LoRA, not a model. Use a LoRA loader behind the model loader."
    if "unquantized_layers" in file:
        return (
            f"{file} is half of a legacy nunchaku folder. Merge the folder into one file with "
            "'python -m nunchaku.merge_safetensors', or download the single-file version."
        )
    return (
        f"{file} is not an SVDQuant checkpoint (no *.qweight, no svdquant comfy_quant). "
        "Use Load Diffusion Model."
    )


def _family(
    header: Header, dialect: str, layers: Iterable[str], dense: Iterable[str]
) -> tuple[Family, bool]:
    file = header.path.name
    names = {*layers, *(name.removesuffix(".weight") for name in dense)}
    if _is_sana(header, names):
        raise CheckpointError(
            f"{file} is a SANA model, which ComfyUI has no class for. Supported: {SUPPORTED}."
        )
    for family in FAMILIES:
        if dialect == KITCHEN and family.matches_native(names):
            return family, True
        if family.matches({family.canonical(name) for name in names}):
            _refuse_half_files(header, family, names)
            return family, False
    shown = ", ".join(sorted(layers)[:3])
    raise CheckpointError(
        f"{file} is an SVDQuant model of an unknown family (first layers: {shown}). "
        f"Supported: {SUPPORTED}."
    )


def _is_sana(header: Header, names: set[str]) -> bool:
    return "Sana" in header.metadata.get("model_class", "") or (
        "transformer_blocks.0.mlp_conv.inverted_conv" in names
        or "caption_projection.linear_1" in names
    )


def _refuse_half_files(header: Header, family: Family, names: set[str]) -> None:
    outside = [n for n in names if not any(n.startswith(b.source + ".") for b in family.blocks)]
    if not outside:
        raise CheckpointError(
            f"{header.path.name} holds only the blocks of a legacy nunchaku folder. Merge the "
            "folder into one file with 'python -m nunchaku.merge_safetensors', or download the "
            "single-file version."
        )


# ---- layers ----
def _nunchaku(header: Header, keys: dict[str, str], dialect: str) -> dict[str, FileLayer]:
    layers = {}
    for name in (n.removesuffix(".qweight") for n in keys if n.endswith(".qweight")):
        is_awq = header.tensors[keys[f"{name}.qweight"]].dtype == "I32"
        suffixes = AWQ_SUFFIXES if is_awq else SUFFIXES[dialect]
        parts = {
            part: keys[f"{name}.{suffix}"]
            for part, suffix in suffixes.items()
            if f"{name}.{suffix}" in keys
        }
        one = LayerReader(header, name, parts, suffixes)
        layers[name] = one.awq() if is_awq else one.svdquant(dialect)
    return layers


def kitchen_layers(header: Header, keys: dict[str, str]) -> dict[str, FileLayer]:
    """The quantised layers of a file in comfy-kitchen's dialect; keys: tensor name -> key."""
    named = {}
    for name, key in keys.items():
        owner, _, suffix = name.rpartition(".")
        named[f"{owner}.{KITCHEN_ALIASES.get(suffix, suffix)}"] = key
    suffixes = SUFFIXES[KITCHEN]
    layers = {}
    for name in {n.rpartition(".")[0] for n in named if n.endswith(".weight_scale")}:
        parts = {p: named[f"{name}.{s}"] for p, s in suffixes.items() if f"{name}.{s}" in named}
        options = quant_options(header, parts["options"]) if "options" in parts else {}
        layers[name] = LayerReader(header, name, parts, suffixes).kitchen(options)
    return layers


def quant_options(header: Header, key: str) -> dict[str, Any]:
    """The JSON object that a comfy_quant tensor holds; empty if it holds none."""
    if header.tensors[key].dtype != "U8" or header.tensors[key].num_bytes > 65536:
        return {}
    try:
        value = json.loads(header.read_bytes(key).decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

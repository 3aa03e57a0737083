"""Which dialect and family a file is, from its keys and shapes; pure header logic.

`detect` never trusts a file's name. It gives a Checkpoint whose layers are complete and whose
shapes agree with each other, or raises CheckpointError with the sentence the user sees.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError
from .families import CORE, FAMILIES, READ_ONLY, READABLE, Family
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
_CORE_PREFIXES = (*PREFIXES, "model.model.", "net.", "model.")  # what ComfyUI strips as well
_LTX2_IN_DIFFUSERS = "av_cross_attn_video_scale_shift.linear"
OWN_FORMATS = ("svdquant_w4a4", "awq_w4a16")  # comfy_quant formats that are read here


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file that can be read: dense maps a tensor's name without prefix to its key.

    family: CORE where only ComfyUI's own detection can say what the model is; native: names are
    ComfyUI's own; core_layers: layers in other formats of comfy_quant, which ComfyUI computes, and
    their settings; num_others: tensors of a whole checkpoint that are not the diffusion model's.
    """

    header: Header
    dialect: str
    family: Family
    native: bool
    layers: dict[str, FileLayer]
    dense: dict[str, str] = field(repr=False)
    core_layers: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    num_others: int = 0

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
    settings = layer_settings(header, keys)
    dialect = _dialect(header, keys, settings)
    if dialect == KITCHEN:
        layers = kitchen_layers(header, keys, settings)
    else:
        layers = _nunchaku(header, keys, dialect)
    parts = {key for found in layers.values() for key in found.parts.values()}
    dense = {name: key for name, key in keys.items() if key not in parts}
    family, native = _family(header, dialect, layers, dense)
    if family.doubtful in keys and dialect in (N1, N2) and _has_int4(layers):
        raise CheckpointError(
            f"{header.path.name} is an int4 {family.title} file of an exporter that does not say "
            "whether the second feed-forward layers read shifted inputs: the image might be noise. "
            "Its nvfp4 version can be loaded."
        )
    if not native:
        layers = {family.canonical(n): found for n, found in layers.items()}
        dense = {family.canonical(n): key for n, key in dense.items()}
    core_layers = {} if dialect != KITCHEN else {n: s for n, s in settings.items() if is_core(s)}
    return Checkpoint(
        header=header,
        dialect=dialect,
        family=family,
        native=native,
        layers=layers,
        dense=dense,
        core_layers=core_layers,
        num_others=len(header.tensors) - len(keys),
    )


def _without_prefix(header: Header) -> dict[str, str]:
    """Tensor name without a checkpoint's prefix -> key; of a whole checkpoint its model's alone."""
    names = list(header.tensors)
    for prefix in _CORE_PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return {name.removeprefix(prefix): name for name in names}
    inside = [name for name in names if name.startswith(PREFIXES[0])]
    return {name.removeprefix(PREFIXES[0]): name for name in inside or names}


def layer_settings(header: Header, keys: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Layer name -> its comfy_quant settings, from its tensor or from the file's metadata."""
    stated = header.json("_quantization_metadata").get("layers")
    found = {}
    for name, value in (stated if isinstance(stated, dict) else {}).items():
        short = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
        if isinstance(value, dict) and f"{short}.weight" in keys:
            found[short] = value
    for name, key in keys.items():
        owner, _, suffix = name.rpartition(".")
        if suffix == "comfy_quant":
            found[owner] = quant_options(header, key)
    return found


def is_core(settings: dict[str, Any]) -> bool:
    """Whether a layer is in another format of comfy_quant, which ComfyUI computes."""
    return isinstance(settings.get("format"), str) and settings["format"] not in OWN_FORMATS


def _dialect(header: Header, keys: dict[str, str], settings: dict[str, dict[str, Any]]) -> str:
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
    formats = {str(one.get("format")) for one in settings.values()}
    if "weight_proj_down" in endings or "svdquant_w4a4" in formats:
        return KITCHEN
    raise CheckpointError(_not_svdquant(header, endings, keys, formats))


def _not_svdquant(
    header: Header, endings: set[str], keys: dict[str, str], formats: set[str]
) -> str:
    file = header.path.name
    if formats:
        return (
            f"{file} is quantised as {', '.join(sorted(formats))}, not SVDQuant. Use Load "
            "Diffusion Model; if it comes with a low-rank branch, the nodes that it was made for."
        )
    blocks = any("transformer_blocks." in name for name in keys)
    if blocks and endings & {"lora_down", "lora_up"}:
        return (
            f"{file} is a LoRA converted for nunchaku, not a model. Use the original LoRA file "
            "with a LoRA loader behind the model loader."
        )
    if any("lora" in name for name in keys):
        return f"{file} is a LoRA, not a model. Use a LoRA loader behind the model loader."
    return (
        f"{file} is not an SVDQuant checkpoint (no *.qweight, no svdquant comfy_quant). "
        "Use Load Diffusion Model."
    )


def _family(
    header: Header, dialect: str, layers: Iterable[str], dense: Iterable[str]
) -> tuple[Family, bool]:
    file = header.path.name
    names = {*layers, *(name.removesuffix(".weight") for name in dense)}
    if dialect in (N1, N2) and _is_sana(header, names):
        raise CheckpointError(
            f"{file} is a SANA model, which ComfyUI has no class for. Supported: {READABLE}."
        )
    if _LTX2_IN_DIFFUSERS in names:
        raise CheckpointError(
            f"{file} is LTX-2 in diffusers' names, without the text connectors: ComfyUI's model "
            "holds them, diffusers keeps them in another file. Use a file in ComfyUI's own names."
        )
    for family in FAMILIES:
        if dialect == KITCHEN and family.matches_native(names):
            return family, True
    for family in (*READ_ONLY, *FAMILIES):
        if family.matches({family.canonical(name) for name in names}):
            return family, False
    if dialect in (KITCHEN, LITE):  # every layer says of itself how it is read
        return CORE, True
    shown = ", ".join(sorted(layers)[:3])
    raise CheckpointError(
        f"{file} is an SVDQuant model of an unknown family (first layers: {shown}). "
        f"Supported: {READABLE}."
    )


def _has_int4(layers: dict[str, FileLayer]) -> bool:
    return any(layer.precision == "int4" for layer in layers.values())


def _is_sana(header: Header, names: set[str]) -> bool:
    return "Sana" in header.metadata.get("model_class", "") or (
        "transformer_blocks.0.mlp_conv.inverted_conv" in names
        or "caption_projection.linear_1" in names
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


def kitchen_layers(
    header: Header, keys: dict[str, str], settings: dict[str, dict[str, Any]]
) -> dict[str, FileLayer]:
    """The quantised layers of a file in comfy-kitchen's dialect.

    keys: tensor name -> key; settings: as of layer_settings.
    """
    named = {}
    for name, key in keys.items():
        owner, _, suffix = name.rpartition(".")
        named[f"{owner}.{KITCHEN_ALIASES.get(suffix, suffix)}"] = key
    suffixes = SUFFIXES[KITCHEN]
    layers = {}
    owners = {n.rpartition(".")[0] for n in named if n.endswith(".weight_scale")}
    for name in owners | {n for n, one in settings.items() if not is_core(one)}:
        options = settings.get(name, {})
        if is_core(options):
            continue
        parts = {p: named[f"{name}.{s}"] for p, s in suffixes.items() if f"{name}.{s}" in named}
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

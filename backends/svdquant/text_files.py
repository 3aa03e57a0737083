"""Which form a 4-bit text encoder file has, from its keys and shapes; pure header logic.

Nunchaku's (AWQ T5: qweight, scales, scaled_zeros) and comfy-kitchen's (comfy_quant svdquant_w4a4,
awq_w4a16). Names inside are the text encoder's own, as ComfyUI's detection knows them.
"""

from .dialects import Checkpoint, is_core, kitchen_layers, layer_settings, quant_options
from .errors import CheckpointError
from .families.text_encoder import TEXT_ENCODER
from .file_layers import KITCHEN, NTEXT, TEXT_SUFFIXES, FileLayer, LayerReader
from .header import Header

FORMATS = ("svdquant_w4a4", "awq_w4a16")
# transformers keeps T5's embedding under two names; ComfyUI knows the first
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


def detect_text(header: Header) -> Checkpoint | None:
    """The text encoder in a file; None if no layer of it is in a form of ours.

    Raises CheckpointError for a damaged file, a mix with another form, or a diffusion model.
    """
    names = set(header.tensors)
    endings = {name.rpartition(".")[2] for name in names}
    if "scaled_zeros" in endings:
        return _checkpoint(header, NTEXT, _nunchaku(header))
    if "qweight" in endings:
        raise CheckpointError(
            f"{header.path.name} is no text encoder that can be loaded: a diffusion model belongs "
            "to Slipstream SVDQuant Loader, other 4-bit text encoders (GPTQ, AutoAWQ) have no "
            "loader here."
        )
    if not _has_ours(header):
        return None
    keys = {name: name for name in names}
    settings = layer_settings(header, keys)
    other = next((name for name, one in settings.items() if is_core(one)), None)
    if other is not None:
        raise CheckpointError(
            f"{header.path.name}: {other} has comfy_quant format '{settings[other]['format']}' "
            "beside 4-bit layers, a mix that this loader does not read"
        )
    return _checkpoint(header, KITCHEN, kitchen_layers(header, keys, settings))


def _has_ours(header: Header) -> bool:
    return any(name.endswith(".weight_proj_down") for name in header.tensors) or any(
        quant_options(header, name).get("format") in FORMATS
        for name in header.tensors
        if name.endswith(".comfy_quant")
    )


def _nunchaku(header: Header) -> dict[str, FileLayer]:
    layers = {}
    for name in (n.removesuffix(".qweight") for n in header.tensors if n.endswith(".qweight")):
        parts = {
            part: f"{name}.{suffix}"
            for part, suffix in TEXT_SUFFIXES.items()
            if f"{name}.{suffix}" in header.tensors
        }
        layers[name] = LayerReader(header, name, parts, TEXT_SUFFIXES).text_awq()
    return layers


def _checkpoint(header: Header, dialect: str, layers: dict[str, FileLayer]) -> Checkpoint:
    parts = {key for layer in layers.values() for key in layer.parts.values()}
    dense = {name: name for name in header.tensors if name not in parts}
    ours, theirs = _EMBEDDINGS
    if theirs in dense:
        embedding = dense.pop(theirs)
        dense.setdefault(ours, embedding)
    return Checkpoint(
        header=header,
        dialect=dialect,
        family=TEXT_ENCODER,
        native=True,
        layers=layers,
        dense=dense,
    )

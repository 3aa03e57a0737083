"""One pure table: which features refuse each other, and the sentence shown before sampling starts.

Our techniques appear under their names, ComfyUI's and other packs' features under the names that
`host.features` gives them. A pair that is not listed composes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import SlipstreamError


class ConflictError(SlipstreamError, ValueError):
    """Two features on one MODEL that cannot work together."""


@dataclass(frozen=True)
class Conflict:
    """`first` and `second` refuse each other; `sentence` says what to change."""

    first: str
    second: str
    sentence: str


CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "cache",
        "easycache",
        "Slipstream Cache and EasyCache both skip steps: remove one of them.",
    ),
    Conflict(
        "cache",
        "lazycache",
        "Slipstream Cache and LazyCache both skip steps: remove one of them.",
    ),
    Conflict(
        "cache",
        "teacache",
        "Slipstream Cache and TeaCache both skip steps: remove one of them.",
    ),
    Conflict(
        "cache",
        "other_cache",
        "Slipstream Cache and another pack's cache both skip steps: remove one of them.",
    ),
    Conflict(
        "svdquant",
        "model_merge",
        "A model merge scales the weights of a quantised layer, which 4-bit weights cannot do: "
        "merge the 16-bit models first and convert the result, or remove the merge.",
    ),
    Conflict(
        "svdquant_calibrate",
        "torch_compile",
        "SVDQuant Calibrate cannot see the inputs of compiled layers: calibrate without "
        "torch.compile.",
    ),
    Conflict(
        "offload",
        "distorch2",
        "DisTorch2 (ComfyUI-MultiGPU) places this model's weights itself: use its settings and "
        "remove Slipstream Layer Offload, or load the model with a core loader.",
    ),
    Conflict(
        "offload",
        "nunchaku_pack",
        "ComfyUI-nunchaku moves the weights of its models itself: use its loader's cpu_offload "
        "and remove Slipstream Layer Offload, or load the file with Slipstream SVDQuant Loader.",
    ),
    Conflict(
        "offload",
        "fsdp",
        "The weights of this model are sharded over devices (FSDP): remove Slipstream Layer "
        "Offload.",
    ),
    Conflict(
        "parallel",
        "multigpu_cfg_split",
        "MultiGPU CFG Split is already on this model. Remove it, or set workers to 1.",
    ),
    Conflict(
        "parallel",
        "torch_compile",
        "Sequence parallel works between the blocks, which torch.compile has compiled: remove "
        "torch.compile, or set workers to 1.",
    ),
)


def refusals(features: Iterable[str]) -> list[str]:
    """The sentence of every conflict whose two sides are both among `features`."""
    present = set(features)
    return [c.sentence for c in CONFLICTS if c.first in present and c.second in present]


def check(features: Iterable[str]) -> None:
    """Raise ConflictError with all sentences if any two `features` refuse each other."""
    sentences = refusals(features)
    if sentences:
        raise ConflictError(" ".join(sentences))

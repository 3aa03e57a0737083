"""The composition matrix: core's nodes that patch a MODEL, with what makes them act on a tiny one.

CASES and UNTESTED together are exactly the nodes of the registry with a MODEL input and output: a
new node of core shows up as a difference.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import core_nodes
import tiny
import torch
from composition_runs import DIT, SVDQUANT, UNET, folder, load, text, tiny_name

CFG = 4.5
EQUAL = 2e-6  # relative, in float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A node on some families. inputs: widgets, and functions of the family that make sockets.

    idle: families whose picture it leaves as it is; quick: families in ./test, not only in
    ./test full; frames: of the latent; mask: the run is an inpainting one; refused: technique ->
    words of the error that it gives with this node; equal: largest relative difference, above
    2e-6 where the node turns a change of the network's last bit into as much by itself; alone:
    words of the reason why some calls are not shared by sequence parallel.
    """

    families: tuple[str, ...] = ("flux",)
    inputs: dict[str, Any] = field(default_factory=dict)
    sockets: dict[str, Callable[[str], Any]] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    frames: int = 0
    mask: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    equal: float = EQUAL
    alone: str = ""


def lora(family: str) -> dict[str, torch.Tensor]:
    """A LoRA on every attention projection of the family's tiny model."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for key, value in load(family).model.state_dict().items():
        if key.endswith(("self_attn.q.weight", "img_attn.qkv.weight")):
            name, (rows, columns) = key.removesuffix(".weight"), value.shape
            for half, shape in (("A", (4, columns)), ("B", (rows, 4))):
                drawn = torch.randn(*shape, generator=generator)
                weights[f"{name}.lora_{half}.weight"] = drawn * 0.3
    return weights


def lora_name(family: str) -> str:
    """The same as a file among core's LoRAs."""
    import folder_paths
    from safetensors.torch import save_file

    loras = Path(folder().name)
    name = f"tiny_{family}.safetensors"
    if not (loras / name).exists():
        save_file(lora(family), loras / name)
        folder_paths.add_model_folder_path("loras", str(loras))
    return name


def sharpen(family: str) -> Any:
    return core_nodes.run("LatentOperationSharpen")


def no_clip(family: str) -> None:
    return None


def latent(family: str) -> Any:
    return {"samples": tiny.latent(family)}


PATCHES, MERGE = "patches of the model's blocks", "is a builtins.function"
LAYERS = {"double_layers": "1", "single_layers": "1", "start_percent": 0.0, "end_percent": 1.0}
TWO_CACHES = {"cache": "both skip steps"}

CASES: dict[str, Case] = {
    # guidance
    "APG": Case(families=DIT),
    "CFGNorm": Case(families=DIT),
    "CFGOverride": Case(
        families=DIT, inputs={"cfg": 1.0, "start_percent": 0.0, "end_percent": 0.5}, quick=("flux",)
    ),
    "CFGZeroStar": Case(families=DIT),
    "FreSca": Case(
        families=DIT, inputs={"scale_low": 0.5, "scale_high": 2.0, "freq_cutoff": 2}, equal=5e-6
    ),
    "LTXVModalityGuidance": Case(families=("ltxav",)),
    "LTXVSpatioTemporalGuidance": Case(families=("ltxav",), inputs={"blocks": "1"}),
    "LatentApplyOperationCFG": Case(families=("flux",), sockets={"operation": sharpen}, equal=5e-6),
    "Mahiro": Case(families=DIT),
    "NAGuidance": Case(alone=PATCHES, families=("flux",), quick=("flux", SVDQUANT)),
    "PerpNeg": Case(families=DIT, sockets={"empty_conditioning": lambda family: text(family, 5)}),
    "PerturbedAttentionGuidance": Case(
        alone=PATCHES, families=(UNET, *DIT), idle=(*DIT, SVDQUANT), quick=(UNET, "flux")
    ),
    "RenormCFG": Case(families=("flux",)),
    "RescaleCFG": Case(families=DIT),
    "SelfAttentionGuidance": Case(
        alone=PATCHES, families=(UNET, "wan"), idle=("wan",), quick=(UNET, "wan")
    ),
    "SkipLayerGuidanceDiT": Case(alone=PATCHES, families=DIT, inputs=LAYERS, quick=("flux",)),
    "SkipLayerGuidanceDiTSimple": Case(alone=PATCHES, families=DIT, inputs=LAYERS),
    "SkipLayerGuidanceSD3": Case(
        alone=PATCHES,
        families=("sd3",),
        inputs={"layers": "1", "start_percent": 0.0, "end_percent": 1.0},
    ),
    "TCFG": Case(families=DIT, equal=3e-5),
    "VideoLinearCFGGuidance": Case(families=("wan",)),
    "VideoTriangleCFGGuidance": Case(families=("wan",)),
    # windows, masks, other caches
    "ContextWindowsManual": Case(
        families=("wan",),
        frames=6,
        quick=("wan",),
        inputs={"context_length": 3, "context_overlap": 1, "dim": 2},
    ),
    "DifferentialDiffusion": Case(families=DIT, mask=True),
    "EasyCache": Case(
        families=DIT, refused=TWO_CACHES, inputs={"reuse_threshold": 3.0, "start_percent": 0.0}
    ),
    "LTXVContextWindows": Case(
        families=("ltxv",), frames=6, inputs={"context_length": 17, "context_overlap": 8}
    ),
    "LazyCache": Case(
        families=DIT, refused=TWO_CACHES, inputs={"reuse_threshold": 3.0, "start_percent": 0.0}
    ),
    "WanContextWindowsManual": Case(
        families=("wan",), frames=6, inputs={"context_length": 9, "context_overlap": 4}
    ),
    # sampling
    "Epsilon Scaling": Case(families=DIT),
    "MiniMaxH3SigmaShift": Case(families=("flux",)),
    "ModelNoiseScale": Case(families=("wan",), inputs={"noise_scale": 1.5}),
    "ModelSamplingAuraFlow": Case(families=("wan",)),
    "ModelSamplingContinuousEDM": Case(families=(UNET,)),
    "ModelSamplingContinuousV": Case(families=(UNET,)),
    "ModelSamplingDiscrete": Case(families=(UNET,), inputs={"sampling": "v_prediction"}),
    "ModelSamplingFlux": Case(families=("flux",), inputs={"width": 256, "height": 256}),
    "ModelSamplingLTXV": Case(families=("ltxv",), sockets={"latent": latent}),
    "ModelSamplingSD3": Case(families=DIT, quick=("flux",)),
    "ModelSamplingStableCascade": Case(families=(UNET,)),
    "TemporalScoreRescaling": Case(families=DIT, inputs={"tsr_sigma": 1.0}),
    # the network
    "ChromaRadianceOptions": Case(families=("flux",), idle=("flux", SVDQUANT)),
    "FluxKVCache": Case(
        alone=PATCHES, families=("flux",), idle=("flux", SVDQUANT)
    ),  # it acts on reference latents
    "FreeU": Case(families=(UNET,)),
    "FreeU_V2": Case(families=(UNET,)),
    "HyperTile": Case(families=(UNET,), inputs={"tile_size": 32, "max_depth": 1}),
    "ModelAttentionBackend": Case(
        alone="an attention override", families=DIT, idle=(*DIT, SVDQUANT)
    ),
    "ModelComputeDtype": Case(
        families=DIT, inputs={"dtype": "fp32"}, idle=(*DIT, SVDQUANT), quick=("flux",)
    ),
    "PatchModelAddDownscale": Case(families=(UNET,), inputs={"block_number": 2}),
    "ScaleROPE": Case(families=DIT, inputs={"scale_x": 1.5, "shift_y": 2.0}, quick=("flux",)),
    "TomePatchModel": Case(families=(UNET,)),
    "UNetCrossAttentionMultiply": Case(families=(UNET,), inputs={"q": 1.5, "out": 1.2}),
    "UNetSelfAttentionMultiply": Case(families=(UNET,), inputs={"q": 1.5, "out": 1.2}),
    # weights and devices
    "LoraLoader": Case(families=DIT, sockets={"lora_name": lora_name, "clip": no_clip}),
    "LoraLoaderBypass": Case(
        alone="injections", families=DIT, sockets={"lora_name": lora_name, "clip": no_clip}
    ),
    "LoraLoaderBypassModelOnly": Case(
        alone="injections", families=DIT, sockets={"lora_name": lora_name}
    ),
    "LoraLoaderModelOnly": Case(families=DIT, sockets={"lora_name": lora_name}, quick=("flux",)),
    "LoraModelLoader": Case(families=DIT, sockets={"lora": lora}),
    "ModelMergeAdd": Case(alone=MERGE, families=DIT),
    "ModelMergeBlocks": Case(families=(UNET,)),
    "ModelMergeFlux1": Case(alone=MERGE, families=("flux",)),
    "ModelMergeLTXV": Case(alone=MERGE, families=("ltxv",)),
    "ModelMergeSD1": Case(families=(UNET,)),
    "ModelMergeSD3_2B": Case(alone=MERGE, families=("sd3",)),
    "ModelMergeSimple": Case(alone=MERGE, families=DIT, inputs={"ratio": 0.5}),
    "ModelMergeSubtract": Case(alone=MERGE, families=DIT),
    "ModelMergeWAN2_1": Case(alone=MERGE, families=("wan",)),
    "MultiGPU_WorkUnits": Case(families=DIT, idle=(*DIT, SVDQUANT)),
    "SelectModelDevice": Case(families=DIT, idle=(*DIT, SVDQUANT)),
    "wanBlockSwap": Case(families=("wan",), idle=("wan",)),
}

_OTHER_NAMES = "ModelMergeBlocks with the block names of a model that has no tiny file here"
_NEEDS_PATCH = "needs a MODEL_PATCH file, an image and a VAE of its own model"
UNTESTED = {
    "ARVideoI2V": "needs a VAE and a causal video model",
    "AnimaLLLiteApply": _NEEDS_PATCH,
    "HiDreamO1PatchSeamSmoothing": "works on HiDream-O1's pixels",
    "HypernetworkLoader": "needs a hypernetwork file of SD 1.5's real widths",
    "LTXVReferenceAudio": "needs an audio VAE",
    "ModelMergeAuraflow": _OTHER_NAMES,
    "ModelMergeCosmos14B": _OTHER_NAMES,
    "ModelMergeCosmos7B": _OTHER_NAMES,
    "ModelMergeCosmosPredict2_14B": _OTHER_NAMES,
    "ModelMergeCosmosPredict2_2B": _OTHER_NAMES,
    "ModelMergeKrea2": _OTHER_NAMES,
    "ModelMergeMochiPreview": _OTHER_NAMES,
    "ModelMergeQwenImage": _OTHER_NAMES,
    "ModelMergeSD2": _OTHER_NAMES,
    "ModelMergeSD35_Large": _OTHER_NAMES,
    "ModelMergeSDXL": _OTHER_NAMES,
    "QwenImageDiffsynthControlnet": _NEEDS_PATCH,
    "SUPIRApply": _NEEDS_PATCH,
    "TorchCompileModel": "compiles for minutes: host/test_cache_composition.py has it",
    "TripoSplatSamplingPreview": "shows previews of a 3-D model by its VAE",
    "UNetTemporalAttentionMultiply": "needs Stable Video Diffusion",
    "USOStyleReference": _NEEDS_PATCH,
    "WanAnimate2Cache": "needs Wan-Animate2",
    "WanInfiniteTalkToVideo": _NEEDS_PATCH,
    "WanUni3CControlnetApply": _NEEDS_PATCH,
    "ZImageFunControlnet": _NEEDS_PATCH,
}


# --- runs


def patched(name: str, family: str, model: Any) -> Any:
    """The MODEL that node `name` makes of `model`."""
    case = CASES[name]
    inputs = {**case.inputs, **{k: make(family) for k, make in case.sockets.items()}}
    if name.startswith("ModelMerge"):
        widgets = core_nodes.widgets(name, "FLOAT")
        halves = {} if "ratio" in inputs else dict.fromkeys(widgets, 0.5)
        return core_nodes.run(name, **halves, **inputs, model1=model, model2=load(family, 1))
    return core_nodes.run(name, **inputs, model=model)


def sample(model: Any, family: str, name: str = "", *, steps: int) -> torch.Tensor:
    """The latent of a run as `name` needs it, nested ones as one row."""
    case = CASES.get(name, Case())
    torch.manual_seed(0)  # TomePatchModel draws
    shape = tiny.latent_shape(tiny_name(family))
    if case.frames:
        shape = (*shape[:2], case.frames, *shape[3:])
    mask = None
    if case.mask:
        mask = torch.linspace(0, 1, shape[-1]).expand(1, 1, *shape[-2:]).clone()
    out = tiny.sample(model, tiny_name(family), steps=steps, cfg=CFG, shape=shape, mask=mask)
    return torch.cat([part.flatten() for part in out.unbind()]) if out.is_nested else out

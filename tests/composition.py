"""The composition matrix: core's nodes that patch a MODEL, with what makes them act on a tiny one.

CASES and UNTESTED together are exactly the nodes of the registry with a MODEL input and output;
GUIDERS likewise for GUIDER outputs. A new node of core shows up as a difference.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import core_nodes
import tiny
import torch

SVDQUANT, UNET = "svdquant", "unet"  # beside the families of tests/tiny.py
CFG = 4.5
EQUAL = 2e-6  # relative, in float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A node on some families. inputs: widgets, and functions of the family that make sockets.

    idle: families whose picture it leaves as it is; quick: families in ./test, not only in
    ./test full; frames: of the latent; mask: the run is an inpainting one; refused: technique ->
    words of the error that it gives with this node; equal: largest relative difference, above
    2e-6 where the node turns a change of the network's last bit into as much by itself.
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

    folder = Path(_folder().name)
    name = f"tiny_{family}.safetensors"
    if not (folder / name).exists():
        save_file(lora(family), folder / name)
        folder_paths.add_model_folder_path("loras", str(folder))
    return name


def sharpen(family: str) -> Any:
    return core_nodes.run("LatentOperationSharpen")


def no_clip(family: str) -> None:
    return None


def latent(family: str) -> Any:
    return {"samples": tiny.latent(family)}


DIT = ("flux", "wan")
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
    "NAGuidance": Case(families=("flux",), quick=("flux", SVDQUANT)),
    "PerpNeg": Case(families=DIT, sockets={"empty_conditioning": lambda family: text(family, 5)}),
    "PerturbedAttentionGuidance": Case(
        families=(UNET, *DIT), idle=(*DIT, SVDQUANT), quick=(UNET, "flux")
    ),
    "RenormCFG": Case(families=("flux",)),
    "RescaleCFG": Case(families=DIT),
    "SelfAttentionGuidance": Case(families=(UNET, "wan"), idle=("wan",), quick=(UNET, "wan")),
    "SkipLayerGuidanceDiT": Case(families=DIT, inputs=LAYERS, quick=("flux",)),
    "SkipLayerGuidanceDiTSimple": Case(families=DIT, inputs=LAYERS),
    "SkipLayerGuidanceSD3": Case(
        families=("sd3",), inputs={"layers": "1", "start_percent": 0.0, "end_percent": 1.0}
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
        families=("flux",), idle=("flux", SVDQUANT)
    ),  # it acts on reference latents
    "FreeU": Case(families=(UNET,)),
    "FreeU_V2": Case(families=(UNET,)),
    "HyperTile": Case(families=(UNET,), inputs={"tile_size": 32, "max_depth": 1}),
    "ModelAttentionBackend": Case(families=DIT, idle=(*DIT, SVDQUANT)),
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
    "LoraLoaderBypass": Case(families=DIT, sockets={"lora_name": lora_name, "clip": no_clip}),
    "LoraLoaderBypassModelOnly": Case(families=DIT, sockets={"lora_name": lora_name}),
    "LoraLoaderModelOnly": Case(families=DIT, sockets={"lora_name": lora_name}, quick=("flux",)),
    "LoraModelLoader": Case(families=DIT, sockets={"lora": lora}),
    "ModelMergeAdd": Case(families=DIT),
    "ModelMergeBlocks": Case(families=(UNET,)),
    "ModelMergeFlux1": Case(families=("flux",)),
    "ModelMergeLTXV": Case(families=("ltxv",)),
    "ModelMergeSD1": Case(families=(UNET,)),
    "ModelMergeSD3_2B": Case(families=("sd3",)),
    "ModelMergeSimple": Case(families=DIT, inputs={"ratio": 0.5}),
    "ModelMergeSubtract": Case(families=DIT),
    "ModelMergeWAN2_1": Case(families=("wan",)),
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


# --- models and runs


@functools.cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="slipstream-composition-")


@functools.cache
def load(family: str, seed: int = 0) -> Any:
    """The family's tiny MODEL, one for the whole process; `unet` is an SD 1.5 of few channels."""
    if family == SVDQUANT:
        import svdquant_models
        from slipstream.backends.svdquant.host import load_svdquant

        path = svdquant_models.write_tiny(Path(_folder().name))
        return load_svdquant(str(path), {"backend": "dequant", "dtype": "fp32"})
    if family == UNET:
        import comfy.supported_models

        narrow = {**tiny.ALL["sd15"].unet(1), "model_channels": 64, "channel_mult": (1, 2)}
        return tiny.in_memory(comfy.supported_models.SD15, narrow, seed)
    return tiny.load(family, heads=3 if family == "sd3" else 1, seed=seed)


def tiny_name(family: str) -> str:
    """What tests/tiny.py calls it."""
    return {SVDQUANT: "flux", UNET: "sd15"}.get(family, family)


def text(family: str, seed: int = 1) -> Any:
    return tiny.text(tiny_name(family), seed=seed)


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


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


# --- guiders


def _guider(name: str, **inputs: Any) -> Callable[[Any, str], Any]:
    def make(model: Any, family: str) -> Any:
        made = {key: value(family) for key, value in inputs.items()}
        if "cfg" in core_nodes.widgets(name, "FLOAT"):
            made["cfg"] = 3.0  # a large one enlarges rounding as much
        return core_nodes.run(name, model=model, **made)

    return make


def _text(seed: int) -> Callable[[str], Any]:
    return lambda family: text(family, seed)


_BOTH = {"positive": _text(1), "negative": _text(2)}
GUIDERS: dict[str, tuple[tuple[str, ...], Callable[[Any, str], Any]]] = {
    "BasicGuider": (DIT, _guider("BasicGuider", conditioning=_text(1))),
    "CFGGuider": (DIT, _guider("CFGGuider", **_BOTH)),
    "DualCFGGuider": (
        DIT, _guider("DualCFGGuider", cond1=_text(1), cond2=_text(3), negative=_text(2))
    ),
    "DualModelGuider": (
        DIT,
        _guider("DualModelGuider", **_BOTH, model_negative=lambda family: load(family, 1)),
    ),
    "LTXVDualCFGGuider": (("ltxav",), _guider("LTXVDualCFGGuider", **_BOTH)),
    "PerpNegGuider": (DIT, _guider("PerpNegGuider", **_BOTH, empty_conditioning=_text(5))),
}  # fmt: skip


def guided(
    model: Any, family: str, guider: str, *, steps: int, sampler: Any = None
) -> torch.Tensor:
    """The latent of SamplerCustomAdvanced with this guider."""
    import comfy.sample
    import comfy.samplers

    torch.manual_seed(0)
    sampling = model.get_model_object("model_sampling")
    empty = tiny.latent(tiny_name(family))
    out = GUIDERS[guider][1](model, family).sample(
        comfy.sample.prepare_noise(empty, 1), empty,
        sampler or comfy.samplers.sampler_object("euler"),
        comfy.samplers.calculate_sigmas(sampling, "simple", steps), disable_pbar=True, seed=1,
    )  # fmt: skip
    return torch.cat([part.flatten() for part in out.unbind()]) if out.is_nested else out


# --- samplers and schedulers

SAMPLERS = (
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2",
    "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast",
    "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde",
    "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm",
    "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp",
    "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "gradient_estimation",
    "gradient_estimation_cfg_pp", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece",
    "ddim", "uni_pc", "uni_pc_bh2",
)  # fmt: skip
SCHEDULERS = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal",
    "linear_quadratic", "kl_optimal",
)  # fmt: skip
SAMPLER_NODES = (
    "KSamplerSelect", "SamplerDPMAdaptative", "SamplerDPMPP_2M_SDE", "SamplerDPMPP_2S_Ancestral",
    "SamplerDPMPP_3M_SDE", "SamplerDPMPP_SDE", "SamplerER_SDE", "SamplerEulerAncestral",
    "SamplerEulerAncestralCFGPP", "SamplerEulerCFGpp", "SamplerLCM", "SamplerLCMUpscale",
    "SamplerLMS", "SamplerSASolver", "SamplerSEEDS2", "VOIDSampler",
)  # fmt: skip
UNTESTED_SAMPLER_NODES = {"SamplerARVideo": "needs a causal video model"}


def sampler_of(name: str, model: Any) -> Any:
    """The SAMPLER of a node, its widgets at their defaults."""
    needs_model = bool(core_nodes.widgets(name, "MODEL"))
    return core_nodes.run(name, **({"model": model} if needs_model else {}))

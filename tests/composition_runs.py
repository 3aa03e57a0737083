"""Models and runs of the composition matrix: tiny MODELs, guiders, samplers and schedulers of core.

GUIDERS, SAMPLER_NODES and UNTESTED_SAMPLER_NODES name every node of the registry that gives a
GUIDER or a SAMPLER; SAMPLERS and SCHEDULERS are KSampler's.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import core_nodes
import tiny
import torch

SVDQUANT, UNET = "svdquant", "unet"  # beside the families of tests/tiny.py
DIT = ("flux", "wan")


@functools.cache
def folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="slipstream-composition-")


@functools.cache
def load(family: str, seed: int = 0) -> Any:
    """The family's tiny MODEL, one for the whole process; `unet` is an SD 1.5 of few channels."""
    if family == SVDQUANT:
        import svdquant_models
        from slipstream.backends.svdquant.host import load_svdquant

        path = svdquant_models.write_tiny(Path(folder().name))
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

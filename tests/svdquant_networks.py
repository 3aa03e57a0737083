"""Tiny networks of ComfyUI's own classes from SVDQuant files, and the dense ones they stand for.

Detection finds no small Qwen-Image, Z-Image or SDXL: those are built in memory from their class.
"""

import tiny
import torch
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.engine import Engine
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.host import finish, load_svdquant, read_model
from slipstream.backends.svdquant.host_operations import operations

CPU = torch.device("cpu")
FLUX = {"depth": 2, "single": 2, "context": 768, "vec": 768}
UNITS = {"flux": "flux", "qwen-image": "qwen_image", "z-image": "z_image", "sdxl": "sdxl"}
SIZES = {
    "flux": FLUX,
    "qwen-image": {"depth": 3, "context": 768},
    "z-image": {"layers": 3, "refiners": 2, "context": 768, "wide": 256},
    "sdxl": {"context": 768, "pooled": 2816},
}
SDXL = {  # three levels of two blocks, as svdquant_models has them
    "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 2, 2),
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
}


def rel(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def unet(family):
    one = tiny.ALL[UNITS[family]]
    sizes = one.unet(max(1, one.min_heads))
    return tiny._config_class(one), sizes | (SDXL if family == "sdxl" else {})


def in_memory(family, state, *, ops=None, dtype=torch.float32):
    """A MODEL of ComfyUI's class at a small config, which detection would not find."""
    import comfy.model_patcher

    config_class, sizes = unet(family)
    config = config_class(dict(sizes))
    config.unet_config.update(sizes)
    config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    config.custom_operations = ops
    model = config.get_model({}, "")
    model.load_model_weights(dict(state), "")
    model.diffusion_model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


def dense_model(family, dense):
    import comfy.sd

    state = {k: v.clone() for k, v in dense.items()}
    if family == "flux":
        options = {"dtype": torch.float32}
        return comfy.sd.load_diffusion_model_state_dict(state, model_options=options)
    return in_memory(family, state)


def quantised_model(family, path, backend="auto", dtype="fp32"):
    if family == "flux":
        return load_svdquant(str(path), {"backend": backend, "dtype": dtype})
    checkpoint, engine = detect(read_header(path)), Engine(backend)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = read_model(checkpoint, engine, dtype, CPU)
    patcher = in_memory(family, model.state, ops=operations(engine), dtype=dtype)
    finish(patcher, checkpoint, engine, model)
    return patcher


def sample(model, family):
    """One sampler step without guidance: one model call."""
    return tiny.sample(model, UNITS[family], steps=1, cfg=1.0).float()


def loaded_flux_output(patcher):
    """Of one call, fp32, after a full load."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return flux_output(patcher)


def flux_output(patcher):
    """The same with the weights where they are."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    context = torch.randn(1, 7, 768, generator=generator)
    y = torch.randn(1, 768, generator=generator)
    with torch.no_grad():
        return patcher.model.diffusion_model(
            x, torch.tensor([0.7]), context=context, y=y, guidance=torch.tensor([3.5])
        ).float()

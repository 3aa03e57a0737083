"""SVDQuant files of any of ComfyUI's models, in comfy-kitchen's dialect and ComfyUI's own names.

Written from a tiny network of tests/tiny.py: linear layers of its blocks that are wide enough
become 4-bit, modulation layers 4-bit with 16-bit inputs, the rest stays as it is.
"""

import dataclasses
import json
import re

import tiny
import torch
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.engine import Engine
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.host import finish, load_svdquant, read_model
from slipstream.backends.svdquant.host_operations import operations
from svdquant_files import Writer
from svdquant_networks import CPU

TILE = 128
MODULATION = ("mod.lin", "modulation.lin", "_modulation_img.lin", "_modulation_txt.lin")
MODULATION += (
    "adaLN_modulation.1",
    "time_projection.1",
    "adaln_single.linear",
    "adaln_proj.linear",
)


def family_of(name, **sizes):
    """A tiny family; some with sizes of their own so that layers are wide enough."""
    one = tiny.ALL[name]
    return dataclasses.replace(one, sizes={**one.sizes, **sizes})


def network(one, heads):
    return tiny.in_memory(tiny._config_class(one), one.unet(heads), shorten=one.shorten)


def write(path, patcher, *, dialect="comfy-kitchen", metadata=None, others=None):
    """Writes the file; returns (dense state, names of the layers that became 4-bit).

    Of each kind of layer (the end of its name) the first one becomes 4-bit: in turn tile-packed
    and in the natural layout. others(name, weight) -> (tensors, effective weight) of a layer in a
    format of ComfyUI's own, or None.
    """
    writer = Writer(dialect)
    state = patcher.model.diffusion_model.state_dict()
    wide = [n for n, m in patcher.model.diffusion_model.named_modules() if _is_linear(n, m)]
    inside_first = sorted(wide, key=lambda n: re.search(r"\.\d+\.", n) is None)
    kinds = {name.rpartition(".")[2]: name for name in reversed(inside_first)}
    blocks = {*kinds.values(), *(n for n in wide if n.endswith(MODULATION))}
    dense, quantised = {}, []
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        if owner in blocks and kind in ("weight", "bias"):
            if kind == "weight":
                bias = state.get(f"{owner}.bias")
                found = _layer(writer, owner, tensor, bias, others)
                dense |= {f"{owner}.{k}": v for k, v in found.items() if v is not None}
                quantised.append(owner)
            continue
        is_float = tensor.is_floating_point()
        stored = tensor.to(torch.bfloat16) if is_float else tensor
        writer.tensors[name] = stored.contiguous()
        dense[name] = stored.float() if is_float else stored
    _save(path, writer.tensors, metadata)
    return dense, quantised


def _is_linear(name, module):
    shape = getattr(getattr(module, "weight", None), "shape", ())
    wide = len(shape) == 2 and all(n % TILE == 0 for n in shape)
    return wide and isinstance(module, torch.nn.Linear) and "." in name


def _layer(writer, name, weight, bias, others):
    weight = weight.float()
    own = others(name, weight) if others else None
    if own is not None:
        tensors, effective = own
        writer.tensors |= {f"{name}.{k}": t for k, t in tensors.items()}
        if bias is not None:
            writer.tensors[f"{name}.bias"] = bias.to(torch.bfloat16)
        return {"weight": effective, "bias": None if bias is None else bias.bfloat16().float()}
    if name.endswith(MODULATION):
        given = torch.zeros(len(weight)) if bias is None else bias.float()
        effective, stored = writer.modulation(name, weight, given, 1)
        if bias is None:
            del writer.tensors[f"{name}.bias"]
        bias = None if bias is None else stored
    else:
        bias = None if bias is None else bias.float()
        effective, bias = writer.svdquant(name, weight, bias)
    return {"weight": effective, "bias": bias}


def _save(path, tensors, metadata):
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata=metadata)


def config_metadata(one, heads):
    """The metadata that ComfyUI's detection of some models reads their sizes from."""
    named = {key: one.unet(heads)[key] for key in one.metadata}
    return {"config": json.dumps({"transformer": named})} if one.metadata else None


def dense_model(one, heads, dense):
    """The network with the weights that the file stands for, without any 4-bit code."""
    patcher = network(one, heads)
    patcher.model.diffusion_model.load_state_dict(dense)
    return patcher


def quantised_model(one, heads, path, backend="auto", dtype="fp32"):
    """Through the loader; where detection knows no small model, into ComfyUI's class directly."""
    if one.in_file:
        return load_svdquant(str(path), {"backend": backend, "dtype": dtype})
    import comfy.model_patcher

    checkpoint, engine = detect(read_header(path)), Engine(backend)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = read_model(checkpoint, engine, dtype, CPU)
    config = tiny._config_class(one)(dict(one.unet(heads)))
    config.unet_config.update(one.unet(heads))
    config.set_inference_dtype(dtype, torch.float32 if dtype != torch.float32 else None)
    config.custom_operations = operations(engine)
    core = config.get_model({}, "")
    for where, length in one.shorten.items():
        del core.diffusion_model.get_submodule(where)[length:]
    core.load_model_weights(dict(model.state), "")
    core.diffusion_model.eval().requires_grad_(False)
    patcher = comfy.model_patcher.ModelPatcher(core, load_device=CPU, offload_device=CPU)
    finish(patcher, checkpoint, engine, model)
    return patcher

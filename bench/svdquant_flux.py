"""Time and memory of one step of Flux with random 4-bit weights, per backend, beside 16-bit.

    python bench svdquant_flux [--double 19] [--single 38] [--tokens 4096] [--backends kitchen,...]

Needs ComfyUI (COMFYUI_PATH) and, at full size, a GPU with room for 24 GB in 16 bits (leave "bf16"
out of --backends otherwise). The network is ComfyUI's own class; weights are random, so the output
means nothing and only time and memory are measured.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..backends.svdquant.engine import Engine
from ..backends.svdquant.host_operations import operations
from ..backends.svdquant.layout import wrap
from ..backends.svdquant.weight import Facts, QuantWeight, Segment, stack_columns, whole
from .svdquant_convert import HEAD, WIDTH
from .svdquant_layers import random_segment

TEXT_TOKENS = 512


def become_comfyui(cpu: bool) -> None:
    """Make `import comfy` work in this process."""
    root = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
    sys.path.insert(0, str(root))
    from comfy.cli_args import args

    args.cpu = cpu
    args.use_pytorch_cross_attention = True


def modulation(num_rows: int) -> Segment:
    """A random AWQ layer."""
    codes = torch.randint(-128, 128, (num_rows, WIDTH // 2), dtype=torch.int8)
    scale = torch.full((WIDTH // 64, num_rows), 0.002, dtype=torch.bfloat16)
    zeros = torch.zeros(WIDTH // 64, num_rows, dtype=torch.bfloat16)
    return Segment(Facts("awq", 0, num_rows, 0, WIDTH), codes, scale, zeros=zeros)


def quantised(num_rows: int, num_columns: int, precision: str) -> QuantWeight:
    return whole(random_segment(num_rows, num_columns, precision, "cpu"))


def layers(precision: str, options: argparse.Namespace) -> dict[str, QuantWeight]:
    """The quantised weights of the network; blocks of a kind share their random tensors."""
    double: dict[str, QuantWeight] = {}
    for stream in ("img", "txt"):
        double |= {
            f"{stream}_attn.qkv": quantised(3 * WIDTH, WIDTH, precision),
            f"{stream}_attn.proj": quantised(WIDTH, WIDTH, precision),
            f"{stream}_mlp.0": quantised(4 * WIDTH, WIDTH, precision),
            f"{stream}_mlp.2": quantised(WIDTH, 4 * WIDTH, precision),
            f"{stream}_mod.lin": whole(modulation(6 * WIDTH)),
        }
    out = random_segment(WIDTH, WIDTH, precision, "cpu")
    down = random_segment(WIDTH, 4 * WIDTH, precision, "cpu")
    single = {
        "linear1": quantised(7 * WIDTH, WIDTH, precision),
        "linear2": stack_columns([out, down]),
        "modulation.lin": whole(modulation(3 * WIDTH)),
    }
    found: dict[str, QuantWeight] = {}
    for i in range(options.double):
        found |= {f"double_blocks.{i}.{name}": weight for name, weight in double.items()}
    for i in range(options.single):
        found |= {f"single_blocks.{i}.{name}": weight for name, weight in single.items()}
    return found


def build(backend: str, options: argparse.Namespace) -> Any:
    """A patcher of ComfyUI's Flux: quantised for a backend, dense for "bf16"."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    sizes = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
        "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": WIDTH, "mlp_ratio": 4.0,
        "num_heads": WIDTH // HEAD, "depth": options.double,
        "depth_single_blocks": options.single, "axes_dim": [16, 56, 56], "theta": 10000,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    }  # fmt: skip
    config = comfy.supported_models.Flux(dict(sizes))
    dtype = torch.bfloat16
    cast = torch.float32 if options.cpu else None
    config.set_inference_dtype(dtype, cast)
    if backend != "bf16":
        config.custom_operations = operations(Engine(backend))
    model = config.get_model({}, "")
    state: dict[str, torch.Tensor] = {}
    weights = layers(options.precision, options) if backend != "bf16" else {}
    for name, weight in weights.items():
        state[f"{name}.weight"] = wrap(weight, dtype)
        state[f"{name}.bias"] = torch.zeros(weight.shape[0], dtype=dtype)
    for name, module in model.diffusion_model.named_modules():
        if f"{name}.weight" not in state and hasattr(module, "in_features"):
            shape = (module.out_features, module.in_features)
            state[f"{name}.weight"] = torch.empty(shape, dtype=dtype).normal_(0, 0.02)
            state[f"{name}.bias"] = torch.zeros(shape[0], dtype=dtype)
    for name, value in model.diffusion_model.state_dict().items():
        state.setdefault(name, torch.ones(value.shape, dtype=dtype))
    model.diffusion_model.load_state_dict(state, strict=False, assign=True)
    model.diffusion_model.eval().requires_grad_(False)
    device = comfy.model_management.get_torch_device()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=cpu)


def measure(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step (median), bytes of weights and of the whole on the device."""
    import comfy.model_management as management

    patcher = build(backend, options)
    management.load_models_gpu([patcher], force_full_load=True)
    device, dtype = patcher.load_device, torch.float32 if options.cpu else torch.bfloat16
    side = int(options.tokens**0.5) * 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    inputs = {
        "context": random(1, TEXT_TOKENS, 4096),
        "y": random(1, 768),
        "guidance": torch.tensor([3.5], device=device, dtype=dtype),
    }
    x, t = random(1, 16, side, side), torch.tensor([0.7], device=device, dtype=dtype)
    weights = torch.cuda.memory_allocated() if x.is_cuda else management.module_size(patcher.model)
    times = []
    with torch.inference_mode():
        for _ in range(options.repeats + 1):
            if x.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            patcher.model.diffusion_model(x, t, **inputs)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    found = {"backend": backend, "seconds": sorted(times[1:])[options.repeats // 2]}
    found["weight_bytes"] = weights
    if x.is_cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    patcher.detach()
    management.unload_all_models()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    parser.add_argument("--backends", default="bf16,kitchen,dequant")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.cpu = not torch.cuda.is_available()
    become_comfyui(options.cpu)
    for backend in options.backends.split(","):
        print(json.dumps(measure(backend, options)))
        if not options.cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0

"""Time and memory of one step of Flux with random 4-bit weights, per backend, beside 16-bit.

    python bench svdquant_flux [--double 19] [--single 38] [--tokens 4096] [--backends kitchen,...]

Needs ComfyUI (COMFYUI_PATH) and, at full size, a GPU with room for 24 GB in 16 bits (leave "bf16"
out of --backends otherwise). The network is ComfyUI's own class; weights are random, so the output
means nothing and only time and memory are measured. Each backend has a process of its own; --out
FOLDER gets svdquant-flux.json and .md.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..backends.svdquant.engine import Engine
from ..backends.svdquant.host_operations import operations
from ..backends.svdquant.layout import wrap
from ..backends.svdquant.weight import Facts, QuantWeight, Segment, stack_columns, whole
from . import children
from .children import write_text
from .environment import environment
from .in_process import use_comfyui
from .offload_models import random_block, repeated
from .setup_env import PACK_ROOT, SetupError
from .svdquant_convert import HEAD, WIDTH
from .svdquant_layers import random_segment
from .svdquant_pages import step_page

TEXT_TOKENS = 512
REHEARSED = {"double": 1, "single": 1, "tokens": 64, "repeats": 1, "width": 2 * HEAD}

Json = dict[str, Any]


def modulation(num_rows: int, width: int) -> Segment:
    """A random AWQ layer."""
    codes = torch.randint(-128, 128, (num_rows, width // 2), dtype=torch.int8)
    scale = torch.full((width // 64, num_rows), 0.002, dtype=torch.bfloat16)
    zeros = torch.zeros(width // 64, num_rows, dtype=torch.bfloat16)
    return Segment(Facts("awq", 0, num_rows, 0, width), codes, scale, zeros=zeros)


def quantised(num_rows: int, num_columns: int, precision: str) -> QuantWeight:
    return whole(random_segment(num_rows, num_columns, precision, "cpu"))


def layers(precision: str, options: argparse.Namespace) -> dict[str, QuantWeight]:
    """The quantised weights of the network; blocks of a kind share their random tensors."""
    width = options.width
    double: dict[str, QuantWeight] = {}
    for stream in ("img", "txt"):
        double |= {
            f"{stream}_attn.qkv": quantised(3 * width, width, precision),
            f"{stream}_attn.proj": quantised(width, width, precision),
            f"{stream}_mlp.0": quantised(4 * width, width, precision),
            f"{stream}_mlp.2": quantised(width, 4 * width, precision),
            f"{stream}_mod.lin": whole(modulation(6 * width, width)),
        }
    out = random_segment(width, width, precision, "cpu")
    down = random_segment(width, 4 * width, precision, "cpu")
    single = {
        "linear1": quantised(7 * width, width, precision),
        "linear2": stack_columns([out, down]),
        "modulation.lin": whole(modulation(3 * width, width)),
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
        "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": options.width, "mlp_ratio": 4.0,
        "num_heads": options.width // HEAD, "depth": options.double,
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
    some = random_block()
    state: dict[str, torch.Tensor] = {}
    weights = layers(options.precision, options) if backend != "bf16" else {}
    for name, weight in weights.items():
        state[f"{name}.weight"] = wrap(weight, dtype)
        state[f"{name}.bias"] = torch.zeros(weight.shape[0], dtype=dtype)
    for name, module in model.diffusion_model.named_modules():
        if f"{name}.weight" not in state and hasattr(module, "in_features"):
            shape = (module.out_features, module.in_features)
            state[f"{name}.weight"] = repeated(some, shape)
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


def child(backend: str, options: argparse.Namespace) -> int:
    """The inner process: one backend's row, answered."""
    use_comfyui(cpu=options.cpu)
    children.answer(measure(backend, options))
    return 0


def ask(backend: str, options: argparse.Namespace) -> Json:
    """One child process's row, or {"error": what it said last}."""
    names = ("double", "single", "tokens", "width", "precision", "repeats")
    arguments = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    return {"backend": backend, **children.ask("svdquant_flux", "--child", backend, *arguments)}


def save(found: Json, folder: Path) -> None:
    """svdquant-flux.json and svdquant-flux.md."""
    write_text(folder / "svdquant-flux.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "svdquant-flux.md", step_page(found))


def main() -> int:
    options = _options()
    if options.rehearse:
        vars(options).update(REHEARSED)
    options.cpu = not torch.cuda.is_available()
    try:
        if options.child:
            return child(options.child, options)
        comfyui = use_comfyui(cpu=options.cpu)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    asked = ("double", "single", "tokens", "precision", "repeats")
    found: Json = {
        "command": "python bench svdquant_flux --out docs/benchmarks",
        "environment": environment(comfyui=comfyui),
        **({"rehearsal": True} if options.rehearse else {}),
        **{name: getattr(options, name) for name in asked},
        "rows": [],
    }
    for backend in options.backends.split(","):
        found["rows"].append(ask(backend, options))
        print(json.dumps(found["rows"][-1]), flush=True)
        save(found, options.out)
    return 1 if all("error" in row for row in found["rows"]) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precision", default="int4", choices=("int4", "nvfp4"))
    parser.add_argument("--backends", default="bf16,kitchen,dequant")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=PACK_ROOT / "output" / "bench")
    parser.add_argument("--width", type=int, default=WIDTH, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()

"""ComfyUI on the fake accelerator, with its classic or its dynamic memory management.

It replaces functions of ComfyUI's modules, so a process that called `start` is good for nothing
else. Make weight files before `start("dynamic")`: with dynamic memory on, ComfyUI builds networks
without weights.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fake_device
import fake_vbar

DEVICE = torch.device("cpu")  # the fake one, after start()


def start(manager: str, *, total_bytes: int = 10**12) -> SimpleNamespace:
    """Put ComfyUI on the fake accelerator. manager: "classic" or "dynamic".

    Returns `device` (held, peak, copied_in, total_bytes), `manager` and `end_node()`.
    """
    global DEVICE
    device = fake_device.register(total_bytes)
    DEVICE = torch.device(fake_device.NAME, 0)
    _place_models_on(DEVICE, device)
    if manager == "classic":
        return SimpleNamespace(device=device, manager=manager, end_node=lambda: None)
    fake_vbar.install(DEVICE)
    device.unbacked = fake_vbar.FakeVBAR.unbacked_bytes
    fake_vbar.Room.free = device.free
    _load_without_writing_data()

    import comfy.memory_management
    import comfy.model_patcher

    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    return SimpleNamespace(device=device, manager=manager, end_node=_end_node)


def _place_models_on(accelerator: torch.device, device: Any) -> None:
    import comfy.float
    import comfy.model_base
    import comfy.model_management as management

    def free_memory(dev: Any = None, torch_free_too: bool = False) -> Any:
        if (accelerator if dev is None else dev).type != fake_device.NAME:
            return on_host(dev, torch_free_too)
        return (device.free(), 0) if torch_free_too else device.free()

    rounding = comfy.float.stochastic_rounding

    def round_on_cpu(value: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        return rounding(value.cpu(), dtype, seed=seed).to(value.device)

    on_host = management.get_free_memory
    comfy.float.stochastic_rounding = round_on_cpu
    management.get_free_memory = free_memory
    management.get_torch_device = lambda: accelerator
    management.get_all_torch_devices = lambda exclude_current=False: (
        [] if exclude_current else [accelerator]
    )
    management.unet_offload_device = lambda: torch.device("cpu")
    management.vram_state = management.VRAMState.NORMAL_VRAM
    # Budgets of a few MB are meant exactly: no estimates on top.
    management.minimum_inference_memory = lambda: 0
    management.EXTRA_RESERVED_VRAM = 0
    comfy.model_base.BaseModel.memory_required = lambda self, input_shape, cond_shapes=None: 0


def _load_without_writing_data() -> None:
    """ComfyUI moves parameters of non-leaf modules by writing .data, which this device refuses."""
    import comfy.model_patcher

    load_list = comfy.model_patcher.ModelPatcher._load_list

    def without_data(self: Any, for_dynamic: bool = False, default_device: Any = None) -> Any:
        for module in self.model.modules() if default_device is not None else ():
            own = dict(module.named_parameters(recurse=False))
            if len(own) == len(list(module.parameters())):
                continue
            for name, parameter in own.items():
                dtype = getattr(module, f"{name}_comfy_model_dtype", None)
                moved = parameter.detach().to(device=default_device, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        return load_list(self, for_dynamic=for_dynamic, default_device=None)

    comfy.model_patcher.ModelPatcher._load_list = without_data


def _end_node() -> None:
    """What ComfyUI's execution.py does after every node in dynamic mode."""
    import comfy.model_management
    import comfy.model_prefetch

    comfy.model_management.reset_cast_buffers()
    comfy.model_prefetch.cleanup_prefetch_queues()

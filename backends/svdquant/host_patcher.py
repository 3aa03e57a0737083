"""A patcher class that hands patches of quantised weights to their layers (ComfyUI 0.33).

Derived from whichever class ComfyUI gave the model, so that full, low-VRAM and dynamic loads stay
core's. A stock patcher would lose LoRA on quantised layers without a word.
"""

import functools
from collections import namedtuple
from typing import Any

import torch

from .layout import FROZEN, FrozenWeightError

_Backup = namedtuple("_Backup", ["weight", "inplace_update"])  # what core's unpatch restores


def with_patcher(patcher: Any) -> Any:
    """The patcher with a class that hands patches of quantised weights to their layers."""
    patcher.__class__ = _patcher_class(type(patcher))  # type: ignore[arg-type]
    return patcher


@functools.cache
def _patcher_class(base: type) -> type:
    class SVDQuantPatcher(base):  # type: ignore[misc,valid-type]
        """ComfyUI's patcher (any), except for weights that stay 4-bit."""

        def quantised_layer(self, key: str) -> Any | None:
            import comfy.utils

            owner, _, name = key.rpartition(".")
            if name != "weight" or not owner:
                return None
            module = comfy.utils.get_attr(self.model, owner)
            return module if getattr(module, "quantised", False) else None

        def patch_weight_to_device(
            self,
            key: str,
            device_to: Any = None,
            inplace_update: bool = False,
            return_weight: bool = False,
            force_cast: bool = False,
        ) -> Any:
            module = self.quantised_layer(key)
            if module is None:
                return super().patch_weight_to_device(
                    key,
                    device_to=device_to,
                    inplace_update=inplace_update,
                    return_weight=return_weight,
                    force_cast=force_cast,
                )
            if return_weight:
                raise FrozenWeightError(FROZEN)
            module.lora_patches = self.patches.get(key, [])
            if force_cast and device_to is not None:
                self.backup.setdefault(key, _Backup(module.weight, False))
                moved = module.weight.to(device_to)
                module.weight = torch.nn.Parameter(moved, requires_grad=False)
            return module.weight

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
            if unpatch_weights:
                for module in quantised_layers(self.model).values():
                    module.lora_patches, module._dynamic_patch = [], None
            return super().unpatch_model(device_to, unpatch_weights)

        def patch_hooks(self, hooks: Any) -> None:
            super().patch_hooks(hooks)  # takes the hooks before these off
            combined = self.get_combined_hook_patches(hooks) if hooks is not None else {}
            for name, module in quantised_layers(self.model).items():
                module.hook_patches = combined.get(f"{name}.weight", [])

        def patch_hook_weight_to_device(
            self, hooks: Any, combined_patches: dict[str, Any], key: str, *args: Any, **kwargs: Any
        ) -> None:
            if self.quantised_layer(key) is None:
                super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

        def unpatch_hooks(self, *args: Any, **kwargs: Any) -> None:
            if not args and not kwargs:
                for module in quantised_layers(self.model).values():
                    module.hook_patches = []
            super().unpatch_hooks(*args, **kwargs)

        def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
            raise FrozenWeightError(FROZEN)

        def slipstream_features(self) -> set[str]:
            """Features of conflicts.py that this patcher alone can see."""
            scaled = (
                key
                for key, patches in self.patches.items()
                if any(patch[2] != 1.0 for patch in patches)
            )
            merges = any(self.quantised_layer(key) is not None for key in scaled)
            return {"model_merge"} if merges else set()

        def clone(self, *args: Any, **kwargs: Any) -> Any:
            """Core names its own class for a clone without dynamic VRAM."""
            copy = super().clone(*args, **kwargs)
            return copy if hasattr(copy, "quantised_layer") else with_patcher(copy)

    return SVDQuantPatcher


def quantised_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Name -> module of every quantised Linear under `model`."""
    return {n: m for n, m in model.named_modules() if getattr(m, "quantised", False)}

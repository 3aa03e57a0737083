"""ComfyUI's operations with a Linear for quantised weights (ComfyUI 0.33).

The layer takes its weight from wherever ComfyUI keeps it: on the device, cast per use, streamed.
Patches never reach the weight; they are added to the output. Imports happen when called.
"""

from typing import Any

import torch

from .dialects import Checkpoint
from .engine import Engine
from .layout import FROZEN, FrozenWeightError, is_quantised, unwrap
from .linear import linear
from .lora import compile_terms
from .terms import Terms
from .weight import QuantWeight, Segment


def mixed_operations(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """ComfyUI's operations for the layers that it computes in other formats; None without any."""
    import comfy.model_management as memory
    import comfy.ops

    if not checkpoint.core_layers:
        return None
    able = {
        "nvfp4": memory.supports_nvfp4_compute(device),
        "mxfp8": memory.supports_mxfp8_compute(device),
        "float8_e4m3fn": memory.supports_fp8_compute(device),
        "float8_e5m2": memory.supports_fp8_compute(device),
    }
    emulated = {name for name, supported in able.items() if not supported}
    return comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype, disabled=emulated)


def operations(engine: Engine, mixed: Any = None) -> type:
    """ComfyUI's operations with a Linear that takes quantised weights.

    mixed: operations for weights in ComfyUI's own formats; without it dense ones as manual_cast.
    """
    import comfy.ops

    base = mixed or comfy.ops.manual_cast

    class Linear(base.Linear):  # type: ignore[misc,name-defined]
        """Dense weights as `base` has them; quantised ones through `linear`.

        lora_patches: what a full load would have merged; hook_patches: of the current LoRA hooks.
        """

        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device: Any = None,
            dtype: Any = None,
        ) -> None:
            if mixed is None:
                torch.nn.Module.__init__(self)
                self.in_features, self.out_features = in_features, out_features
                self.register_parameter("weight", None)
                self.register_parameter("bias", None)
            else:
                super().__init__(in_features, out_features, bias, device, dtype)
                self.register_parameter("weight", None)
            self.has_bias, self.layer_name = bias, ""
            self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype
            self.weight_function: list[Any] = []
            self.bias_function: list[Any] = []
            self.lora_patches: list[Any] = []
            self.hook_patches: list[Any] = []
            self._dynamic_patch: Any = None

        @property
        def quantised(self) -> bool:
            return is_quantised(self.weight)

        # The dynamic loader sets this to merge while it streams. Reading None keeps it from
        # turning the weight back into 16 bits.
        @property
        def weight_lowvram_function(self) -> Any:
            return None if self.quantised else self._dynamic_patch

        @weight_lowvram_function.setter
        def weight_lowvram_function(self, patch: Any) -> None:
            self._dynamic_patch = patch

        def _load_from_state_dict(
            self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
        ) -> None:
            if mixed is not None and not is_quantised(state.get(f"{prefix}weight")):
                super()._load_from_state_dict(state, prefix, metadata, *rest)
                return
            for name in ("weight", "bias"):
                value = state.get(prefix + name)
                if value is None:
                    continue
                if not is_quantised(value) and not metadata.get("assign_to_params_buffers"):
                    # as torch copies into a parameter of the layer's dtype
                    value = value.to(self.weight_comfy_model_dtype or value.dtype, copy=True)
                setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
            if self.quantised:
                # asked for by whatever patches weights in place, core's merge nodes included
                self.convert_weight = self.set_weight = _frozen

        def _save_to_state_dict(
            self, destination: dict[str, Any], prefix: str, keep_vars: bool
        ) -> None:
            """The weight as it is: detaching would make another view of its bytes."""
            if not self.quantised:
                super()._save_to_state_dict(destination, prefix, keep_vars)
                return
            destination[f"{prefix}weight"] = self.weight
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            if mixed is not None and not self.quantised:
                return super().state_dict(*args, **kwargs)
            return torch.nn.Module.state_dict(self, *args, **kwargs)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            if not self.quantised:
                return super()._apply(fn, recurse)
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    moved = fn(parameter)
                    if moved is not parameter:
                        self._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
            return self

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not self.quantised:
                return super().forward(*args, **kwargs)
            comfy.ops.run_every_op()
            return _forward(self, engine, *args, **kwargs)

    return type("SVDQuantOperations", (base,), {"Linear": Linear})


def _frozen(*args: Any, **kwargs: Any) -> Any:
    raise FrozenWeightError(FROZEN)


def _forward(module: Any, engine: Engine, x: torch.Tensor) -> torch.Tensor:
    """One quantised layer: its weight from wherever ComfyUI keeps it, its patches as terms."""
    import comfy.ops

    patches, functions = active_patches(module), module.weight_function
    if functions:
        module.weight_function = []  # hidden, or the cast would turn the weight into 16 bits
    try:
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module,
            dtype=module.weight.dtype,
            device=x.device,
            bias_dtype=module.weight.dtype,
            offloadable=True,
        )
    finally:
        if functions:
            module.weight_function = functions
    assert is_quantised(weight)
    quantised = unwrap(weight)
    terms = _terms(module, engine, patches, quantised, x.device)
    session, used = engine.session, []

    def kernel_of(segment: Segment, inputs: torch.Tensor) -> Any:
        used.append(engine.kernel(segment, inputs))
        return used[-1]

    y = linear(
        x,
        quantised,
        bias,
        kernel_of,
        compute=engine.compute,
        terms=terms,
        session=session,
        layer=module,
    )
    if session is not None:  # only now: a kernel that fails at its first call is replaced
        session.ran.setdefault(module.layer_name, set()).update(kernel.id for kernel in used)
    comfy.ops.uncast_bias_weight(module, weight, bias, stream)
    return y


def active_patches(module: Any) -> list[Any]:
    """A layer's patches now, by whichever way ComfyUI's loader handed them over.

    Raises ValueError for a weight function that is not a patch list (a weight wrapper).
    """
    lowvram = [f for f in module.weight_function if getattr(f, "is_lowvram_patch", False)]
    if len(lowvram) != len(module.weight_function):
        raise ValueError(
            f"A weight wrapper is set on the quantised layer {module.layer_name}: it would need "
            "16-bit weights. Remove the node that adds it."
        )
    if module._dynamic_patch is not None:
        lowvram = [module._dynamic_patch]
    if lowvram:
        base = [patch for f in lowvram for patch in f.patches.get(f.key, ())]
    else:
        base = module.lora_patches
    return [*base, *module.hook_patches]


def _terms(
    module: Any, engine: Engine, patches: list[Any], weight: QuantWeight, device: torch.device
) -> Terms | None:
    """The layer's terms on the device, in the dtype it computes in; compiled once per run, kept in
    the weight's dtype where the weight rests."""
    if not patches:
        return None
    dtype = weight.segments[0].dtype
    key = (id(module), tuple(map(id, patches)))
    session = engine.session
    if session is not None and key in session.terms:
        terms = session.terms[key]
    else:
        terms, _ = compile_terms(patches, weight)
        # A classic low-VRAM load keeps them beside the weight; a dynamic one is cheap to evict
        rest = device if hasattr(module, "_v") else module.weight.device
        terms = None if terms is None else terms.to(rest, dtype)
        if session is not None:
            session.terms[key] = terms
    return None if terms is None else terms.to(device, engine.compute or dtype)

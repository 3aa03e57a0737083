"""SageAttention 2.x: INT8 q and k, v in FP16 or FP8 by GPU, no mask.

The CUDA functions are called by name: `sageattn` sends SM86 to its Triton route, which gave black
images (Comfy-Org/ComfyUI#9773), and drops `attn_mask` silently. Accumulation is the package's
default for each function. Source: sageattention/core.py, 2.2.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..request import Request
from . import operands, rules
from .base import APPROXIMATE
from .package import TRITON, PackageKernel, UnavailableError, require_c_compiler, version_of
from .sage1 import V2_FUNCTION

# SM -> function and what it needs beyond the defaults.
FUNCTIONS: dict[int, tuple[str, dict[str, str]]] = {
    80: ("sageattn_qk_int8_pv_fp16_cuda", {}),
    86: ("sageattn_qk_int8_pv_fp16_cuda", {}),
    89: ("sageattn_qk_int8_pv_fp8_cuda", {}),
    90: ("sageattn_qk_int8_pv_fp8_cuda_sm90", {}),
    120: ("sageattn_qk_int8_pv_fp8_cuda", {"qk_quant_gran": "per_warp"}),
    121: ("sageattn_qk_int8_pv_fp8_cuda", {"qk_quant_gran": "per_warp"}),
}


class Sage2(PackageKernel):
    """sageattention 2.x: the function for this GPU."""

    id, category, lse, sparse = "sage2", APPROXIMATE, True, False
    package, title = "sageattention", "sageattention 2.x"
    pip = (
        "Windows: a prebuilt wheel from https://github.com/woct0rdho/SageAttention/releases, and "
        "triton-windows; Linux: build https://github.com/thu-ml/SageAttention (pip only has 1.0.6)"
    )
    distributions = ("sageattention", *TRITON)
    _package: Any

    def load(self, package: Any) -> None:
        if not hasattr(package, V2_FUNCTION):
            raise UnavailableError(
                f"sageattention 2.x is not installed (found {version_of('sageattention')}, which "
                f"is 'sage1'). {self.pip}, or choose 'sage1'"
            )
        require_c_compiler(self.title)
        self._package = package

    def ineligible(self, request: Request) -> str | None:
        name = self.id
        return (
            rules.device(name, request, hip=False)
            or rules.arch(name, request, only=tuple(FUNCTIONS))
            or rules.dtype(name, request, "float16", "bfloat16")
            or rules.head_dim(name, request, most=128)
            or rules.no_mask(name, request)
            or rules.gqa(name, request)
            or rules.precision(name, request)
            or rules.no_capture(name, request)
            or rules.grid(name, request)
            or rules.int32_offsets(name, request)
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
        want_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert mask is None
        attention, options = self._function(q.device)
        with operands.on_device_of(q):
            result = attention(
                *map(operands.aligned, (q, k, v)),
                tensor_layout="HND",
                is_causal=False,
                sm_scale=scale,
                smooth_k=True,
                return_lse=want_lse,
                **options,
            )
        if not want_lse:
            return result.contiguous()
        out, lse = result
        return out.contiguous(), lse

    def _function(self, device: torch.device) -> tuple[Callable[..., Any], dict[str, str]]:
        major, minor = torch.cuda.get_device_capability(device)
        name, options = FUNCTIONS[major * 10 + minor]
        return getattr(self._package, name), options

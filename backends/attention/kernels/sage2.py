"""SageAttention 2.x: INT8 q and k, v in FP16 or FP8 by GPU, no mask.

The CUDA functions are called by name: `sageattn` sends SM86 to its Triton route, which gave black
images (Comfy-Org/ComfyUI#9773), and drops `attn_mask` silently. `sage2` accumulates P times V as
each function does by default; two more kernels trade that differently. Source:
sageattention/core.py and setup.py, 2.2. Of the GPUs that setup.py compiles for, core.py has no
route for SM100, and neither knows SM87 or SM103.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..request import Request
from . import heads, operands, rules
from .base import APPROXIMATE
from .package import TRITON, PackageKernel, UnavailableError, require_c_compiler, version_of
from .sage1 import V2_FUNCTION

Functions = dict[int, tuple[str, dict[str, str]]]
FP16, FP8 = "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp8_cuda"
_PER_WARP = {"qk_quant_gran": "per_warp"}  # as core.py does on SM12x


class Sage2(PackageKernel):
    """sageattention 2.x: the function for this GPU with its own accumulation.

    functions: SM -> function and what it needs beyond its defaults.
    """

    id, category, lse, sparse = "sage2", APPROXIMATE, True, False
    package, title = "sageattention", "sageattention 2.x"
    pip = (
        "Windows: a prebuilt wheel from https://github.com/woct0rdho/SageAttention/releases, and "
        "triton-windows; Linux: build https://github.com/thu-ml/SageAttention (pip only has 1.0.6)"
    )
    distributions = ("sageattention", *TRITON)
    functions: ClassVar[Functions] = {
        80: (FP16, {}),
        86: (FP16, {}),
        89: (FP8, {}),
        90: (f"{FP8}_sm90", {}),
        120: (FP8, _PER_WARP),
        121: (FP8, _PER_WARP),
    }
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
            or rules.arch(name, request, only=tuple(self.functions))
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
        function, options = self._function(q.device)
        options = {**call_options(scale), **options}
        if want_lse:
            return with_lse(function, q, k, v, options)
        return in_groups(function, q, k, v, None, options)

    def _function(self, device: torch.device) -> tuple[Callable[..., Any], dict[str, Any]]:
        major, minor = torch.cuda.get_device_capability(device)
        name, options = self.functions[major * 10 + minor]
        return getattr(self._package, name), dict(options)


class Sage2Fp16Accum(Sage2):
    """P times V in FP16, each block's sum added to FP32. RTX 30 does that at twice FP32's rate."""

    id = "sage2_fp16_accum"
    functions: ClassVar[Functions] = {
        sm: (FP16, {"pv_accum_dtype": "fp16+fp32"}) for sm in (80, 86)
    }


class Sage2Fp32Accum(Sage2):
    """P times V in FP32 where 2.2 takes FP16 by default: slower, closer to exact."""

    id = "sage2_fp32_accum"
    functions: ClassVar[Functions] = {
        sm: (FP8, {"pv_accum_dtype": "fp32+fp32", **(_PER_WARP if sm >= 120 else {})})
        for sm in (89, 120, 121)
    }


def call_options(scale: float | None) -> dict[str, Any]:
    """What every function of sageattention 2.x is given."""
    return {"tensor_layout": "HND", "is_causal": False, "sm_scale": scale, "smooth_k": True}


def in_groups(
    function: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """A function of sageattention 2.x on groups of heads; mask only if it takes one."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        masks = {} if mask is None else {"attn_mask": mask}
        with operands.on_device_of(q):
            out: torch.Tensor = function(*map(operands.aligned, (q, k, v)), **masks, **options)
        return out.contiguous()

    copies = q.numel() + k.numel() + 3 * v.numel()  # FP8 from a transposed copy
    return heads.in_groups(attention, q, k, v, mask, workspace_bytes=copies)


def with_lse(
    function: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log-sum-exp) of a function of sageattention 2.x, all heads at once."""
    with operands.on_device_of(q):
        out, lse = function(*map(operands.aligned, (q, k, v)), return_lse=True, **options)
    return out.contiguous(), lse

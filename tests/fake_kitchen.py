"""comfy-kitchen's compiled CUDA functions, faked: the real package's Python around them.

Each checks what the C++ side relies on (layout, dtypes, sizes, 32-bit indices), notes its call and
computes with the package's own plain-torch code on the faked device of fake_cuda.py.
"""

import builtins
from collections.abc import Sequence
from typing import Any

import torch

LIMIT = 2**31


class Compiled:
    """In place of comfy_kitchen.backends.cuda._C.

    fault: "" for right results; "values", "silent" (writes nothing), "unstable" (another result in
    each call), or the name of an exception type.
    """

    HAS_CUBLASLT = False

    def __init__(self, fault: str = ""):
        self.fault = fault
        self.calls: list[dict[str, Any]] = []

    def svdquant_quantize_w4a4(
        self, x: Any, smooth: Any, down: Any, q: Any, ascales: Any, low: Any, unsigned: bool,
        stream: int,
    ) -> None:  # fmt: skip
        from comfy_kitchen.backends.eager import svdquant

        self._note("quantize", x=x, smooth=smooth, down=down, q=q, ascales=ascales, low=low)
        k, padded = x.shape[1], q.shape[0]
        assert k % 64 == 0
        assert padded % 256 == 0
        assert padded * k < LIMIT
        assert x.dtype == smooth.dtype == down.dtype == ascales.dtype
        found = svdquant.quantize_svdquant_w4a4(
            x.held, smooth.held, down.held, pad_size=256, act_unsigned=unsigned
        )
        q.held.copy_(found[0].view(torch.uint8))
        ascales.held.copy_(found[1])

    def svdquant_scaled_mm_w4a4(
        self, act: Any, wgt: Any, ascales: Any, wscales: Any, low: Any, up: Any, bias: Any,
        out: Any, unsigned: bool, fast: bool, shared: bool, fused: bool, stream: int,
    ) -> None:  # fmt: skip
        from comfy_kitchen.backends.eager import svdquant

        self._note(
            "matmul", act=act, wgt=wgt, ascales=ascales, wscales=wscales, low=low, up=up, bias=bias,
            out=out,
        )  # fmt: skip
        (m, half), n = act.shape, wgt.shape[0]
        assert wgt.shape == (n, half)
        assert ascales.shape == (half // 32, m)
        assert wscales.shape == (half // 32, n)
        assert low.shape[1] == up.shape[1]
        assert up.shape[1] % 16 == 0
        assert m * half * 2 < LIMIT
        assert m * n < LIMIT
        assert m // 32 <= 65535  # the grid's second dimension
        assert out.dtype == ascales.dtype == wscales.dtype == up.dtype
        assert fused
        if self.fault in ("", "values", "unstable"):
            found = svdquant.scaled_mm_svdquant_w4a4(
                act.held.view(torch.int8), wgt.held.view(torch.int8), ascales.held, wscales.held,
                low.held, up.held, bias=bias.held if bias.numel() else None, act_unsigned=unsigned,
            )  # fmt: skip
            out.held.copy_(found)
        self._spoil(out)

    def awq_w4a16(
        self, x: Any, wgt: Any, scales: Any, zeros: Any, out: Any, group: int, stream: int
    ) -> None:
        from comfy_kitchen.backends.eager import awq

        self._note("gemv", x=x, wgt=wgt, scales=scales, zeros=zeros, out=out)
        assert x.dtype == scales.dtype == zeros.dtype == out.dtype
        assert x.shape[0] <= 256
        if self.fault in ("", "values", "unstable"):
            out.held.copy_(
                awq.gemv_awq_w4a16(x.held, wgt.held.view(torch.int8), scales.held, zeros.held)
            )
        self._spoil(out)

    def _note(self, name: str, **tensors: Any) -> None:
        for key, tensor in tensors.items():
            assert tensor.is_cuda, key
            assert tensor.is_contiguous(), key
        if self.fault and self.fault not in ("values", "silent", "unstable"):
            raise getattr(builtins, self.fault)("faked")
        self.calls.append({"name": name, **{k: list(t.shape) for k, t in tensors.items()}})

    def _spoil(self, out: Any) -> None:
        if self.fault == "values":
            out.held.mul_(1.2)
        if self.fault == "unstable":
            out.held[0, 0] += 0.01 * len(self.calls)


def install(
    fault: str = "", cuda: str = "12.8", driver: Sequence[int] | None = (13, 0)
) -> Compiled:
    """The faked functions in the real package, on a faked GPU whose torch is built for `cuda`.

    Call fake_cuda.start() before.
    """
    torch.version.cuda = cuda
    import comfy_kitchen
    from comfy_kitchen.backends import cuda as module
    from slipstream.backends.svdquant.kernels import kitchen_access

    if tuple(map(int, cuda.split("."))) < (13,):  # as ComfyUI's quant_ops.py does
        comfy_kitchen.registry.disable("cuda")
    else:
        comfy_kitchen.registry.enable("cuda")
    kitchen_access._driver_cuda = lambda: None if driver is None else tuple(driver)
    module._C = Compiled(fault)
    module._EXT_AVAILABLE = True
    module._wrap_for_dlpack = lambda tensor: tensor  # the capsule that carries the same tensor
    return module._C

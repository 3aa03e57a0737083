"""One question to the attention kernels in a process of its own, with real packages installed.

    python [-O] kernels_child.py '{"packages": [...], "sm": 89, "ask": "availability", ...}'

The last line of the output is the answer as JSON. Triton's interpreter wants `python -O`, where
asserts do not count: the tests compare what comes back.
"""

import json
import os
import site
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prepare(packages: list[str]) -> None:
    """Put packages in front of the Python's own."""
    root = Path(os.environ.get("SLIPSTREAM_KERNEL_PACKAGES", ""))
    for name in packages:
        site.addsitedir(str(root / name))  # .pth files, too: nvidia-cutlass-dsl needs its own
    sys.path[:0] = [str(root / name) for name in packages]


def fake_gpu(sm: int) -> None:
    """One GPU of compute capability `sm` in torch."""
    import torch

    capability = divmod(sm, 10)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.version.cuda = torch.version.cuda or "13.0"


def request(**changes: Any) -> Any:
    from slipstream.backends.attention.request import Request

    sizes = {"batch": 1, "heads": 24, "kv_heads": 24, "head_dim": 128}
    tokens = {"q_tokens": 32_768, "k_tokens": 32_768}
    defaults = {"device_type": "cuda", "dtype": "bfloat16", **sizes, **tokens}
    if isinstance(changes.get("capability"), list):
        changes["capability"] = tuple(changes["capability"])
    return Request(**{**defaults, **changes})


def availability(ids: list[str], sms: list[int]) -> list[dict[str, str | None]]:
    """What kernels say of themselves on each of some GPUs."""
    from slipstream.backends.attention.kernels.table import KERNELS

    found = []
    for sm in sms:
        fake_gpu(sm)
        found.append({name: type(KERNELS[name])().available() for name in ids})
    return found


def choice(policy: str, calls: list[dict[str, Any]]) -> list[str]:
    """The kernel that `policy` would try first for each call, or "" for none."""
    from slipstream.backends.attention.kernels.table import KERNELS, POLICIES
    from slipstream.backends.registry import Choice, select

    candidates = [KERNELS[name] for name in POLICIES[policy]]
    found = [select(candidates, request(**changes)) for changes in calls]
    return [f.candidate.id if isinstance(f, Choice) else "" for f in found]


def imported(calls: list[dict[str, Any]]) -> list[str]:
    """Which optional packages are imported after every policy was asked about `calls`."""
    for policy in ("exact", "balanced", "fastest"):
        choice(policy, calls)
    names = {"xformers", "flash_attn", "sageattention", "comfy_kitchen", "triton"}
    return sorted(names & {name.partition(".")[0] for name in sys.modules})


def tensors(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """q, k, v [B,H,N,D] as `layout` has them in memory, seeded.

    mean: of v; alike: so many tokens in a row are nearly the same in k and v.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype, dim = getattr(torch, case.get("dtype", "float16")), case["head_dim"]
    heads, kv_heads = case.get("heads", 2), case.get("kv_heads", 2)
    layout = case.get("layout", "HND")

    def make(heads: int, tokens: int) -> torch.Tensor:
        if layout == "HND":
            return torch.randn(1, heads, tokens, dim, generator=generator).to(dtype)
        wide = 3 if layout == "qkv" else 1  # as models slice q, k, v from one projection
        flat = torch.randn(1, tokens, wide * heads * dim, generator=generator).to(dtype)
        if run := case.get("alike"):
            base = flat[:, ::run].repeat_interleave(run, 1)[:, :tokens]
            flat = base + 0.1 * flat
        part = flat[..., (wide - 1) * heads * dim :]
        return part.unflatten(-1, (heads, dim)).transpose(1, 2)

    q = make(heads, case["q_tokens"])
    k, v = make(kv_heads, case["k_tokens"]), make(kv_heads, case["k_tokens"])
    return q, k, v.add_(case.get("mean", 0.0))


def relative_l1(out: Any, q: Any, k: Any, v: Any, scale: float | None = None) -> float:
    from torch.nn import functional

    exact = functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if out.shape != exact.shape or out.dtype != q.dtype:
        raise SystemExit(f"{tuple(out.shape)} {out.dtype} for {tuple(exact.shape)} {q.dtype}")
    return float((out.float() - exact).abs().sum() / exact.abs().sum())


def errors(kernel: str, cases: list[dict[str, Any]]) -> list[float]:
    """Relative L1 of a kernel, run through its adapter, against fp32. Inputs must not change."""
    import torch
    from slipstream.backends.attention.kernels import heads
    from slipstream.backends.attention.kernels.table import KERNELS

    adapter = KERNELS[kernel]
    if (reason := adapter.available()) is not None:
        raise SystemExit(reason)
    found = []
    for case in cases:
        q, k, v = tensors(case)
        before = [x.clone() for x in (q, k, v)]
        heads.WORKSPACE_BYTES = case.get("workspace_bytes", 2**28)
        out = adapter.run(q, k, v, scale=case.get("scale"))
        if not all(map(torch.equal, before, (q, k, v))):
            raise SystemExit(f"{kernel} wrote to its inputs: {case}")
        found.append(relative_l1(out, q, k, v, case.get("scale")))
    return found


def bare_sage1(cases: list[dict[str, Any]]) -> list[float]:
    """The same for the package without our adapter."""
    import sageattention

    found = []
    for case in cases:
        q, k, v = tensors(case)
        out = sageattention.sageattn(q, k.clone(), v, tensor_layout="HND")
        found.append(relative_l1(out, q, k, v))
    return found


def shapes(kernel: str, cases: list[dict[str, Any]]) -> list[list[int]]:
    """Output shapes of a kernel's real operator on tensors without memory: schema and names fit."""
    import torch
    from slipstream.backends.attention.kernels.table import KERNELS

    adapter = KERNELS[kernel]
    if (reason := adapter.available()) is not None:
        raise SystemExit(reason)
    found = []
    for case in cases:
        q, k, v = (x.to("meta") for x in tensors(case))
        mask = torch.empty(case["mask"], device="meta") if "mask" in case else None
        found.append(list(adapter.run(q, k, v, mask=mask, scale=case.get("scale")).shape))
    return found


def sol_workspace(sizes: list[list[int]]) -> list[float]:
    """Bytes per element of q that the package plans for (tokens, heads)."""
    import comfy_kitchen

    plan = comfy_kitchen.backends.cuda._C.sol_attn_plan
    return [plan(1, n, h, token_aug=0)["total"] / (n * h * 128) for n, h in sizes]


def kitchen_extension() -> str | None:
    """Why comfy-kitchen's compiled extension does not load here, or None."""
    import comfy_kitchen

    cuda = comfy_kitchen.backends.cuda
    return None if cuda._EXT_AVAILABLE else str(cuda._EXT_ERROR)


def flash4_widths(sms: list[int]) -> dict[str, list[list[int]]]:
    """SM -> [widths that the package takes, widths that our rule takes] among multiples of 8."""
    from flash_attn.cute import interface
    from slipstream.backends.attention.kernels.table import KERNELS

    def taken(sm: int, width: int) -> bool:
        try:
            interface._validate_head_dims(width, width, sm // 10, 8)
        except AssertionError:
            return False
        return True

    found = {}
    widths = range(8, 257, 8)
    for sm in sms:
        own = [
            width for width in widths
            if KERNELS["flash4"].ineligible(
                request(capability=divmod(sm, 10), head_dim=width)
            ) is None
        ]  # fmt: skip
        found[str(sm)] = [[w for w in widths if taken(sm, w)], own]
    return found


def flash4_names() -> list[str]:
    """Parameters of the package's function."""
    import inspect

    from flash_attn import cute

    return list(inspect.signature(cute.flash_attn_func).parameters)


def xformers_limits() -> dict[str, list[int] | None]:
    """Highest compute capability of the two kernels that our rules are about."""
    from xformers.ops import fmha

    highest = {
        "cutlass": fmha.cutlass.FwOp.CUDA_MAXIMUM_COMPUTE_CAPABILITY,
        "flash": fmha.flash.FwOp.CUDA_MAXIMUM_COMPUTE_CAPABILITY,
    }
    return {name: None if sm is None else list(sm) for name, sm in highest.items()}


def svdquant(check: str, **more: Any) -> Any:
    """A question of svdquant_child.py."""
    import svdquant_child

    return getattr(svdquant_child, check)(**more)


QUESTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        availability, choice, imported, errors, bare_sage1, shapes, sol_workspace,
        kitchen_extension, flash4_widths, flash4_names, xformers_limits, svdquant,
    )
}  # fmt: skip


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    prepare(question.pop("packages"))
    if "sm" in question:
        fake_gpu(question.pop("sm"))
    import comfy_home

    comfy_home.load_pack()
    print(json.dumps(QUESTIONS[question.pop("ask")](**question)))

"""Eligibility rules that kernels share: each gives the sentence that rules a request out, or None.

Kernels chain them with `or`, most telling first, so that the first failing rule speaks. Rules on
compute capabilities hold on NVIDIA GPUs only: ROCm shows SM-shaped numbers of its own.
"""

from collections.abc import Collection

from ..request import Request

GRID = 65_535  # CUDA's limit on the y and z dimensions of a grid, where batch and heads go
INT32 = 2**31


def device(name: str, request: Request, *, hip: bool = True) -> str | None:
    """Needs CUDA, or (hip) ROCm."""
    if request.device_type != "cuda":
        wanted = "a CUDA or ROCm GPU" if hip else "a CUDA GPU"
        return f"device {request.device_type}: {name} needs {wanted}"
    if request.is_hip and not hip:
        return f"ROCm: {name} needs a CUDA GPU"
    return None


def arch(
    name: str,
    request: Request,
    *,
    low: int = 0,
    high: int = 999,
    only: Collection[int] = (),
) -> str | None:
    """Compute capability (SM89 = 89) within a range, or one of a few."""
    if request.is_hip:
        return None
    sm = request.sm
    if sm is None:
        return f"compute capability unknown: {name} cannot tell whether it runs"
    if only:
        return None if sm in only else f"SM{sm}: {name} needs {_listed(only, 'SM')}"
    if low <= sm <= high:
        return None
    span = f"SM{low} to SM{high}" if high < 999 else f"SM{low} or newer"
    return f"SM{sm}: {name} needs {span}"


def dtype(name: str, request: Request, *names: str) -> str | None:
    """One of the named dtypes; bfloat16 also needs SM80."""
    if request.dtype not in names:
        return f"{request.dtype}: {name} takes {_listed(names, '', 'and')}"
    if request.dtype == "bfloat16" and request.sm is not None and request.sm < 80:
        return f"bfloat16 on SM{request.sm}: {name} needs SM80 for it"
    return None


def head_dim(
    name: str, request: Request, *, most: int | None = None, only: Collection[int] = ()
) -> str | None:
    """The head width: up to `most`, or one of a few; the same for v."""
    width = request.head_dim
    if only and width not in only:
        return f"head_dim {width}: {name} needs {_listed(only)}"
    if most is not None and width > most:
        return f"head_dim {width}: {name} takes up to {most}"
    if request.value_dim not in (None, width):
        return f"head_dim {width} with {request.value_dim} in v: {name} needs equal ones"
    return None


def no_mask(name: str, request: Request) -> str | None:
    return f"mask: {name} takes none" if request.has_mask else None


def gqa(name: str, request: Request, *, allowed: bool = True) -> str | None:
    """Fewer k/v heads than q heads, if allowed and a divisor."""
    heads, kv_heads = request.heads, request.kv_heads
    if heads == kv_heads:
        return None
    if not allowed:
        return f"{kv_heads} k/v heads for {heads} q heads: {name} needs as many"
    if heads % kv_heads:
        return f"{kv_heads} k/v heads for {heads} q heads: {name} needs a divisor"
    return None


def default_scale(name: str, request: Request) -> str | None:
    return f"scale: {name} has head_dim ** -0.5 built in" if request.has_scale else None


def precision(name: str, request: Request) -> str | None:
    """Approximate kernels only where the caller and the schedule let them."""
    if not request.low_precision:
        return f"low precision: the model forbids it here, and {name} is approximate"
    if request.dense:
        return f"schedule: exact kernels only here, and {name} is approximate"
    return None


def no_lse(name: str, request: Request) -> str | None:
    return f"log-sum-exp: {name} does not return it" if request.want_lse else None


def no_capture(name: str, request: Request) -> str | None:
    """A kernel that is compiled at its first call cannot be met first inside a CUDA graph."""
    if request.capturing:
        return f"CUDA graph capture: {name} compiles at its first call; run once before capturing"
    return None


def grid(name: str, request: Request, *, most_batch: int = GRID) -> str | None:
    """Batch and heads within what the kernel's launch grid can count."""
    if request.batch > most_batch:
        return f"batch {request.batch}: {name} takes up to {most_batch}"
    if request.heads > GRID:
        return f"{request.heads} heads: {name} takes up to {GRID}"
    return None


def int32_offsets(name: str, request: Request) -> str | None:
    """Fewer than 2**31 elements: Triton kernels count offsets in 32 bits (limit unverified)."""
    q = request.heads * request.q_tokens
    k = request.kv_heads * request.k_tokens
    elements = request.batch * request.head_dim * max(q, k)
    if elements < INT32:
        return None
    return f"{elements} elements in one tensor: {name} counts in 32 bits, fewer than {INT32}"


def _listed(values: Collection[object], prefix: str = "", word: str = "or") -> str:
    """'64, 96 or 128'."""
    texts = [f"{prefix}{value}" for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} {word} {texts[-1]}"

"""The kernels torch brings: 'math' against SDPA, and what the GPU ops are given."""

import pytest
import torch
from slipstream.backends.attention.kernels import math as math_kernel
from slipstream.backends.attention.kernels.table import KERNELS
from torch.nn import functional

MATH = KERNELS["math"]
NEGATIVE = float("-inf")


def qkv(heads=4, kv_heads=None, head_dim=16, dtype=torch.float32, tokens=(33, 21)):
    gen = torch.Generator().manual_seed(1)
    kv_heads = kv_heads or heads
    shapes = ((heads, tokens[0]), (kv_heads, tokens[1]), (kv_heads, tokens[1]))
    return [torch.randn(2, h, n, head_dim, generator=gen).to(dtype) for h, n in shapes]


def plain(q, k, v, mask=None, scale=None):
    """(out, lse) in fp64, written out."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, NEGATIVE)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


MASKS = {
    "none": None,
    "bool": torch.rand(2, 1, 33, 21, generator=torch.Generator().manual_seed(2)) > 0.4,
    "keys": torch.rand(2, 1, 1, 21, generator=torch.Generator().manual_seed(3)) > 0.4,
    "bias": torch.randn(1, 4, 33, 21, generator=torch.Generator().manual_seed(4)),
    "2d": torch.randn(33, 21, generator=torch.Generator().manual_seed(5)),
}
MASKS["empty row"] = MASKS["bool"].clone()
MASKS["empty row"][:, :, 5] = False


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("want_lse", [False, True])
def test_math_is_attention(mask, kv_heads, scale, want_lse):
    q, k, v = qkv(kv_heads=kv_heads)
    wanted, wanted_lse = plain(q, k, v, MASKS[mask], scale)
    result = MATH.run(q, k, v, mask=MASKS[mask], scale=scale, want_lse=want_lse)
    out, lse = result if want_lse else (result, None)
    assert out.dtype == q.dtype
    assert torch.allclose(out.double(), wanted, atol=3e-6)
    if lse is not None:
        assert lse.dtype == torch.float32
        assert lse.shape == q.shape[:3]
        assert torch.allclose(lse.double(), wanted_lse, atol=2e-6)


def test_math_is_sdpa_bit_for_bit_on_a_cpu():
    q, k, v = qkv()
    assert torch.equal(MATH.run(q, k, v), functional.scaled_dot_product_attention(q, k, v))
    bias = MASKS["bias"].double()  # torch wants the mask in q's dtype
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.float())
    assert torch.equal(MATH.run(q, k, v, mask=bias), wanted)


@pytest.mark.parametrize("scores_bytes", [1, 2_000, 9_000, 10**9])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", ["none", "bias", "empty row"])
def test_slices_of_any_size_give_the_same(scores_bytes, kv_heads, mask):
    q, k, v = qkv(kv_heads=kv_heads)
    wanted, wanted_lse = plain(q, k, v, MASKS[mask])
    out, lse = math_kernel.sliced_attention(
        q, k, v, MASKS[mask], 16**-0.5, scores_bytes=scores_bytes
    )
    assert torch.allclose(out.double(), wanted, atol=1e-6)
    assert torch.allclose(lse.double(), wanted_lse, atol=2e-6)


def test_slices_bound_the_scores(monkeypatch):
    largest = 0
    real = torch.logsumexp

    def logsumexp(scores, *args, **kwargs):
        nonlocal largest
        largest = max(largest, scores.nbytes)
        return real(scores, *args, **kwargs)

    monkeypatch.setattr(torch, "logsumexp", logsumexp)
    q, k, v = qkv(heads=8, tokens=(300, 200))
    math_kernel.sliced_attention(q, k, v, None, 0.25, scores_bytes=50_000)
    assert 25_000 < largest <= 50_000
    math_kernel.sliced_attention(q, k, v, None, 0.25, scores_bytes=10**9)
    assert largest == 8 * 300 * 200 * 4  # the whole of one batch entry


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_slices_keep_the_dtype_and_accumulate_in_fp32_or_better(dtype):
    q, k, v = qkv(dtype=dtype)
    out, lse = math_kernel.sliced_attention(q, k, v, None, 0.25)
    wanted, wanted_lse = plain(q, k, v, scale=0.25)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), wanted, atol=3 * torch.finfo(dtype).eps, rtol=1e-2)
    assert torch.allclose(lse.double(), wanted_lse, atol=2e-6)


def merge(parts):
    """Attention over all keys from (out, lse) over parts of them, in fp32."""
    out, lse = parts[0]
    for other, other_lse in parts[1:]:
        both = torch.logaddexp(lse, other_lse)
        out = out * (lse - both).exp()[..., None] + other * (other_lse - both).exp()[..., None]
        lse = both
    return out, lse


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("cut", [1, 160, 256, 511])
def test_halves_merged_by_lse_are_full_attention(cut):
    q, k, v = qkv(heads=3, head_dim=64, tokens=(96, 512))
    full, full_lse = MATH.run(q, k, v, want_lse=True)
    halves = [
        MATH.run(q, k[:, :, part], v[:, :, part], want_lse=True)
        for part in (slice(0, cut), slice(cut, None))
    ]
    out, lse = merge(halves)
    assert relative(out, full) < 2e-6
    assert relative(lse, full_lse) < 5e-7
    wrong, _ = merge([halves[0], (halves[1][0], halves[1][1] / 0.6931)])  # base 2 for natural
    assert relative(wrong, full) > 1e-2


# --- what the ops of the GPU are given, on stand-ins that compute plain attention ---

OPS = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash_sdpa": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
}
LSE_SHAPES = {
    "cudnn": lambda lse: lse.unsqueeze(-1),
    "flash_sdpa": lambda lse: lse,
    "efficient": lambda lse: functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("nan")),
}


@pytest.fixture(params=OPS)
def op(request, monkeypatch):
    """(kernel, list of what its op was given)."""
    name, calls = request.param, []

    def fake(q, k, v, *args, scale=None):
        bias = args[0] if name != "flash_sdpa" else None
        calls.append({"q": q, "k": k, "bias": bias, "args": args, "scale": scale})
        out, lse = plain(q, k, v, bias, scale)
        return out.to(q.dtype), LSE_SHAPES[name](lse.float()), None, None

    monkeypatch.setattr(torch.ops.aten, OPS[name], fake)
    return KERNELS[name], calls


@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("want_lse", [False, True])
def test_aten_ops_get_padded_heads_and_the_scale_of_the_real_ones(op, head_dim, kv_heads, want_lse):
    kernel, calls = op
    q, k, v = qkv(kv_heads=kv_heads, head_dim=head_dim)
    copies = [x.clone() for x in (q, k, v)]
    result = kernel.run(q, k, v, want_lse=want_lse)
    out, lse = result if want_lse else (result, None)
    wanted, wanted_lse = plain(q, k, v)
    assert calls[0]["q"].shape[-1] % 8 == 0
    assert calls[0]["scale"] == pytest.approx(head_dim**-0.5)
    assert torch.allclose(out.double(), wanted, atol=1e-6)
    assert out.shape == q.shape
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), copies, strict=True))
    if lse is not None:
        assert torch.allclose(lse.double(), wanted_lse, atol=2e-6)


@pytest.mark.parametrize("mask", ["bool", "keys", "bias", "2d"])
def test_aten_ops_that_take_masks_get_a_bias(op, mask):
    kernel, calls = op
    if kernel.id == "flash_sdpa":
        with pytest.raises(AssertionError):
            kernel.run(*qkv(), mask=MASKS[mask])
        return
    q, k, v = qkv(kv_heads=2)
    out = kernel.run(q, k, v, mask=MASKS[mask], scale=0.3)
    bias = calls[0]["bias"]
    assert bias.dtype == q.dtype
    assert torch.allclose(out.double(), plain(q, k, v, MASKS[mask], 0.3)[0], atol=1e-6)
    if kernel.id == "efficient":
        assert bias.shape == (2, 4, 33, 21)
        assert bias.stride(-2) % 8 == 0


def test_sdpa_backends_are_never_switched_for_the_process(op):
    kernel, _ = op
    flags = torch.backends.cuda

    def state():
        return (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(),
                flags.cudnn_sdp_enabled(), flags.math_sdp_enabled())  # fmt: skip

    before = state()
    kernel.run(*qkv())
    assert state() == before == (True, True, True, True)


def test_torch_without_an_op_or_a_build_says_so(monkeypatch):
    class Old:
        """torch.ops.aten of an older torch."""

    monkeypatch.setattr(torch.ops, "aten", Old())
    assert KERNELS["cudnn"].available().endswith("Update torch to 2.5 or newer")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "was built without FlashAttention" in KERNELS["flash_sdpa"].available()

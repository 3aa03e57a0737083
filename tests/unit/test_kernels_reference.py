"""The accuracy reference: right rows, honest errors, thresholds that INT8 trips where it should."""

import math

import pytest
import torch
from slipstream.backends.attention import reference
from slipstream.backends.attention.probe import is_finite
from slipstream.backends.attention.reference import compare, evenly_spaced_rows, reference_rows
from torch.nn import functional

CPU = torch.device("cpu")


def test_rows_are_spread_from_first_to_last():
    assert evenly_spaced_rows(5, 256, CPU).tolist() == [0, 1, 2, 3, 4]
    rows = evenly_spaced_rows(75_600, 256, CPU)
    assert (rows[0], rows[-1], len(rows.unique())) == (0, 75_599, 256)
    gaps = rows.diff()
    assert gaps.max() - gaps.min() <= 1
    assert evenly_spaced_rows(10, 1, CPU).tolist() == [0]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", ["none", "bool", "bias", "empty row"])
def test_reference_is_attention_on_its_rows(kv_heads, scale, mask):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 50, 16, generator=gen)
    k, v = (torch.randn(2, kv_heads, 30, 16, generator=gen) for _ in range(2))
    masks = {
        "none": None,
        "bool": torch.rand(50, 30, generator=gen) > 0.5,
        "bias": torch.randn(2, 1, 1, 30, generator=gen),
        "empty row": torch.ones(2, 1, 50, 30, dtype=torch.bool),
    }
    masks["empty row"][:, :, 0] = False
    rows = evenly_spaced_rows(50, 12, CPU)
    got = reference_rows(q, k, v, mask=masks[mask], scale=scale, rows=rows)
    full = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=masks[mask], scale=scale, enable_gqa=kv_heads != 4
    )
    assert got.dtype == torch.float32
    assert torch.allclose(got, full[:, :, rows], atol=1e-6)
    assert not torch.allclose(got, full[:, :, rows.roll(1)], atol=1e-2)


def test_reference_of_half_precision_is_fp32():
    q, k, v = (torch.randn(1, 1, 64, 8).half() for _ in range(3))
    rows = evenly_spaced_rows(64, 64, CPU)
    got = reference_rows(q, k, v, mask=None, scale=None, rows=rows)
    want = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.allclose(got.double(), want, atol=1e-6)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_reference_keeps_within_its_memory(monkeypatch, kv_heads):
    """As many heads at once as a slice of scores holds, and the same numbers."""
    sizes = []
    real = torch.softmax

    def softmax(scores, dim):
        sizes.append(scores.numel())
        return real(scores, dim)

    q = torch.randn(2, 6, 40, 8)
    k, v = (torch.randn(2, kv_heads, 40, 8) for _ in range(2))
    rows = evenly_spaced_rows(40, 10, CPU)
    whole = reference_rows(q, k, v, mask=None, scale=None, rows=rows)
    group = 6 // kv_heads
    monkeypatch.setattr(torch, "softmax", softmax)
    monkeypatch.setattr(reference, "SCORES_BYTES", 4 * 40 * (group * 10 + 16))
    assert torch.allclose(
        reference_rows(q, k, v, mask=None, scale=None, rows=rows), whole, atol=1e-6
    )
    assert sizes == [group * 10 * 40] * (2 * kv_heads)  # one k/v head at a time


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_check_sees_every_value_and_no_more(dtype):
    out = torch.full((1, 2, 30, 4), 60_000.0, dtype=dtype)
    out[0, 0, 0, 0] = -60_000.0  # further apart than fp16 reaches
    assert is_finite(out)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = out.clone()
        spoilt[0, 1, 29, 3] = bad
        assert not is_finite(spoilt)


def test_compare_measures_error_and_direction():
    reference = torch.randn(1, 2, 30, 16)
    assert compare(reference, reference) == pytest.approx((0.0, 1.0, True))
    rel_l1, cosine, finite = compare(reference * 1.1, reference)
    assert (rel_l1, cosine, finite) == pytest.approx((0.1, 1.0, True), abs=1e-5)
    assert compare(-reference, reference) == pytest.approx((2.0, -1.0, True), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_compare_of_what_is_not_finite(bad):
    reference = torch.randn(1, 1, 8, 4)
    out = reference.clone()
    out[0, 0, 3, 1] = bad
    assert compare(out, reference) == (math.inf, 0.0, False)


def test_compare_of_zeros():
    zero, some = torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)
    assert compare(zero, zero) == (0.0, 1.0, True)
    assert compare(zero, some) == (1.0, 0.0, True)
    rel_l1, cosine, finite = compare(some, zero)
    assert (rel_l1, cosine, finite) == (math.inf, 0.0, True)


def int8_roundtrip(x, block):
    """x [B,H,N,D] through INT8 with one scale per block of tokens, as SageAttention 1 does."""
    blocks = x.unflatten(2, (-1, block))
    scale = blocks.abs().amax(dim=(-1, -2), keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(2, 3)


@pytest.mark.parametrize("sigmas", [0.0, 2.0, 8.0, 20.0])
@pytest.mark.parametrize("smooth", [False, True])
def test_int8_trips_the_threshold_at_20_sigma_unsmoothed_only(sigmas, smooth):
    """D=128, eight K channels with a constant bias; default thresholds of the node."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1024, 128, generator=gen) for _ in range(3))
    channels = torch.zeros(128)
    channels[torch.randperm(128, generator=gen)[:8]] = sigmas
    k = k + channels
    quantized = k - k.mean(2, keepdim=True) if smooth else k
    out = functional.scaled_dot_product_attention(
        int8_roundtrip(q, 128), int8_roundtrip(quantized, 64), v
    )
    rows = evenly_spaced_rows(1024, 256, CPU)
    reference = reference_rows(q, k, v, mask=None, scale=None, rows=rows)
    rel_l1, cosine, finite = compare(out[:, :, rows], reference)
    assert finite
    assert (rel_l1 > 0.05 or cosine < 0.995) == (sigmas == 20.0 and not smooth)

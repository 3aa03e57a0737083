"""Our reading of a call against ComfyUI's own attention_pytorch, for every layout it sends."""

import pytest
import torch
from slipstream.backends.attention.kernels.table import KERNELS
from slipstream.backends.attention.layout import read_call, write_output

B, H, D = 2, 4, 8
KINDS = ("none", "bool", "bias")
SHAPES = {"2d": 2, "3d": 3, "4d": 4, "keys": 0, "one for the batch": 1}

pytestmark = pytest.mark.usefixtures("comfy")


def tensors(layout, kv_heads, tokens, gen):
    nq, nk = tokens
    q = torch.randn(B, nq, H * D, generator=gen)
    k, v = (torch.randn(B, nk, kv_heads * D, generator=gen) for _ in range(2))
    if layout == "3d":
        return q, k, v
    k, v = (x.view(B, nk, kv_heads, D) for x in (k, v))
    if layout == "mix":  # SD3: 3-D q with k and v still split into heads
        return q, k, v
    return tuple(x.transpose(1, 2) for x in (q.view(B, nq, H, D), k, v))


def mask_of(kind, shape, tokens, gen):
    if kind == "none":
        return None
    nq, nk = tokens
    size = {2: (nq, nk), 3: (B, nq, nk), 4: (B, H, nq, nk), 0: (B, 1, 1, nk), 1: (1, nq, nk)}[shape]
    if kind == "bias":
        return torch.randn(size, generator=gen)
    keep = torch.rand(size, generator=gen) > 0.4
    keep[..., 0] = True
    return keep


def ours(q, k, v, heads, mask, skip_reshape, skip_output_reshape, **options):
    views = read_call(
        q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
        enable_gqa=options.get("enable_gqa", False), scale=options.get("scale"),
    )  # fmt: skip
    out = KERNELS["math"].run(views.q, views.k, views.v, mask=views.mask, scale=views.scale)
    return write_output(out, skip_output_reshape=skip_output_reshape)


def theirs(q, k, v, heads, mask, skip_reshape, skip_output_reshape, **options):
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(
        q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape, **options,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["3d", "4d", "mix"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(12, 12), (12, 5), (3, 20)])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_same_as_comfyui(layout, kind, tokens, skip_output_reshape):
    gen = torch.Generator().manual_seed(0)
    q, k, v = tensors(layout, H, tokens, gen)
    for options in ({}, {"scale": 0.4}):
        for shape in SHAPES.values():
            mask = mask_of(kind, shape, tokens, gen)
            call = (q, k, v, H, mask, layout == "4d", skip_output_reshape)
            got, want = ours(*call, **options), theirs(*call, **options)
            assert got.shape == want.shape
            assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["3d", "4d"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_same_as_comfyui_with_fewer_kv_heads(layout, kind, kv_heads):
    gen = torch.Generator().manual_seed(1)
    q, k, v = tensors(layout, kv_heads, (12, 5), gen)
    mask = mask_of(kind, SHAPES["4d"], (12, 5), gen)
    for skip_output_reshape in (False, True):
        call = (q, k, v, H, mask, layout == "4d", skip_output_reshape)
        got, want = ours(*call, enable_gqa=True), theirs(*call, enable_gqa=True)
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["attention_basic", "attention_split", "attention_sub_quad"])
def test_the_other_functions_of_comfyui_agree_on_plain_calls(name):
    from comfy.ldm.modules import attention

    gen = torch.Generator().manual_seed(2)
    bias = torch.randn(12, 5, generator=gen)
    for layout in ("3d", "4d"):
        q, k, v = tensors(layout, H, (12, 5), gen)
        want = getattr(attention, name)(q, k, v, H, mask=bias, skip_reshape=layout == "4d")
        got = ours(q, k, v, H, bias, layout == "4d", False)
        assert torch.allclose(got, want, atol=1e-5)


def test_a_wrong_reading_is_seen():
    gen = torch.Generator().manual_seed(3)
    q, k, v = tensors("3d", H, (12, 12), gen)
    mask = torch.randn(B, 12, 12, generator=gen)
    want = theirs(q, k, v, H, mask, False, False)
    as_heads = mask.repeat_interleave(2, 0)[None]  # [1,H,Nq,Nk] where ComfyUI means [B,1,Nq,Nk]
    assert not torch.allclose(ours(q, k, v, H, as_heads, False, False), want, atol=1e-2)

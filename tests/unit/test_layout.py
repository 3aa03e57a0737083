"""Every shape ComfyUI sends, read and written back, against its conventions spelled out."""

from dataclasses import asdict

import pytest
import torch
from slipstream.backends.attention.kernels.table import KERNELS
from slipstream.backends.attention.layout import mask_dims, read_call, request_of, write_output
from torch.nn import functional

B, H, D = 2, 4, 8
GEN = torch.Generator().manual_seed(7)


def plain(q, k, v, heads, mask, skip_reshape, skip_output_reshape, **options):
    """ComfyUI's attention_pytorch, by its documented conventions, one head at a time."""
    dim = q.shape[-1] if skip_reshape else q.shape[-1] // heads

    def heads_of(x):
        if skip_reshape:
            return [x[:, h] for h in range(x.shape[1])]
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        return list(flat.split(dim, dim=-1))

    qs, ks, vs = heads_of(q), heads_of(k), heads_of(v)
    if mask is not None:
        shape = {2: (1, 1), 3: (mask.shape[0], 1), 4: tuple(mask.shape[:2])}[mask.ndim]
        mask = mask.reshape(*shape, *mask.shape[-2:]).expand(q.shape[0], heads, -1, -1)
    outs = []
    for h in range(heads):
        kv = h * len(ks) // heads
        scale = options.get("scale") or dim**-0.5
        scores = qs[h] @ ks[kv].transpose(-1, -2) * scale
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, h], float("-inf"))
        elif mask is not None:
            scores = scores + mask[:, h]
        outs.append(scores.softmax(-1) @ vs[kv])
    return torch.stack(outs, 1) if skip_output_reshape else torch.cat(outs, -1)


def tensors(layout, kv_heads=H, tokens=(12, 12)):
    """q, k, v in one of ComfyUI's layouts, and skip_reshape."""
    nq, nk = tokens
    q = torch.randn(B, nq, H * D, generator=GEN)
    k, v = (torch.randn(B, nk, kv_heads * D, generator=GEN) for _ in range(2))
    if layout == "3d":
        return (q, k, v), False
    k, v = (x.view(B, nk, kv_heads, D) for x in (k, v))
    if layout == "mix":
        return (q, k, v), False
    q = q.view(B, nq, H, D)
    return tuple(x.transpose(1, 2) for x in (q, k, v)), True


def masks(nq, nk):
    shapes = {"2d": (nq, nk), "3d": (B, nq, nk), "4d": (B, H, nq, nk), "keys": (B, 1, 1, nk)}
    for name, shape in shapes.items():
        keep = torch.rand(shape, generator=GEN) > 0.4
        keep[..., 0] = True
        yield f"bool {name}", keep
        yield f"bias {name}", torch.randn(shape, generator=GEN)
    yield "bias one for the batch", torch.randn(1, nq, nk, generator=GEN)
    yield "none", None


def ours(q, k, v, heads, mask, skip_reshape, skip_output_reshape, **options):
    views = read_call(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **options)
    out = KERNELS["math"].run(views.q, views.k, views.v, mask=views.mask, scale=views.scale)
    return write_output(out, skip_output_reshape=skip_output_reshape)


@pytest.mark.parametrize("layout", ["3d", "4d", "mix"])
@pytest.mark.parametrize("tokens", [(12, 12), (12, 5), (3, 20)])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_layouts_and_masks(layout, tokens, skip_output_reshape, scale):
    (q, k, v), skip_reshape = tensors(layout, tokens=tokens)
    options = {} if scale is None else {"scale": scale}
    for name, mask in masks(*tokens):
        got = ours(q, k, v, H, mask, skip_reshape, skip_output_reshape, **options)
        want = plain(q, k, v, H, mask, skip_reshape, skip_output_reshape, **options)
        assert got.shape == want.shape, name
        assert torch.allclose(got, want, atol=1e-6), name


@pytest.mark.parametrize("layout", ["3d", "4d"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_fewer_kv_heads(layout, kv_heads, skip_output_reshape):
    (q, k, v), skip_reshape = tensors(layout, kv_heads=kv_heads, tokens=(12, 5))
    for name, mask in masks(12, 5):
        got = ours(q, k, v, H, mask, skip_reshape, skip_output_reshape, enable_gqa=True)
        want = plain(q, k, v, H, mask, skip_reshape, skip_output_reshape)
        assert torch.allclose(got, want, atol=1e-6), name


def test_a_mask_read_the_wrong_way_would_be_seen():
    (q, k, v), skip_reshape = tensors("3d")
    mask = torch.randn(12, 12, generator=GEN)
    want = plain(q, k, v, H, mask, skip_reshape, False)
    assert not torch.allclose(ours(q, k, v, H, mask.T, skip_reshape, False), want, atol=1e-2)
    assert not torch.allclose(ours(q, k, v, 2 * H, mask, skip_reshape, False), want, atol=1e-2)


def test_reading_copies_nothing():
    for layout in ("3d", "4d", "mix"):
        inputs, skip_reshape = tensors(layout)
        views = read_call(*inputs, H, skip_reshape=skip_reshape)
        for x, view in zip(inputs, (views.q, views.k, views.v), strict=True):
            assert view.shape == (B, H, 12, D)
            assert view.data_ptr() == x.data_ptr()
    flat = torch.randn(B, 12, 3 * H * D)  # q, k, v as slices of one projection
    q, k, v = flat.split(H * D, dim=-1)
    views = read_call(q, k, v, H)
    assert views.v.data_ptr() == v.data_ptr()
    assert torch.equal(views.v[:, 1], v[..., D : 2 * D])


def test_a_batch_of_one_is_shared_as_in_sdpa():
    (q, k, v), _ = tensors("4d")
    got = ours(q, k[:1], v[:1], H, None, True, True)
    want = functional.scaled_dot_product_attention(q, k[:1].expand(B, -1, -1, -1), v[:1])
    assert torch.allclose(got, want, atol=1e-6)


def test_output_is_written_without_a_copy_when_tokens_come_first():
    out = torch.randn(B, 12, H, D).transpose(1, 2)  # as flash kernels return it
    assert write_output(out, skip_output_reshape=True) is out
    assert write_output(out, skip_output_reshape=False).data_ptr() == out.data_ptr()
    assert torch.equal(write_output(out, skip_output_reshape=False)[..., D : 2 * D], out[:, 1])


def test_request_says_what_the_call_is():
    (q, k, v), skip_reshape = tensors("3d", kv_heads=2, tokens=(12, 5))
    views = read_call(
        q.half(), k.half(), v.half(), H, mask=torch.ones(5, dtype=torch.bool).expand(12, 5),
        skip_reshape=skip_reshape, enable_gqa=True, scale=0.5,
    )  # fmt: skip
    request = request_of(views, low_precision=False, dense=True, want_lse=True)
    assert asdict(request) == {
        "device_type": "cpu",
        "dtype": "float16",
        "batch": B,
        "heads": H,
        "kv_heads": 2,
        "q_tokens": 12,
        "k_tokens": 5,
        "head_dim": D,
        "value_dim": D,
        "capability": None,
        "device_name": "",
        "is_hip": torch.version.hip is not None,
        "mask": "bool",
        "mask_dims": "qk",
        "has_scale": True,
        "low_precision": False,
        "want_lse": True,
        "dense": True,
        "capturing": False,
    }
    assert hash(request) == hash(request_of(views, low_precision=False, dense=True, want_lse=True))


@pytest.mark.parametrize(
    ("mask", "scale", "kind", "has_scale"),
    [
        (None, None, "none", False),
        (torch.zeros(12, 12), D**-0.5, "bias", False),
        (torch.ones(12, 12, dtype=torch.bool), 1.0, "bool", True),
    ],
)
def test_request_knows_masks_and_the_usual_scale(mask, scale, kind, has_scale):
    (q, k, v), _ = tensors("3d")
    request = request_of(read_call(q, k, v, H, mask=mask, scale=scale))
    assert (request.mask, request.has_scale, request.low_precision) == (kind, has_scale, True)


def test_request_asks_a_gpu_once_for_its_capability(monkeypatch):
    from slipstream.backends.attention import layout

    asked = []

    class OnCuda:
        """A tensor's face, on a GPU that is not here."""

        dtype, shape = torch.bfloat16, (1, 2, 3, 4)
        device = torch.device("cuda", 5)

    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or (8, 9)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: asked.append(index) or "GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layout._capability.cache_clear()
    layout._device_name.cache_clear()
    views = layout.Views(OnCuda(), OnCuda(), OnCuda(), None, None)
    for _ in range(2):
        request = request_of(views)
        assert (request.capability, request.device_name) == ((8, 9), "GPU")
        assert request.capturing
    assert asked == [5, 5]
    layout._capability.cache_clear()
    layout._device_name.cache_clear()


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((12, 5), "qk"), ((2, 1, 1, 5), "bk"), ((1, 1, 12, 5), "qk"), ((2, 3, 12, 5), "bhqk")],
)
def test_masks_of_one_kind_are_told_apart_by_what_they_broadcast(shape, dims):
    assert mask_dims(torch.zeros(shape)) == dims

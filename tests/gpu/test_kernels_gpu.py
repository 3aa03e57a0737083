"""Every kernel that is installed and takes the call, on a GPU, against fp32: ./test gpu

Random tensors: errors of quantised kernels here say that they work, not how a picture looks. A
sparse kernel drops keys that random tensors need, so of it only finite values are asked.
"""

from functools import cache

import pytest
import torch
from slipstream.backends import registry
from slipstream.backends.attention.kernels import heads
from slipstream.backends.attention.kernels.base import EXACT
from slipstream.backends.attention.kernels.math import sliced_attention
from slipstream.backends.attention.kernels.table import KERNELS
from slipstream.backends.attention.layout import read_call, request_of
from slipstream.backends.attention.reference import compare, evenly_spaced_rows, reference_rows

NO_GPU = "needs a CUDA or ROCm GPU: torch sees none"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]

# batch, heads, q tokens, k tokens, head_dim
SHAPES = {
    "Flux 1024": (1, 24, 4608, 4608, 128),
    "Wan 480p 81 frames": (1, 40, 32_760, 32_760, 128),
    "Wan cross": (1, 40, 32_760, 512, 128),
    "SDXL": (2, 10, 4096, 4096, 64),
    "SDXL cross": (2, 20, 1024, 77, 64),
    "SD1.5 D40": (2, 8, 4096, 4096, 40),
    "SD1.5 D80": (2, 8, 1024, 1024, 80),
    "SD1.5 D160": (2, 8, 256, 256, 160),
}
SMALL = (2, 8, 1000, 1000, 64)
EXACT_REL_L1, APPROXIMATE_REL_L1, FP4_REL_L1 = 0.01, 0.08, 0.3


@pytest.fixture(scope="module", autouse=True)
def _environment():
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")


@cache
def tensors(shape, kv_heads=None, dtype=torch.bfloat16):
    """q, k, v [B,H,N,D] as views of [B,N,H*D], the way models make them."""
    batch, heads, q_tokens, k_tokens, head_dim = shape
    gen = torch.Generator("cuda").manual_seed(0)

    def make(num_heads, tokens):
        flat = torch.randn(batch, tokens, num_heads * head_dim, generator=gen, device="cuda")
        return flat.to(dtype).view(batch, tokens, num_heads, head_dim).transpose(1, 2)

    kv_heads = kv_heads or heads
    return make(heads, q_tokens), make(kv_heads, k_tokens), make(kv_heads, k_tokens)


def usable(name, q, k, v, *, mask=None, want_lse=False):
    """The kernel, or a skip that says why it does not take this call."""
    views = read_call(q, k, v, q.shape[1], mask=mask, skip_reshape=True)
    reason = registry.reason_against(KERNELS[name], request_of(views, want_lse=want_lse))
    if reason is not None:
        pytest.skip(reason)
    return KERNELS[name]


def check(kernel, out, q, k, v, *, mask=None, scale=None):
    rows = evenly_spaced_rows(q.shape[2], 256, q.device)
    reference = reference_rows(q, k, v, mask=mask, scale=scale, rows=rows)
    rel_l1, cosine, finite = compare(out[:, :, rows], reference)
    print(f"{kernel.id}: rel-L1 {rel_l1:.4f}, cosine {cosine:.5f}")
    assert finite
    assert torch.isfinite(out).all()
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    if kernel.sparse:
        return
    limit = EXACT_REL_L1 if kernel.category == EXACT else APPROXIMATE_REL_L1
    assert rel_l1 < (FP4_REL_L1 if kernel.id == "sage3" else limit)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_is_attention(name, shape):
    q, k, v = tensors(SHAPES[shape])
    kernel = usable(name, q, k, v)
    versions = [x._version for x in (q, k, v)]
    out = kernel.run(q, k, v)
    assert [x._version for x in (q, k, v)] == versions
    assert out.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    check(kernel, out, q, k, v)


@pytest.mark.parametrize("name", [n for n in KERNELS if KERNELS[n].category != EXACT])
def test_groups_of_heads_are_the_same(name, monkeypatch):
    q, k, v = tensors((1, 4, 16_384, 16_384, 128))
    kernel = usable(name, q, k, v)
    whole = kernel.run(q, k, v)
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 1)
    assert compare(kernel.run(q, k, v), whole)[0] < 1e-3


@pytest.mark.parametrize("kind", ["keys", "bool", "bias"])
@pytest.mark.parametrize("name", KERNELS)
def test_masks_are_honoured(name, kind):
    q, k, v = tensors(SMALL)
    batch, _, q_tokens, k_tokens, _ = SMALL
    gen = torch.Generator("cuda").manual_seed(1)
    size = (batch, 1, 1, k_tokens) if kind == "keys" else (batch, 1, q_tokens, k_tokens)
    mask = torch.rand(size, generator=gen, device="cuda") > 0.5
    mask[..., 0] = True
    if kind == "bias":
        mask = torch.randn(size, generator=gen, device="cuda", dtype=q.dtype) * 3
    kernel = usable(name, q, k, v, mask=mask)
    check(kernel, kernel.run(q, k, v, mask=mask), q, k, v, mask=mask)


@pytest.mark.parametrize("name", KERNELS)
def test_fewer_kv_heads_and_a_scale(name):
    q, k, v = tensors(SMALL, kv_heads=2)
    kernel = usable(name, q, k, v)
    if name == "sage3":
        pytest.skip("sage3 has its scale built in")
    check(kernel, kernel.run(q, k, v, scale=0.05), q, k, v, scale=0.05)


@pytest.mark.parametrize("tokens", [(1000, 1000), (1000, 77), (4608, 512)])
@pytest.mark.parametrize("name", [name for name in KERNELS if KERNELS[name].lse])
def test_lse_is_natural_and_merges(name, tokens):
    q, k, v = tensors((2, 8, *tokens, 64))
    kernel = usable(name, q, k, v, want_lse=True)
    out, lse = kernel.run(q, k, v, want_lse=True)
    assert lse.dtype == torch.float32
    assert lse.shape == q.shape[:3]
    wanted_out, wanted = sliced_attention(q, k, v, None, 64**-0.5)
    assert (lse - wanted).abs().max() < (1e-2 if kernel.category == EXACT else 0.1)
    assert compare(out, wanted_out)[0] < APPROXIMATE_REL_L1


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_replays_from_a_cuda_graph(name):
    q, k, v = (x.clone() for x in tensors((1, 8, 1024, 1024, 64)))
    kernel = usable(name, q, k, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first call compiles, which a capture cannot
        kernel.run(q, k, v)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.run(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    check(kernel, out, q, k, v)

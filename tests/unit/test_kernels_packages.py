"""Kernels of optional packages, faked: what they are given, and why they are not available."""

import importlib.util
import inspect
import sys
from types import ModuleType

import pytest
import torch
from slipstream.backends.attention.kernels import heads, operands, sage1, sage2
from slipstream.backends.attention.kernels.ck_int8 import CkInt8
from slipstream.backends.attention.kernels.flash2 import Flash2
from slipstream.backends.attention.kernels.flash3 import Flash3
from slipstream.backends.attention.kernels.flash4 import Flash4
from slipstream.backends.attention.kernels.package import PackageKernel
from slipstream.backends.attention.kernels.sage1 import Sage1
from slipstream.backends.attention.kernels.sage2 import Sage2, Sage2Fp16Accum, Sage2Fp32Accum
from slipstream.backends.attention.kernels.sage2_triton import Sage2Triton
from slipstream.backends.attention.kernels.sage3 import Sage3
from slipstream.backends.attention.kernels.sol import SolAttn
from slipstream.backends.attention.kernels.sparge import Sparge
from slipstream.backends.attention.kernels.table import KERNELS, versions
from slipstream.backends.attention.kernels.xformers import Xformers
from torch.nn import functional

ALL = tuple(type(kernel) for kernel in KERNELS.values() if isinstance(kernel, PackageKernel))


def attention(q, k, v, scale=None, mask=None):
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def qkv(heads=4, kv_heads=None, head_dim=64, dtype=torch.float32, tokens=(40, 24)):
    """q, k, v [B,H,N,D] as views of [B,N,H*D], the way most models make them."""
    gen = torch.Generator().manual_seed(0)

    def make(h, n):
        flat = torch.randn(2, n, h * head_dim, generator=gen).to(dtype)
        return flat.view(2, n, h, head_dim).transpose(1, 2)

    kv_heads = kv_heads or heads
    return make(heads, tokens[0]), make(kv_heads, tokens[1]), make(kv_heads, tokens[1])


class Fake(ModuleType):
    """A package whose functions record what they got and answer with plain attention."""

    def __init__(self, name, **functions):
        super().__init__(name)
        self.calls = []
        for function_name, function in functions.items():
            setattr(self, function_name, function)

    def record(self, **got):
        self.calls.append(got)


@pytest.fixture(autouse=True)
def _c_compiler(monkeypatch):
    monkeypatch.setenv("CC", "cc")


@pytest.fixture
def install(monkeypatch):
    def put(*modules):
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return modules[0]

    return put


@pytest.fixture
def import_raises(monkeypatch):
    """Make importing a package raise, whether it is installed here or not."""

    class Raises:
        def __init__(self, package, error):
            self.package, self.error = package, error

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == self.package:
                raise self.error

    def arrange(package, error):
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Raises(package, error), *sys.meta_path])

    return arrange


def sage_1():
    """sageattention 1.0.6 in shape: smooths K in place, takes zero keys to the end of a block."""

    def sageattn(
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs
    ):
        assert q.dtype == k.dtype == v.dtype
        module.record(layout=tensor_layout, scale=sm_scale, smooth=smooth_k, k=k, v=v, extra=kwargs)
        if smooth_k:
            k -= k.mean(dim=2, keepdim=True)
        rest = (0, 0, 0, -k.shape[2] % 64)
        return attention(q, functional.pad(k, rest), functional.pad(v, rest), sm_scale).contiguous()

    module = Fake("sageattention", sageattn=sageattn)
    return module


def sage_2():
    """sageattention 2.x in shape: one function per kind of GPU, log-sum-exp on request."""

    def function(name):
        def run(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True,
                return_lse=False, **kwargs):  # fmt: skip
            module.record(
                name=name, layout=tensor_layout, scale=sm_scale, smooth=smooth_k, extra=kwargs
            )
            out = functional.pad(attention(q, k, v, sm_scale), (0, 8))[..., : q.shape[-1]]
            return (out, out.float().sum(-1)) if return_lse else out

        return run

    def triton(q, k, v, tensor_layout="HND", is_causal=False, attn_mask=None, sm_scale=None,
               smooth_k=True, return_lse=False, **kwargs):  # fmt: skip
        module.record(mask=attn_mask, layout=tensor_layout, extra=kwargs)
        assert attn_mask is None or attn_mask.dtype in (torch.bool, q.dtype)
        scores = (q.float() * (sm_scale or q.shape[-1] ** -0.5)) @ k.float().mT
        scores = scores * 1.44269504  # powers of two from here on, mask or not
        if attn_mask is not None:
            mask = attn_mask.expand(scores.shape)
            add = torch.where(mask, 0, -1.0e6) if mask.dtype == torch.bool else mask.float()
            scores = scores + add
            assert torch.isfinite(scores).all(), "a block of -inf alone is NaN in the package"
        weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
        out = (weights @ v.float() / weights.sum(-1, keepdim=True)).to(q.dtype)
        return (out, out.float().sum(-1)) if return_lse else out

    module = Fake("sageattention", sageattn=None, sageattn_qk_int8_pv_fp16_triton=triton)
    for name in (sage2.FP16, sage2.FP8, f"{sage2.FP8}_sm90"):
        setattr(module, name, function(name))
    return module


# --- why a package is not available ---


@pytest.mark.parametrize("kind", ALL)
def test_missing_package_is_one_sentence_with_the_way_to_get_it(kind, import_raises):
    top = kind.package.split(".")[0]
    import_raises(top, ModuleNotFoundError("No module named", name=top))
    assert kind().available() == f"{kind.title} is not installed. {kind.pip}"


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file"),
        OSError("undefined symbol: _ZN3c10"),
        RuntimeError("built for torch 2.4"),
        TypeError("torch too old"),
        AssertionError(),
        SyntaxError("invalid syntax"),
        KeyError("CUDA_HOME"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_package_broken_at_import_is_a_reason(kind, error, import_raises):
    import_raises(kind.package.split(".")[0], error)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    expected = f"{kind.title} is installed but cannot be imported ({said}). {kind.pip}"
    assert kind().available() == expected


def test_package_that_lacks_one_of_its_own_needs_names_it(import_raises):
    import_raises("sageattention", ModuleNotFoundError("No module named 'triton'", name="triton"))
    assert (
        Sage1()
        .available()
        .startswith(
            "sageattention 1.x is installed but cannot be imported "
            "(ModuleNotFoundError: No module named 'triton')."
        )
    )


def test_an_error_after_the_import_is_not_called_one_of_it(install, monkeypatch):
    def broken(device):
        raise AttributeError("'int' object has no attribute 'type'")

    install(Fake("comfy_kitchen", int8_attention=print, int8_attention_is_available=broken))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert CkInt8().available() == (
        "comfy-kitchen is installed but cannot be used "
        f"(AttributeError: 'int' object has no attribute 'type'). {CkInt8.pip}"
    )


def test_outcome_is_remembered(import_raises, install):
    import_raises("sageattention", OSError("broken"))
    kernel = Sage1()
    first = kernel.available()
    install(sage_1())
    assert kernel.available() == first


def test_sage_versions_are_told_apart(install, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0.6")
    install(sage_1())
    assert Sage1().available() is None
    assert Sage2().available() == (
        "sageattention 2.x is not installed (found 1.0.6, which is 'sage1'). "
        f"{Sage2.pip}, or choose 'sage1'"
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.2.0")
    install(sage_2())
    assert Sage2().available() is None
    assert Sage1().available() == (
        "sageattention 1.x is not installed (found 2.2.0, which is 'sage2'). "
        f"{Sage1.pip}, or choose 'sage2'"
    )


def test_flash_attn_4_alone_is_not_flash_attn_2(install):
    cute = Fake("flash_attn.cute", flash_attn_func=lambda q, k, v, softmax_scale=None: None)
    package = Fake("flash_attn", cute=cute, __path__=[])
    install(package, cute)
    assert Flash4().available() is None
    assert "with flash-attn-4 choose 'flash4'" in Flash2().available()


def test_flash_attn_2_alone_is_not_flash_attn_4(install):
    install(Fake("flash_attn", flash_attn_func=lambda *args: None))
    assert Flash2().available() is None
    assert Flash4().available() == f"flash-attn-4 is not installed. {Flash4.pip}"


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (Flash3, "flash_attn_interface"),
        (Sage1, "sageattention"),
        (Sage3, "sageattn3"),
        (Sparge, "spas_sage_attn"),
        (CkInt8, "comfy_kitchen"),
        (SolAttn, "comfy_kitchen"),
        (Xformers, "xformers"),
    ],
)
def test_package_without_the_function_is_a_reason(kind, module, install):
    install(Fake(module, __version__="0.0.1"))
    assert kind().available().endswith(kind.pip)


def test_triton_kernels_need_a_c_compiler(install, monkeypatch):
    monkeypatch.delenv("CC")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", "")
    install(sage_1())
    assert Sage1().available() == (
        "sageattention 1.x runs on Triton, which needs a C compiler at run time and found none. "
        "Install gcc, or set CC"
    )


def test_kitchen_on_a_gpu_it_does_not_support(install, monkeypatch):
    def supported(device):  # newest takes nothing else
        return device.type == "cuda" and device.index == 1

    install(Fake("comfy_kitchen", int8_attention=print, int8_attention_is_available=supported,
                 sol_attn=print, sol_attn_is_available=supported))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "does not run here: it needs SM75 or newer" in CkInt8().available()
    assert "Sol-Attn does not run here: it needs SM80 or newer" in SolAttn().available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert CkInt8().available() is None
    assert SolAttn().available() is None


# --- what a package is given ---


def loaded(kernel: PackageKernel) -> PackageKernel:
    assert kernel.available() is None
    return kernel


def test_sage1_smooths_a_clone_and_leaves_v_to_the_package(install):
    fake = install(sage_1())
    q, k, v = qkv(kv_heads=2, dtype=torch.bfloat16, tokens=(40, 64))
    before = k.clone()
    out = loaded(Sage1()).run(q, k, v, scale=0.2)
    call = fake.calls[0]
    assert torch.equal(k, before)
    assert call["k"].data_ptr() != k.data_ptr()
    assert call["v"].dtype == torch.bfloat16
    assert (call["layout"], call["scale"], call["smooth"]) == ("HND", 0.2, True)
    assert call["extra"] == {}
    assert torch.allclose(out, attention(q, k, v, 0.2), atol=2e-2)


PER_WARP = {"qk_quant_gran": "per_warp"}
FP16_FP32, FP32_FP32 = ({"pv_accum_dtype": f"{kind}+fp32"} for kind in ("fp16", "fp32"))


@pytest.mark.parametrize(
    ("kind", "sm", "name", "extra"),
    [
        (Sage2, 80, "sageattn_qk_int8_pv_fp16_cuda", {}),
        (Sage2, 86, "sageattn_qk_int8_pv_fp16_cuda", {}),
        (Sage2, 89, "sageattn_qk_int8_pv_fp8_cuda", {}),
        (Sage2, 90, "sageattn_qk_int8_pv_fp8_cuda_sm90", {}),
        (Sage2, 120, "sageattn_qk_int8_pv_fp8_cuda", PER_WARP),
        (Sage2, 121, "sageattn_qk_int8_pv_fp8_cuda", PER_WARP),
        (Sage2Fp16Accum, 86, "sageattn_qk_int8_pv_fp16_cuda", FP16_FP32),
        (Sage2Fp32Accum, 89, "sageattn_qk_int8_pv_fp8_cuda", FP32_FP32),
        (Sage2Fp32Accum, 120, "sageattn_qk_int8_pv_fp8_cuda", FP32_FP32 | PER_WARP),
    ],
)
def test_sage2_calls_the_function_of_the_gpu_by_name(install, monkeypatch, kind, sm, name, extra):
    fake = install(sage_2())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(sm, 10))
    q, k, v = qkv(head_dim=40)
    out = loaded(kind()).run(q, k, v)
    call = fake.calls[0]
    assert (call["name"], call["extra"]) == (name, extra)
    assert (call["layout"], call["scale"], call["smooth"]) == ("HND", None, True)
    assert out.is_contiguous()
    out, lse = loaded(kind()).run(q, k, v, want_lse=True)
    assert out.is_contiguous()
    assert lse.shape == q.shape[:3]


@pytest.mark.parametrize("shape", [(40, 24), (1, 1, 40, 24), (2, 1, 1, 24), (2, 4, 40, 24)])
def test_sage2_triton_gets_masks_as_it_adds_them(install, shape):
    fake = install(sage_2())
    q, k, v = qkv(dtype=torch.float16)
    bias = torch.randn(shape) * 2
    hidden = torch.zeros(shape)
    hidden[..., :20] = float("-inf")
    for mask in (bias, hidden, torch.rand(shape) > 0.5):
        if mask.dtype == torch.bool:
            mask[..., 0] = True
        out = loaded(Sage2Triton()).run(q, k, v, mask=mask)
        wanted = attention(q.float(), k.float(), v.float(), mask=mask)
        assert torch.allclose(out.float(), wanted, atol=1e-2)
    assert loaded(Sage2Triton()).run(q, k, v, want_lse=True)[1].shape == q.shape[:3]
    assert fake.calls[-1]["mask"] is None
    assert [call["extra"] for call in fake.calls] == [{}] * 4


def test_sage2_whose_triton_form_drops_masks_is_no_sage2_triton(install, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.0.1")
    fake = install(sage_2())
    fake.sageattn_qk_int8_pv_fp16_triton = lambda q, k, v, **kwargs: q
    assert Sage2Triton().available() == (
        "sageattention 2.0.1 has no sageattn_qk_int8_pv_fp16_triton with attn_mask, 2.2 has. "
        f"{Sage2.pip}"
    )


def test_sage1_gets_whole_blocks_of_keys_filled_with_their_means(install):
    fake = install(sage_1())
    q, k, v = qkv(tokens=(40, 6_337))
    out = loaded(Sage1()).run(q, k, v + 1)
    keys, values = fake.calls[0]["k"], fake.calls[0]["v"]
    assert keys.shape[2] == values.shape[2] == 6_400
    assert keys[:, :, 6_337:].abs().max() < 1e-6  # smoothed: such a key weighs 1 / N at most
    assert torch.allclose(values[:, :, 6_337:].mean(2), (v + 1).mean(2), atol=1e-5)
    assert sage1.whole_blocks(keys) is keys
    wanted = attention(q, k, v + 1)
    assert (out - wanted).abs().mean() < 0.002 * wanted.abs().mean()  # with zeros: 0.006


def test_sol_attn_gets_tokens_before_heads_and_whole_heads(install):
    seen = {}

    def sol_attn(q, k, v, tau=1.0, scale=None, **kwargs):
        seen.update(q=q, k=k, kwargs=kwargs)
        out = attention(*(x.transpose(1, 2) for x in (q, k, v)), scale)
        return out.transpose(1, 2).contiguous()

    install(Fake("comfy_kitchen", sol_attn=sol_attn, sol_attn_is_available=lambda device: True))
    q, k, v = qkv(kv_heads=2, head_dim=128, tokens=(40, 40))
    out = loaded(SolAttn()).run(q, k, v, scale=0.1)
    assert seen["q"].shape == seen["k"].shape == (2, 40, 4, 128)
    assert seen["q"].data_ptr() == q.data_ptr()  # a view, as the package takes it
    assert seen["kwargs"] == {}
    assert torch.allclose(out, attention(q, k, v, 0.1), atol=1e-5)


# --- groups of heads ---


@pytest.mark.parametrize("mask_shape", [None, (7, 5), (1, 1, 7, 5), (2, 6, 7, 5), (6, 7, 5)])
@pytest.mark.parametrize("most_bytes", [1, 25, 40, 100])
def test_groups_of_heads_give_the_same_numbers(mask_shape, most_bytes):
    q, k, v = qkv(heads=6, kv_heads=3, tokens=(7, 5))
    mask = None if mask_shape is None else torch.randn(mask_shape)
    seen = []

    def function(q, k, v, mask):
        seen.append(q.shape[1])
        return attention(q, k, v, mask=mask)

    out = heads.in_groups(function, q, k, v, mask, workspace_bytes=75, most_bytes=most_bytes)
    assert torch.equal(out, attention(q, k, v, mask=mask))
    assert seen == {1: [2, 2, 2], 25: [2, 2, 2], 40: [4, 2], 100: [6]}[most_bytes]
    if len(seen) > 1:
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()  # no copy for models


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        (CkInt8, "kitchen"),
        (SolAttn, "kitchen"),
        (Sage1, "1"),
        (Sage2, "2"),
        (Sage2Triton, "2"),
        (Sage3, "3"),
        (Sparge, "sparge"),
    ],
)
def test_quantised_kernels_split_long_calls_by_heads(install, monkeypatch, kind, package):
    def kitchen():
        def int8(q, k, v, *, scale, attn_mask):
            module.record(q=q)
            return attention(q, k, v, scale, attn_mask)

        def sol(q, k, v, tau=1.0, scale=None):
            module.record(q=q.transpose(1, 2))
            return attention(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)

        asked = dict.fromkeys(("int8_attention_is_available", "sol_attn_is_available"), bool)
        module = Fake("comfy_kitchen", int8_attention=int8, sol_attn=sol, **asked)
        return module

    def sage_3():
        def blackwell(q, k, v, is_causal=False):
            module.record(q=q)
            k -= k.mean(dim=-2, keepdim=True)
            return attention(q, k, v)

        module = Fake("sageattn3", sageattn3_blackwell=blackwell)
        return module

    def sparge():
        def topk(q, k, v, topk=0.5, is_causal=False, scale=None):
            module.record(q=q)
            return attention(q, k, v, scale)

        module = Fake("spas_sage_attn", spas_sage2_attn_meansim_topk_cuda=topk)
        return module

    packages = {"kitchen": kitchen, "1": sage_1, "2": sage_2, "3": sage_3, "sparge": sparge}
    fake = install(packages[package]())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    q, k, v = qkv(head_dim=128, tokens=(64, 64))
    whole = loaded(kind()).run(q, k, v)
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 1)
    assert torch.allclose(loaded(kind()).run(q, k, v), whole, atol=1e-6)
    assert len(fake.calls) == 1 + 4


def test_versions_name_what_is_installed(monkeypatch):
    found = versions()
    assert found["torch"] == torch.__version__
    assert ("triton" in found) == (importlib.util.find_spec("triton") is not None)
    assert all({"triton", "triton-windows"} <= set(k.distributions) for k in (Sage1, Sage2, Sparge))


def test_sage3_gets_its_own_k_and_as_many_heads(install):
    seen = {}

    def blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
        seen.update(k=k, v=v, kwargs=kwargs)
        k -= k.mean(dim=-2, keepdim=True)
        return attention(q, k, v)

    install(Fake("sageattn3", sageattn3_blackwell=blackwell))
    for kv_heads in (4, 2):
        q, k, v = qkv(kv_heads=kv_heads)
        before = k.clone()
        out = loaded(Sage3()).run(q, k, v)
        assert torch.equal(k, before)
        assert seen["k"].shape[1] == seen["v"].shape[1] == 4
        assert torch.allclose(out, attention(q, k, v), atol=1e-5)


def flash(asks, wants_tuple):
    """A flash-attn function: [B,N,H,D]; `asks` names its switch for the log-sum-exp."""

    def run(q, k, v, softmax_scale=None, **kwargs):
        module.record(q=q, k=k, scale=softmax_scale, kwargs=kwargs)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = attention(*heads_first, softmax_scale).transpose(1, 2)
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
        return (out, lse, None) if wants_tuple or kwargs.get(asks) else out

    names = ["q", "k", "v", "softmax_scale", *([asks] if asks else [])]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    run.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])
    module = Fake("flash", flash_attn_func=run)
    return module


FLASHES = [
    (Flash2, "flash_attn", "return_attn_probs", False),
    (Flash3, "flash_attn_interface", "return_attn_probs", False),
    (Flash3, "flash_attn_interface", None, True),
    (Flash4, "flash_attn.cute", "return_lse", True),
    (Flash4, "flash_attn.cute", None, True),
]


@pytest.mark.parametrize(("kind", "name", "asks", "wants_tuple"), FLASHES)
@pytest.mark.parametrize("want_lse", [False, True])
def test_flash_layout_padding_scale_and_both_answers(
    install, kind, name, asks, wants_tuple, want_lse
):
    fake = flash(asks, wants_tuple)
    fake.__name__ = name
    install(fake)
    if kind is Flash4:
        install(Fake("flash_attn", cute=fake, __path__=[]))
    q, k, v = qkv(heads=6, kv_heads=2, head_dim=44)
    result = loaded(kind()).run(q, k, v, want_lse=want_lse)
    out = result[0] if want_lse else result
    call = fake.calls[0]
    assert call["q"].shape == (2, 40, 6, 48)  # tokens first, width a multiple of 8
    assert call["k"].shape == (2, 24, 2, 48)  # GQA as it came
    assert call["scale"] == pytest.approx(44**-0.5)  # of the width before padding
    assert out.shape == q.shape
    assert torch.allclose(out, attention(q, k, v), atol=1e-5)
    if want_lse:
        assert result[1].shape == q.shape[:3]


def test_xformers_gets_an_aligned_bias_and_whole_heads(install):
    seen = {}

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        seen.update(k=k, bias=attn_bias)
        out = attention(*(x.transpose(1, 2) for x in (q, k, v)), scale, attn_bias)
        return out.transpose(1, 2)

    ops = Fake("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    install(Fake("xformers", ops=ops, __path__=[]), ops)
    q, k, v = qkv(kv_heads=2, tokens=(40, 21))
    mask = torch.rand(2, 1, 40, 21) > 0.3
    mask[..., 0] = True
    out = loaded(Xformers()).run(q, k, v, mask=mask, scale=0.3)
    assert seen["k"].shape[2] == 4
    bias = seen["bias"]
    assert bias.shape == (2, 4, 40, 21)
    assert bias.stride(-2) % 8 == 0
    assert torch.allclose(out, attention(q, k, v, 0.3, mask), atol=1e-5)


def test_sparge_gets_the_recommended_share_of_keys(install):
    seen = {}

    def topk(q, k, v, topk=0.5, is_causal=False, scale=None):
        seen.update(topk=topk, scale=scale)
        return attention(q, k, v, scale)

    install(Fake("spas_sage_attn", spas_sage2_attn_meansim_topk_cuda=topk))
    q, k, v = qkv()
    loaded(Sparge()).run(q, k, v, scale=0.1)
    assert seen == {"topk": 0.5, "scale": 0.1}


def test_kitchen_gets_masks_scale_and_heads_as_they_are(install):
    seen = {}

    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        seen.update(scale=scale, mask=attn_mask, k=k)
        return functional.pad(attention(q, k, v, scale, attn_mask), (0, 20))[..., : q.shape[-1]]

    module = Fake(
        "comfy_kitchen", int8_attention=int8_attention, int8_attention_is_available=lambda i: True
    )
    install(module)
    q, k, v = qkv(kv_heads=2, head_dim=44)
    mask = torch.zeros(1, 1, 40, 24)
    out = loaded(CkInt8()).run(q, k, v, mask=mask, scale=0.5)
    assert seen["mask"] is mask
    assert seen["scale"] == 0.5
    assert seen["k"] is k  # it pads and expands by itself
    assert out.is_contiguous()
    assert torch.allclose(out, attention(q, k, v, 0.5), atol=1e-5)


def test_installed_kitchen_has_what_the_kernel_calls():
    """comfy-kitchen 0.2.31: CUDA and HIP kernels, nothing for a CPU."""
    kitchen = pytest.importorskip("comfy_kitchen")
    q, k, v = qkv()
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        kitchen.int8_attention(q, k, v, scale=None, attn_mask=None)
    if not torch.cuda.is_available():
        assert CkInt8().available() is None  # the device rule speaks for a CPU


# --- operands ---


def test_aligned_copies_only_what_kernels_cannot_read():
    q = qkv()[0]
    assert operands.aligned(q) is q
    odd_rows = torch.randn(1, 2, 8, 65)[..., :64]
    unit_last = torch.randn(1, 2, 64, 8).transpose(2, 3)
    offset = torch.randn(1 * 2 * 8 * 64 + 1)[1:].view(1, 2, 8, 64)
    repeated = torch.randn(1, 2, 8, 64).expand(3, -1, -1, -1)
    for x in (odd_rows, unit_last, offset, repeated):
        y = operands.aligned(x)
        assert torch.equal(x, y)
        assert y.is_contiguous()
        assert y.data_ptr() % 16 == 0


def test_views_that_reach_beyond_32_bits_are_copied():
    strides = (2**33, 2**32, 8, 1)
    meta = torch.empty_strided((1, 2, 4, 8), strides, dtype=torch.float16, device="meta")
    assert operands.aligned(meta).is_contiguous()


def test_bias_rows_equal_the_mask_and_are_aligned():
    q, k, _ = qkv(tokens=(5, 21))
    for shape in ((5, 21), (1, 1, 5, 21), (2, 1, 1, 21), (2, 4, 5, 21), (1, 1, 5, 1)):
        mask = torch.rand(shape) > 0.5
        bias = operands.bias_rows(mask, q, k)
        assert bias.shape == (2, 4, 5, 21)
        assert torch.equal(bias == 0, mask.expand(2, 4, 5, 21))
        assert bias.stride(-1) == 1
        assert bias.data_ptr() % 16 == 0
        assert all(s % 8 == 0 for s in bias.stride()[:-1])
    additive = torch.randn(2, 4, 5, 24)
    assert operands.bias_rows(additive, q, k.repeat(1, 1, 2, 1)[:, :, :24]).data_ptr() == (
        additive.data_ptr()
    )

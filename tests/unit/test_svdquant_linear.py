"""Kernels against each other and against emulation in fp64; segments; shared activations."""

import pytest
import torch
from slipstream.backends.svdquant import layouts
from slipstream.backends.svdquant.engine import Engine, request_of
from slipstream.backends.svdquant.errors import BackendError
from slipstream.backends.svdquant.kernels import Dequant, Kitchen, LowRank, Reference
from slipstream.backends.svdquant.linear import Session, linear
from slipstream.backends.svdquant.quantize import quantise, round_awq
from slipstream.backends.svdquant.weight import (
    Facts,
    QuantWeight,
    Segment,
    effective,
    residual,
    rows_of,
    stack_columns,
    stack_rows,
    whole,
)

torch.manual_seed(0)


def rel(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def weight_of(n, k, generator):
    return torch.randn(n, k, generator=generator) * 0.03


def segment_of(
    n=384, k=256, *, precision="int4", unsigned=False, dtype=torch.bfloat16, smooth=None, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    weight = weight_of(n, k, generator)
    if smooth is None:
        smooth = inputs(64, k).float().abs().amax(0) ** 0.5  # as a calibrated file has it
    q = quantise(weight, rank=32, precision=precision, smooth=smooth, dtype=dtype)
    facts = Facts(precision, 0, n, 0, k, unsigned=unsigned)
    plain = layouts.plain_from_codes(q.codes.codes)
    if precision == "nvfp4":
        return Segment(
            facts,
            layouts.swap_nibbles(plain),
            layouts.blocked_from_plain(q.codes.scale),
            q.smooth,
            q.down,
            q.up,
            rows=torch.full((n,), q.codes.tensor),
        )
    return Segment(facts, plain, q.codes.scale.t().contiguous(), q.smooth, q.down, q.up)


def awq_segment(n=384, k=256, dtype=torch.bfloat16):
    weight = weight_of(n, k, torch.Generator().manual_seed(3))
    codes, scale, zeros = round_awq(weight, dtype)
    zeros = (zeros.float() + 8 * scale.float()).to(dtype)
    facts = Facts("awq", 0, n, 0, k)
    return Segment(facts, layouts.plain_from_codes(codes), scale, zeros=zeros)


def inputs(m=300, k=256, dtype=torch.bfloat16):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(5))
    x[:, torch.randperm(k, generator=torch.Generator().manual_seed(6))[:4]] *= 12
    return x.to(dtype)


def emulate(x, segment, scale_dtype):
    """int4 forward in fp64 with the kernel's roundings of the input."""
    shift = 0.171875 if segment.facts.unsigned else 0.0
    smoothed = ((x + shift) / segment.smooth).to(scale_dtype)
    groups = smoothed.view(x.shape[0], -1, 64)
    low, high = (0, 15) if segment.facts.unsigned else (-7, 7)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / high
    codes = (groups / scale).round().clamp(low, high).double()
    q = (codes * scale.to(x.dtype).double()).view(x.shape)
    side = (x.double() @ segment.down.double()) @ segment.up.double().t()
    return q @ residual(segment).double().t() + side


@pytest.mark.parametrize(
    ("dtype", "same", "wide"), [(torch.bfloat16, 3.0e-3, 2.4e-2), (torch.float16, 4e-4, 0.9e-2)]
)
@pytest.mark.parametrize("unsigned", [False, True])
def test_reference_and_kitchen_follow_the_emulation(dtype, same, wide, unsigned):
    pytest.importorskip("comfy_kitchen")
    segment = segment_of(dtype=dtype, unsigned=unsigned)
    x = inputs(dtype=dtype)
    x = torch.nn.functional.gelu(x, approximate="tanh") if unsigned else x
    exact = emulate(x, segment, dtype)
    reference = Reference().run(x, segment)
    kitchen = Kitchen().run(x, segment)
    assert rel(reference, exact) < same
    assert rel(kitchen, exact) < same
    assert rel(kitchen, reference) < 1.1 * same
    assert rel(reference, emulate(x, segment, torch.float32)) < wide
    # negative control: the signed grid on an unsigned layer is another result
    if unsigned:
        signed = segment_of(dtype=dtype)
        assert rel(Reference().run(x, signed), exact) > 10 * same


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_dequant_is_the_dense_layer(precision):
    segment = segment_of(precision=precision)
    x = inputs()
    dense = x.double() @ effective(whole(segment)).double().t()
    assert rel(Dequant().run(x, segment), dense) < 8e-3
    four_bit = rel(Reference().run(x, segment), dense)
    assert 0.02 < four_bit < 0.2  # what 4-bit inputs cost


def test_dequant_in_fp32_is_exact():
    segment = segment_of(dtype=torch.float32, unsigned=True)
    x = inputs(dtype=torch.float32)
    bias = torch.randn(384)
    part = residual(segment) / segment.smooth
    dense = x @ effective(whole(segment)).t() + part.sum(1) * 0.171875 + bias
    assert rel(Dequant().run(x, segment, bias=bias), dense) < 1e-5


@pytest.mark.parametrize("kernel", [Kitchen(), Dequant(), Reference()], ids=lambda k: k.id)
def test_modulation_weights(kernel):
    if kernel.id == "kitchen":
        pytest.importorskip("comfy_kitchen")
    segment, x = awq_segment(), inputs(3)
    bias = torch.randn(384).bfloat16()
    wanted = x.double() @ residual(segment).double().t() + bias.double()
    assert rel(kernel.run(x, segment, bias=bias), wanted) < 6e-3
    extra = lora_pair(384, 256)
    delta = kernel.run(x, segment, bias=bias, extra=extra).double() - wanted
    exact = (x.double() @ extra.down.double()) @ extra.up.double().t()
    assert torch.nn.functional.cosine_similarity(delta.flatten(), exact.flatten(), 0) > 0.99


def lora_pair(n, k, rank=16, scale=0.05):
    generator = torch.Generator().manual_seed(9)
    down = (torch.randn(k, rank, generator=generator) * scale).bfloat16()
    return LowRank(down, (torch.randn(n, rank, generator=generator) * scale).bfloat16())


@pytest.mark.parametrize("kernel", [Kitchen(), Dequant(), Reference()], ids=lambda k: k.id)
@pytest.mark.parametrize("rank", [16, 272])
def test_lora_joins_the_low_rank_branch(kernel, rank):
    if kernel.id == "kitchen":
        pytest.importorskip("comfy_kitchen")
    segment, x = segment_of(unsigned=True), inputs().abs()
    extra = lora_pair(384, 256, rank, 0.06)
    base = kernel.run(x, segment)
    delta = kernel.run(x, segment, extra=extra).double() - base.double()
    exact = (x.double() @ extra.down.double()) @ extra.up.double().t()
    assert torch.nn.functional.cosine_similarity(delta.flatten(), exact.flatten(), 0) > 0.99
    assert torch.equal(kernel.run(x, segment), base)


def of(kernel):
    return lambda segment, x: kernel


def test_parts_of_a_layer_equal_the_layer():
    pytest.importorskip("comfy_kitchen")
    kernel = of(Kitchen())
    segment, x = segment_of(), inputs()
    bias = torch.randn(384).bfloat16()
    y = linear(x, whole(segment), bias, kernel)
    thirds = [rows_of(segment, i, i + 128, shared=1, count=3) for i in (0, 128, 256)]
    parts = [
        linear(x, whole(part), bias[i : i + 128], kernel)
        for part, i in zip(thirds, (0, 128, 256), strict=True)
    ]
    assert torch.equal(torch.cat(parts, 1), y)
    fused = stack_rows([whole(t).segments[0] for t in thirds])
    assert len(fused.segments) == 1
    assert fused.segments[0].up.shape == (384, 96)
    assert rel(linear(x, fused, bias, kernel), y) < 3e-3  # the branch is summed in other order


def test_columns_add_and_read_their_own_inputs():
    kernel = of(Dequant())
    a, b = segment_of(k=256, dtype=torch.float32), segment_of(k=128, dtype=torch.float32, seed=1)
    weight = stack_columns([a, b])
    assert weight.shape == (384, 384)
    x = inputs(7, 384, torch.float32)
    assert rel(linear(x, weight, None, kernel), x @ effective(weight).t()) < 1e-5
    swapped = stack_columns([b, a])
    assert rel(linear(x, swapped, None, kernel), x @ effective(weight).t()) > 0.5


def test_shapes_dtypes_and_empty_inputs():
    segment = segment_of()
    weight = whole(segment)
    x = inputs(10).view(2, 5, 256)
    y = linear(x, weight, None, of(Dequant()))
    assert y.shape == (2, 5, 384)
    wide = linear(x.float(), weight, None, of(Dequant()))
    assert wide.dtype == torch.float32
    assert torch.equal(wide, y.float())
    assert linear(x[:, :0], weight, None, of(Dequant())).shape == (2, 0, 384)


class Counting(Kitchen):
    def __init__(self):
        self.quantised = 0

    def run(self, x, segment, *, bias=None, extra=None, share=None):
        if share is None or share.get() is None:
            self.quantised += 1
        return super().run(x, segment, bias=bias, extra=extra, share=share)


def test_q_k_v_quantise_their_input_once():
    pytest.importorskip("comfy_kitchen")
    kernel, session = Counting(), Session()
    segment, x = segment_of(), inputs()
    thirds = [whole(rows_of(segment, i, i + 128, shared=1, count=3)) for i in (0, 128, 256)]
    alone = [linear(x, w, None, of(kernel)) for w in thirds]
    kernel.quantised = 0

    def run(i, value):
        return linear(value, thirds[i], None, of(kernel), session=session, layer=i)

    shared = [run(i, x) for i in range(3)]
    assert kernel.quantised == 1
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert session._shared is None  # the input is not held once its layers had it
    run(0, x)
    x.mul_(2)  # written to between two calls of one layer
    again = run(0, x)
    assert torch.equal(again, linear(x, thirds[0], None, of(kernel)))
    run(1, x.clone())
    assert kernel.quantised == 5  # first q, second q, its check, and k with another input


def test_engine_falls_back_and_says_why():
    engine = Engine("auto")
    cpu = torch.device("cpu")
    assert engine.choose(request_of(segment_of(precision="nvfp4"), cpu)).id == "dequant"
    assert "nvfp4 matmuls need SM100" in engine.reasons["kitchen"]
    engine = Engine("nunchaku")
    with pytest.raises(BackendError, match="backend nunchaku cannot run"):
        engine.require([request_of(segment_of(), cpu)])
    assert engine.choose(request_of(segment_of(), cpu)).id in ("kitchen", "dequant")
    assert Engine("reference").choose(request_of(awq_segment(), cpu)).id == "reference"


def test_measured_order_is_followed():
    pytest.importorskip("comfy_kitchen")
    engine = Engine("auto", order={"int4": ("dequant", "kitchen")})
    segment = segment_of()
    assert engine.kernel(segment, inputs()).id == "dequant"
    assert Engine("auto").kernel(segment, inputs()).id == "kitchen"


@pytest.mark.parametrize(
    ("changes", "kernel", "word"),
    [
        ({"capability": (7, 5)}, "kitchen", "SM80"),
        ({"dtype": "float32"}, "kitchen", "bf16 or fp16"),
        ({"precision": "nvfp4", "capability": (9, 0)}, "kitchen", "SM90: nvfp4 matmuls"),
        ({"capability": (9, 0)}, "nunchaku", "Choose backend kitchen or dequant"),
        ({"capability": (12, 0)}, "nunchaku", "SM120"),
        ({"precision": "nvfp4", "capability": (8, 9)}, "nunchaku", "SM120"),
        ({"capability": (7, 5)}, "nunchaku", "fp16"),
        ({"unsigned": True}, "nunchaku", "fused GELU"),
        ({"device_type": "cpu", "capability": None}, "nunchaku", "NVIDIA"),
    ],
)
def test_eligibility_table(changes, kernel, word):
    if kernel == "kitchen":
        pytest.importorskip("comfy_kitchen")
    from slipstream.backends.svdquant.kernels import KERNELS, LayerRequest

    base = {
        "precision": "int4",
        "device_type": "cuda",
        "dtype": "bfloat16",
        "num_rows": 3072,
        "num_columns": 3072,
        "capability": (8, 6),
    }
    one = next(k for k in KERNELS if k.id == kernel)
    reason = one.ineligible(LayerRequest(**{**base, **changes}))
    assert reason is not None
    assert word in reason


def test_weights_count_all_their_bytes():
    weight = QuantWeight((384, 256), (segment_of(),))
    parts = 384 * 128 + 4 * 384 * 2 + 256 * 2 + (256 + 384) * 32 * 2
    assert weight.num_bytes == parts

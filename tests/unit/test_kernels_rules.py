"""Every rule of every kernel speaks its sentence, on faked GPUs; selection never raises."""

import itertools
from dataclasses import replace

import pytest
import torch
from slipstream.backends import registry
from slipstream.backends.attention.kernels.base import APPROXIMATE, EXACT
from slipstream.backends.attention.kernels.table import EXACT_ORDER, FUSED, KERNELS, POLICIES
from slipstream.backends.attention.request import MASK_BIAS, MASK_BOOL, Request

FLUX = Request(
    device_type="cuda",
    capability=(9, 0),
    dtype="bfloat16",
    batch=1,
    heads=24,
    kv_heads=24,
    q_tokens=4608,
    k_tokens=4608,
    head_dim=128,
)
# A GPU the kernel runs on, where it is not Hopper, and a length it is made for.
HOME = {"sage3": (12, 0), "sage2_fp16_accum": (8, 6), "sage2_fp32_accum": (8, 9)}
LONG = {"sol_attn": 32_768}
GPU = "a CUDA or ROCm GPU"
HALF = "float16 and bfloat16"

CPU = {"device_type": "cpu", "capability": None}
ROCM = {"is_hip": True, "capability": (11, 0)}
F32, F64, BF16 = ({"dtype": name} for name in ("float32", "float64", "bfloat16"))
BIAS, BOOL = {"mask": MASK_BIAS}, {"mask": MASK_BOOL}
GQA, ODD_GQA = {"kv_heads": 8}, {"kv_heads": 7}
SCALE, LSE, FORBIDDEN = {"has_scale": True}, {"want_lse": True}, {"low_precision": False}
DENSE, CAPTURE = {"dense": True}, {"capturing": True}
MANY = {"batch": 70_000, "q_tokens": 8, "k_tokens": 8, "head_dim": 64, "heads": 1, "kv_heads": 1}
SHORT = {"q_tokens": 4608, "k_tokens": 4608}
HUGE = {"batch": 32, "q_tokens": 32_768}  # 32 x 24 x 32,768 x 128 elements


def sm(number):
    return {"capability": divmod(number, 10)}


def dim(width, value=None):
    return {"head_dim": width, "value_dim": value}


def rejected(kernel, sentence, *changes):
    return pytest.param(kernel, changes, sentence, id=f"{kernel}: {sentence[:32]}")


FORBIDS = "low precision: the model forbids it here, and {} is approximate"
SCHEDULED = "schedule: exact kernels only here, and {} is approximate"
COMPILES = "CUDA graph capture: {} compiles at its first call; run once before capturing"
TOO_MANY = "3221225472 elements in one tensor: {} counts in 32 bits, fewer than 2147483648"

REJECTIONS = [
    rejected("cudnn", "device cpu: cudnn needs a CUDA GPU", CPU),
    rejected("cudnn", "ROCm: cudnn needs a CUDA GPU", ROCM),
    rejected("cudnn", "SM75: cudnn needs SM80 to SM121", sm(75)),
    rejected("cudnn", f"float32: cudnn takes {HALF}", F32),
    rejected("cudnn", "head_dim 160: cudnn takes up to 128", dim(160)),
    rejected("cudnn", "head_dim 128 with 64 in v: cudnn needs equal ones", dim(128, 64)),
    rejected("cudnn", "7 k/v heads for 24 q heads: cudnn needs a divisor", ODD_GQA),
    rejected("cudnn", "batch 70000: cudnn takes up to 65535", MANY),
    rejected("cudnn", "1 key: cudnn needs two or more", {"k_tokens": 1}),
    rejected("flash_sdpa", f"device mps: flash_sdpa needs {GPU}", CPU, {"device_type": "mps"}),
    rejected("flash_sdpa", "SM75: flash_sdpa needs SM80 to SM121", sm(75)),
    rejected("flash_sdpa", f"float32: flash_sdpa takes {HALF}", F32),
    rejected("flash_sdpa", "head_dim 512: flash_sdpa takes up to 256", dim(512)),
    rejected("flash_sdpa", "head_dim 192 with 128 in v: flash_sdpa needs equal", dim(192, 128)),
    rejected("flash_sdpa", "mask: flash_sdpa takes none", BIAS),
    rejected("flash_sdpa", "7 k/v heads for 24 q heads: flash_sdpa needs a divisor", ODD_GQA),
    rejected("flash_sdpa", "batch 70000: flash_sdpa takes up to 32768", MANY),
    rejected("efficient", f"device cpu: efficient needs {GPU}", CPU),
    rejected("efficient", "SM130: efficient needs SM50 to SM121", sm(130)),
    rejected("efficient", "float64: efficient takes float16, bfloat16 and float32", F64),
    rejected("efficient", "bfloat16 on SM75: efficient needs SM80 for it", BF16, sm(75)),
    rejected("efficient", "head_dim 320: efficient takes up to 256", ROCM, dim(320)),
    rejected("efficient", "batch 70000: efficient takes up to 32768", MANY),
    rejected("math", "7 k/v heads for 24 q heads: math needs a divisor", ODD_GQA),
    rejected("flash2", f"device cpu: flash2 needs {GPU}", CPU),
    rejected("flash2", "SM75: flash2 needs SM80 or newer", sm(75)),
    rejected("flash2", f"float32: flash2 takes {HALF}", F32),
    rejected("flash2", "head_dim 320: flash2 takes up to 256", dim(320)),
    rejected("flash2", "mask: flash2 takes none", BOOL),
    rejected("flash2", "7 k/v heads for 24 q heads: flash2 needs a divisor", ODD_GQA),
    rejected("flash2", "batch 70000: flash2 takes up to 65535", MANY),
    rejected("flash3", "ROCm: flash3 needs a CUDA GPU", ROCM),
    rejected("flash3", "SM75: flash3 needs SM80 to SM90", sm(75)),
    rejected("flash3", "SM120: flash3 needs SM80 to SM90", sm(120)),
    rejected("flash3", f"float32: flash3 takes {HALF}", F32),
    rejected("flash3", "head_dim 320: flash3 takes up to 256", dim(320)),
    rejected("flash3", "mask: flash3 takes none", BIAS),
    rejected("flash4", "ROCm: flash4 needs a CUDA GPU", ROCM),
    rejected("flash4", "SM75: flash4 needs SM80 to SM129", sm(75)),
    rejected("flash4", f"float32: flash4 takes {HALF}", F32),
    rejected("flash4", "head_dim 320: flash4 takes up to 256", dim(320)),
    rejected("flash4", "head_dim 160: flash4 takes up to 128", sm(100), dim(160)),
    rejected("flash4", "head_dim 256: flash4 takes up to 128", sm(89), dim(256)),
    rejected("flash4", "mask: flash4 takes none", BIAS),
    rejected("flash4", COMPILES.format("flash4"), CAPTURE),
    rejected("xformers", f"device cpu: xformers needs {GPU}", CPU),
    rejected("xformers", "mask on SM120: xformers takes one up to SM90", sm(120), BIAS),
    rejected("xformers", "float32 on SM120: xformers takes it up to SM90", sm(120), F32),
    rejected("xformers", "float64: xformers takes float16, bfloat16 and float32", F64),
    rejected("xformers", "head_dim 320: xformers takes up to 256", dim(320)),
    rejected("xformers", "log-sum-exp: xformers does not return it", LSE),
    rejected("ck_int8", f"device cpu: ck_int8 needs {GPU}", CPU),
    rejected("ck_int8", "SM70: ck_int8 needs SM75 or newer", sm(70)),
    rejected("ck_int8", "float64: ck_int8 takes float32, float16 and bfloat16", F64),
    rejected("ck_int8", "head_dim 320: ck_int8 takes up to 256", dim(320)),
    rejected("ck_int8", "7 k/v heads for 24 q heads: ck_int8 needs a divisor", ODD_GQA),
    rejected("ck_int8", FORBIDS.format("ck_int8"), FORBIDDEN),
    rejected("ck_int8", SCHEDULED.format("ck_int8"), DENSE),
    rejected("ck_int8", "log-sum-exp: ck_int8 does not return it", LSE),
    rejected("sage1", f"device cpu: sage1 needs {GPU}", CPU),
    rejected("sage1", "SM75: sage1 needs SM80 or newer", sm(75)),
    rejected("sage1", "float64: sage1 takes float16, bfloat16 and float32", F64),
    rejected("sage1", "head_dim 80: sage1 needs 64, 96 or 128", dim(80)),
    rejected("sage1", "mask: sage1 takes none", BOOL),
    rejected("sage1", "77 keys: sage1 cannot end in a part of a block", {"k_tokens": 77}),
    rejected("sage1", "1030 keys: sage1 cannot end in a part", {"k_tokens": 1030}),
    rejected("sage1", FORBIDS.format("sage1"), FORBIDDEN),
    rejected("sage1", SCHEDULED.format("sage1"), DENSE),
    rejected("sage1", "log-sum-exp: sage1 does not return it", LSE),
    rejected("sage1", COMPILES.format("sage1"), CAPTURE),
    rejected("sage1", "batch 70000: sage1 takes up to 65535", MANY),
    rejected("sage1", TOO_MANY.format("sage1"), HUGE),
    rejected("sage2", "ROCm: sage2 needs a CUDA GPU", ROCM),
    rejected("sage2", "SM100: sage2 needs SM80, SM86, SM89, SM90, SM120 or SM121", sm(100)),
    rejected("sage2", f"float32: sage2 takes {HALF}", F32),
    rejected("sage2", "head_dim 160: sage2 takes up to 128", dim(160)),
    rejected("sage2", "mask: sage2 takes none", BIAS),
    rejected("sage2", FORBIDS.format("sage2"), FORBIDDEN),
    rejected("sage2", SCHEDULED.format("sage2"), DENSE),
    rejected("sage2", COMPILES.format("sage2"), CAPTURE),
    rejected("sage2", TOO_MANY.format("sage2"), HUGE),
    rejected("sage3", "ROCm: sage3 needs a CUDA GPU", ROCM),
    rejected("sage3", "SM90: sage3 needs SM100, SM120 or SM121", sm(90)),
    rejected("sage3", f"float32: sage3 takes {HALF}", F32),
    rejected("sage3", "head_dim 96: sage3 needs 64 or 128", dim(96)),
    rejected("sage3", "mask: sage3 takes none", BIAS),
    rejected("sage3", "scale: sage3 has head_dim ** -0.5 built in", SCALE),
    rejected("sage3", FORBIDS.format("sage3"), FORBIDDEN),
    rejected("sage3", SCHEDULED.format("sage3"), DENSE),
    rejected("sage3", "log-sum-exp: sage3 does not return it", LSE),
    rejected("sage3", COMPILES.format("sage3"), CAPTURE),
    rejected("sage3", TOO_MANY.format("sage3"), HUGE),
    rejected("sparge", "ROCm: sparge needs a CUDA GPU", ROCM),
    rejected("sparge", "SM100: sparge needs SM80, SM86, SM87, SM89, SM90, SM120 or", sm(100)),
    rejected("sparge", f"float32: sparge takes {HALF}", F32),
    rejected("sparge", "head_dim 96: sparge needs 64 or 128", dim(96)),
    rejected("sparge", "mask: sparge takes none", BIAS),
    rejected("sparge", "8 k/v heads for 24 q heads: sparge needs as many", GQA),
    rejected("sparge", FORBIDS.format("sparge"), FORBIDDEN),
    rejected("sparge", SCHEDULED.format("sparge"), DENSE),
    rejected("sparge", "77 tokens: sparge needs 128", {"k_tokens": 77}),
    rejected("sparge", "log-sum-exp: sparge does not return it", LSE),
    rejected("sparge", COMPILES.format("sparge"), CAPTURE),
    rejected("sparge", TOO_MANY.format("sparge"), HUGE),
    rejected("sage2_fp16_accum", "SM89: sage2_fp16_accum needs SM80 or SM86", sm(89)),
    rejected("sage2_fp16_accum", "mask: sage2_fp16_accum takes none", BOOL),
    rejected("sage2_fp32_accum", "SM90: sage2_fp32_accum needs SM89, SM120 or SM121", sm(90)),
    rejected("sage2_fp32_accum", SCHEDULED.format("sage2_fp32_accum"), DENSE),
    rejected("sage2_triton", "ROCm: sage2_triton needs a CUDA GPU", ROCM),
    rejected("sage2_triton", "SM120: sage2_triton needs SM80 to SM90", sm(120)),
    rejected("sage2_triton", f"float32: sage2_triton takes {HALF}", F32),
    rejected("sage2_triton", "head_dim 160: sage2_triton takes up to 128", dim(160)),
    rejected("sage2_triton", FORBIDS.format("sage2_triton"), FORBIDDEN),
    rejected("sage2_triton", COMPILES.format("sage2_triton"), CAPTURE),
    rejected("sage2_triton", TOO_MANY.format("sage2_triton"), HUGE),
    rejected("sol_attn", f"device cpu: sol_attn needs {GPU}", CPU),
    rejected("sol_attn", "SM75: sol_attn needs SM80 or newer", sm(75)),
    rejected("sol_attn", f"float32: sol_attn takes {HALF}", F32),
    rejected("sol_attn", "head_dim 64: sol_attn needs 128", dim(64)),
    rejected("sol_attn", "mask: sol_attn takes none", BOOL),
    rejected("sol_attn", "32768 queries, 512 keys: sol_attn needs as many", {"k_tokens": 512}),
    rejected("sol_attn", "4608 tokens: sol_attn is slower than others below 8192", SHORT),
    rejected("sol_attn", "7 k/v heads for 24 q heads: sol_attn needs a divisor", ODD_GQA),
    rejected("sol_attn", SCHEDULED.format("sol_attn"), DENSE),
    rejected("sol_attn", "log-sum-exp: sol_attn does not return it", LSE),
]


def base(kernel):
    tokens = LONG.get(kernel, FLUX.q_tokens)
    capability = HOME.get(kernel, FLUX.capability)
    return replace(FLUX, capability=capability, q_tokens=tokens, k_tokens=tokens)


@pytest.mark.parametrize("name", KERNELS)
def test_plain_call_is_taken_at_home(name):
    assert KERNELS[name].ineligible(base(name)) is None


@pytest.mark.parametrize(("name", "changes", "sentence"), REJECTIONS)
def test_each_rule_gives_its_sentence(name, changes, sentence):
    request = base(name)
    for change in changes:
        request = replace(request, **change)
    reason = KERNELS[name].ineligible(request)
    assert reason is not None
    assert reason.startswith(sentence)


TAKEN = [
    ("cudnn", (BIAS,)),
    ("cudnn", (GQA, SCALE, LSE, DENSE, FORBIDDEN)),
    ("flash_sdpa", (dim(40), GQA, LSE)),
    ("flash_sdpa", (ROCM,)),
    ("efficient", (F32, BOOL, GQA, LSE, dim(512))),
    ("efficient", (sm(75), {"dtype": "float16"})),
    ("math", (CPU, F64, BIAS, GQA, LSE, dim(40, 16))),
    ("flash2", (ROCM, GQA, SCALE, LSE, dim(80))),
    ("flash3", (dim(256), GQA, LSE)),
    ("flash4", (sm(100), dim(256), LSE)),
    ("xformers", (BIAS, GQA, F32)),
    ("ck_int8", (F32, BOOL, GQA, SCALE, dim(40), sm(75), CAPTURE)),
    ("ck_int8", (ROCM,)),
    ("sage1", (dim(96), GQA, SCALE, F32)),
    ("sage1", (ROCM,)),
    ("sage2", (dim(40), GQA, SCALE, LSE, sm(86))),
    ("sage3", (GQA,)),
    ("sage1", ({"q_tokens": 77},)),  # only keys come in blocks that are not masked
    ("sage1", ({"k_tokens": 512},)),
    ("sage1", ({"k_tokens": 75_600},)),
    ("sparge", (SCALE, dim(64))),
    ("sparge", (sm(120),)),
    ("flash3", (sm(89),)),
    ("xformers", (sm(120),)),
    ("sage2_fp16_accum", (dim(40), GQA, LSE)),
    ("sage2_fp32_accum", (sm(121), GQA, SCALE)),
    ("sage2_triton", (sm(86), BIAS, GQA, LSE)),
    ("sage2_triton", (BOOL, dim(40), {"k_tokens": 77})),
    ("sol_attn", (ROCM, GQA, SCALE)),
]


@pytest.mark.parametrize(("name", "changes"), TAKEN)
def test_what_a_kernel_can_take_is_taken(name, changes):
    request = base(name)
    for change in changes:
        request = replace(request, **change)
    assert KERNELS[name].ineligible(request) is None


def test_unknown_capability_is_a_reason_not_a_crash():
    reason = KERNELS["flash_sdpa"].ineligible(replace(FLUX, capability=None))
    assert reason == "compute capability unknown: flash_sdpa cannot tell whether it runs"


@pytest.mark.parametrize(
    ("version", "q_tokens", "k_tokens", "allowed"),
    [
        (91_002, 4608, 4608, True),
        (91_002, 4607, 4608, False),
        (91_002, 4608, 77, False),
        (91_501, 32_760, 512, True),
    ],
)
def test_old_cudnn_is_only_used_at_lengths_it_gets_right(
    monkeypatch, version, q_tokens, k_tokens, allowed
):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    request = replace(FLUX, q_tokens=q_tokens, k_tokens=k_tokens)
    reason = KERNELS["cudnn"].ineligible(request)
    assert (reason is None) == allowed
    assert allowed or "cuDNN 91002 is only safe at multiples of 128" in reason


def test_every_approximate_kernel_heeds_the_model_and_the_schedule():
    for kernel in KERNELS.values():
        for change in (FORBIDDEN, DENSE):
            reason = kernel.ineligible(replace(base(kernel.id), **change))
            assert (reason is None) == (kernel.category == EXACT), kernel.id


def test_every_kernel_without_lse_says_so():
    for kernel in KERNELS.values():
        reason = kernel.ineligible(replace(base(kernel.id), want_lse=True))
        assert (reason is None) == kernel.lse, kernel.id


def test_selection_never_raises():
    axes = {
        "device_type": ("cpu", "cuda", "mps"),
        "capability": (None, (7, 5), (8, 6), (9, 0), (12, 0)),
        "is_hip": (False, True),
        "dtype": ("float16", "float32", "float8_e4m3fn"),
        "head_dim": (1, 64, 80, 512),
        "mask": ("none", "bool"),
        "kv_heads": (24, 5),
        "want_lse": (False, True),
    }
    available = dict.fromkeys(KERNELS)
    for values in itertools.product(*axes.values()):
        request = replace(FLUX, **dict(zip(axes, values, strict=True)))
        choice = registry.select([KERNELS[name] for name in EXACT_ORDER], request)
        for kernel in KERNELS.values():
            reason = kernel.ineligible(request)
            assert reason is None or (reason[0] != " " and not reason.endswith("."))
            available[kernel.id] = available[kernel.id] or reason is None
        if isinstance(choice, registry.Refusal):
            assert set(choice.reasons) == set(EXACT_ORDER)
            assert request.kv_heads == 5  # math takes everything else
    assert available["math"]
    assert available["sage1"]


def test_policies_name_kernels_of_the_right_kind():
    assert (*FUSED, "math") == EXACT_ORDER
    assert POLICIES["exact"] == FUSED
    assert all(KERNELS[name].category == EXACT for name in EXACT_ORDER)
    for policy in ("balanced", "fastest"):
        assert all(KERNELS[name].category == APPROXIMATE for name in POLICIES[policy])
    assert not any(KERNELS[name].sparse for name in POLICIES["balanced"])
    assert set(POLICIES["balanced"]) < set(POLICIES["fastest"])
    listed = {name for names in POLICIES.values() for name in names} | {"math"}
    assert listed == set(KERNELS)
    assert all(KERNELS[name].id == name for name in KERNELS)

"""SVDQuant's kernels and load paths on a GPU: ./test gpu

Random weights: errors say that kernels compute what the format means, not how a picture looks.
Speed is measured by `python bench svdquant_layers` and `python bench svdquant_flux`.
"""

import os
import sys

import comfy_home
import pytest
import svdquant_models
import torch
from slipstream.backends.svdquant.engine import Engine, request_of
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.kernels import KERNELS, Dequant, LowRank, Reference
from slipstream.backends.svdquant.kernels.kitchen import max_rows
from slipstream.backends.svdquant.measure import prove
from slipstream.backends.svdquant.weight import Segment, whole
from slipstream.bench.svdquant_layers import random_segment

NO_GPU = "needs a CUDA or ROCm GPU: torch sees none"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]
ROWS = (1, 7, 255, 256, 257, 4096)
SHAPES = ((3072, 3072), (9216, 3072), (3072, 12288), (128, 128), (384, 256))


@pytest.fixture(scope="module", autouse=True)
def _environment():
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")


def rel(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def usable(kernel, segment):
    """The kernel, or a skip that says why it does not take this segment here."""
    reason = kernel.available() or kernel.ineligible(request_of(segment, torch.device("cuda")))
    if reason is not None:
        pytest.skip(reason)
    return kernel


def on_gpu(precision, shape, dtype=torch.bfloat16):
    segment = random_segment(*shape, precision, "cuda")
    if dtype == torch.bfloat16:
        return segment
    parts = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        else value
        for name, value in vars(segment).items()
    }  # fmt: skip
    return Segment(**parts)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_follow_the_reference(kernel, precision, shape):
    segment = on_gpu(precision, shape)
    kernel = usable(kernel, segment)
    for num_rows in ROWS:
        x = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
        y = kernel.run(x, segment)
        assert y.shape == (num_rows, shape[0])
        assert torch.isfinite(y).all()
        if kernel.id == "dequant":
            continue  # its inputs are not rounded: compared with the dense layer elsewhere
        error = rel(y, Reference().run(x, segment))
        # another accumulation order flips codes; nvfp4 kernels scale inputs per tensor as well
        assert error < (0.06 if precision == "nvfp4" else 0.03), (num_rows, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [16, 64, 128, 256, 272])
def test_lora_ranks(dtype, rank):
    segment = on_gpu("int4", (3072, 3072), dtype)
    x = torch.randn(300, 3072, device="cuda", dtype=dtype)
    down = torch.randn(3072, rank, device="cuda", dtype=dtype) * 0.02
    pair = LowRank(down, torch.randn(3072, rank, device="cuda", dtype=dtype) * 0.02)
    exact = (x.float() @ pair.down.float()) @ pair.up.float().t()
    for kernel in KERNELS:
        if kernel.available() or kernel.ineligible(request_of(segment, torch.device("cuda"))):
            continue
        base = kernel.run(x, segment)
        delta = kernel.run(x, segment, extra=pair).float() - base.float()
        cosine = torch.nn.functional.cosine_similarity(delta.flatten(), exact.flatten(), dim=0)
        assert cosine > 0.98, (kernel.id, float(cosine))
        assert torch.equal(kernel.run(x, segment), base)


def test_dequant_is_the_dense_layer():
    from slipstream.backends.svdquant.weight import effective

    for precision in ("int4", "nvfp4"):
        segment = on_gpu(precision, (3072, 3072))
        x = torch.randn(512, 3072, device="cuda", dtype=torch.bfloat16)
        wanted = x.float() @ effective(whole(segment)).t()
        assert rel(Dequant().run(x, segment), wanted) < 1e-2


def test_auto_follows_the_measurement():
    engine = Engine("auto")
    segment = on_gpu("int4", (3072, 3072))
    prove({"int4": whole(segment)}, torch.device("cuda"), engine, lambda num_bytes, device: None)
    print(engine.order, engine.reasons)
    if not engine.order:  # no other package's kernel takes it here, and dequant takes all
        assert engine.reasons
        return
    x = torch.randn(64, 3072, device="cuda", dtype=torch.bfloat16)
    assert engine.kernel(segment, x).id == engine.order["int4"][0]


# (rows of x, N, K): FLUX.1's fc2 at 1024 x 1024 and its text, and what ends within a tile
REPEATED = ((4608, 3072, 12288), (4608, 12288, 3072), (512, 3072, 3072), (300, 384, 256))


@pytest.mark.parametrize(("rows", "num_rows", "num_columns"), REPEATED)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.id)
def test_a_thousand_equal_calls_are_equal(kernel, rows, num_rows, num_columns):
    """Bit-equal while a second stream keeps the GPU busy, which moves warps apart.

    A difference without a cause on our side: look for it with NVIDIA's tool on the small sizes,
        compute-sanitizer --tool racecheck --racecheck-report all --kernel-name-base demangled
            --kernel-name kns=svdquant python -m pytest -q tests/gpu/test_svdquant_gpu.py
            -k "thousand and kitchen and 300"
    with SLIPSTREAM_EQUAL_CALLS=2 (racecheck is some hundred times slower). A hazard that it
    reports names the two lines of the kernel that touch the same shared memory.
    """
    segment = on_gpu("int4", (num_rows, num_columns))
    kernel = usable(kernel, segment)
    count = int(os.environ.get("SLIPSTREAM_EQUAL_CALLS", "1000"))
    if kernel.id in ("dequant", "reference"):
        count = min(count, 20)  # torch's own matmuls
    x = torch.randn(rows, num_columns, device="cuda", dtype=torch.bfloat16)
    wanted = kernel.run(x, segment).clone()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    load = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    busy = torch.cuda.Stream()
    for _ in range(count):
        with torch.cuda.stream(busy):
            torch.mm(load, load)
        different += (kernel.run(x, segment) != wanted).any()
    torch.cuda.synchronize()
    assert int(different) == 0, f"{int(different)} of {count} equal calls differ"


def test_rows_beyond_32_bit_indices():
    """Batches of video: split by us, compared with the same rows alone."""
    segment = on_gpu("int4", (128, 12288))
    kernel = usable(next(k for k in KERNELS if k.id == "kitchen"), segment)
    num_rows = max_rows(segment) + 300
    x = torch.randn(512, 12288, device="cuda", dtype=torch.bfloat16)
    many = x.repeat(-(-num_rows // 512), 1)[:num_rows]
    y = kernel.run(many, segment)
    alone = kernel.run(x, segment)
    assert torch.equal(y[:512], alone)
    last = num_rows // 512 * 512
    assert torch.equal(y[last:], alone[: num_rows - last])


@pytest.fixture(scope="module")
def on_device():
    """ComfyUI in this process, on the GPU."""
    if comfy_home.find() is None:
        pytest.skip(comfy_home.NOT_FOUND)
    loaded = sys.modules.get("comfy.model_management")
    if loaded is not None and loaded.get_torch_device().type == "cpu":
        pytest.skip("ComfyUI runs on the CPU in this process already: run tests/gpu alone")
    comfy_home.in_process()
    from comfy.cli_args import args

    args.cpu = False


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("svdquant") / "flux.safetensors"
    svdquant_models.write(file, "flux", "nunchaku-1", depth=2, single=2, context=768, vec=768)
    return str(file)


def forward(model):
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 16, 16, 16), (1, 7, 768), (1, 768))
    x, context, y = (torch.randn(s, generator=generator).cuda().bfloat16() for s in shapes)
    with torch.no_grad():
        return model.model.diffusion_model(
            x,
            torch.tensor([0.7], device="cuda").bfloat16(),
            context=context,
            y=y,
            guidance=torch.tensor([3.5], device="cuda").bfloat16(),
        )


@pytest.mark.parametrize("backend", ["kitchen", "dequant"])
def test_full_low_vram_and_cpu_agree(on_device, path, backend):
    import comfy.model_management

    model = load_svdquant(path, {"backend": backend}, disable_dynamic=True)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    wanted = forward(model)
    low = model.clone()
    low.unpatch_model(low.offload_device)
    low.load(torch.device("cuda"), lowvram_model_memory=1)
    assert low.model.model_lowvram
    assert torch.equal(forward(low), wanted)


def test_dynamic_vram_agrees(on_device, path):
    import comfy.memory_management
    import comfy.model_management

    if not comfy.memory_management.aimdo_enabled:
        pytest.skip("dynamic VRAM is off in this process (ComfyUI's main.py switches it on)")
    plain = load_svdquant(path, {"backend": "dequant"}, disable_dynamic=True)
    comfy.model_management.load_models_gpu([plain], force_full_load=True)
    wanted = forward(plain)
    model = load_svdquant(path, {"backend": "dequant"})
    assert model.is_dynamic()
    comfy.model_management.load_models_gpu([model])
    assert torch.equal(forward(model), wanted)
    assert torch.equal(forward(model), wanted)  # resident weights, not streamed ones

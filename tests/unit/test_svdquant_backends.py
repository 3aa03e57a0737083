"""Backends: impostors and broken packages, choosing by measurement, what Inspect says."""

import sys
import types

import pytest
import svdquant_models
import torch
from slipstream.backends.registry import reason_against
from slipstream.backends.svdquant import kernels, measure
from slipstream.backends.svdquant.casts import narrowed
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.engine import Engine, request_of
from slipstream.backends.svdquant.errors import BackendError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.inspection import inspect_text, requests, verdict
from slipstream.backends.svdquant.kernels import Dequant, Kitchen, Nunchaku, Reference
from slipstream.backends.svdquant.kernels.base import LayerRequest
from slipstream.backends.svdquant.measure import checked, fastest, prove
from slipstream.backends.svdquant.quantize import quantise
from slipstream.backends.svdquant.segments import unsigned_by_topology
from slipstream.backends.svdquant.technique import Loaded, SVDQuantState, SVDQuantTechnique
from slipstream.backends.svdquant.weight import Facts, Segment

CPU = torch.device("cpu")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder for fake packages, in front of everything that is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    assert "nunchaku" not in sys.modules
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "nunchaku"]:
        del sys.modules[name]


def package(folder, name, text, extra=()):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    for file in extra:
        (folder / name / file).write_text("")


def test_pypis_nunchaku_is_recognised_and_not_imported(packages):
    package(packages, "nunchaku", "raise RuntimeError('imported')", ("stats.py",))
    reason = Nunchaku().available()
    assert reason is not None
    assert "unrelated PyPI package (no nunchaku._C.ops)" in reason
    assert "nunchaku" not in sys.modules


ERRORS = (
    ImportError, AttributeError, ValueError, RuntimeError, AssertionError, TypeError, OSError,
    KeyError,
)  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_a_nunchaku_that_cannot_be_imported_is_a_reason(packages, error):
    package(packages, "nunchaku", f"raise {error.__name__}('not here')", ("_C.abi3.so",))
    assert "nunchaku cannot be imported (" in Nunchaku().available()


@pytest.mark.parametrize("error", ERRORS)
def test_a_comfy_kitchen_that_cannot_be_imported_is_a_reason(packages, monkeypatch, error):
    for name in [n for n in sys.modules if n.split(".")[0] == "comfy_kitchen"]:
        monkeypatch.delitem(sys.modules, name)
    package(packages, "comfy_kitchen", f"raise {error.__name__}('not here')")
    assert "comfy-kitchen cannot be imported (" in Kitchen().available()
    assert Engine().kernel(segment(), torch.randn(2, 128).bfloat16()).id == "dequant"


def test_the_user_can_stop_an_import(packages):
    package(packages, "nunchaku", "raise KeyboardInterrupt", ("_C.abi3.so",))
    with pytest.raises(KeyboardInterrupt):
        Nunchaku().available()


def test_no_nunchaku(packages, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert Nunchaku().available().startswith("nunchaku is not installed")


def test_an_old_comfy_kitchen_is_named(monkeypatch):
    old = types.ModuleType("comfy_kitchen")
    old.__version__ = "0.1.9"
    monkeypatch.setitem(sys.modules, "comfy_kitchen", old)
    assert "comfy-kitchen 0.1.9 lacks quantize_svdquant_w4a4" in Kitchen().available()
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    assert "comfy-kitchen cannot be imported" in Kitchen().available()
    for precision in ("int4", "nvfp4"):  # its rules on a layer ask the package, too
        layer = LayerRequest(
            precision=precision, device_type="cuda", dtype="bfloat16", num_rows=64, num_columns=64,
            capability=(12, 0),
        )  # fmt: skip
        assert "comfy-kitchen cannot be imported" in reason_against(Kitchen(), layer)


class Fake:
    """A kernel with a given result: reference's, changed by `result`, or an error."""

    def __init__(self, name, result=None, error=None):
        self.id, self.result, self.error = name, result, error

    def available(self):
        return None

    def ineligible(self, request):
        return None

    def run(self, x, segment, *, bias=None, extra=None, share=None):
        if self.error is not None:
            raise self.error
        y = (Dequant() if self.id == "dequant" else Reference()).run(x, segment)
        return self.result(y) if self.result else y


class InterruptProcessingException(Exception):  # noqa: N818
    """Of this name is ComfyUI's own."""


def segment():
    q = quantise(torch.randn(128, 128) * 0.05, rank=16)
    from slipstream.backends.svdquant.layouts import plain_from_codes

    facts = Facts("int4", 0, 128, 0, 128)
    scale = q.codes.scale.t().contiguous()
    return Segment(facts, plain_from_codes(q.codes.codes), scale, q.smooth, q.down, q.up)


def engine_of(*fakes, **options):
    return Engine(kernels=(*fakes, Fake("dequant")), **options)


def test_only_right_kernels_are_measured():
    def changing(y):
        changing.calls += 1
        return y + 1e-3 * changing.calls

    changing.calls = 0
    fakes = [
        Fake("kitchen"),
        Fake("dequant"),
        Fake("wrong", result=lambda y: y * 2),
        Fake("nan", result=lambda y: y * float("nan")),
        Fake("nunchaku", result=changing),
        Fake("broken", error=RuntimeError("no kernel image")),
    ]
    engine = engine_of()
    right = checked(fakes, segment(), engine)
    assert [kernel.id for kernel in right] == ["kitchen", "dequant"]
    assert "relative error 1.00" in engine.reasons["wrong"]
    assert "is wrong" in engine.reasons["nan"]
    assert engine.reasons["nunchaku"] == "equal calls give different results on this device"
    assert engine.reasons["broken"] == "failed on this device: RuntimeError: no kernel image"
    assert engine.failed.keys() == {(n, "int4") for n in ("wrong", "nan", "nunchaku", "broken")}


def test_a_small_error_of_a_4_bit_kernel_is_seen():
    """dequant is 0.1 away from it anyway: only against `reference` does it show."""
    fakes = [Fake("kitchen", result=lambda y: y * 1.1)]
    engine = engine_of()
    assert checked(fakes, segment(), engine) == []
    assert "relative error 0.10" in engine.reasons["kitchen"]


def test_the_fastest_kernel_is_taken():
    one, x = segment(), torch.randn(8, 128).bfloat16()
    speeds, reasons = iter([3.0, 2.0]), {}
    order = fastest([Fake("kitchen"), Fake("dequant")], x, one, reasons, lambda call: next(speeds))
    assert order == ("dequant", "kitchen")
    assert "slower here" in reasons["kitchen"]
    engine = Engine("auto", order={"int4": order})
    assert engine.kernel(one, x).id == "dequant"


@pytest.mark.parametrize("name", ["kitchen", "nunchaku"])
@pytest.mark.parametrize("error", ERRORS)
def test_whatever_an_optional_package_raises_is_a_reason(error, name):
    raised = error("late")
    engine = engine_of(Fake(name, error=raised))
    assert checked([Fake(name, error=raised)], segment(), engine) == []
    assert engine.reasons[name].startswith(f"failed on this device: {error.__name__}: ")
    # the same where nothing was measured: the first call, in the middle of a run
    engine = engine_of(Fake(name, error=raised), order={"int4": (name,)})
    one, x = segment(), torch.randn(8, 128).bfloat16()
    wanted = Dequant().run(x, one)
    for _ in range(2):
        kernel = engine.kernel(one, x)
        assert torch.equal(kernel.run(x, one), wanted)
        assert kernel.id == "dequant"  # what the report counts
    assert engine.reasons[name].startswith(f"failed on this device: {error.__name__}: ")
    by_hand = engine_of(Fake(name, error=raised), backend=name)
    with pytest.raises(BackendError, match=f"backend {name} cannot run .* {error.__name__}"):
        by_hand.kernel(one, x).run(x, one)


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptProcessingException])
def test_the_users_cancel_goes_through(error):
    engine = engine_of(Fake("kitchen", error=error()))
    one, x = segment(), torch.randn(8, 128).bfloat16()
    with pytest.raises(error):
        checked([Fake("kitchen", error=error())], one, engine)
    with pytest.raises(error):
        fastest([Fake("kitchen", error=error())], x, one, {}, lambda call: call())
    with pytest.raises(error):
        engine.kernel(one, x).run(x, one)
    assert engine.reasons == {}
    assert engine.failed == {}


def test_a_kernel_is_guarded_until_it_has_run_once():
    """Later errors are a run's own: the input was wrong, or the device has died."""
    kitchen = Fake("kitchen")
    engine = engine_of(kitchen)
    one, x = segment(), torch.randn(8, 128).bfloat16()
    engine.kernel(one, x).run(x, one)
    assert engine.kernel(one, x) is kitchen


@pytest.fixture
def on_gpu(monkeypatch):
    """What is measured as on a GPU runs here on the CPU; True: no memory is left."""
    full = [False]

    def moved(one, device):
        if full[0]:
            raise torch.cuda.OutOfMemoryError("full")
        return one

    randn = torch.randn
    monkeypatch.setattr(measure, "_moved", moved)
    monkeypatch.setattr(measure, "request_of", lambda one, device: request_of(one, CPU))
    monkeypatch.setattr(measure, "_cuda_seconds", lambda call: 1.0)
    monkeypatch.setattr(measure, "is_direct", lambda device: False)
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, **more: randn(*shape, **more))
    return full


CUDA = torch.device("cuda")


def test_measuring_asks_comfyui_for_room_and_is_repeated_when_there_was_none(on_gpu):
    asked, engine = [], engine_of(Fake("kitchen"))
    weight = types.SimpleNamespace(segments=(segment(),))
    on_gpu[0] = True
    prove({"int4": weight}, CUDA, engine, lambda *wanted: asked.append(wanted))
    assert asked == [(measure.NEEDED_BYTES, CUDA)]
    assert engine.order == {}
    assert engine.reasons == {}
    assert engine.failed == {}
    technique = SVDQuantTechnique(LOADED, engine)
    technique.start(RUN).close()
    assert engine.order == {}  # still none
    on_gpu[0] = False
    technique.start(RUN).close()
    assert set(engine.order["int4"]) == {"kitchen", "dequant"}
    assert engine.measure_later is None
    assert len(asked) == 1  # a run has its model in memory: nothing may be unloaded for this


def test_memory_that_runs_out_in_a_kernel_does_not_brand_it(on_gpu):
    kitchen = Fake("kitchen", error=torch.cuda.OutOfMemoryError("full"))
    engine = engine_of(kitchen)
    prove({"int4": types.SimpleNamespace(segments=(segment(),))}, CUDA, engine, lambda *_: None)
    assert engine.reasons == {}
    assert engine.failed == {}
    kitchen.error = None
    engine.measure_later()
    assert set(engine.order["int4"]) == {"kitchen", "dequant"}


def test_what_comfyui_switched_off_is_not_used_unchecked(on_gpu, monkeypatch):
    engine = engine_of(Fake("kitchen"))
    weight = types.SimpleNamespace(segments=(segment(),))
    monkeypatch.setattr(measure, "is_direct", lambda device: True)
    on_gpu[0] = True
    prove({"int4": weight}, CUDA, engine, lambda *_: None)
    x = torch.randn(8, 128).bfloat16()
    assert engine.kernel(weight.segments[0], x).id == "dequant"
    on_gpu[0] = False
    engine.measure_later()
    assert engine.failed == {}
    assert engine.kernel(weight.segments[0], x).id in engine.order["int4"]
    assert "not checked" not in engine.reasons.get("kitchen", "")


def test_a_backend_that_was_chosen_and_is_wrong_is_an_error(on_gpu):
    engine = engine_of(Fake("nunchaku", result=lambda y: -y), backend="nunchaku")
    weight = types.SimpleNamespace(segments=(segment(),))
    with pytest.raises(BackendError, match=r"backend nunchaku cannot run .* result .* is wrong"):
        prove({"int4": weight}, CUDA, engine, lambda *_: None)


LOADED = Loaded(title="t", family="flux", dialect="d", weight_bytes=1, keys=())
RUN = types.SimpleNamespace(patcher=types.SimpleNamespace(patches={}))


def test_workspaces_of_comfy_kitchen_end_with_the_run(monkeypatch):
    """It keeps one per token count for ever: 84 MB for each size of picture."""
    cuda = types.ModuleType("comfy_kitchen.backends.cuda")
    cuda._SVDQUANT_WORKSPACE_CACHE = {size: torch.zeros(8) for size in range(12)}
    monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
    state = SVDQuantState(RUN, LOADED, Engine())
    assert len(cuda._SVDQUANT_WORKSPACE_CACHE) == 12
    state.close()
    assert cuda._SVDQUANT_WORKSPACE_CACHE == {}


def test_the_real_comfy_kitchen_keeps_its_workspaces_where_we_look():
    pytest.importorskip("comfy_kitchen")
    from comfy_kitchen.backends import cuda

    assert isinstance(cuda._SVDQUANT_WORKSPACE_CACHE, dict)


@pytest.mark.parametrize(
    ("precision", "capability", "missing"),
    [("int4", (8, 6), "scaled_mm_svdquant_w4a4"), ("nvfp4", (12, 0), "scaled_mm_nvfp4")],
)
def test_a_backend_without_the_kernel_is_not_taken_for_one_that_has_it(
    monkeypatch, precision, capability, missing
):
    """RDNA 2 registers hip without its matrix kernels; without cuBLASLt there is no nvfp4."""
    kitchen = pytest.importorskip("comfy_kitchen")
    ops = ["quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4", "quantize_nvfp4", "scaled_mm_nvfp4"]
    status = {"available": True, "disabled": False, "capabilities": ops}
    monkeypatch.setattr(kitchen, "list_backends", lambda: {"cuda": status})
    layer = LayerRequest(
        precision=precision, device_type="cuda", dtype="bfloat16", num_rows=64, num_columns=64,
        capability=capability,
    )  # fmt: skip
    assert Kitchen().ineligible(layer) is None
    ops.remove(missing)
    assert Kitchen().ineligible(layer) == (
        f"comfy-kitchen's cuda kernels on this GPU have no {missing}"
    )


def test_four_bit_kernels_pass_the_check():
    """The accuracy check must not refuse what it is for."""
    pytest.importorskip("comfy_kitchen")
    kernels = [Kitchen(), Dequant(), Reference()]
    assert checked(kernels, segment(), Engine()) == kernels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "svdq-fp4_r128-tiny.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1", single=1)
    return detect(read_header(path))


def test_inspect_text(checkpoint):
    pytest.importorskip("comfy_kitchen")
    text = inspect_text(checkpoint, CPU)
    assert "svdq-fp4_r128-tiny.safetensors: 1.2 MB" in text
    assert "Family: FLUX.1. Dialect: Nunchaku (lora_down, smooth)." in text
    assert "Precision: int4, rank 32, 16-bit parts BF16." in text
    assert "Quantised layers: 15 (3 awq, 12 int4)" in text
    assert "Doubt: the file's name says nvfp4, rank 128." in text
    assert "kitchen: yes" in text
    assert "nunchaku: no (" in text
    assert "dequant: yes" in text
    assert "auto picks kitchen" in text


def test_verdicts_follow_the_device(checkpoint, monkeypatch):
    from dataclasses import replace

    asked = requests(checkpoint, CPU, torch.bfloat16)
    assert {r.unsigned for r in asked if r.precision == "int4"} == {True, False}

    def on(**changes):
        return [replace(r, device_type="cuda", **changes) for r in asked]

    monkeypatch.setattr(Nunchaku, "available", lambda self: None)
    assert "no (nunchaku has no SM90 kernels" in verdict(Nunchaku(), on(capability=(9, 0)))
    assert verdict(Nunchaku(), on(capability=(8, 9))).startswith("for ")
    old = on(capability=(7, 5))
    if Kitchen().available() is None:
        assert "SM75" in verdict(Kitchen(), old)
    assert verdict(Dequant(), old) == "yes"


def test_inspect_begins_with_what_is_off(checkpoint, monkeypatch):
    pytest.importorskip("comfy_kitchen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2080")
    first, second, *_ = inspect_text(checkpoint, CUDA, torch.float16).splitlines()
    assert first.startswith("4-bit kernels are off: SM75: comfy-kitchen's int4 kernels need SM80")
    assert second.startswith("svdq-fp4_r128-tiny.safetensors")
    text = inspect_text(checkpoint, CUDA, torch.float32)
    assert text.startswith("FLUX.1 is computed in fp32 here, as ComfyUI computes its 16-bit model")
    assert "Computes in fp32 here." in text
    assert not inspect_text(checkpoint, CPU, torch.float32).startswith("FLUX.1 is")


def test_topology_of_unsigned_layers(checkpoint, tmp_path):
    unsigned = {n for n, flag in unsigned_by_topology(checkpoint).items() if flag}
    assert unsigned == {
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.0.mlp_fc2",
    }
    for family, dialect, precision, number in (
        ("qwen-image", "nunchaku-2", "int4", 2),
        ("qwen-image", "nunchaku-2", "nvfp4", 0),
        ("qwen-image", "nunchaku-lite", "int4", 0),
        ("qwen-image", "comfy-kitchen", "int4", 2),
        ("z-image", "nunchaku-2", "int4", 0),
    ):
        path = tmp_path / f"{family}{dialect}{precision}.safetensors"
        svdquant_models.write(path, family, dialect, precision=precision)
        flags = unsigned_by_topology(detect(read_header(path)))
        assert sum(flags.values()) == number, (family, dialect, precision)


def test_every_backend_has_one_id():
    assert [k.id for k in kernels.KERNELS] == ["kitchen", "nunchaku", "dequant", "reference"]


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_no_cast_to_fp16_makes_infinity_or_zero(source):
    """Real Z-Image files have biases beyond fp16, and scales of quiet groups below it."""
    values = torch.tensor([70_000.0, -1e30, 1e-9, -1e-12, 0.0, 1.5, -65_504.0], dtype=source)
    found = narrowed(values, torch.float16)
    assert found.dtype == torch.float16
    assert torch.isfinite(found).all()
    assert torch.equal(found == 0, values == 0)
    assert torch.equal(found.sign().float(), values.sign().float())
    assert found[5] == 1.5
    assert narrowed(values, torch.bfloat16).dtype == torch.bfloat16

"""The dtype a file computes in is ComfyUI's own choice for the same model, on faked cards.

What is faked is beneath ComfyUI's functions: what torch says of the device. Files have every
family's real shapes and no bytes.
"""

import functools
from types import SimpleNamespace

import pytest
import svdquant_models
import svdquant_wide
import torch
from slipstream.backends.svdquant import host as loader
from slipstream.backends.svdquant.config import DTYPES, SVDQuantConfig
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_detection import outline
from slipstream.backends.svdquant.host_dtype import pick_dtypes
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.layout import unwrap
from svdquant_networks import SIZES

pytestmark = pytest.mark.usefixtures("comfy")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NORM = "layers.28.ffn_norm1.weight"  # its spread decides whether ComfyUI allows Z-Image fp16
FILES = {
    "flux": lambda: svdquant_wide.flux(svdquant_wide.WideShapes),
    "qwen-image": lambda: svdquant_wide.qwen_image(kind=svdquant_wide.Shapes, num_blocks=60),
    "z-image": lambda: svdquant_wide.z_image(kind=svdquant_wide.Shapes, num_blocks=30),
    "z-image, safe in fp16": lambda: (
        svdquant_wide.z_image(kind=svdquant_wide.Shapes, num_blocks=30)
        | {NORM: torch.full((3840,), 0.5, dtype=BF16)}
    ),
    "sdxl": lambda: svdquant_wide.sdxl(svdquant_wide.WideShapes),
}
WIDE = torch.linspace(-3, 3, 3840, dtype=BF16)
CARDS = {  # name, compute capability, GiB, ROCm architecture
    "RTX 2080": ("NVIDIA GeForce RTX 2080", (7, 5), 8, ""),
    "Quadro RTX 6000": ("Quadro RTX 6000", (7, 5), 24, ""),
    "Quadro RTX 8000": ("Quadro RTX 8000", (7, 5), 48, ""),
    "GTX 1660": ("NVIDIA GeForce GTX 1660", (7, 5), 6, ""),
    "GTX 1080": ("NVIDIA GeForce GTX 1080", (6, 1), 8, ""),
    "RTX 3060": ("NVIDIA GeForce RTX 3060", (8, 6), 12, ""),
    "RX 6800": ("AMD Radeon RX 6800", (10, 3), 16, "gfx1030"),
    "RX 7900": ("AMD Radeon RX 7900 XTX", (11, 0), 24, "gfx1100"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(family, file dtype) -> the path of a file with all its blocks."""
    folder, found = tmp_path_factory.mktemp("dtype"), {}

    def file(family, dtype=BF16):
        path = folder / f"{family}-{dtype}.safetensors"
        if path not in found:
            tensors = FILES[family]()
            if family == "z-image":
                tensors[NORM] = WIDE
            svdquant_wide.save_sparse(path, tensors, dtype)
            found[path] = detect(read_header(path))
        return found[path]

    return file


@pytest.fixture
def card(monkeypatch):
    """card(name): torch and ComfyUI see that card."""
    import comfy.model_management as management

    def fake(name):
        title, (major, minor), size, arch = CARDS[name]
        facts = SimpleNamespace(
            name=title, major=major, minor=minor, gcnArchName=arch, total_memory=size * 2**30,
            multi_processor_count=40, warp_size=32,
        )  # fmt: skip
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda device=None: facts,
            "get_device_capability": lambda device=None: (major, minor),
            "get_device_name": lambda device=None: title,
            "is_bf16_supported": lambda including_emulation=True: True,  # Turing emulates it
            "mem_get_info": lambda device=None: (size * 2**30, size * 2**30),
            "memory_stats": lambda device=None: {
                "reserved_bytes.all.current": 0, "active_bytes.all.current": 0
            },
        }  # fmt: skip
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, answer)
        monkeypatch.setattr(torch.version, "cuda", None if arch else "13.0")
        monkeypatch.setattr(torch.version, "hip", "6.4" if arch else None)
        monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
        return management.get_torch_device()

    return fake


class Built(Exception):  # noqa: N818
    """Carries the config that ComfyUI would build a network from."""


@functools.cache
def dense_shapes(path):
    """The 16-bit model on the meta device: names and shapes of the network that ComfyUI's
    detection finds, with the file's dtype and vectors."""
    import comfy.model_base
    import comfy.model_detection
    import comfy.ops

    checkpoint = detect(read_header(path))
    shapes = outline(checkpoint)
    config = comfy.model_detection.model_config_from_unet(dict(shapes), "")
    config.custom_operations = comfy.ops.disable_weight_init
    network = config.get_model({}, "", device="meta").diffusion_model
    dtype = {"BF16": BF16, "F16": FP16}[checkpoint.dtype]
    state = {
        name: shapes[name] if shapes[name].device.type == "cpu" else tensor.to(dtype)
        for name, tensor in network.state_dict().items()
    }
    assert state.keys() == shapes.keys()
    assert all(tensor.shape == shapes[name].shape for name, tensor in state.items())
    return state


def of_the_dense_model(checkpoint, monkeypatch, options):
    """(dtype it is told, dtype it computes in) by ComfyUI's own loader for the 16-bit model."""
    import comfy.model_base
    import comfy.sd

    state = dict(dense_shapes(checkpoint.header.path))

    def stop(self, model_config, *args, **kwargs):
        raise Built(model_config)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_base.BaseModel, "__init__", stop)
        with pytest.raises(Built) as caught:
            comfy.sd.load_diffusion_model_state_dict(state, model_options=options)
    built = caught.value.args[0]
    return built.unet_config["dtype"], built.manual_cast_dtype or built.unet_config["dtype"]


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("family", FILES)
def test_it_is_what_comfyui_chooses_for_the_dense_model(family, name, files, card, monkeypatch):
    device = card(name)
    for file_dtype in (BF16, FP16):
        checkpoint = files(family, file_dtype)
        found = pick_dtypes(checkpoint, SVDQuantConfig(), device)
        _, wanted = of_the_dense_model(checkpoint, monkeypatch, {})
        assert found.compute == wanted, file_dtype
        assert found.storage in (BF16, FP16), "16 bits in memory whatever it computes in"
        # ComfyUI, told to store like that, computes in the same dtype
        told, computed = of_the_dense_model(checkpoint, monkeypatch, {"dtype": found.storage})
        assert (told, computed) == (found.storage, wanted)


EXPECTED = {  # of bf16 files, as docs/svdquant.md has it
    "RTX 2080": {"flux": FP16, "qwen-image": FP32, "z-image": FP32, "sdxl": FP16},
    "GTX 1660": {"flux": FP32, "qwen-image": FP32, "z-image": FP32, "sdxl": FP32},
    "RX 6800": {"flux": FP16, "qwen-image": FP32, "z-image": FP32, "sdxl": FP16},
    "RTX 3060": {"flux": BF16, "qwen-image": BF16, "z-image": BF16, "sdxl": FP16},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_table_of_the_documentation(name, files, card):
    device = card(name)
    found = {
        family: pick_dtypes(files(family), SVDQuantConfig(), device).compute
        for family in EXPECTED[name]
    }
    assert found == EXPECTED[name]
    safe = pick_dtypes(files("z-image, safe in fp16"), SVDQuantConfig(), device).compute
    assert safe == {"RTX 3060": BF16, "GTX 1660": FP32}.get(name, FP16)


@pytest.mark.parametrize("name", ["RTX 2080", "GTX 1660", "RTX 3060", "RX 6800"])
@pytest.mark.parametrize("widget", DTYPES[1:])
def test_the_widget_is_what_comfyui_makes_of_it(widget, name, files, card, monkeypatch):
    device, config = card(name), SVDQuantConfig(dtype=widget)
    asked = {"bf16": BF16, "fp16": FP16, "fp32": FP32}[widget]
    for family in ("flux", "qwen-image", "sdxl"):
        checkpoint = files(family)
        found = pick_dtypes(checkpoint, config, device)
        _, wanted = of_the_dense_model(checkpoint, monkeypatch, {"dtype": asked})
        assert found.compute == wanted, family
        _, computed = of_the_dense_model(checkpoint, monkeypatch, {"dtype": found.storage})
        assert computed == wanted, family


@pytest.fixture(autouse=True)
def unpack_on_the_cpu(monkeypatch):
    """A faked card holds no tensors: it has no room to unpack on."""
    monkeypatch.setattr(loader, "UNPACKING_BYTES", 1 << 62)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("dtype") / "flux.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1", **SIZES["flux"])
    return str(path)


@pytest.mark.parametrize(
    ("name", "widget", "storage", "compute"),
    [
        ("RTX 2080", "auto", FP16, FP16),
        ("RTX 2080", "bf16", FP16, FP16),
        ("RTX 2080", "fp32", FP32, FP32),
        ("GTX 1660", "auto", BF16, FP32),
        ("GTX 1660", "fp16", BF16, FP32),
        ("RTX 3060", "auto", BF16, BF16),
        ("RTX 3060", "fp16", FP16, FP16),
        ("RX 6800", "bf16", FP16, FP16),
    ],
)
def test_a_loaded_model_is_stored_and_computes_so(name, widget, storage, compute, flux, card):
    card(name)
    for disable_dynamic in (False, True):
        config = {"backend": "dequant", "dtype": widget}
        model = load_svdquant(flux, config, disable_dynamic)
        assert model.model.get_dtype_inference() == compute
        weights = [layer.weight for layer in quantised_layers(model.model).values()]
        segments = [segment for weight in weights for segment in unwrap(weight).segments]
        assert {segment.scale.dtype for segment in segments} == {storage}
        assert {weight.dtype for weight in weights} == {storage}


def test_a_file_is_loaded_alike_by_a_worker(flux, card):
    """Sequence parallel's workers repeat the call with these arguments on cards of one kind."""
    card("GTX 1660")
    first = load_svdquant(flux, {"backend": "dequant"})
    function, arguments = first.cached_patcher_init
    again = function(*arguments)
    assert again.model.get_dtype_inference() == first.model.get_dtype_inference() == FP32

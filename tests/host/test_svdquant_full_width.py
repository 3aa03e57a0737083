"""Files of real width, one block: ComfyUI's own detection finds the class, and a layer is right.

Qwen-Image, Z-Image and SDXL have fixed widths in ComfyUI's detection, so no small file goes through
it. SDXL's depths are fixed as well: the file has those of Segmind Vega, the smallest that detection
takes for an SDXL. The packed bytes are random: nothing is quantised here, and no dense copy of the
model is made.
"""

import pytest
import svdquant_files
import svdquant_models
import torch
from safetensors.torch import save_file
from slipstream.backends.svdquant import layouts
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.layout import unwrap
from slipstream.backends.svdquant.weight import effective

pytestmark = pytest.mark.usefixtures("comfy")
RANK = 32


class Random:
    """Tensors of a file: packed layers with random codes, 16-bit tensors of a sensible size."""

    def __init__(self, names=svdquant_files.NEW):
        self.generator = torch.Generator().manual_seed(0)
        self.tensors, self.names = {}, names

    def randn(self, *shape, scale=1.0):
        return (torch.randn(*shape, generator=self.generator) * scale).bfloat16()

    def codes(self, *shape):
        return torch.randint(-128, 128, shape, generator=self.generator, dtype=torch.int8)

    def layer(self, name, rows, columns, bias=True):
        scale = 0.15 / columns**0.5
        parts = {
            "q": self.codes(rows, columns // 2),
            "scale": self.randn(columns // 64, rows, scale=0.1 * scale) + scale,
            "smooth": self.randn(columns, scale=0.1) + 1,
            "orig": self.randn(columns, scale=0.1) + 1,
            "down": self.randn(columns, RANK, scale=0.3 / columns**0.5),
            "up": self.randn(rows, RANK, scale=0.3 / RANK**0.5),
        }
        self.tensors |= {f"{name}.{self.names[part]}": tensor for part, tensor in parts.items()}
        if bias:
            self.tensors[f"{name}.bias"] = self.randn(rows, scale=0.02)

    def modulation(self, name, rows, columns):
        self.tensors |= {
            f"{name}.qweight": self.codes(rows // 4, columns * 2).view(torch.int32),
            f"{name}.wscales": self.randn(columns // 64, rows, scale=0.0002) + 0.002,
            f"{name}.wzeros": self.randn(columns // 64, rows, scale=0.0002) - 0.015,
            f"{name}.bias": self.randn(rows, scale=0.02),
        }

    def linear(self, name, rows, columns, bias=True):
        self.tensors[f"{name}.weight"] = self.randn(rows, columns, scale=0.7 / columns**0.5)
        if bias:
            self.tensors[f"{name}.bias"] = self.randn(rows, scale=0.02)

    def norm(self, name, size):
        self.tensors[f"{name}.weight"] = self.randn(size, scale=0.05) + 1


def qwen_image(width=3072, head=128):
    file, block = Random(), "transformer_blocks.0."
    for name, rows, columns in (
        ("attn.to_qkv", 3 * width, width),
        ("attn.add_qkv_proj", 3 * width, width),
        ("attn.to_out.0", width, width),
        ("attn.to_add_out", width, width),
        ("img_mlp.net.0.proj", 4 * width, width),
        ("img_mlp.net.2", width, 4 * width),
        ("txt_mlp.net.0.proj", 4 * width, width),
        ("txt_mlp.net.2", width, 4 * width),
    ):
        file.layer(block + name, rows, columns)
    for name in ("img_mod.1", "txt_mod.1"):
        file.modulation(block + name, 6 * width, width)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        file.norm(f"{block}attn.{name}", head)
    file.linear("img_in", width, 64)
    file.linear("txt_in", width, 3584)
    file.norm("txt_norm", 3584)
    for n, columns in ((1, 256), (2, width)):
        file.linear(f"time_text_embed.timestep_embedder.linear_{n}", width, columns)
    file.linear("norm_out.linear", 2 * width, width)
    file.linear("proj_out", 64, width)
    return file.tensors


def z_image(width=3840, wide=10240, head=128):
    file = Random()
    for stack, count in (("layers", 1), ("noise_refiner", 2), ("context_refiner", 2)):
        for i in range(count):
            block = f"{stack}.{i}."
            file.layer(f"{block}attention.to_qkv", 3 * width, width, bias=False)
            file.layer(f"{block}attention.to_out.0", width, width, bias=False)
            file.layer(f"{block}feed_forward.net.0.proj", 2 * wide, width, bias=False)
            file.layer(f"{block}feed_forward.net.2", width, wide, bias=False)
            for name in ("norm_q", "norm_k"):
                file.norm(f"{block}attention.{name}", head)
            for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                file.norm(block + name, width)
            if stack != "context_refiner":
                file.linear(f"{block}adaLN_modulation.0", 4 * width, 256)
    file.linear("all_x_embedder.2-1", width, 64)
    file.linear("all_final_layer.2-1.linear", 64, width)
    file.linear("all_final_layer.2-1.adaLN_modulation.1", width, 256)
    file.norm("cap_embedder.0", 2560)
    file.linear("cap_embedder.1", width, 2560)
    file.linear("t_embedder.mlp.0", 1024, 256)
    file.linear("t_embedder.mlp.2", 256, 1024)
    file.tensors["x_pad_token"] = file.randn(1, width, scale=0.02)
    file.tensors["cap_pad_token"] = file.randn(1, width, scale=0.02)
    return file.tensors


class Wide(svdquant_files.Writer):
    """svdquant_models' writer, with random bytes instead of quantised weights."""

    def __post_init__(self):
        super().__post_init__()
        self.file = Random(svdquant_files.OLD)
        self.tensors, self.pattern = self.file.tensors, self.file.randn(1 << 20)

    def weight(self, rows, columns):
        return torch.empty(rows, columns, device="meta")

    def svdquant(self, name, weight, bias, *, unsigned=False, smooth=None):
        self.file.layer(name, *weight.shape, bias=bias is not None)
        return weight, bias

    def plain(self, theirs, ours, *shape, swap=False, ones=False):
        numel = torch.Size(shape).numel()
        value = self.pattern.repeat(numel // len(self.pattern) + 1)[:numel].view(shape)
        fan_in = numel // shape[0]
        self.tensors[theirs] = value * 0.05 + 1 if ones else value * (0.7 / max(fan_in, 900) ** 0.5)


def sdxl():
    file = Wide("nunchaku-1")
    svdquant_models.sdxl(file, widths=(320, 640, 1280), context=2048, pooled=2816)
    return file.tensors


CASES = [
    ("QwenImage", qwen_image, "transformer_blocks.0.attn.to_k", 3584, (1, 16, 1, 4, 4)),
    ("Lumina2", z_image, "layers.0.feed_forward.w1", 2560, (1, 16, 4, 4)),
    ("SDXL", sdxl, "input_blocks.7.1.transformer_blocks.1.attn1.to_v", 2048, (1, 4, 8, 8)),
]
MORE = {
    "QwenImage": {"attention_mask": None},
    "Lumina2": {"num_tokens": 6, "attention_mask": None},
    "SDXL": {"y": torch.ones(1, 2816)},
}


@pytest.mark.parametrize(("base", "make", "layer", "text", "shape"), CASES)
def test_one_block_of_full_width(base, make, layer, text, shape, tmp_path):
    import comfy.model_management

    path = tmp_path / "model.safetensors"
    tensors = make()
    save_file(tensors, path)
    rows = rows_by_hand(tensors, layer)
    del tensors
    model = load_svdquant(str(path), {"backend": "dequant"})
    assert type(model.model).__name__ == base
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    module = quantised_layers(model.model)[f"diffusion_model.{layer}"]
    x = torch.randn(4, module.in_features)
    with torch.no_grad():
        y = module(x) - (0 if module.bias is None else module.bias.float())
        wanted = x.bfloat16().float() @ rows.t()
        assert float((y - wanted).norm() / wanted.norm()) < 8e-3
        assert torch.allclose(effective(unwrap(module.weight)), rows)
        out = model.model.diffusion_model(
            torch.randn(*shape),
            torch.tensor([0.5]),
            context=torch.randn(1, 6, text),
            **MORE[base],
        )
    assert out.shape == shape
    assert torch.isfinite(out).all()
    assert out.std() > 1e-3


def rows_by_hand(tensors, layer):
    """The dense rows of one ComfyUI layer, from the file's fused one."""
    source, index, count = {
        "transformer_blocks.0.attn.to_k": ("transformer_blocks.0.attn.to_qkv", 1, 3),
        "layers.0.feed_forward.w1": ("layers.0.feed_forward.net.0.proj", 1, 2),
        "input_blocks.7.1.transformer_blocks.1.attn1.to_v": (
            "down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_qkv",
            2,
            3,
        ),
    }[layer]
    names = svdquant_files.OLD if f"{source}.lora_up" in tensors else svdquant_files.NEW
    part = {key: tensors[f"{source}.{name}"] for key, name in names.items()}
    codes = layouts.codes_from_plain(layouts.weight_from_file(part["q"]), signed=True)
    scale = layouts.scales_from_file(part["scale"]).t().float().repeat_interleave(64, 1)
    smooth = layouts.vector_from_file(part["smooth"]).float()
    branch = layouts.up_from_file(part["up"]).float() @ (
        layouts.down_from_file(part["down"]).float().t()
    )
    return (codes.float() * scale / smooth + branch).chunk(count)[index]

"""SVDQuant files of real width: random bytes in packed layers, or no bytes at all.

Qwen-Image, Z-Image and SDXL have fixed widths in ComfyUI's detection, so no small file goes through
it. Nothing is quantised here, and no dense copy of a model is made.
"""

import json

import svdquant_files
import svdquant_models
import torch

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


def qwen_image(width=3072, head=128, kind=Random, num_blocks=1):
    file = kind()
    for i in range(num_blocks):
        qwen_image_block(file, f"transformer_blocks.{i}.", width, head)
    file.linear("img_in", width, 64)
    file.linear("txt_in", width, 3584)
    file.norm("txt_norm", 3584)
    for n, columns in ((1, 256), (2, width)):
        file.linear(f"time_text_embed.timestep_embedder.linear_{n}", width, columns)
    file.linear("norm_out.linear", 2 * width, width)
    file.linear("proj_out", 64, width)
    return file.tensors


def qwen_image_block(file, block, width, head):
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


def z_image(width=3840, wide=10240, head=128, kind=Random, num_blocks=1):
    file = kind()
    for stack, count in (("layers", num_blocks), ("noise_refiner", 2), ("context_refiner", 2)):
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


class Shapes(Random):
    """The same without values."""

    def randn(self, *shape, scale=1.0):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    def codes(self, *shape):
        return torch.empty(*shape, dtype=torch.int8, device="meta")


class Wide(svdquant_files.Writer):
    """svdquant_models' writer, with random bytes instead of quantised weights."""

    kind = Random

    def __post_init__(self):
        super().__post_init__()
        self.file = self.kind(svdquant_files.OLD)
        self.tensors, self.pattern = self.file.tensors, self.file.randn(1 << 20)

    def weight(self, rows, columns):
        return torch.empty(rows, columns, device="meta")

    def svdquant(self, name, weight, bias, *, unsigned=False, smooth=None):
        self.file.layer(name, *weight.shape, bias=bias is not None)
        return weight, bias

    def modulation(self, name, weight, bias, chunks):
        self.file.modulation(name, *weight.shape)
        return weight, bias

    def plain(self, theirs, ours, *shape, swap=False, ones=False):
        numel = torch.Size(shape).numel()
        value = self.pattern.repeat(numel // len(self.pattern) + 1)[:numel].view(shape)
        fan_in = numel // shape[0]
        self.tensors[theirs] = value * 0.05 + 1 if ones else value * (0.7 / max(fan_in, 900) ** 0.5)


class WideShapes(Wide):
    kind = Shapes


def flux(writer=Wide):
    file = writer("nunchaku-1")
    svdquant_models.flux(file, hidden=3072, depth=19, single=38, context=4096, vec=768)
    return file.tensors


def sdxl(writer=Wide):
    file = writer("nunchaku-1")
    svdquant_models.sdxl(file, widths=(320, 640, 1280), context=2048, pooled=2816)
    return file.tensors


NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.int32: "I32"}


def save_sparse(path, tensors, dtype=torch.bfloat16):
    """A file of these shapes without blocks on the disk, 16-bit tensors in `dtype`; what is not
    on the meta device keeps its values."""
    header, at, values = {}, 0, []
    for name, tensor in tensors.items():
        kind = dtype if tensor.dtype == torch.bfloat16 else tensor.dtype
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": NAMES[kind], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [at, at + size]}
        if tensor.device.type != "meta":
            values.append((at, tensor.to(kind).view(torch.uint8).numpy().tobytes()))
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        for offset, raw in values:
            file.seek(start + offset)
            file.write(raw)

"""Small SVDQuant files in every dialect, written from the format's rules with hand-made names.

Nothing of the pack's readers is used: layouts come from svdquant_golden, names from the tables of
docs/svdquant.md. Each writer returns the dense model that its file stands for, under ComfyUI's
names: what a reader must find. Random weights; widths of one head.
"""

import json
from dataclasses import dataclass, field

import svdquant_golden as golden
import torch
from slipstream.backends.svdquant.quantize import quantise, round_awq

BF16 = torch.bfloat16
SHIFT = 0.171875
OLD = {
    "q": "qweight",
    "scale": "wscales",
    "smooth": "smooth",
    "orig": "smooth_orig",
    "down": "lora_down",
    "up": "lora_up",
}
NEW = {
    "q": "qweight",
    "scale": "wscales",
    "smooth": "smooth_factor",
    "orig": "smooth_factor_orig",
    "down": "proj_down",
    "up": "proj_up",
}
METADATA = {
    "int4": {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 32},
    "nvfp4": {
        "method": "svdquant",
        "weight": {"dtype": "fp4_e2m1_all", "group_size": 16},
        "rank": 32,
    },
}


def interleave(rows, num_chunks):
    """Row i*D + c -> c*num_chunks + i."""
    size = rows.shape[0] // num_chunks
    order = [i * size + c for c in range(size) for i in range(num_chunks)]
    return rows[order]


@dataclass
class Writer:
    """Collects a file's tensors and the dense model they stand for."""

    dialect: str
    precision: str = "int4"
    rank: int = 32
    seed: int = 0
    fp4_rows: bool = False  # nvfp4's factor as wcscales instead of wtscale
    tensors: dict = field(default_factory=dict)
    dense: dict = field(default_factory=dict)
    num: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def randn(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.generator) * scale

    def weight(self, rows, columns):
        return self.randn(rows, columns, scale=0.7 / columns**0.5)

    def smooth(self, columns):
        return torch.rand(columns, generator=self.generator) + 0.5

    # ---- quantised layers ----
    def svdquant(self, name, weight, bias, *, unsigned=False, smooth=None):
        """Writes file layer `name`; returns the effective weight and bias."""
        smooth = self.smooth(weight.shape[1]) if smooth is None else smooth
        q = quantise(weight, rank=self.rank, precision=self.precision, smooth=smooth)
        unsigned = unsigned and self.precision == "int4"
        effective = q.dense()
        if bias is not None:
            bias = bias.to(BF16).float()
            stored = bias - (effective - branch(q)).sum(1) * SHIFT if unsigned else bias
            stored = stored.to(BF16)
            bias = stored.float()
            if unsigned:  # what the stored bias means after rounding
                bias = bias + (effective - branch(q)).sum(1) * SHIFT
        else:
            stored = None
        if self.dialect == "comfy-kitchen":
            self.put_kitchen(name, q, stored, unsigned)
        else:
            self.put_nunchaku(name, q, stored)
        return effective, bias

    def put_nunchaku(self, name, q, bias):
        names = OLD if self.dialect == "nunchaku-1" else NEW
        codes = q.codes
        packed = {
            names["q"]: golden.pack_qweight(codes.codes),
            names["smooth"]: golden.pack_vector(q.smooth),
            names["down"]: golden.pack_down(q.down),
            names["up"]: golden.pack_up(q.up),
        }
        if self.dialect != "nunchaku-lite":
            packed[names["orig"]] = packed[names["smooth"]].clone()
        if self.precision == "nvfp4":
            plain = codes.scale.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
            packed[names["scale"]] = golden.pack_wscales_fp8(plain)
            if self.fp4_rows:
                rows = torch.full((codes.codes.shape[0],), codes.tensor)
                packed["wcscales"] = golden.pack_vector(rows.to(BF16))
            else:
                packed["wtscale"] = torch.tensor([codes.tensor])
        else:
            packed[names["scale"]] = golden.pack_wscales(codes.scale.t().contiguous())
        if bias is not None:
            packed["bias"] = golden.pack_vector(bias)
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}

    def put_kitchen(self, name, q, bias, unsigned):
        """Every other layer is tile-packed."""
        codes = q.codes.codes.to(torch.int32) & 15
        weight = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8).view(torch.int8)
        scale, up = q.codes.scale.t().contiguous(), q.up
        options = {"format": "svdquant_w4a4"}
        self.num += 1
        if self.num % 2:
            rows, half = weight.shape
            tiles = weight.view(rows // 128, 32, 4, half // 32, 32).permute(0, 3, 1, 2, 4)
            weight = tiles.reshape(rows // 128, half // 32, 32, 128)
            scale = scale.view(-1, rows // 128, 128).permute(1, 0, 2).contiguous()
            up = up.view(rows // 128, 128, -1).permute(0, 2, 1).contiguous()
            options["layout"] = "kitchen_tile_packed_w4a4"
        if unsigned:
            options["act_unsigned"] = True
        text = torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)
        parts = {
            "weight": weight,
            "weight_scale": scale,
            "smooth_factor": q.smooth,
            "proj_down": q.down,
            "proj_up": up,
            "comfy_quant": text,
        }
        if bias is not None:
            parts["bias"] = bias
        self.tensors |= {f"{name}.{k}": v.contiguous() for k, v in parts.items()}

    def modulation(self, name, weight, bias, chunks):
        """An int4 layer with 16-bit inputs; returns the effective weight and bias."""
        own = self.dialect in ("nunchaku-1", "nunchaku-2")
        codes, scale, zeros = round_awq(interleave(weight, chunks) if own else weight)
        wide_s, wide_z = (t.float().t().repeat_interleave(64, 1) for t in (scale, zeros))
        effective = codes.float() * wide_s + wide_z
        plus = torch.zeros(chunks)
        if own:
            plus[[1, chunks - 2]] = 1
        stored = (bias.view(chunks, -1) + plus.unsqueeze(1)).reshape(-1)
        stored = (interleave(stored, chunks) if own else stored).to(BF16)
        if self.dialect == "comfy-kitchen":
            low, high = codes.to(torch.int32)[:, 0::2], codes.to(torch.int32)[:, 1::2]
            text = json.dumps({"format": "awq_w4a16", "group_size": 64}).encode()
            zeros = (zeros.float() + 8 * scale.float()).to(BF16)
            effective = (codes.float() - 8) * wide_s + zeros.float().t().repeat_interleave(64, 1)
            self.tensors |= {
                f"{name}.weight": (low | (high << 4)).to(torch.uint8).view(torch.int8),
                f"{name}.weight_scale": scale,
                f"{name}.weight_zero": zeros,
                f"{name}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
            }
        else:
            self.tensors |= {
                f"{name}.qweight": golden.pack_awq(codes),
                f"{name}.wscales": scale,
                f"{name}.wzeros": zeros,
            }
        self.tensors[f"{name}.bias"] = stored
        bias = stored.float()
        if own:
            size = len(bias) // chunks
            back = torch.empty_like(bias)
            for i in range(chunks):
                for c in range(size):
                    back[i * size + c] = bias[c * chunks + i] - plus[i]
            order = [c * chunks + i for i in range(chunks) for c in range(size)]
            effective, bias = effective[order], back
        return effective, bias

    # ---- plain tensors ----
    def plain(self, theirs, ours, *shape, swap=False, ones=False):
        value = (torch.rand(*shape, generator=self.generator) + 0.5) if ones else self.randn(*shape)
        if not ones:
            value = value * (0.7 / value[0].numel() ** 0.5 if len(shape) > 1 else 0.05)
        value = value.to(BF16)
        self.dense[ours] = value.float()
        stored = torch.cat(value.chunk(2)[::-1]) if swap else value
        self.tensors[ours if self.dialect == "comfy-kitchen" else theirs] = stored.contiguous()

    def linear(self, theirs, ours, rows, columns, *, swap=False, bias=True):
        swap = swap and self.dialect != "comfy-kitchen"
        self.plain(f"{theirs}.weight", f"{ours}.weight", rows, columns, swap=swap)
        if bias:
            self.plain(f"{theirs}.bias", f"{ours}.bias", rows, swap=swap)

    def keep(self, ours, pair):
        weight, bias = pair
        self.dense[f"{ours}.weight"] = weight
        if bias is not None:
            self.dense[f"{ours}.bias"] = bias

    def save(self, path, metadata=True):
        from safetensors.torch import save_file

        texts = {"quantization_config": json.dumps(METADATA[self.precision])} if metadata else None
        if self.dialect == "nunchaku-lite" and metadata:
            texts = {"quantization_config": json.dumps({"quant_method": "nunchaku_lite"})}
        save_file(self.tensors, path, metadata=texts)
        return path


def branch(q):
    return q.up.float() @ q.down.float().t()

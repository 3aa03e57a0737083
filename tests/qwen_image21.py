"""A stand-in for Qwen-Image 2.1, which ComfyUI has from 0.37 on: for tests on older ones.

Attribute names, call signatures and the order of steps are those of the network in core's
comfy/ldm/qwen_image21/model.py (version 0.40); the mathematics is only of the same kind. Text and
references come first and do not see the picture: each text part is causal, each image sees all
before it. Their keys and values are kept from the first call on, unless `qwen_image21_cache` says
off: that call runs every block twice, later ones on the picture alone.
"""

from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_prefetch
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import nn

BASE = comfy.supported_models_base.BASE


def positions(length: int, dim: int, start: int = 0) -> torch.Tensor:
    """Angles of a rotary embedding, [1, length, 1, dim / 2]."""
    rates = 1e4 ** -(torch.arange(0, dim, 2) / dim)
    return torch.outer(torch.arange(start, start + length), rates)[None, :, None]


def rotate(x: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    even, odd = x.chunk(2, -1)
    return torch.cat((even * pe.cos() - odd * pe.sin(), odd * pe.cos() + even * pe.sin()), -1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, **made: Any):
        super().__init__()
        self.heads, linear = heads, made.pop("operations").Linear
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, linear(dim, dim, bias=False, **made))
        self.to_out = nn.ModuleList([linear(dim, dim, bias=False, **made)])

    def forward(
        self, x: Any, pe: Any, attn_fn: Any, prefix_len: int, transformer_options: Any = None
    ) -> torch.Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attn_fn(rotate(q, pe), rotate(k, pe), v, self.heads))


class QwenImage21TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: int, **made: Any):
        super().__init__()
        linear = made["operations"].Linear
        weights = {name: made[name] for name in ("dtype", "device")}
        self.attn = Attention(dim, heads, **made)
        self.gate_up = linear(dim, mlp_ratio * dim, bias=False, **weights)
        self.out = linear(mlp_ratio * dim, dim, bias=False, **weights)

    def forward(
        self, x: Any, mod: Any, pe: Any, attn_fn: Any, prefix_len: int, transformer_options: Any
    ) -> torch.Tensor:
        def scaled(scale: Any) -> torch.Tensor:
            normed = nn.functional.layer_norm(x, x.shape[-1:])
            ours, theirs = normed[:, :prefix_len], normed[:, prefix_len:]
            return torch.cat((ours * (1 + scale[0]), theirs * (1 + scale[1])), 1)

        def add(y: torch.Tensor, gate: Any) -> None:
            x[:, :prefix_len].addcmul_(y[:, :prefix_len], gate[0])
            x[:, prefix_len:].addcmul_(y[:, prefix_len:], gate[1])

        scale1, gate1, scale2, gate2 = mod
        add(self.attn(scaled(scale1), pe, attn_fn, prefix_len, transformer_options), gate1)
        add(self.out(nn.functional.silu(self.gate_up(scaled(scale2)))), gate2)
        return x


class QwenImage21Transformer2DModel(nn.Module):
    """x [B,C,H,W], one token a latent pixel; ref_latents: images of the same kind."""

    def __init__(
        self,
        in_channels: int = 64,
        out_channels: int = 64,
        num_layers: int = 32,
        attention_head_dim: int = 128,
        num_attention_heads: int = 32,
        context_in_dim: int = 4096,
        mlp_ratio: int = 3,
        image_model: str | None = None,
        **made: Any,
    ):
        super().__init__()
        self.dtype, self.out_channels = made["dtype"], out_channels
        self.head_dim, dim = attention_head_dim, num_attention_heads * attention_head_dim
        linear = made["operations"].Linear
        weights = {name: made[name] for name in ("dtype", "device")}
        self.time_text_embed = linear(1, dim, **weights)
        self.txt_in = linear(context_in_dim, dim, bias=False, **weights)
        self.img_in = linear(in_channels, dim, bias=False, **weights)
        self.modulation = linear(dim, 4 * dim, bias=False, **weights)
        self.transformer_blocks = nn.ModuleList(
            QwenImage21TransformerBlock(dim, num_attention_heads, mlp_ratio, **made)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False)
        self.proj_out = linear(dim, out_channels, bias=False, **weights)
        self.prefix_cache_enabled = False
        self.prefix_cache: tuple[torch.Tensor, list[Any]] | None = None

    def forward(
        self,
        x: Any,
        timestep: Any,
        context: Any,
        ref_latents: Any = None,
        image_slots: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        options = transformer_options or {}
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers("diffusion_model", options),
        ).execute(x, timestep, context, ref_latents, image_slots, options, **kwargs)

    def _forward(
        self,
        x: Any,
        timesteps: Any,
        context: Any,
        ref_latents: Any = None,
        image_slots: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        options: dict[str, Any] = transformer_options
        images = [self.img_in(i.flatten(2).transpose(1, 2)) for i in (*(ref_latents or ()), x)]
        parts = [self.txt_in(context), *images]
        segments, end = [], 0
        for part in parts:
            start, end = end, end + part.shape[1]
            # the text is causal, an image sees all before its end
            ones = torch.ones(end - start, end, dtype=torch.bool, device=x.device)
            segments.append((start, end, None if start else ones.tril()))
        h, prefix_len = torch.cat(parts, 1), segments[-1][0]
        pe = positions(end, self.head_dim).to(x)
        temb = self.time_text_embed(torch.cat((timesteps, timesteps.new_zeros(1)))[:, None].to(x))
        rows = self.modulation(nn.functional.silu(temb)).chunk(4, -1)
        mod = [(row[-1:, None], row[:-1, None]) for row in rows]

        is_off = options.get("qwen_image21_cache", {}).get("device") == "off"
        kept = None
        if self.prefix_cache_enabled and not is_off:
            key = torch.cat([part.flatten() for part in parts[:-1]])
            if self.prefix_cache is None or not torch.equal(self.prefix_cache[0], key):
                self.prefix_cache = key, []
            kept = self.prefix_cache[1]
        fills = kept is not None and not kept
        prefix, prefix_pe, width = h[:, :prefix_len].clone(), pe[:, :prefix_len], prefix_len
        if kept is not None:
            h, pe, prefix_len = h[:, prefix_len:], pe[:, prefix_len:], 0

        options["total_blocks"] = len(self.transformer_blocks)
        options["block_type"] = "single"
        blocks = list(self.transformer_blocks)
        queue = comfy.model_prefetch.make_prefetch_queue(blocks, x.device, options)
        for i, block in enumerate(blocks):
            comfy.model_prefetch.prefetch_queue_pop(queue, x.device, block)
            options["block_index"] = i
            if fills:
                assert kept is not None
                attention = by_segments(segments[:-1], options, keep=kept)
                prefix = block(prefix, mod, prefix_pe, attention, width, options)
            attention = by_segments(segments, options)
            if kept is not None:
                attention = behind(*kept[i], options)
            h = block(h, mod, pe, attention, prefix_len, options)
        comfy.model_prefetch.prefetch_queue_pop(queue, x.device, None)
        out = self.proj_out(self.norm_out(h[:, prefix_len:]))
        return out.transpose(1, 2).reshape(x.shape[0], self.out_channels, *x.shape[2:])


QwenImage21Transformer2DModel.__module__ = "comfy.ldm.qwen_image21.model"


def by_segments(segments: Any, options: dict[str, Any], keep: list[Any] | None = None) -> Any:
    """Attention part by part: rows start..end see keys up to end."""

    def attention(q: Any, k: Any, v: Any, heads: int) -> torch.Tensor:
        if keep is not None:
            keep.append((k, v))
        return torch.cat([
            optimized_attention(
                q[:, start:end].flatten(2), k[:, :end].flatten(2), v[:, :end].flatten(2), heads,
                mask=mask, transformer_options=options,
            )
            for start, end, mask in segments
        ], 1)  # fmt: skip

    return attention


def behind(prefix_k: torch.Tensor, prefix_v: torch.Tensor, options: dict[str, Any]) -> Any:
    """Attention of the picture to the kept prefix and itself."""

    def attention(q: Any, k: Any, v: Any, heads: int) -> torch.Tensor:
        k, v = torch.cat((prefix_k, k), 1), torch.cat((prefix_v, v), 1)
        rows = (t.flatten(2) for t in (q, k, v))
        return optimized_attention(*rows, heads, transformer_options=options)

    return attention


class Latent(comfy.latent_formats.LatentFormat):
    latent_channels = 64


class Model(comfy.model_base.BaseModel):
    def __init__(self, config: Any, device: Any = None):
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(config, flow, device=device, unet_model=QwenImage21Transformer2DModel)
        self.diffusion_model.prefix_cache_enabled = True  # core: for the time of a sampling run

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        out["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        if kwargs.get("reference_latents") is not None:
            out["ref_latents"] = comfy.conds.CONDList(kwargs["reference_latents"])
        return out


class QwenImage21(BASE):
    unet_config: ClassVar = {"image_model": "qwen_image21"}
    unet_extra_config: ClassVar = {}
    sampling_settings: ClassVar = {"multiplier": 1.0, "shift": 1.15}
    latent_format = Latent

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Model:
        return Model(self, device=device)

"""Sizes of the tiny models: what ComfyUI's config class gets, latent shape, conditioning.

`unet` makes the unet_config for a number of attention heads. A family `in_file` has weights that
ComfyUI's detection accepts; for the others detection hard-codes widths, so that only memory can
hold a small one. Facts: ComfyUI 0.33, comfy/model_detection.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """config: class in comfy.supported_models; latent: shape, or one shape per nested tensor;
    mask: conditioning needs an integer attention_mask; extra: further tensors in the conditioning,
    name -> shape behind the batch; min_heads: the smallest width the network can be built with."""

    config: str
    unet: Callable[[int], dict[str, Any]]
    latent: tuple[Any, ...]
    in_file: bool = True
    prefix: str = ""
    metadata: Callable[[int], dict[str, Any]] | None = None
    text_dim: int = 768
    pooled: int = 768
    mask: bool = False
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    min_heads: int = 1


def _wan(model_type: str, **sizes: Any) -> Callable[[int], dict[str, Any]]:
    def unet(heads: int) -> dict[str, Any]:
        return {
            "image_model": "wan2.1",
            "model_type": model_type,
            "dim": 128 * heads,
            "ffn_dim": 512,
            "num_heads": heads,
            "num_layers": 4,
            "in_dim": 16,
            "out_dim": 16,
            "text_dim": 768,
            **sizes,
        }

    return unet


def _wan_text(heads: int) -> dict[str, Any]:
    return {"text_dim": 768}  # the one Wan width that is not read from the weights


def _flux(heads: int, **sizes: Any) -> dict[str, Any]:
    return {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 768,
        "context_in_dim": 768,
        "hidden_size": 128 * heads,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": 2,
        "depth_single_blocks": 3,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
        **sizes,
    }


def _flux2(heads: int) -> dict[str, Any]:
    return _flux(
        heads,
        image_model="flux2",
        in_channels=128,
        out_channels=128,
        patch_size=1,
        vec_in_dim=None,
        mlp_ratio=3.0,
        axes_dim=[32, 32, 32, 32],
        theta=2000,
        qkv_bias=False,
        txt_ids_dims=[3],
        global_modulation=True,
        mlp_silu_act=True,
        ops_bias=False,
        default_ref_method="index",
        ref_index_scale=10.0,
    )


def _hunyuan_video(heads: int) -> dict[str, Any]:
    return {
        "image_model": "hunyuan_video",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 768,
        "context_in_dim": 768,
        "hidden_size": 128 * heads,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": 2,
        "depth_single_blocks": 3,
        "axes_dim": [16, 56, 56],
        "theta": 256,
        "patch_size": [1, 2, 2],
        "qkv_bias": True,
        "guidance_embed": True,
        "byt5": False,
        "meanflow": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    }


def _ltxv_widths(heads: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "cross_attention_dim": 64 * heads,
        "caption_channels": 768,
    }


def _ltxv(heads: int) -> dict[str, Any]:
    return {"image_model": "ltxv", "in_channels": 128, "num_layers": 3, **_ltxv_widths(heads)}


def _ltxav_widths(heads: int) -> dict[str, Any]:
    return {
        **_ltxv_widths(heads),
        "in_channels": 128,
        "audio_in_channels": 128,
        "audio_attention_head_dim": 32,
        "audio_num_attention_heads": heads,
        "audio_cross_attention_dim": 32 * heads,
        "connector_attention_head_dim": 32,
        "connector_num_attention_heads": heads,
        "connector_num_layers": 1,
    }


def _ltxav(heads: int) -> dict[str, Any]:
    return {"image_model": "ltxav", "num_layers": 3, **_ltxav_widths(heads)}


def _sd3(*, self_attention: list[int]) -> Callable[[int], dict[str, Any]]:
    def unet(heads: int) -> dict[str, Any]:
        width = 64 * heads
        context = {"in_features": 768, "out_features": width}
        return {
            "input_size": None,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "depth": heads,
            "adm_in_channels": 768,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": context},
            "num_patches": 4096,
            "pos_embed_max_size": 64,
            "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [n for n in self_attention if n < heads],
        }

    return unet


def _unet(**sizes: Any) -> Callable[[int], dict[str, Any]]:
    def unet(heads: int) -> dict[str, Any]:
        # 320 channels are what detection knows SD by; two levels of one block are enough
        return {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "num_res_blocks": [1, 1],
            "channel_mult": (1, 1),
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "legacy": False,
            **sizes,
        }

    return unet


def _chroma(image_model: str, **sizes: Any) -> Callable[[int], dict[str, Any]]:
    def unet(heads: int) -> dict[str, Any]:
        return {
            "image_model": image_model,
            "in_channels": 64,
            "out_channels": 64,
            "context_in_dim": 768,
            "hidden_size": 128 * heads,
            "mlp_ratio": 4.0,
            "num_heads": heads,
            "depth": 2,
            "depth_single_blocks": 3,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "in_dim": 64,
            "out_dim": 128 * heads,
            "hidden_dim": 64,
            "n_layers": 2,
            "txt_ids_dims": [],
            "vec_in_dim": None,
            **sizes,
        }

    return unet


def _qwen_image(heads: int) -> dict[str, Any]:
    return {
        "image_model": "qwen_image",
        "num_layers": 3,
        "attention_head_dim": 128,
        "num_attention_heads": heads,
        "joint_attention_dim": 768,
    }


def _lumina(**sizes: Any) -> Callable[[int], dict[str, Any]]:
    def unet(heads: int) -> dict[str, Any]:
        return {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 128 * heads,
            "n_layers": 3,
            "n_refiner_layers": 2,
            "multiple_of": 32,
            "ffn_dim_multiplier": 1.0,
            "qk_norm": True,
            "cap_feat_dim": 768,
            "axes_dims": [32, 48, 48],
            "axes_lens": [64, 64, 64],
            "n_heads": heads,
            "n_kv_heads": sizes.get("n_kv_heads", heads),
            **sizes,
        }

    return unet


def _hidream(heads: int) -> dict[str, Any]:
    return {
        "image_model": "hidream",
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 128,
        "num_attention_heads": heads,
        "caption_channels": [768, 768],
        "text_emb_dim": 768,
        "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128],
        "llama_layers": [0, 1, 2, 3, 4],
    }


def _cosmos_predict2(image_model: str, **sizes: Any) -> Callable[[int], dict[str, Any]]:
    def unet(heads: int) -> dict[str, Any]:
        return {
            "image_model": image_model,
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "concat_padding_mask": True,
            "model_channels": 128 * heads,
            "num_blocks": 3,
            "num_heads": heads,
            "crossattn_emb_channels": 768,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            **sizes,
        }

    return unet


_VIDEO = (1, 16, 2, 16, 16)
_IMAGE = (1, 16, 16, 16)

FAMILIES: dict[str, Family] = {
    "wan": Family(config="WAN21_T2V", unet=_wan("t2v"), latent=_VIDEO, metadata=_wan_text),
    "wan_i2v": Family(
        config="WAN21_I2V", unet=_wan("i2v", in_dim=36), latent=_VIDEO, metadata=_wan_text
    ),
    "wan_vace": Family(
        config="WAN21_Vace",
        unet=_wan("vace", vace_layers=2, vace_in_dim=96),
        latent=_VIDEO,
        metadata=_wan_text,
    ),
    "wan_5b": Family(
        config="WAN22_T2V",
        unet=_wan("t2v", in_dim=48, out_dim=48),
        latent=(1, 48, 2, 8, 8),
        metadata=_wan_text,
    ),
    "wan_camera": Family(
        config="WAN22_Camera",
        unet=_wan("camera_2.2", in_dim=36),
        latent=_VIDEO,
        metadata=_wan_text,
    ),
    "flux": Family(config="Flux", unet=_flux, latent=_IMAGE),
    "flux_schnell": Family(
        config="FluxSchnell", unet=lambda heads: _flux(heads, guidance_embed=False), latent=_IMAGE
    ),
    "flux2": Family(config="Flux2", unet=_flux2, latent=(1, 128, 8, 8)),
    "hunyuan_video": Family(config="HunyuanVideo", unet=_hunyuan_video, latent=_VIDEO),
    "ltxv": Family(
        config="LTXV", unet=_ltxv, latent=(1, 128, 2, 8, 8), metadata=_ltxv_widths, mask=True
    ),
    "ltxav": Family(
        config="LTXAV",
        unet=_ltxav,
        latent=((1, 128, 2, 8, 8), (1, 8, 9, 16)),
        metadata=_ltxav_widths,
        text_dim=2 * 768,  # video and audio text, behind the connectors
        mask=True,
    ),
    "sd3": Family(config="SD3", unet=_sd3(self_attention=[]), latent=_IMAGE),
    "sd35": Family(config="SD3", unet=_sd3(self_attention=[0]), latent=_IMAGE),
    "sd15": Family(
        config="SD15",
        unet=_unet(num_heads=8, num_head_channels=-1),
        latent=(1, 4, 16, 16),
        prefix="model.diffusion_model.",
    ),
    "chroma": Family(config="Chroma", unet=_chroma("chroma"), latent=_IMAGE, in_file=False),
    "qwen_image": Family(
        config="QwenImage", unet=_qwen_image, latent=(1, 16, 1, 16, 16), in_file=False
    ),
    "lumina2": Family(
        config="Lumina2",
        unet=_lumina(n_kv_heads=1),
        latent=_IMAGE,
        in_file=False,
        min_heads=2,
    ),
    "z_image": Family(
        config="ZImage",
        unet=_lumina(
            z_image_modulation=True, pad_tokens_multiple=32, time_scale=1000.0, rope_theta=256.0
        ),
        latent=_IMAGE,
        in_file=False,
        min_heads=2,  # the timestep embedding is 256 wide, and no width goes below that
    ),
    "hidream": Family(
        config="HiDream",
        unet=_hidream,
        latent=_IMAGE,
        in_file=False,
        extra={"conditioning_llama3": (5, 7, 768)},
    ),
    "cosmos_predict2": Family(
        config="CosmosT2IPredict2",
        unet=_cosmos_predict2("cosmos_predict2"),
        latent=_VIDEO,
        in_file=False,
    ),
    "sdxl": Family(
        config="SDXL",
        unet=_unet(
            model_channels=64,
            channel_mult=(1, 2),
            transformer_depth=[0, 2],
            transformer_depth_output=[2, 2, 0, 0],
            transformer_depth_middle=2,
            use_linear_in_transformer=True,
            num_classes="sequential",
            adm_in_channels=2816,
            num_head_channels=64,
            num_heads=-1,
        ),
        latent=(1, 4, 16, 16),
        in_file=False,
        pooled=1280,
    ),
}

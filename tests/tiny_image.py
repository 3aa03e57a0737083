"""Tiny image models. Facts: ComfyUI 0.33, comfy/model_detection.py."""

from typing import Any

from tiny_family import TEXT, Family

LATENT = (1, 16, 16, 16)

FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": TEXT,
    "context_in_dim": TEXT,
    "mlp_ratio": 4.0,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX_WIDTHS = {"hidden_size": 128, "num_heads": 1}
FLUX2 = FLUX | {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
CHROMA = FLUX | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "hidden_dim": 64,
    "n_layers": 2,
    "vec_in_dim": None,
}
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 1,
    "nerf_depth": 1,
    "nerf_max_freqs": 2,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": None,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
for sizes in (CHROMA, RADIANCE):
    del sizes["guidance_embed"]

SD3 = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "adm_in_channels": TEXT,
    "num_patches": 4096,
    "pos_embed_max_size": 64,
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "use_spatial_transformer": True,
    "context_dim": TEXT,
    "legacy": False,
}
LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "qk_norm": True,
    "cap_feat_dim": TEXT,
    "axes_dims": [32, 48, 48],
    "axes_lens": [64, 64, 64],
}
Z_IMAGE = LUMINA | {
    "z_image_modulation": True,
    "pad_tokens_multiple": 32,
    "time_scale": 1000.0,
    "rope_theta": 256.0,
}
FAMILIES = {
    "flux": Family(config="Flux", sizes=FLUX, per_head=FLUX_WIDTHS, latent=LATENT),
    "flux_schnell": Family(
        config="FluxSchnell",
        sizes=FLUX | {"guidance_embed": False},
        per_head=FLUX_WIDTHS,
        latent=LATENT,
    ),
    "flux2": Family(config="Flux2", sizes=FLUX2, per_head=FLUX_WIDTHS, latent=(1, 128, 8, 8)),
    "sd3": Family(config="SD3", sizes=SD3, per_head={"depth": 1}, latent=LATENT),
    "sd35": Family(
        config="SD3",
        sizes=SD3 | {"x_block_self_attn_layers": [0]},
        per_head={"depth": 1},
        latent=LATENT,
    ),
    "sd15": Family(
        config="SD15",
        sizes=UNET
        | {
            "model_channels": 320,  # what detection knows SD by
            "channel_mult": (1, 1),
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "use_linear_in_transformer": False,
            "num_heads": 8,
            "num_head_channels": -1,
        },
        latent=(1, 4, 16, 16),
        prefix="model.diffusion_model.",
    ),
    "sdxl": Family(
        config="SDXL",
        sizes=UNET
        | {
            "model_channels": 64,
            "channel_mult": (1, 2),
            "transformer_depth": [0, 2],
            "transformer_depth_output": [2, 2, 0, 0],
            "transformer_depth_middle": 2,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "num_head_channels": 64,
            "num_heads": -1,
        },
        latent=(1, 4, 16, 16),
        in_file=False,
        pooled=1280,
    ),
    "chroma": Family(
        config="Chroma",
        sizes=CHROMA,
        per_head=FLUX_WIDTHS | {"out_dim": 128},
        latent=LATENT,
        in_file=False,
    ),
    "chroma_radiance": Family(
        config="ChromaRadiance",
        sizes=RADIANCE,
        per_head=FLUX_WIDTHS | {"out_dim": 128},
        latent=(1, 3, 64, 64),
        in_file=False,
    ),
    "qwen_image": Family(
        config="QwenImage",
        sizes={
            "image_model": "qwen_image",
            "num_layers": 3,
            "attention_head_dim": 128,
            "joint_attention_dim": TEXT,
        },
        per_head={"num_attention_heads": 1},
        latent=(1, 16, 1, 16, 16),
        in_file=False,
    ),
    "mage_flow": Family(
        config="MageFlow",
        sizes={"image_model": "mage_flow", "num_layers": 3, "joint_attention_dim": TEXT},
        per_head={"num_attention_heads": 1},
        latent=(1, 128, 8, 8),
        in_file=False,
    ),
    "lumina2": Family(
        config="Lumina2",
        sizes=LUMINA | {"n_kv_heads": 1},
        per_head={"dim": 128, "n_heads": 1},
        latent=LATENT,
        in_file=False,
        min_heads=2,  # the timestep embedding is 256 wide, and no width goes below that
    ),
    "z_image": Family(
        config="ZImage",
        sizes=Z_IMAGE,
        per_head={"dim": 128, "n_heads": 1, "n_kv_heads": 1},
        latent=LATENT,
        in_file=False,
        min_heads=2,
    ),
    "z_image_pixel": Family(
        config="ZImagePixelSpace",
        sizes=Z_IMAGE
        | {
            "image_model": "zimage_pixel",
            "patch_size": 4,
            "in_channels": 3,
            "decoder_hidden_size": 32,
            "decoder_num_res_blocks": 1,
        },
        per_head={"dim": 128, "n_heads": 1, "n_kv_heads": 1},
        latent=(1, 3, 32, 32),
        in_file=False,
        min_heads=2,
    ),
    "hidream": Family(
        config="HiDream",
        sizes={
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 128,
            "caption_channels": [TEXT, TEXT],
            "text_emb_dim": TEXT,
            "axes_dims_rope": [64, 32, 32],
            "max_resolution": [128, 128],
            "llama_layers": [0, 1, 2, 3, 4],
        },
        per_head={"num_attention_heads": 1},
        latent=LATENT,
        in_file=False,
        extra={"conditioning_llama3": (5, 7, TEXT)},
    ),
}

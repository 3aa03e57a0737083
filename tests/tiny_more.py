"""Tiny models of the rarer image families. Facts: ComfyUI 0.33, comfy/model_detection.py."""

from dataclasses import replace

from tiny_family import TEXT, Family

LATENT = (1, 16, 16, 16)

OMNIGEN = {
    "image_model": "omnigen2",
    "in_channels": 16,
    "num_refiner_layers": 1,
    "num_layers": 3,
    "multiple_of": 32,
    "num_kv_heads": 1,
    "axes_dim_rope": (32, 48, 48),
    "timestep_scale": 1000.0,
}

HIDREAM_O1 = Family(
    config="HiDreamO1",
    sizes={
        "image_model": "hidream_o1",
        "vision_config_overrides": {
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "depth": 2,
        },
    },
    latent=(1, 3, 96, 64),
    odd=(1, 3, 7 * 32, 5 * 32),
    in_file=False,
    ids={"text_input_ids": (8, 1000, 151672, 151673)},
)
QWEN_IMAGE21 = Family(  # a stand-in before ComfyUI 0.37: qwen_image21.py
    config="QwenImage21",
    sizes={"image_model": "qwen_image21", "num_layers": 4, "context_in_dim": TEXT},
    per_head={"num_attention_heads": 1},
    latent=(1, 64, 6, 5),
    in_file=False,
)

FAMILIES = {
    "qwen_image21": QWEN_IMAGE21,
    "qwen_image21_edit": replace(QWEN_IMAGE21, lists={"reference_latents": (64, 4, 4)}),
    "aura_flow": Family(
        config="AuraFlow",
        sizes={"n_layers": 5, "n_double_layers": 2, "cond_seq_dim": TEXT, "max_seq": 256},
        per_head={"dim": 128, "n_heads": 1, "global_conddim": 128},
        latent=(1, 4, 16, 16),
        in_file=False,
    ),
    "krea2": Family(
        config="Krea2",
        sizes={
            "image_model": "krea2",
            "txtdim": TEXT // 2,
            "txtlayers": 2,
            "txtheads": 2,
            "txtkvheads": 2,
            "kvheads": 1,
            "multiplier": 2,
            "layers": 3,
        },
        per_head={"features": 128, "heads": 1},
        latent=(1, 16, 1, 16, 16),
        in_file=False,
    ),
    "lens": Family(
        config="Lens",
        sizes={"image_model": "lens", "num_layers": 3, "enc_hidden_dim": TEXT // 4},
        per_head={"num_attention_heads": 1},
        latent=(1, 128, 8, 8),
        in_file=False,
    ),
    "omnigen2": Family(
        config="Omnigen2",
        sizes=OMNIGEN | {"text_feat_dim": TEXT},
        per_head={"hidden_size": 128, "num_attention_heads": 1},
        latent=LATENT,
        in_file=False,
        mask=True,
        lists={"reference_latents": LATENT[1:]},
    ),
    "boogu": Family(
        config="Boogu",
        sizes=OMNIGEN
        | {"image_model": "boogu", "instruction_feat_dim": TEXT, "num_double_stream_layers": 2},
        per_head={"hidden_size": 128, "num_attention_heads": 1},
        latent=LATENT,
        in_file=False,
        mask=True,
        lists={"reference_latents": LATENT[1:]},
    ),
    "ernie": Family(
        config="ErnieImage",
        sizes={
            "image_model": "ernie",
            "num_layers": 3,
            "ffn_hidden_size": 256,
            "text_in_dim": TEXT,
        },
        per_head={"hidden_size": 128, "num_attention_heads": 1},
        latent=(1, 128, 8, 8),
        in_file=False,
    ),
    "ideogram4": Family(
        config="Ideogram4",
        sizes={
            "image_model": "ideogram4",
            "num_layers": 3,
            "attention_head_dim": 128,
            "intermediate_size": 256,
            "adaln_dim": 64,
            "llm_features_dim": TEXT,
            "mrope_section": (24, 20, 20),
        },
        per_head={"num_attention_heads": 1},
        latent=(1, 128, 8, 8),
        in_file=False,
    ),
    "hidream_o1": HIDREAM_O1,
    "hidream_o1_edit": replace(HIDREAM_O1, lists={"reference_latents": (64, 64, 3)}),
    "pixart": Family(
        config="PixArtSigma",
        sizes={
            "image_model": "pixart_sigma",
            "depth": 3,
            "num_heads": 2,
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": TEXT,
            "micro_condition": False,
            "model_max_length": 8,
        },
        per_head={"hidden_size": 144},
        latent=(1, 4, 64, 64),
        in_file=False,
    ),
}

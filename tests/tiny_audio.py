"""Tiny audio models. Facts: ComfyUI 0.33, comfy/model_detection.py."""

from tiny_family import TEXT, Family

FAMILIES = {
    "ace_step": Family(
        config="ACEStep",
        sizes={
            "audio_model": "ace",
            "attention_head_dim": 64,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "mlp_ratio": 2.5,
            "patch_size": [16, 1],
            "max_height": 16,
            "max_position": 1024,
            "text_embedding_dim": TEXT,
            "ssl_latent_dims": [32, 32],
            "lyric_encoder_vocab_size": 32,
            "lyric_hidden_size": 1024,
        },
        per_head={"num_attention_heads": 1},
        latent=(1, 8, 16, 21),
        in_file=False,
        ids={"conditioning_lyrics": (5, 32)},
        shorten={"lyric_encoder.encoders": 1},  # 6 layers of 1,024 whatever the config says
    ),
    "ace_step15": Family(
        config="ACEStep15",
        sizes={
            "audio_model": "ace1.5",
            "text_hidden_dim": TEXT,
            "num_dit_layers": 4,
            "num_lyric_layers": 2,
            "num_timbre_layers": 2,
            "num_tokenizer_layers": 2,
            "num_kv_heads": 1,
            "head_dim": 64,
            "intermediate_size": 128,
            "sliding_window": 3,
            "fsq_dim": 64,
            "encoder_hidden_size": 64,
            "encoder_intermediate_size": 128,
            "encoder_num_heads": 1,
        },
        per_head={"hidden_size": 64, "num_heads": 1},
        latent=(1, 64, 21),
        in_file=False,
        extra={"conditioning_lyrics": (5, TEXT)},
    ),
}

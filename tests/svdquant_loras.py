"""LoRA files of every kind for the tiny Flux of svdquant_models, and ComfyUI's loader for them."""

import torch

H = 128
# layers of diffusers' naming: (key, rows, columns)
LAYERS = (
    ("transformer_blocks.0.attn.to_q", H, H),
    ("transformer_blocks.0.attn.to_v", H, H),
    ("transformer_blocks.0.ff.net.2", H, 4 * H),
    ("transformer_blocks.0.attn.to_out.0", H, H),
    ("transformer_blocks.0.norm1.linear", 6 * H, H),
    ("single_transformer_blocks.0.attn.to_k", H, H),
    ("single_transformer_blocks.0.proj_mlp", 4 * H, H),
    ("single_transformer_blocks.0.proj_out", H, 5 * H),
    ("x_embedder", H, 64),
)
WHOLE = tuple(layer for layer in LAYERS if layer[0].split(".")[-1] in ("2", "0", "linear"))


def lora_file(kind, layers=LAYERS, rank=4, scale=0.06, seed=0):
    """A file of one LoRA kind, in the names that ComfyUI's loader knows."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, by=scale):
        return torch.randn(*shape, generator=generator) * by

    tensors = {}
    for key, rows, columns in layers:
        name = f"transformer.{key}" if "lo" not in kind[:2] or kind == "lora" else f"lycoris_{key}"
        name = name.replace(".", "_") if name.startswith("lycoris") else name
        if kind in ("lora", "dora", "dora-columns"):
            tensors[f"{name}.lora_A.weight"] = randn(rank, columns)
            tensors[f"{name}.lora_B.weight"] = randn(rows, rank)
            tensors[f"{name}.alpha"] = torch.tensor(6.0)
            if kind != "lora":
                shape = (rows, 1) if kind == "dora" else (1, columns)
                tensors[f"{name}.dora_scale"] = randn(*shape, by=0.2) + 1.0
        elif kind.startswith("loha"):
            r = 20 if kind == "loha-wide" else rank
            for i in (1, 2):
                tensors[f"{name}.hada_w{i}_a"] = randn(rows, r, by=0.3)
                tensors[f"{name}.hada_w{i}_b"] = randn(r, columns, by=0.3)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        elif kind == "lokr":
            tensors[f"{name}.lokr_w1"] = randn(8, 8, by=0.2)
            tensors[f"{name}.lokr_w2_a"] = randn(rows // 8, rank, by=0.2)
            tensors[f"{name}.lokr_w2_b"] = randn(rank, columns // 8, by=0.2)
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
        elif kind == "diff":
            tensors[f"{name}.diff"] = randn(rows, columns, by=0.02)
            tensors[f"{name}.diff_b"] = randn(rows, by=0.05)
        elif kind == "glora":
            tensors[f"{name}.a1.weight"] = randn(rank, columns)
            tensors[f"{name}.a2.weight"] = randn(columns, rank)
            tensors[f"{name}.b1.weight"] = randn(rank, columns)
            tensors[f"{name}.b2.weight"] = randn(rows, rank)
    return tensors


def with_lora(patcher, file, strength=1.0):
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, dict(file), strength, 0)[0]

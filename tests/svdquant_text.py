"""Small 4-bit text encoders: Nunchaku's form of T5 and comfy-kitchen's of Qwen2.5-VL.

Written from the format's rules (docs/svdquant.md) with svdquant_golden's addresses; each writer
returns the dense fp32 model that its file stands for.
"""

import torch
from safetensors.torch import save_file
from svdquant_files import Writer
from svdquant_golden import pack_awq

GROUP = 128
T5 = {"d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2, "num_layers": 3}
CLIP_L = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 64,
}
QWEN = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # 512 rows of k: how ComfyUI knows the 7B
    "vocab_size": 152064,
}
GATED = {"is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"}


def sizes():
    """ComfyUI's model options that shrink its classes; ComfyUI writes into one of them."""
    return {
        "t5xxl_model_config": T5 | GATED,
        "t5base_model_config": T5 | GATED,
        "model_config": dict(CLIP_L),
        "qwen25_7b_model_config": QWEN,
    }


def awq_layer(weight, dtype=torch.float16):
    """(parts of a file layer, the dense weight it stands for): code * scale + scaled_zero."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    zeros = groups.amin(-1).to(dtype)
    scale = ((groups.amax(-1) - zeros.float()) / 15).to(dtype)
    codes = (groups - zeros.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    codes = codes.round().clamp(0, 15)
    dense = codes * scale.float().unsqueeze(-1) + zeros.float().unsqueeze(-1)
    padded = -(-(columns // GROUP) // 8) * 8
    parts = {
        "qweight": pack_awq(codes.view(rows, columns)).view(torch.int16).view(rows // 4, columns),
        "scales": torch.zeros(padded, rows, dtype=dtype),
        "scaled_zeros": torch.zeros(padded, rows, dtype=dtype),
    }
    parts["scales"][: columns // GROUP] = scale.t()
    parts["scaled_zeros"][: columns // GROUP] = zeros.t()
    return parts, dense.view(rows, columns)


def write_t5(path, seed=0, embedding="shared.weight", dtype=torch.float16):
    """The file of Nunchaku; returns the dense model under ComfyUI's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors, dense = {}, {}

    def randn(*shape, scale):
        return torch.randn(*shape, generator=generator) * scale

    def plain(name, value, stored=None):
        tensors[stored or name] = value.to(dtype)
        dense[name] = value.to(dtype).float()

    def layer(name, rows, columns):
        parts, weight = awq_layer(randn(rows, columns, scale=columns**-0.5), dtype)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        dense[f"{name}.weight"] = weight

    width, wide, inner = T5["d_model"], T5["d_ff"], T5["d_kv"] * T5["num_heads"]
    for i in range(T5["num_layers"]):
        block = f"encoder.block.{i}."
        for name in ("q", "k", "v"):
            layer(f"{block}layer.0.SelfAttention.{name}", inner, width)
        layer(f"{block}layer.0.SelfAttention.o", width, inner)
        for name, rows, columns in (("wi_0", wide, width), ("wi_1", wide, width)):
            layer(f"{block}layer.1.DenseReluDense.{name}", rows, columns)
        layer(f"{block}layer.1.DenseReluDense.wo", width, wide)
        for j in (0, 1):
            plain(f"{block}layer.{j}.layer_norm.weight", randn(width, scale=0.1) + 1)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    plain(bias, randn(32, T5["num_heads"], scale=1))
    plain("encoder.final_layer_norm.weight", randn(width, scale=0.1) + 1)
    plain("shared.weight", randn(32128, width, scale=1), embedding)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    return dense


def write_t5_base(path):
    """T5 base at full size with random codes, in Nunchaku's form; returns its 4-bit layers."""
    generator = torch.Generator().manual_seed(0)
    width, wide, layers = 768, 3072, []
    for i in range(12):
        block = f"encoder.block.{i}.layer."
        layers += [(f"{block}0.SelfAttention.{n}", width, width) for n in ("q", "k", "v", "o")]
        layers.append((f"{block}1.DenseReluDense.wi", wide, width))
        layers.append((f"{block}1.DenseReluDense.wo", width, wide))
    norms = [f"encoder.block.{i}.layer.{j}.layer_norm" for i in range(12) for j in (0, 1)]
    tensors = {
        f"{n}.weight": torch.ones(width).half() for n in (*norms, "encoder.final_layer_norm")
    }
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tensors[bias] = torch.randn(32, 12, generator=generator).half()
    tensors["shared.weight"] = torch.randn(32128, width, generator=generator).half()
    for name, rows, columns in layers:
        words = torch.randint(-(2**15), 2**15, (rows // 4, columns), generator=generator)
        groups, step = -(-(columns // GROUP) // 8) * 8, columns**-0.5 / 4
        tensors[f"{name}.qweight"] = words.to(torch.int16)
        tensors[f"{name}.scales"] = torch.full((groups, rows), step).half()
        tensors[f"{name}.scaled_zeros"] = torch.full((groups, rows), -7.5 * step).half()
    save_file(tensors, path)
    return len(layers)


def write_clip_l(path, seed=0):
    """An ordinary 16-bit CLIP-L; returns its tensors as fp32."""
    generator = torch.Generator().manual_seed(seed)
    width, wide = CLIP_L["hidden_size"], CLIP_L["intermediate_size"]
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
    }
    for i in range(CLIP_L["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", wide, width) | _linear(f"{layer}mlp.fc2", width, wide)
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
    tensors = {
        name: (torch.randn(*shape, generator=generator) * 0.2).half()
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def write_qwen(path, seed=0):
    """Qwen2.5-VL's language model: attention in svdquant_w4a4, feed-forward in awq_w4a16."""
    w = Writer("comfy-kitchen", "int4", 16, seed)
    width, wide, rows = QWEN["hidden_size"], QWEN["intermediate_size"], 512

    def bias(count):
        return w.randn(count, scale=0.05)

    for i in range(QWEN["num_hidden_layers"]):
        block = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = f"{block}self_attn.{name}"
            w.keep(layer, w.svdquant(layer, w.weight(rows, width), bias(rows)))
        layer = f"{block}self_attn.o_proj"
        w.keep(layer, w.svdquant(layer, w.weight(width, rows), None))
        for name, n, k in (
            ("gate_proj", wide, width),
            ("up_proj", wide, width),
            ("down_proj", width, wide),
        ):
            layer = f"{block}mlp.{name}"
            weight, _ = w.modulation(layer, w.weight(n, k), torch.zeros(n), 1)
            w.dense[f"{layer}.weight"] = weight
            del w.tensors[f"{layer}.bias"]
        for name in ("input_layernorm", "post_attention_layernorm"):
            w.plain(f"{block}{name}.weight", f"{block}{name}.weight", width, ones=True)
    w.plain("model.norm.weight", "model.norm.weight", width, ones=True)
    name = "model.embed_tokens.weight"
    w.plain(name, name, QWEN["vocab_size"], width)
    save_file(w.tensors, path)
    return w.dense

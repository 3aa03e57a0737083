"""Every family at one head (SDXL: two) in every SVDQuant dialect; see svdquant_files."""

import torch
from svdquant_files import Writer

HIDDEN = 128
OWN = {  # the dialect that Nunchaku has a family in
    "flux": "nunchaku-1",
    "qwen-image": "nunchaku-2",
    "z-image": "nunchaku-2",
    "sdxl": "nunchaku-1",
}


def write(path, family, dialect, *, precision="int4", rank=32, seed=0, hidden=None, **sizes):
    """Writes the file; returns the dense fp32 model it stands for, under ComfyUI's names."""
    writer = Writer(dialect, precision, rank, seed)
    writer.fp4_rows = family == "sdxl"
    build = {"flux": flux, "qwen-image": qwen_image, "z-image": z_image, "sdxl": sdxl}[family]
    build(writer, **({"hidden": hidden} if hidden else {}), **sizes)
    writer.save(path)
    return writer.dense


def write_tiny(folder):
    """<folder>/tiny_flux_svdquant.safetensors, of the widths of tests/tiny.py's Flux."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_flux_svdquant.safetensors"
    write(path, "flux", "nunchaku-1", depth=2, single=3, context=768, vec=768)
    return path


# ---- FLUX.1 ----
STREAMS = (
    # ours, N1 suffix, q/k/v in diffusers, out, feed-forward, norm, N1 feed-forward
    ("img", "", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", "mlp"),
    (
        "txt",
        "_context",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "ff_context",
        "norm1_context",
        "mlp_context",
    ),
)


def flux(w, hidden=HIDDEN, depth=1, single=2, context=96, vec=64):
    for i in range(depth):
        flux_double(w, i, hidden)
    for i in range(single):
        flux_single(w, i, hidden)
    w.linear("x_embedder", "img_in", hidden, 64)
    w.linear("context_embedder", "txt_in", hidden, context)
    w.linear("proj_out", "final_layer.linear", 64, hidden)
    w.linear("norm_out.linear", "final_layer.adaLN_modulation.1", 2 * hidden, hidden, swap=True)
    for theirs, ours, width in (
        ("timestep_embedder", "time_in", 256),
        ("text_embedder", "vector_in", vec),
        ("guidance_embedder", "guidance_in", 256),
    ):
        w.linear(f"time_text_embed.{theirs}.linear_1", f"{ours}.in_layer", hidden, width)
        w.linear(f"time_text_embed.{theirs}.linear_2", f"{ours}.out_layer", hidden, hidden)


def bias(w, rows):
    return w.randn(rows, scale=0.05)


def norms(w, theirs, ours, names):
    for short, long in names:
        w.plain(f"{theirs}{short}.weight", f"{ours}{long}.weight", HIDDEN, ones=True)


def flux_double(w, i, hidden):
    ours = f"double_blocks.{i}."
    theirs = ours if w.dialect == "comfy-kitchen" else f"transformer_blocks.{i}."
    for stream, suffix, qkv, out, ff, norm, mlp in STREAMS:
        layers = {
            f"{stream}_attn.proj": (f"out_proj{suffix}", f"attn.{out}", hidden, hidden, False),
            f"{stream}_mlp.0": (f"{mlp}_fc1", f"{ff}.net.0.proj", 4 * hidden, hidden, False),
            f"{stream}_mlp.2": (f"{mlp}_fc2", f"{ff}.net.2", hidden, 4 * hidden, True),
        }
        fused = "to_qkv" if stream == "img" else "add_qkv_proj"
        name = {
            "nunchaku-1": f"qkv_proj{suffix}",
            "nunchaku-2": f"attn.{fused}",
            "comfy-kitchen": f"{stream}_attn.qkv",
        }.get(w.dialect)
        weight, b = w.weight(3 * hidden, hidden), bias(w, 3 * hidden)
        if name is not None:
            w.keep(f"{ours}{stream}_attn.qkv", w.svdquant(theirs + name, weight, b))
        else:
            w.keep(f"{ours}{stream}_attn.qkv", separate(w, f"{theirs}attn.", qkv, weight, b))
        for mine, (old, new, rows, columns, unsigned) in layers.items():
            name = {"nunchaku-1": old, "comfy-kitchen": mine}.get(w.dialect, new)
            unsigned = unsigned and w.dialect != "nunchaku-lite"
            weight, b = w.weight(rows, columns), bias(w, rows)
            w.keep(ours + mine, w.svdquant(theirs + name, weight, b, unsigned=unsigned))
        name = f"{stream}_mod.lin" if w.dialect == "comfy-kitchen" else f"{norm}.linear"
        pair = w.modulation(theirs + name, w.weight(6 * hidden, hidden), bias(w, 6 * hidden), 6)
        w.keep(f"{ours}{stream}_mod.lin", pair)
        short = "norm_added_" if suffix else "norm_"
        prefix = f"{theirs}{short}" if w.dialect == "nunchaku-1" else f"{theirs}attn.{short}"
        norms(w, prefix, f"{ours}{stream}_attn.norm.", (("q", "query_norm"), ("k", "key_norm")))


def separate(w, prefix, names, weight, b):
    """Layers of one input written apart, with one smoothing: (weight, bias) of the fused layer."""
    return separate_with(w, prefix, names, weight, b, w.smooth(weight.shape[1]))


def flux_single(w, i, hidden):
    ours = f"single_blocks.{i}."
    theirs = ours if w.dialect == "comfy-kitchen" else f"single_transformer_blocks.{i}."
    qkv, mlp = w.weight(3 * hidden, hidden), w.weight(4 * hidden, hidden)
    bq, bm = bias(w, 3 * hidden), bias(w, 4 * hidden)
    out, down = w.weight(hidden, hidden), w.weight(hidden, 4 * hidden)
    bo, bd = bias(w, hidden), bias(w, hidden)
    smooth = w.smooth(hidden)
    if w.dialect == "comfy-kitchen":
        pair = w.svdquant(f"{ours}linear1", torch.cat([qkv, mlp]), torch.cat([bq, bm]))
        w.keep(f"{ours}linear1", pair)
        w.keep(f"{ours}linear2", w.svdquant(f"{ours}linear2", torch.cat([out, down], 1), bo + bd))
    elif w.dialect == "nunchaku-lite":
        first = separate_with(w, f"{theirs}attn.", ("to_q", "to_k", "to_v"), qkv, bq, smooth)
        second = w.svdquant(f"{theirs}proj_mlp", mlp, bm, smooth=smooth)
        w.keep(f"{ours}linear1", tuple(torch.cat(p) for p in zip(first, second, strict=True)))
        pair = w.svdquant(f"{theirs}proj_out", torch.cat([out, down], 1), bo + bd)
        w.keep(f"{ours}linear2", pair)
    else:
        old = w.dialect == "nunchaku-1"
        first = w.svdquant(theirs + ("qkv_proj" if old else "attn.to_qkv"), qkv, bq, smooth=smooth)
        second = w.svdquant(f"{theirs}mlp_fc1", mlp, bm, smooth=smooth)
        w.keep(f"{ours}linear1", tuple(torch.cat(p) for p in zip(first, second, strict=True)))
        one = w.svdquant(theirs + ("out_proj" if old else "attn.to_out"), out, bo)
        two = w.svdquant(f"{theirs}mlp_fc2", down, bd, unsigned=True)
        w.keep(f"{ours}linear2", (torch.cat([one[0], two[0]], 1), one[1] + two[1]))
    name = "modulation.lin" if w.dialect == "comfy-kitchen" else "norm.linear"
    pair = w.modulation(theirs + name, w.weight(3 * hidden, hidden), bias(w, 3 * hidden), 3)
    w.keep(f"{ours}modulation.lin", pair)
    prefix = f"{theirs}norm_" if w.dialect == "nunchaku-1" else f"{theirs}attn.norm_"
    norms(w, prefix, f"{ours}norm.", (("q", "query_norm"), ("k", "key_norm")))


def separate_with(w, prefix, names, weight, b, smooth):
    count = len(names)
    biases = [None] * count if b is None else b.chunk(count)
    parts = [
        w.svdquant(prefix + name, rows, bias_rows, smooth=smooth)
        for name, rows, bias_rows in zip(names, weight.chunk(count), biases, strict=True)
    ]
    whole = torch.cat([p[0] for p in parts])
    return whole, None if b is None else torch.cat([p[1] for p in parts])


# ---- Qwen-Image ----
def qwen_image(w, hidden=HIDDEN, depth=1, context=96):
    fused = w.dialect == "nunchaku-2"
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        for names, one in (
            (("to_q", "to_k", "to_v"), "to_qkv"),
            (("add_q_proj", "add_k_proj", "add_v_proj"), "add_qkv_proj"),
        ):
            weight, b = w.weight(3 * hidden, hidden), bias(w, 3 * hidden)
            if fused:
                pair = w.svdquant(f"{block}attn.{one}", weight, b)
            else:
                pair = separate(w, f"{block}attn.", names, weight, b)
            for j, name in enumerate(names):
                w.keep(f"{block}attn.{name}", [t.chunk(3)[j] for t in pair])
        for name, rows, columns, unsigned in (
            ("attn.to_out.0", hidden, hidden, False),
            ("attn.to_add_out", hidden, hidden, False),
            ("img_mlp.net.0.proj", 4 * hidden, hidden, False),
            ("img_mlp.net.2", hidden, 4 * hidden, True),
            ("txt_mlp.net.0.proj", 4 * hidden, hidden, False),
            ("txt_mlp.net.2", hidden, 4 * hidden, True),
        ):
            unsigned = unsigned and w.dialect != "nunchaku-lite"
            pair = w.svdquant(
                block + name, w.weight(rows, columns), bias(w, rows), unsigned=unsigned
            )
            w.keep(block + name, pair)
        for name in ("img_mod.1", "txt_mod.1"):
            pair = w.modulation(block + name, w.weight(6 * hidden, hidden), bias(w, 6 * hidden), 6)
            w.keep(block + name, pair)
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        norms(w, f"{block}attn.", f"{block}attn.", [(n, n) for n in names])
    w.linear("img_in", "img_in", hidden, 64)
    w.linear("txt_in", "txt_in", hidden, context)
    w.plain("txt_norm.weight", "txt_norm.weight", context, ones=True)
    for n, columns in (("1", 256), ("2", hidden)):
        name = f"time_text_embed.timestep_embedder.linear_{n}"
        w.linear(name, name, hidden, columns)
    w.linear("norm_out.linear", "norm_out.linear", 2 * hidden, hidden)
    w.linear("proj_out", "proj_out", 64, hidden)


# ---- Z-Image ----
def z_image(w, hidden=256, layers=1, refiners=1, context=96, wide=None, dense_refiners=False):
    wide = wide or 256 * ((int(8 / 3 * hidden) + 255) // 256)
    for name, count in (
        ("layers", layers),
        ("noise_refiner", refiners),
        ("context_refiner", refiners),
    ):
        for i in range(count):
            z_block(w, f"{name}.{i}.", hidden, wide, dense_refiners and name != "layers")
            if name != "context_refiner":
                mod = f"{name}.{i}.adaLN_modulation.0"
                w.linear(mod, mod, 4 * hidden, min(hidden, 256))
    w.linear("all_x_embedder.2-1", "x_embedder", hidden, 64)
    w.linear("all_final_layer.2-1.linear", "final_layer.linear", 64, hidden)
    w.linear(
        "all_final_layer.2-1.adaLN_modulation.1",
        "final_layer.adaLN_modulation.1",
        hidden,
        min(hidden, 256),
    )
    w.plain("cap_embedder.0.weight", "cap_embedder.0.weight", context, ones=True)
    w.linear("cap_embedder.1", "cap_embedder.1", hidden, context)
    w.linear("t_embedder.mlp.0", "t_embedder.mlp.0", min(hidden, 1024), 256)
    w.linear("t_embedder.mlp.2", "t_embedder.mlp.2", min(hidden, 256), min(hidden, 1024))
    w.plain("x_pad_token", "x_pad_token", 1, hidden)
    w.plain("cap_pad_token", "cap_pad_token", 1, hidden)


def z_block(w, block, hidden, wide, dense):
    native = w.dialect == "comfy-kitchen"
    fused = w.dialect == "nunchaku-2" and not dense
    put = z_dense if dense else z_quantised
    qkv = w.weight(3 * hidden, hidden)
    if native or fused:
        name = "attention.qkv" if native else "attention.to_qkv"
        w.dense[f"{block}attention.qkv.weight"] = put(w, block + name, qkv)
    else:
        parts = [
            put(w, f"{block}attention.{name}", rows)
            for name, rows in zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True)
        ]
        w.dense[f"{block}attention.qkv.weight"] = torch.cat(parts)
    name = "attention.out" if native else "attention.to_out.0"
    w.dense[f"{block}attention.out.weight"] = put(w, block + name, w.weight(hidden, hidden))
    w1, w3, w2 = w.weight(wide, hidden), w.weight(wide, hidden), w.weight(hidden, wide)
    if w.dialect == "nunchaku-2":  # the first half of net.0.proj is w3, the gate w1 comes second
        both = put(w, f"{block}feed_forward.net.0.proj", torch.cat([w3, w1]))
        w3, w1 = both.chunk(2)
        w2 = put(w, f"{block}feed_forward.net.2", w2)
    else:
        w1 = put(w, f"{block}feed_forward.w1", w1)
        w2 = put(w, f"{block}feed_forward.w2", w2)
        w3 = put(w, f"{block}feed_forward.w3", w3)
    for name, weight in (("w1", w1), ("w2", w2), ("w3", w3)):
        w.dense[f"{block}feed_forward.{name}.weight"] = weight
    for theirs, ours in (("norm_q", "q_norm"), ("norm_k", "k_norm")):
        name = f"{block}attention.{theirs}.weight"
        w.plain(name, f"{block}attention.{ours}.weight", HIDDEN, ones=True)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        w.plain(f"{block}{norm}.weight", f"{block}{norm}.weight", hidden, ones=True)


def z_quantised(w, name, weight):
    return w.svdquant(name, weight, None)[0]


def z_dense(w, name, weight):
    stored = weight.to(torch.bfloat16)
    w.tensors[f"{name}.weight"] = stored
    return stored.float()


# ---- SDXL ----
# diffusers' name, ComfyUI's name, levels whose channels come in (added up), level of the output
SDXL_RESNETS = (
    ("down_blocks.0.resnets.0", "input_blocks.1.0", (0,), 0),
    ("down_blocks.0.resnets.1", "input_blocks.2.0", (0,), 0),
    ("down_blocks.1.resnets.0", "input_blocks.4.0", (0,), 1),
    ("down_blocks.1.resnets.1", "input_blocks.5.0", (1,), 1),
    ("down_blocks.2.resnets.0", "input_blocks.7.0", (1,), 2),
    ("down_blocks.2.resnets.1", "input_blocks.8.0", (2,), 2),
    ("mid_block.resnets.0", "middle_block.0", (2,), 2),
    ("mid_block.resnets.1", "middle_block.2", (2,), 2),
    ("up_blocks.0.resnets.0", "output_blocks.0.0", (2, 2), 2),
    ("up_blocks.0.resnets.1", "output_blocks.1.0", (2, 2), 2),
    ("up_blocks.0.resnets.2", "output_blocks.2.0", (2, 1), 2),
    ("up_blocks.1.resnets.0", "output_blocks.3.0", (2, 1), 1),
    ("up_blocks.1.resnets.1", "output_blocks.4.0", (1, 1), 1),
    ("up_blocks.1.resnets.2", "output_blocks.5.0", (1, 0), 1),
    ("up_blocks.2.resnets.0", "output_blocks.6.0", (1, 0), 0),
    ("up_blocks.2.resnets.1", "output_blocks.7.0", (0, 0), 0),
    ("up_blocks.2.resnets.2", "output_blocks.8.0", (0, 0), 0),
)
# the same names, level, number of transformer blocks here (SDXL: 2 and 10)
SDXL_ATTENTIONS = (
    ("down_blocks.1.attentions.0", "input_blocks.4.1", 1, 1),
    ("down_blocks.1.attentions.1", "input_blocks.5.1", 1, 1),
    ("down_blocks.2.attentions.0", "input_blocks.7.1", 2, 2),
    ("down_blocks.2.attentions.1", "input_blocks.8.1", 2, 2),
    ("mid_block.attentions.0", "middle_block.1", 2, 2),
    ("up_blocks.0.attentions.0", "output_blocks.0.1", 2, 2),
    ("up_blocks.0.attentions.1", "output_blocks.1.1", 2, 2),
    ("up_blocks.0.attentions.2", "output_blocks.2.1", 2, 2),
    ("up_blocks.1.attentions.0", "output_blocks.3.1", 1, 1),
    ("up_blocks.1.attentions.1", "output_blocks.4.1", 1, 1),
    ("up_blocks.1.attentions.2", "output_blocks.5.1", 1, 1),
)
SDXL_RESAMPLERS = (
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op", 0),
    ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op", 1),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", 2),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv", 1),
)


def sdxl(w, widths=(64, 128, 128), context=96, pooled=64):
    channels = widths[0]
    conv(w, "conv_in", "input_blocks.0.0", channels, 4)
    for theirs, ours, rows, columns in (
        ("time_embedding.linear_1", "time_embed.0", 4 * channels, channels),
        ("time_embedding.linear_2", "time_embed.2", 4 * channels, 4 * channels),
        ("add_embedding.linear_1", "label_emb.0.0", 4 * channels, pooled),
        ("add_embedding.linear_2", "label_emb.0.2", 4 * channels, 4 * channels),
    ):
        w.linear(theirs, ours, rows, columns)
    for theirs, ours, levels, level in SDXL_RESNETS:
        inputs = sum(widths[i] for i in levels)
        sdxl_resnet(w, theirs, ours, inputs, widths[level], 4 * channels)
    for theirs, ours, level in SDXL_RESAMPLERS:
        conv(w, theirs, ours, widths[level], widths[level])
    for theirs, ours, level, depth in SDXL_ATTENTIONS:
        width = widths[level]
        norm(w, f"{theirs}.norm", f"{ours}.norm", width)
        w.linear(f"{theirs}.proj_in", f"{ours}.proj_in", width, width)
        w.linear(f"{theirs}.proj_out", f"{ours}.proj_out", width, width)
        for i in range(depth):
            name = f"transformer_blocks.{i}."
            sdxl_block(w, f"{theirs}.{name}", f"{ours}.{name}", width, context)
    norm(w, "conv_norm_out", "out.0", channels)
    conv(w, "conv_out", "out.2", 4, channels)


def conv(w, theirs, ours, rows, columns, size=3):
    w.plain(f"{theirs}.weight", f"{ours}.weight", rows, columns, size, size)
    w.plain(f"{theirs}.bias", f"{ours}.bias", rows)


def norm(w, theirs, ours, width):
    w.plain(f"{theirs}.weight", f"{ours}.weight", width, ones=True)
    w.plain(f"{theirs}.bias", f"{ours}.bias", width)


def sdxl_resnet(w, theirs, ours, inputs, outputs, embedding):
    norm(w, f"{theirs}.norm1", f"{ours}.in_layers.0", inputs)
    conv(w, f"{theirs}.conv1", f"{ours}.in_layers.2", outputs, inputs)
    w.linear(f"{theirs}.time_emb_proj", f"{ours}.emb_layers.1", outputs, embedding)
    norm(w, f"{theirs}.norm2", f"{ours}.out_layers.0", outputs)
    conv(w, f"{theirs}.conv2", f"{ours}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        conv(w, f"{theirs}.conv_shortcut", f"{ours}.skip_connection", outputs, inputs, size=1)


def sdxl_block(w, theirs, ours, width, context):
    native = w.dialect == "comfy-kitchen"
    block = ours if native else theirs
    qkv, names = w.weight(3 * width, width), ("to_q", "to_k", "to_v")
    if native or w.dialect == "nunchaku-lite":
        pair = separate(w, f"{block}attn1.", names, qkv, None)
    else:
        pair = w.svdquant(f"{block}attn1.to_qkv", qkv, None)
    for name, rows in zip(names, pair[0].chunk(3), strict=True):
        w.dense[f"{ours}attn1.{name}.weight"] = rows
    for name, rows, columns in (
        ("attn1.to_out.0", width, width),
        ("attn2.to_out.0", width, width),
        ("ff.net.0.proj", 8 * width, width),
        ("ff.net.2", width, 4 * width),
    ):
        w.keep(ours + name, w.svdquant(block + name, w.weight(rows, columns), bias(w, rows)))
    w.keep(f"{ours}attn2.to_q", w.svdquant(f"{block}attn2.to_q", w.weight(width, width), None))
    for name in ("to_k", "to_v"):
        w.linear(f"{theirs}attn2.{name}", f"{ours}attn2.{name}", width, context, bias=False)
    for i in (1, 2, 3):
        norm(w, f"{theirs}norm{i}", f"{ours}norm{i}", width)

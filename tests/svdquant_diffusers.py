"""Files of FLUX.2, Chroma and MiniMax-H3 in diffusers' and Nunchaku's names, from tiny networks.

The tables are made by hand from the converters of diffusers and the community loaders' sources;
nothing of the pack's tables is used.
"""

import re

import torch
from svdquant_files import Writer
from svdquant_models import separate_with

TILE = 128

# ComfyUI's layer -> its layers in the file, and how they make it up
FLUX2_DOUBLE = r"double_blocks\.(\d+)\."
FLUX2_LITE = {
    FLUX2_DOUBLE + r"img_attn\.qkv": ("rows", "transformer_blocks.{}.attn.to_q", ".to_k", ".to_v"),
    FLUX2_DOUBLE + r"txt_attn\.qkv": (
        "rows",
        "transformer_blocks.{}.attn.add_q_proj",
        ".add_k_proj",
        ".add_v_proj",
    ),
    FLUX2_DOUBLE + r"img_attn\.proj": ("one", "transformer_blocks.{}.attn.to_out.0"),
    FLUX2_DOUBLE + r"txt_attn\.proj": ("one", "transformer_blocks.{}.attn.to_add_out"),
    FLUX2_DOUBLE + r"img_mlp\.0": ("one", "transformer_blocks.{}.ff.linear_in"),
    FLUX2_DOUBLE + r"img_mlp\.2": ("one", "transformer_blocks.{}.ff.linear_out"),
    FLUX2_DOUBLE + r"txt_mlp\.0": ("one", "transformer_blocks.{}.ff_context.linear_in"),
    FLUX2_DOUBLE + r"txt_mlp\.2": ("one", "transformer_blocks.{}.ff_context.linear_out"),
    r"single_blocks\.(\d+)\.linear1": ("one", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
    r"single_blocks\.(\d+)\.linear2": ("one", "single_transformer_blocks.{}.attn.to_out"),
    r"(double_stream_modulation_\w+|single_stream_modulation)\.lin": ("awq", "{}.linear"),
}
_SINGLE = "single_transformer_blocks.{}."
FLUX2_N2 = {
    **{k: v for k, v in FLUX2_LITE.items() if "modulation" not in k},
    FLUX2_DOUBLE + r"img_attn\.qkv": ("one", "transformer_blocks.{}.attn.to_qkv"),
    FLUX2_DOUBLE + r"txt_attn\.qkv": ("one", "transformer_blocks.{}.attn.to_added_qkv"),
    r"single_blocks\.(\d+)\.linear1": ("rows3", f"{_SINGLE}attn.qkv_proj", ".mlp_fc1"),
    r"single_blocks\.(\d+)\.linear2": ("columns1", f"{_SINGLE}attn.out_proj", ".mlp_fc2"),
}
OLD = "transformer_blocks.{}."
FLUX2_N1 = {
    FLUX2_DOUBLE + r"img_attn\.qkv": ("one", f"{OLD}qkv_proj"),
    FLUX2_DOUBLE + r"txt_attn\.qkv": ("one", f"{OLD}qkv_proj_context"),
    FLUX2_DOUBLE + r"img_attn\.proj": ("one", f"{OLD}out_proj"),
    FLUX2_DOUBLE + r"txt_attn\.proj": ("one", f"{OLD}out_proj_context"),
    FLUX2_DOUBLE + r"img_mlp\.0": ("one", f"{OLD}mlp_fc1"),
    FLUX2_DOUBLE + r"img_mlp\.2": ("one", f"{OLD}mlp_fc2"),
    FLUX2_DOUBLE + r"txt_mlp\.0": ("one", f"{OLD}mlp_context_fc1"),
    FLUX2_DOUBLE + r"txt_mlp\.2": ("one", f"{OLD}mlp_context_fc2"),
    r"single_blocks\.(\d+)\.linear1": ("rows3", f"{_SINGLE}qkv_proj", ".mlp_fc1"),
    r"single_blocks\.(\d+)\.linear2": ("columns1", f"{_SINGLE}out_proj", ".mlp_fc2"),
}
_H3 = r"(blocks|token_refiner\.blocks)\.(\d+)\."
H3_BLOCK = "{}.{}."
H3_LITE = {
    _H3 + r"attn\.qkv_proj": ("rows", f"{H3_BLOCK}attn.to_q", ".to_k", ".to_v"),
    _H3 + r"attn\.out_proj": ("one", f"{H3_BLOCK}attn.to_out.0"),
    _H3 + r"mlp\.fc1": ("flipped", f"{H3_BLOCK}ff.net.0.proj"),
    _H3 + r"mlp\.fc2": ("one", f"{H3_BLOCK}ff.net.2"),
}
TABLES = {
    ("flux2", "nunchaku-lite"): FLUX2_LITE,
    ("flux2", "nunchaku-2"): FLUX2_N2,
    ("flux2", "nunchaku-1"): FLUX2_N1,
    ("chroma", "nunchaku-1"): FLUX2_N1,  # FLUX.1's names are the same
    ("minimax_h3", "nunchaku-lite"): H3_LITE,
}
UNSIGNED = {"chroma": ("mlp_fc2", "mlp_context_fc2")}
SWAPPED = "final_layer.adaLN_modulation.1"
DROPPED = ("rope.inv_freq",)
RENAMED = {
    "flux2": (
        (r"^img_in", "x_embedder"),
        (r"^txt_in", "context_embedder"),
        (r"^final_layer\.linear", "proj_out"),
        (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
        (r"^time_in\.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
        (r"^time_in\.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
        (r"^guidance_in\.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
        (r"^guidance_in\.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
        (r"_modulation(_img|_txt)?\.lin\.", r"_modulation\1.linear."),
        (r"^double_blocks\.(\d+)\.img_attn\.norm\.query_norm", r"transformer_blocks.\1.NORM_q"),
        (r"^double_blocks\.(\d+)\.img_attn\.norm\.key_norm", r"transformer_blocks.\1.NORM_k"),
        (
            r"^double_blocks\.(\d+)\.txt_attn\.norm\.query_norm",
            r"transformer_blocks.\1.NORM_added_q",
        ),
        (r"^double_blocks\.(\d+)\.txt_attn\.norm\.key_norm", r"transformer_blocks.\1.NORM_added_k"),
        (r"^single_blocks\.(\d+)\.norm\.query_norm", r"single_transformer_blocks.\1.NORM_q"),
        (r"^single_blocks\.(\d+)\.norm\.key_norm", r"single_transformer_blocks.\1.NORM_k"),
    ),
    "minimax_h3": (
        (r"^video_patch_proj", "proj_in"),
        (r"^audio_patch_proj", "audio_proj_in"),
        (r"^condition_proj", "context_embedder"),
        (r"^time_embedder\.proj_in", "time_embedder.linear_1"),
        (r"^time_embedder\.proj_out", "time_embedder.linear_2"),
        (r"^final_layer\.norm", "norm_out.norm"),
        (r"^final_layer\.adaln_proj\.linear", "norm_out.linear"),
        (r"^final_layer\.video_out", "proj_out"),
        (r"^final_layer\.audio_out", "audio_proj_out"),
        (r"^blocks\.", "transformer_blocks."),
        (r"^token_refiner\.blocks\.", "token_refiner.refiner_blocks."),
        (r"\.attn\.q_norm\.", ".attn.norm_q."),
        (r"\.attn\.k_norm\.", ".attn.norm_k."),
    ),
}
RENAMED["chroma"] = (
    *RENAMED["flux2"],
    (r"(guidance_layer\.layers\.\d+)\.in_layer", r"\1.linear_1"),
    (r"(guidance_layer\.layers\.\d+)\.out_layer", r"\1.linear_2"),
)


def write(path, patcher, family, dialect, *, precision="int4", norm=None):
    """Writes the file; returns the dense state that it stands for, under ComfyUI's names.

    norm: what precedes `q` in the names of norms; None as Nunchaku or diffusers have them.
    """
    writer = Writer(dialect, precision)
    table, state = TABLES[family, dialect], patcher.model.diffusion_model.state_dict()
    norm = norm or ("norm_" if dialect == "nunchaku-1" else "attn.norm_")
    names = {"blocks": "transformer_blocks", "token_refiner.blocks": "token_refiner.refiner_blocks"}
    dense = {}
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        found = next(((m, t) for p, t in table.items() if (m := re.fullmatch(p, owner))), None)
        if found is not None:
            if kind == "weight":
                places = [names.get(g, g) for g in found[0].groups()]
                bias = state.get(f"{owner}.bias")
                bias = None if bias is None else bias.float()
                pair = _layer(writer, family, found[1], places, tensor.float(), bias)
                dense |= {
                    f"{owner}.{k}": v
                    for k, v in zip(("weight", "bias"), pair, strict=True)
                    if v is not None
                }
            continue
        stored = tensor.to(torch.bfloat16)
        dense[name] = tensor if name in DROPPED else stored.float()
        theirs = name
        for ours, new in RENAMED[family]:
            theirs = re.sub(ours, new, theirs)
        if name.startswith(SWAPPED):
            stored = torch.cat(stored.chunk(2)[::-1])
        if name not in DROPPED:
            writer.tensors[theirs.replace("NORM_", norm)] = stored.contiguous()
    writer.save(path)
    return dense


def _layer(w, family, how, places, weight, bias):
    """Writes one layer of ComfyUI's; returns the weight and bias that the file means by it."""
    mode, first, *more = how
    first = first.format(*places)
    stem = first.rpartition(".")[0]
    names = [first, *(stem + suffix for suffix in more)]
    unsigned = [n.rpartition(".")[2] in UNSIGNED.get(family, ()) for n in names]
    if mode == "awq":
        given = torch.zeros(len(weight)) if bias is None else bias
        weight, bias_out = w.modulation(first, weight, given, 1)
        if bias is None:
            del w.tensors[f"{first}.bias"]
        return weight, None if bias is None else bias_out
    if mode == "rows":
        return separate_with(w, f"{stem}.", [n[len(stem) + 1 :] for n in names], weight, bias, None)
    if mode == "flipped":
        low, high = weight.chunk(2)
        flipped, bias = w.svdquant(first, torch.cat([high, low]), bias)
        return torch.cat(flipped.chunk(2)[::-1]), bias
    if mode == "rows3":  # q, k, v are three times as high as the layer is wide
        sizes = [3 * weight.shape[1], len(weight) - 3 * weight.shape[1]]
        biases = [None, None] if bias is None else bias.split(sizes)
        pairs = [
            w.svdquant(n, r, b) for n, r, b in zip(names, weight.split(sizes), biases, strict=True)
        ]
        return (
            torch.cat([p[0] for p in pairs]),
            None if bias is None else torch.cat([p[1] for p in pairs]),
        )
    if mode == "columns1":  # the attention's output is as wide as the layer is high
        sizes = [len(weight), weight.shape[1] - len(weight)]
        zero = None if bias is None else torch.zeros_like(bias)
        pairs = [
            w.svdquant(n, part.contiguous(), b, unsigned=u)
            for n, part, b, u in zip(
                names, weight.split(sizes, 1), (bias, zero), unsigned, strict=True
            )
        ]
        return (
            torch.cat([p[0] for p in pairs], 1),
            None if bias is None else pairs[0][1] + pairs[1][1],
        )
    return w.svdquant(first, weight, bias, unsigned=unsigned[0])

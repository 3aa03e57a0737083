"""What Nunchaku's loaders (1.2, Python) accept: every key, shape and dtype, from a file's metadata.

Written from their sources' facts (models/transformers/transformer_{flux_v2,qwenimage,zimage}.py,
transformers/utils.py, linear.py) and diffusers' three classes. A loader builds diffusers' class
from `config`, replaces layers, renames a FLUX.1 file's keys, fills in missing `wcscales`, takes
`wtscale` out of nvfp4 files, and loads strictly. Needs torch for no tensor: headers are enough.
"""

GROUP = {"int4": 64, "nvfp4": 16}
FUSED = (".to_qkv", ".add_qkv_proj")
# N1 key part -> the newer name, in blocks of two streams and of one
DOUBLE = {
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "qkv_proj_context": "attn.add_qkv_proj",
    "qkv_proj": "attn.to_qkv",
    "out_proj_context": "attn.to_add_out",
    "out_proj": "attn.to_out.0",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
    "norm_added_q": "attn.norm_added_q",
    "norm_added_k": "attn.norm_added_k",
}
SINGLE = {
    "qkv_proj": "attn.to_qkv",
    "out_proj": "attn.to_out",
    "norm_q": "attn.norm_q",
    "norm_k": "attn.norm_k",
}
PARTS = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth_orig": "smooth_factor_orig",
    "smooth": "smooth_factor",
}


def problems(header):
    """Sentences on what a strict load of a file with this header refuses or misunderstands."""
    config, quantization = header.json("config"), header.json("quantization_config")
    stated = quantization["weight"]
    precision = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}[stated["dtype"]]
    found = []
    if stated["group_size"] != GROUP[precision]:
        found.append(f"group_size {stated['group_size']}")
    wanted = expected(config, quantization, precision)
    got = {renamed(config, n): (e.dtype, e.shape) for n, e in header.tensors.items()}
    if len(got) != len(header.tensors):
        found.append("two keys become one")
    factors = {n for n in got if n.endswith(".wtscale")} if precision == "nvfp4" else set()
    for name in factors:
        layer = name.removesuffix(".wtscale")
        if f"{layer}.qweight" not in wanted:
            found.append(f"unexpected {name}")
        elif layer.endswith(FUSED):  # a fused forward passes no factor of its own
            found.append(f"{name} would be ignored")
    missing = {n for n in wanted.keys() - got.keys() if not n.endswith(".wcscales")}
    found += [f"missing {name}" for name in missing]
    found += [f"unexpected {name}" for name in got.keys() - wanted.keys() - factors]
    found += [
        f"{name} is {got[name]}, not {wanted[name]}"
        for name in got.keys() & wanted.keys()
        if got[name] != wanted[name]
    ]
    return sorted(found)


def renamed(config, name):
    """The name that the loader looks a key up under."""
    if config["_class_name"] != "FluxTransformer2DModel" or "transformer_blocks." not in name:
        return name
    block, index, rest = name.split(".", 2)
    table = SINGLE if block.startswith("single") else DOUBLE
    layer, _, part = rest.rpartition(".")
    return f"{block}.{index}.{table.get(layer, layer)}.{PARTS.get(part, part)}"


def expected(config, quantization, precision):
    """Name -> (dtype, shape) of the patched network's state dict."""
    build = {
        "FluxTransformer2DModel": _flux,
        "QwenImageTransformer2DModel": _qwen_image,
        "ZImageTransformer2DModel": _z_image,
    }[config["_class_name"]]
    network = Network(precision, quantization["rank"])
    build(network, config, quantization)
    return network.state


class Network:
    """Collects the state dict of a patched network."""

    def __init__(self, precision, rank):
        self.precision, self.rank, self.state = precision, rank, {}

    def put(self, name, *shape, dtype="BF16"):
        self.state[name] = (dtype, shape)

    def dense(self, name, rows, columns, *, bias=True):
        self.put(f"{name}.weight", rows, columns)
        if bias:
            self.put(f"{name}.bias", rows)

    def four_bit(self, name, rows, columns, *, bias=True):
        groups = columns // GROUP[self.precision]
        self.put(f"{name}.qweight", rows, columns // 2, dtype="I8")
        scale = "BF16" if self.precision == "int4" else "F8_E4M3"
        self.put(f"{name}.wscales", groups, rows, dtype=scale)
        self.put(f"{name}.smooth_factor", columns)
        self.put(f"{name}.smooth_factor_orig", columns)
        self.put(f"{name}.proj_down", columns, self.rank)
        self.put(f"{name}.proj_up", rows, self.rank)
        if self.precision == "nvfp4":
            self.put(f"{name}.wcscales", rows)
        if bias:
            self.put(f"{name}.bias", rows)

    def modulation(self, name, rows, columns):
        self.put(f"{name}.qweight", rows // 4, columns // 2, dtype="I32")
        self.put(f"{name}.wscales", columns // 64, rows)
        self.put(f"{name}.wzeros", columns // 64, rows)
        self.put(f"{name}.bias", rows)


def _embedder(w, name, rows, columns):
    w.dense(f"{name}.linear_1", rows, columns)
    w.dense(f"{name}.linear_2", rows, rows)


def _joint_attention(w, block, dim, head):
    for name in ("to_qkv", "add_qkv_proj"):
        w.four_bit(f"{block}attn.{name}", 3 * dim, dim)
    for name in ("to_out.0", "to_add_out"):
        w.four_bit(f"{block}attn.{name}", dim, dim)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        w.put(f"{block}attn.{name}.weight", head)


def _feed_forward(w, name, dim):
    w.four_bit(f"{name}.net.0.proj", 4 * dim, dim)
    w.four_bit(f"{name}.net.2", dim, 4 * dim)


def _flux(w, config, quantization):
    head = config["attention_head_dim"]
    dim = head * config["num_attention_heads"]
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}."
        _joint_attention(w, block, dim, head)
        for stream in ("", "_context"):
            w.modulation(f"{block}norm1{stream}.linear", 6 * dim, dim)
            _feed_forward(w, f"{block}ff{stream}", dim)
    for i in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{i}."
        w.modulation(f"{block}norm.linear", 3 * dim, dim)
        w.four_bit(f"{block}attn.to_qkv", 3 * dim, dim)
        w.four_bit(f"{block}attn.to_out", dim, dim)
        w.four_bit(f"{block}mlp_fc1", 4 * dim, dim)
        w.four_bit(f"{block}mlp_fc2", dim, 4 * dim)
        for name in ("norm_q", "norm_k"):
            w.put(f"{block}attn.{name}.weight", head)
    w.dense("x_embedder", dim, config["in_channels"])
    w.dense("context_embedder", dim, config["joint_attention_dim"])
    _embedder(w, "time_text_embed.timestep_embedder", dim, 256)
    _embedder(w, "time_text_embed.text_embedder", dim, config["pooled_projection_dim"])
    if config["guidance_embeds"]:
        _embedder(w, "time_text_embed.guidance_embedder", dim, 256)
    w.dense("norm_out.linear", 2 * dim, dim)
    w.dense("proj_out", config["patch_size"] ** 2 * config["out_channels"], dim)


def _qwen_image(w, config, quantization):
    head = config["attention_head_dim"]
    dim = head * config["num_attention_heads"]
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}."
        _joint_attention(w, block, dim, head)
        for stream in ("img", "txt"):
            w.modulation(f"{block}{stream}_mod.1", 6 * dim, dim)
            _feed_forward(w, f"{block}{stream}_mlp", dim)
    w.dense("img_in", dim, config["in_channels"])
    w.dense("txt_in", dim, config["joint_attention_dim"])
    w.put("txt_norm.weight", config["joint_attention_dim"])
    _embedder(w, "time_text_embed.timestep_embedder", dim, 256)
    if config.get("use_additional_t_cond", False):
        w.put("time_text_embed.addition_t_embedding.weight", 2, dim)
    w.dense("norm_out.linear", 2 * dim, dim)
    w.dense("proj_out", config["patch_size"] ** 2 * config["out_channels"], dim)


def _z_image(w, config, quantization):
    dim, context = config["dim"], config["cap_feat_dim"]
    refiners = config["n_refiner_layers"]
    skipped = quantization.get("skip_refiners", False)
    for name, count in (
        ("layers", config["n_layers"]),
        ("noise_refiner", refiners),
        ("context_refiner", refiners),
    ):
        for i in range(count):
            _z_block(w, f"{name}.{i}.", dim, config, skipped and name != "layers")
            if name != "context_refiner":
                w.dense(f"{name}.{i}.adaLN_modulation.0", 4 * dim, min(dim, 256))
    patch = config["all_patch_size"][0] ** 2 * config["all_f_patch_size"][0]
    size = f"{config['all_patch_size'][0]}-{config['all_f_patch_size'][0]}"
    w.dense(f"all_x_embedder.{size}", dim, patch * config["in_channels"])
    w.dense(f"all_final_layer.{size}.linear", patch * config["in_channels"], dim)
    w.dense(f"all_final_layer.{size}.adaLN_modulation.1", dim, min(dim, 256))
    w.put("cap_embedder.0.weight", context)
    w.dense("cap_embedder.1", dim, context)
    w.dense("t_embedder.mlp.0", 1024, 256)
    w.dense("t_embedder.mlp.2", min(dim, 256), 1024)
    w.put("x_pad_token", 1, dim)
    w.put("cap_pad_token", 1, dim)


def _z_block(w, block, dim, config, is_dense):
    wide = int(dim / 3 * 8)
    if is_dense:  # attention as diffusers has it, the feed-forward already renamed
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            w.dense(f"{block}attention.{name}", dim, dim, bias=False)
        w.dense(f"{block}feed_forward.net.0.proj", 2 * wide, dim, bias=False)
        w.dense(f"{block}feed_forward.net.2", dim, wide, bias=False)
    else:
        w.four_bit(f"{block}attention.to_qkv", 3 * dim, dim, bias=False)
        w.four_bit(f"{block}attention.to_out.0", dim, dim, bias=False)
        w.four_bit(f"{block}feed_forward.net.0.proj", 2 * wide, dim, bias=False)
        w.four_bit(f"{block}feed_forward.net.2", dim, wide, bias=False)
    for name in ("norm_q", "norm_k"):
        w.put(f"{block}attention.{name}.weight", dim // config["n_heads"])
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        w.put(f"{block}{name}.weight", dim)

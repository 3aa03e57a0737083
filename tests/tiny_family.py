"""What makes a tiny model of one family: the config ComfyUI gets, latent shape, conditioning."""

from dataclasses import dataclass, field
from typing import Any

TEXT = 768  # width of prompts and pooled prompts, unless a family says otherwise


@dataclass(frozen=True, kw_only=True)
class Family:
    """config: class in comfy.supported_models; sizes: its unet_config; per_head: more of it, each
    number times the attention heads; latent: shape, or one shape per nested tensor.

    in_file: detection takes all widths from the weights (or from the keys named in `metadata`), so
    that a small file can exist; prefix: of the keys in that file. Conditioning: mask: an integer
    attention_mask; extra: tensors by name, the shape behind the batch; lists: the same, each
    wrapped in a list; ids: integers by name, (how many, below what, then these). min_heads: the
    narrowest network that can be built; shorten: lists of modules that no config makes shorter ->
    length; odd: a latent whose tokens nothing divides, where patches are larger than usual.
    """

    config: str
    sizes: dict[str, Any]
    latent: tuple[Any, ...]
    per_head: dict[str, int] = field(default_factory=dict)
    in_file: bool = True
    metadata: tuple[str, ...] = ()
    prefix: str = ""
    text_dim: int = TEXT
    pooled: int = TEXT
    mask: bool = False
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    lists: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    min_heads: int = 1
    shorten: dict[str, int] = field(default_factory=dict)
    odd: tuple[int, ...] = ()

    def unet(self, heads: int) -> dict[str, Any]:
        """The unet_config of a model with this many attention heads."""
        widths = {name: width * heads for name, width in self.per_head.items()}
        config = {**self.sizes, **widths}
        if self.config == "SD3":  # depth = heads = width / 64, as detection has it
            linear = {"in_features": TEXT, "out_features": 64 * heads}
            config["context_embedder_config"] = {"target": "torch.nn.Linear", "params": linear}
        if self.config == "HiDreamO1":
            config["text_config_overrides"] = {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": heads,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "rope_dims": [6, 5, 5],
            }
        return config

"""What the suite puts beside plain ComfyUI: our techniques, and core's own for the same purpose.

A Variant makes a MODEL from the plain one, or says in a sentence why this machine, this ComfyUI or
this model has nothing to measure. Settings are the nodes' defaults unless the name says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..backends.attention.apply import apply_attention
from ..backends.attention.config import AttentionConfig
from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig, from_preset

OURS, CORE = "slipstream", "core"


class NotHereError(Exception):
    """The variant cannot run here; the message is the sentence for the table."""


@dataclass(frozen=True)
class Variant:
    """name is what tables show; owner: slipstream or core."""

    name: str
    owner: str
    technique: str
    make: Callable[[Any], Any]


def variants() -> tuple[Variant, ...]:
    """All of them, by technique."""
    return (*_attention(), *_caches(), *_offload())


def _attention() -> tuple[Variant, ...]:
    def with_policy(policy: str) -> Callable[[Any], Any]:
        return lambda model: apply_attention(model, AttentionConfig(policy=policy))

    return (
        Variant("attention, exact", OURS, "attention", with_policy("exact")),
        Variant("attention, balanced", OURS, "attention", with_policy("balanced")),
        Variant("ModelAttentionBackend, pytorch", CORE, "attention", _core_attention("pytorch")),
        Variant("ModelAttentionBackend, INT8", CORE, "attention", _core_attention("comfy kitchen")),
    )


def _caches() -> tuple[Variant, ...]:
    def cached(config: CacheConfig) -> Callable[[Any], Any]:
        return lambda model: apply_cache(model, config)

    ratios = tuple(
        Variant(f"cache, ratio {ratio}", OURS, "cache", cached(CacheConfig.from_ratio(ratio)))
        for ratio in (0.25, 0.5, 0.75)
    )
    presets = tuple(
        Variant(f"Cache-DiT, {name}", OURS, "cache", cached(from_preset(name)[0]))
        for name in ("quality", "balanced", "fast")
    )
    kinds = ("fbcache", "taylorseer", "scm", "output")
    strategies = tuple(
        Variant(f"cache, {kind}", OURS, "cache", cached(CacheConfig.from_ratio(0.5, strategy=kind)))
        for kind in kinds
    )
    core = tuple(
        Variant(name, CORE, "cache", _core_cache(name)) for name in ("EasyCache", "LazyCache")
    )
    return (*ratios, *presets, *strategies, *core)


def _core_cache(name: str) -> Callable[[Any], Any]:
    """A cache node of ComfyUI's own with the node's defaults."""

    def make(model: Any) -> Any:
        from comfy_extras import nodes_easycache

        node = getattr(nodes_easycache, f"{name}Node")
        defaults = {i.id: i.default for i in node.define_schema().inputs if i.id != "model"}
        return node.execute(model, **defaults).args[0]

    return make


def _core_attention(name: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        from comfy_extras.nodes_model_advanced import ModelAttentionBackend

        option = f"{name} attention"
        offered = ModelAttentionBackend.INPUT_TYPES()["required"]["attention"][0]
        if option not in offered:
            raise NotHereError(f"this ComfyUI offers {', '.join(offered)} here")
        return ModelAttentionBackend().patch(model, option)[0]

    return make


def _offload() -> tuple[Variant, ...]:
    def make(model: Any) -> Any:
        import torch

        if not torch.cuda.is_available():
            raise NotHereError("needs a GPU: without one there is nothing to offload from")
        from ..backends.offload.apply import apply_offload
        from ..backends.offload.config import OffloadConfig

        return apply_offload(model, OffloadConfig())

    return (Variant("layer offload, auto", OURS, "offload", make),)

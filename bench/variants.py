"""What the suite puts beside plain ComfyUI: our techniques, and core's own for the same purpose.

A Variant makes a MODEL of a subject, or says in a sentence why this machine, this ComfyUI or this
model has nothing to measure. Settings are the nodes' defaults unless the name says otherwise.
Other packs' nodes: suite_peers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..backends.attention.apply import apply_attention
from ..backends.attention.config import AttentionConfig
from ..backends.attention.kernels.table import POLICIES
from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig, from_preset
from .subjects import Subject

OURS, CORE = "slipstream", "core"
Make = Callable[[Subject], Any]


class NotHereError(Exception):
    """The variant cannot run here; the message is the sentence for the table."""


@dataclass(frozen=True)
class Variant:
    """name is what tables show; owner: slipstream or core; make: a subject to a MODEL.

    num_processes: the threads are shared among so many; about: what a reader must know.
    """

    name: str
    owner: str
    technique: str
    make: Make
    num_processes: int = 1
    about: str = ""


def variants(*, clock: str = "wall") -> tuple[Variant, ...]:
    """All of them, by technique. clock: a name of CLOCKS."""
    from .variants_svdquant import svdquant

    return (*_attention(), *_caches(), *svdquant(), *_parallel(clock), *_offload())


def _attention() -> tuple[Variant, ...]:
    def with_policy(policy: str) -> Make:
        return lambda subject: apply_attention(subject.model, AttentionConfig(policy=policy))

    return (
        *(
            Variant(f"attention, {policy}", OURS, "attention", with_policy(policy))
            for policy in POLICIES
        ),
        Variant("ModelAttentionBackend, pytorch", CORE, "attention", _core_attention("pytorch")),
        Variant("ModelAttentionBackend, INT8", CORE, "attention", _core_attention("comfy kitchen")),
    )


def _caches() -> tuple[Variant, ...]:
    def cached(config: CacheConfig) -> Make:
        return lambda subject: apply_cache(subject.model, config)

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


def _core_cache(name: str) -> Make:
    """A cache node of ComfyUI's own with the node's defaults."""

    def make(subject: Subject) -> Any:
        from comfy_extras import nodes_easycache

        node = getattr(nodes_easycache, f"{name}Node")
        defaults = {i.id: i.default for i in node.define_schema().inputs if i.id != "model"}
        return node.execute(subject.model, **defaults).args[0]

    return make


def _core_attention(name: str) -> Make:
    def make(subject: Subject) -> Any:
        from comfy_extras.nodes_model_advanced import ModelAttentionBackend

        option = f"{name} attention"
        offered = ModelAttentionBackend.INPUT_TYPES()["required"]["attention"][0]
        if option not in offered:
            raise NotHereError(f"this ComfyUI offers {', '.join(offered)} here")
        return ModelAttentionBackend().patch(subject.model, option)[0]

    return make


def _parallel(clock: str) -> tuple[Variant, ...]:
    def two_ranks(subject: Subject) -> Any:
        if clock == "cpu":
            raise NotHereError(
                "this process's clock leaves out the other one's work: measure with --clock wall, "
                "or with `python bench parallel`"
            )
        from ..parallel.apply import apply_parallel
        from ..parallel.config import SequenceParallelConfig

        devices = "cuda:0,cuda:1" if _num_gpus() > 1 else "cpu,cpu"
        if _num_gpus() == 1:
            raise NotHereError("needs two GPUs, or none: this machine has one")
        return apply_parallel(subject.model, SequenceParallelConfig(devices=devices))

    def cfg_split(subject: Subject) -> Any:
        if _num_gpus() < 2:
            raise NotHereError("needs two GPUs: it puts cond and uncond on one each")
        from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

        return MultiGPUCFGSplitNode.execute(subject.model, 2).args[0]

    about = (
        "two processes that share --threads, at least one thread each; `python bench parallel` "
        "measures it on a larger model"
    )
    return (
        Variant("Sequence Parallel, two ranks", OURS, "parallel", two_ranks, 2, about),
        Variant("MultiGPU CFG Split", CORE, "parallel", cfg_split),
    )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _offload() -> tuple[Variant, ...]:
    def ours(subject: Subject) -> Any:
        if not _num_gpus():
            raise NotHereError("needs a GPU: without one there is nothing to offload from")
        from ..backends.offload.apply import apply_offload
        from ..backends.offload.config import OffloadConfig

        return apply_offload(subject.model, OffloadConfig())

    def core(subject: Subject) -> Any:
        needs = "" if _num_gpus() else "needs a GPU, and "
        raise NotHereError(
            f"{needs}is chosen when ComfyUI starts: `python bench offload` compares both"
        )

    return (
        Variant("layer offload, auto", OURS, "offload", ours),
        Variant("offload by ComfyUI's memory manager", CORE, "offload", core),
    )

"""The budget: how many bytes of one MODEL may be resident, told to ComfyUI's memory managers.

Classic: a mixin on the patcher clamps `partially_load`. Dynamic: an ON_LOAD callback lowers the
VBAR's watermark. Both ask `resident_cap`, so a clone without the technique is ComfyUI's again at
its next load. While ComfyUI makes room, `model_size` answers with the budget, so that no other
model is evicted for weights that will not be loaded.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import host as comfy
from ..architectures import find
from ..memory import host as memory
from ..run import attached, current, disabled_techniques
from . import host
from .blocks import module_sizes, units_of
from .config import OffloadConfig

NAME = "offload"
KEY = "slipstream.offload"


def config_of(patcher: Any) -> OffloadConfig | None:
    """The config in force on a MODEL; None without the technique, when off or disabled."""
    technique = attached(patcher).get(NAME)
    if technique is None or NAME in disabled_techniques():
        return None
    config: OffloadConfig = technique.config  # type: ignore[attr-defined]
    return None if config.mode == "off" else config


def resident_cap(patcher: Any) -> int | None:
    """Bytes of weights that may be resident, None: no cap. A run's plan goes before the widget."""
    config = config_of(patcher)
    if config is None or host.unsupported(patcher) is not None:
        return None
    planned = getattr(patcher, "slipstream_planned_bytes", None)
    if planned is not None:
        return planned
    budget = config.budget_bytes
    with real_size(patcher):
        if budget is None or budget >= memory.placed_bytes(patcher):
            return None
        return max(budget - buffer_bytes(patcher, config), 0)


def buffer_bytes(patcher: Any, config: OffloadConfig) -> int:
    """Device memory that streaming this MODEL takes beside its resident weights.

    With prefetch: depth + 1 blocks (dynamic: one per stream). Else in dynamic mode ComfyUI's cast
    buffers, one per stream: of a module, or of a block where the model stages its own blocks. In
    classic mode ComfyUI subtracts its own from the cap.
    """
    network = comfy.diffusion_model(patcher)
    architecture = find(network)
    units = units_of(network, architecture)
    largest_unit = max((sum(module_sizes(unit.module)) for unit in units), default=0)
    is_dynamic, num_streams = memory.is_dynamic(patcher), host.num_offload_streams()
    if plans_prefetch(patcher, config):
        depth = config.depth(len({unit.block for unit in units}))
        return (num_streams if is_dynamic else depth + 1) * largest_unit
    if not is_dynamic:
        return 0
    largest_module = max(module_sizes(network), default=0)
    if architecture is not None and architecture.notes.prefetches:
        return num_streams * max(largest_module, largest_unit)
    return num_streams * largest_module


def plans_prefetch(patcher: Any, config: OffloadConfig) -> bool:
    """Whether room for staged blocks has to be kept: a run knows, before it mode auto has none."""
    stages: bool | None = getattr(patcher, "slipstream_stages", None)
    if stages is not None:
        return stages
    return config.mode in ("speed", "memory", "manual") and why_no_prefetch(patcher, config) is None


def why_no_prefetch(patcher: Any, config: OffloadConfig) -> str | None:
    """Why blocks of this MODEL are not staged ahead, or None."""
    if config.prefetch < 0:
        return "prefetch is -1: ComfyUI streams per module"
    network = comfy.diffusion_model(patcher)
    name = type(network).__name__
    architecture = find(network)
    if architecture is None or not units_of(network, architecture):
        return f"{name} has no block stack in backends/architectures"
    if architecture.notes.prefetches:
        return f"{name} streams its own blocks"
    features = comfy.features(patcher)
    if "torch_compile" in features:
        return "the model is compiled: ComfyUI streams per module"
    if "multigpu_cfg_split" in features:
        return "the model runs on several devices at once"
    if host.has_weight_hooks(patcher):
        return "hooks change weights while sampling"
    return host.prefetch_unsupported(patcher)


class BudgetMixin:
    """Put in front of a patcher's own class; it has no `__init__`, clones pass through `clone`.

    slipstream_planned_bytes: cap of a run's plan; slipstream_stages: whether the run keeps room for
    staged blocks; slipstream_first: ids of modules to load before all others (classic);
    slipstream_room_bytes: what ComfyUI itself last had room for (classic);
    slipstream_asks_bytes: what `model_size` answers while ComfyUI makes
    room; slipstream_cap_bytes: the cap at the latest load, for the report.
    """

    slipstream_planned_bytes: int | None = None
    slipstream_stages: bool | None = None
    slipstream_first: frozenset[int] = frozenset()
    slipstream_room_bytes: int | None = None
    slipstream_asks_bytes: int | None = None
    slipstream_cap_bytes: int | None = None

    def model_size(self) -> int:
        size = super().model_size()  # type: ignore[misc]
        asked = self.slipstream_asks_bytes
        return size if asked is None else min(size, asked)

    def partially_load(
        self, device_to: Any, extra_memory: float = 0, *args: Any, **kwargs: Any
    ) -> Any:
        # ComfyUI adds what an unpatch frees to extra_memory, so the clamp is relative to now.
        with real_size(self):
            cap = self.slipstream_cap_bytes = resident_cap(self)
            if self.slipstream_planned_bytes is None and not memory.is_dynamic(self):
                room = memory.resident_bytes(self) + extra_memory
                self.slipstream_room_bytes = int(min(room, 2 * memory.weight_bytes(self)))
            if cap is not None and not memory.is_dynamic(self):
                extra_memory = min(extra_memory, cap - memory.resident_bytes(self))
            load = super().partially_load  # type: ignore[misc]
            return load(device_to, extra_memory, *args, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        with real_size(self):
            return install(super().clone(*args, **kwargs))  # type: ignore[misc]

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        entries = super()._load_list(*args, **kwargs)  # type: ignore[misc]
        return FirstLoaded(entries, self.slipstream_first) if self.slipstream_first else entries


class FirstLoaded(list[Any]):
    """ComfyUI's load list whose order puts chosen modules on the side that is loaded first.

    ComfyUI 0.33 sorts the list itself, then loads from the large end and unloads from the small
    one; an entry ends with the module and its parameters, all before them is its sort key.
    """

    def __init__(self, entries: list[Any], first: frozenset[int]):
        super().__init__(entries)
        self._first = first

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        assert key is None
        super().sort(key=lambda entry: (id(entry[-2]) in self._first, entry[:-2]), reverse=reverse)


@contextmanager
def real_size(patcher: Any) -> Iterator[None]:
    """While this lasts, `model_size` is the size of the weights again."""
    asked = getattr(patcher, "slipstream_asks_bytes", None)
    if asked is None:
        yield
        return
    patcher.slipstream_asks_bytes = None
    try:
        yield
    finally:
        patcher.slipstream_asks_bytes = asked


@functools.cache
def _with_budget(patcher_class: type) -> type:
    return type(f"Budgeted{patcher_class.__name__}", (BudgetMixin, patcher_class), {})


def install(patcher: Any) -> Any:
    """`patcher` with the mixin, if its class can take it. Returns the same object."""
    has_names = hasattr(patcher, "partially_load") and hasattr(patcher, "model_size")
    if has_names and not isinstance(patcher, BudgetMixin):
        patcher.__class__ = _with_budget(type(patcher))  # type: ignore[arg-type]
    return patcher


def on_load(patcher: Any, *_: Any) -> None:
    """ON_LOAD callback: in dynamic mode the cap is set after each load, which had reset it."""
    if memory.is_dynamic(patcher):
        cap = patcher.slipstream_cap_bytes = resident_cap(patcher)
        if cap is not None:
            host.cap_watermark(patcher, cap)


def on_clone(_: Any, clone: Any) -> None:
    """ON_CLONE callback: classic clones of a dynamic MODEL are of another class."""
    install(clone)


def prepare_sampling(
    executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any
) -> Any:
    """PREPARE_SAMPLING wrapper: ComfyUI makes room for the budget, not for the whole model."""
    options = kwargs.get("model_options") or (args[0] if args else None) or {}
    run = current(options.get("transformer_options"))
    state = run.states.get(NAME) if run is not None else None
    if state is not None:
        state.prepare(tuple(noise_shape))  # type: ignore[attr-defined]
    cap = resident_cap(model)
    config = config_of(model)
    if cap is None or config is None:
        return executor(model, noise_shape, conds, *args, **kwargs)
    model.slipstream_asks_bytes = cap + buffer_bytes(model, config)
    try:
        return executor(model, noise_shape, conds, *args, **kwargs)
    finally:
        model.slipstream_asks_bytes = None

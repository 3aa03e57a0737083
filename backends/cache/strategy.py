"""From a CacheConfig and a run to what is really done: strategy, engine, schedule, mechanism.

Fixed at run start, when the number of steps is known. `auto` falls back and says so; an explicit
choice that cannot be had raises ValueError with one sentence.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .. import host
from ..architectures import Architecture, find, stack_blocks
from ..run import Run
from . import cachedit
from .blocks import BlockCache
from .broadcast import Broadcast
from .builtin import BuiltinEngine
from .cfg import CfgReuse
from .config import BLOCK_STRATEGIES, CacheConfig
from .decisions import Decider, Decisions
from .engine import Engine
from .interval import IntervalEngine
from .mechanism import Mechanism
from .output import OutputCache, OutputEngine
from .schedule import SCM_SHARES, Schedule, counts_mask, make_mask, named_mask, parse_counts
from .teacache import TeaCacheEngine, coefficients_of, threshold_of
from .unet import DeepCache

FEWEST_STEPS = 6  # below, comparing steps has nothing to go by
AUTO_SCM_BELOW = 8
# What is extrapolated keeps more quality by a shorter streak than by a lower threshold: on the
# trained demo model, twice the threshold of cache_ratio 0.5 reuses 11 of 20 evaluations instead of
# 8 and stays above 40 dB (docs/benchmarks/quality.md, "Threshold against streak").
EXTRAPOLATED_THRESHOLD = 2.0
WHOLE_CALL_STRATEGIES = ("output", "fastercache-cfg")  # they work around the network's forward
_COMPARING = ("cache-dit", "fbcache", "taylorseer", "teacache")


@dataclass(frozen=True)
class Model:
    """What the choice depends on."""

    network: torch.nn.Module
    architecture: Architecture | None
    num_blocks: int
    is_compiled: bool  # as a whole: its forward is one graph
    has_compiled_parts: bool

    @property
    def class_name(self) -> str:
        return type(self.network).__name__

    @property
    def name(self) -> str:
        return self.architecture.name if self.architecture else self.class_name

    @property
    def is_unet(self) -> bool:
        return self.architecture is not None and self.architecture.notes.unet

    @property
    def has_stack(self) -> bool:
        return self.num_blocks > 1 and not self.is_unet


def look_at(run: Run) -> Model:
    """The facts of the MODEL that is sampled."""
    network = host.diffusion_model(run.patcher)
    architecture = find(network)
    stacks = architecture.stacks if architecture else ()
    return Model(
        network=network,
        architecture=architecture,
        num_blocks=sum(len(stack_blocks(network, stack)) for stack in stacks),
        is_compiled=host.is_compiled_whole(run.patcher),
        has_compiled_parts="torch_compile" in host.features(run.patcher),
    )


def choose(config: CacheConfig, model: Model, num_steps: int) -> str:
    """The strategy of this run. Raises ValueError if the one asked for cannot be had."""
    if config.strategy != "auto":
        sentence = refusal(config.strategy, model, num_steps)
        if sentence is not None:
            raise ValueError(sentence)
        return config.strategy
    if model.is_compiled:
        return "output"
    if model.is_unet:
        return "deepcache"
    if not model.has_stack:
        return "output"
    return "scm" if num_steps < AUTO_SCM_BELOW else "cache-dit"


def refusal(strategy: str, model: Model, num_steps: int) -> str | None:
    """Why this strategy cannot be had here, with the fix, or None."""
    if strategy in WHOLE_CALL_STRATEGIES:
        return None
    if model.is_compiled:
        return (
            f"{strategy} works between or inside the blocks, and torch.compile has made the whole "
            "model one graph: compile block by block, or use strategy output."
        )
    if strategy == "deepcache":
        if model.is_unet:
            return None
        return f"deepcache needs a UNet (SD1.5, SDXL); this is {model.name}: use cache-dit."
    if strategy == "pab":
        return _pab_refusal(model)
    if "nunchaku" in type(model.network).__module__.lower():
        return (
            "This is ComfyUI-nunchaku's model: use its loader's cache_threshold, "
            "or strategy output."
        )
    if model.is_unet:
        return f"{strategy} needs a transformer; this is {model.name}: use deepcache."
    if not model.has_stack:
        return (
            f"{model.class_name} has no block stack in backends/architectures: "
            "use strategy output or auto."
        )
    if strategy == "teacache" and coefficients_of(model.network) is None:
        return f"teacache has no coefficients for {model.class_name}: use cache-dit."
    if strategy in _COMPARING and num_steps < FEWEST_STEPS:
        return f"{strategy} needs {FEWEST_STEPS} steps or more, this run has {num_steps}: use scm."
    return None


def _pab_refusal(model: Model) -> str | None:
    if model.has_compiled_parts:
        return "pab decides inside the blocks, which torch.compile has compiled: use cache-dit."
    notes = model.architecture.notes if model.architecture else None
    if notes is not None and not notes.reaches_override:
        return (
            f"pab repeats attention outputs, and the attention of {model.name} does not pass "
            "through ComfyUI's hook: use cache-dit."
        )
    return None


def make_engine(config: CacheConfig, strategy: str, run: Run) -> Engine:
    """The engine of a block strategy. `auto`: cache-dit where it decides best, else built in."""
    wants_dit = config.engine == "cache-dit" or config.calibrator in ("foca", "dmd")
    if not wants_dit and config.engine == "auto" and strategy in ("cache-dit", "taylorseer"):
        reason = cachedit.unavailable(config.calibrator)
        if reason is None:
            return cachedit.CacheDitEngine(config)
        run.note(f"Built-in cache engine used: {reason}")
        return BuiltinEngine(config)
    if not wants_dit:
        return BuiltinEngine(config)
    reason = cachedit.unavailable(config.calibrator)
    if reason is not None:
        raise ValueError(reason)
    return cachedit.CacheDitEngine(config)


def make_schedule(config: CacheConfig, strategy: str, run: Run) -> Schedule:
    """Warmup, cooldown and mask of this run. Raises ValueError if scm counts do not add up."""
    num_steps, warmup = run.num_steps, config.warmup
    if config.cache_ratio is not None and warmup > num_steps // 3:
        warmup = num_steps // 3
        run.note(f"warmup is {warmup} instead of {config.warmup}: the run has {num_steps} steps")
    mask, static = None, config.scm_policy == "static"
    if strategy == "scm" and config.scm == "off":
        mask, static = make_mask(num_steps, config.compute_share, dense=max(warmup, 1)), True
    elif config.scm in SCM_SHARES:
        mask = named_mask(config.scm, num_steps)
    elif config.scm != "off":
        mask = counts_mask(parse_counts(config.scm), num_steps)
    return Schedule(
        num_steps=num_steps,
        warmup=warmup,
        warmup_interval=config.warmup_interval,
        cooldown=config.cooldown,
        mask=mask,
        static=static and mask is not None,
    )


def make_mechanism(
    config: CacheConfig, strategy: str, model: Model, run: Run, decider: Decider | None
) -> Mechanism:
    """The parts of one run, put together. `config` is the one that `settle` returned."""
    schedule = make_schedule(config, strategy, run)

    def decisions(engine: Engine) -> Decisions:
        return Decisions(
            run,
            schedule,
            engine,
            shared=config.cfg_mode == "shared",
            reset_at_step=config.reset_at_step,
            decider=decider,
        )

    if strategy == "output":
        return OutputCache(decisions(OutputEngine(config)))
    if strategy == "fastercache-cfg":
        return CfgReuse(run, decisions(IntervalEngine(config.cfg_interval)))
    if strategy == "pab":
        notes = model.architecture.notes if model.architecture else None
        wraps = notes is None or notes.diffusion_model_wrappers
        hook = "diffusion_model" if wraps else "apply_model"
        return Broadcast(run, config, schedule, hook=hook)
    assert model.architecture is not None
    if strategy == "deepcache":
        fine = config.cache_ratio is not None and config.cache_ratio < 0.5
        engine = IntervalEngine(config.deep_interval)
        return DeepCache(model.architecture, decisions(engine), full_level=fine)
    front, back, probe = config.front_blocks, config.back_blocks, None
    engine_ = make_engine(config, strategy, run) if strategy != "teacache" else None
    if engine_ is None:
        coefficients = coefficients_of(model.network)
        assert coefficients is not None
        engine_, probe = TeaCacheEngine(config, coefficients), coefficients.probe
    return BlockCache(
        run, model.architecture, decisions(engine_), front=front, back=back, probe=probe
    )


def settle(config: CacheConfig, strategy: str, model: Model, run: Run) -> CacheConfig:
    """The config with what the strategy and this run fix. Raises ValueError on bad block counts."""
    changes: dict[str, Any] = {"strategy": strategy}
    if "multigpu_cfg_split" in host.features(run.patcher) and config.cfg_mode == "shared":
        changes["cfg_mode"] = "separate"
        run.note("cfg_mode is separate: MultiGPU CFG split runs the branches side by side")
    if strategy == "fastercache-cfg":
        changes["cfg_mode"] = "separate"
    by_auto = config.strategy == "auto" and strategy == "cache-dit"
    if config.calibrator == "none" and (by_auto or strategy in ("taylorseer", "scm", "output")):
        changes["calibrator"] = "taylorseer"
        if strategy in _COMPARING and config.cache_ratio is not None:
            threshold = EXTRAPOLATED_THRESHOLD * config.residual_diff_threshold
            changes["residual_diff_threshold"] = threshold
    if strategy == "teacache":
        coefficients = coefficients_of(model.network)
        assert coefficients is not None
        changes["residual_diff_threshold"] = threshold_of(coefficients, config.cache_ratio)
    if strategy not in BLOCK_STRATEGIES:
        return config.with_(**changes)
    front, num_blocks = config.front_blocks, model.num_blocks
    if config.cache_ratio is not None:
        front = min(front, max(1, num_blocks // 8))
    if strategy == "fbcache":
        front = 1
    if strategy in ("scm", "teacache") and config.cache_ratio is not None:
        front = 0  # decided before any block
    if front + config.back_blocks >= num_blocks:
        raise ValueError(
            f"front_blocks {front} + back_blocks {config.back_blocks} leave nothing to skip "
            f"in {num_blocks} blocks."
        )
    return config.with_(front_blocks=front, **changes)

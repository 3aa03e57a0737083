"""SlipstreamCache and SlipstreamCacheDiT: widgets to CacheConfig."""

from typing import Any

from comfy_api.latest import io

from ..backends.cache.apply import apply_cache
from ..backends.cache.config import (
    CALIBRATORS,
    CFG_MODES,
    ENGINES,
    PRESET_NAMES,
    SCM_POLICIES,
    STRATEGIES,
    CacheConfig,
    from_preset,
)

_CFG_MODE_TOOLTIP = (
    "shared: the first branch of a step decides, the others follow if they have something to "
    "reuse. separate: cond and uncond decide for themselves, which costs one comparison more."
)
_COOLDOWN_TOOLTIP = "This many steps at the end are always computed: they set fine detail."


class SlipstreamCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamCache",
            display_name="Slipstream Cache",
            category="model/patch/slipstream",
            description=(
                "Approximate. Reuses what earlier steps computed instead of running every block "
                "again. cache-dit decides where it is installed; SlipstreamReport shows what was "
                "reused and why."
            ),
            search_aliases=[
                "cache", "cache-dit", "teacache", "first block cache", "fbcache", "wavespeed",
                "deepcache", "taylorseer", "easycache", "magcache", "pab", "fastercache",
                "skip steps", "speed up sampling",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to speed up. A clone is returned."),
                io.Combo.Input(
                    "strategy",
                    options=list(STRATEGIES),
                    default="auto",
                    tooltip=(
                        "auto: cache-dit on transformers, scm below 8 steps, deepcache on UNets, "
                        "output where the blocks are not known. See the help page for the others."
                    ),
                ),
                io.Float.Input(
                    "cache_ratio", default=0.5, min=0.0, max=1.0, step=0.05,
                    tooltip=(
                        "0: quality first, few steps reused. 1: speed first. At 0.5 about half of "
                        "20 steps are reused and blocks run about 2x less often."
                    ),
                ),
                io.Int.Input(
                    "warmup", default=4, min=0, max=10000,
                    tooltip=(
                        "This many steps at the start are always computed, at most a third of the "
                        "run: they set the picture's layout."
                    ),
                ),
                io.Int.Input(
                    "cooldown", default=1, min=1, max=10000, optional=True, advanced=True,
                    tooltip=_COOLDOWN_TOOLTIP,
                ),
                io.Combo.Input(
                    "cfg_mode", options=list(CFG_MODES), default="shared",
                    optional=True, advanced=True, tooltip=_CFG_MODE_TOOLTIP,
                ),
                io.Combo.Input(
                    "engine", options=list(ENGINES), default="auto", optional=True, advanced=True,
                    tooltip=(
                        "What decides for the block strategies. auto: cache-dit if it is installed "
                        "(its first import takes 4 to 8 s), else the built-in engine with the same "
                        "rules, and the report says so."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched MODEL: wire it to any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        strategy: str,
        cache_ratio: float,
        warmup: int,
        cooldown: int = 1,
        cfg_mode: str = "shared",
        engine: str = "auto",
    ) -> io.NodeOutput:
        config = CacheConfig.from_ratio(
            cache_ratio, strategy=strategy, warmup=warmup, cooldown=cooldown, cfg_mode=cfg_mode,
            engine=engine,
        )  # fmt: skip
        return io.NodeOutput(apply_cache(model, config))


class SlipstreamCacheDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamCacheDiT",
            display_name="Slipstream Cache-DiT",
            category="model/patch/slipstream",
            description=(
                "Approximate. Every setting of cache-dit's DBCache, with presets: the first blocks "
                "of a transformer run, and if they changed little the others are reused."
            ),
            search_aliases=[
                "cache-dit", "dbcache", "dual block cache", "taylorseer", "foca", "scm",
                "steps mask", "residual threshold", "cachedit",
            ],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The transformer MODEL to speed up (no UNet)."),
                io.Combo.Input(
                    "preset", options=list(PRESET_NAMES), default="balanced",
                    tooltip=(
                        "quality: F8 B0, threshold 0.08, 8 warmup steps. balanced: F1 B0, 0.24, at "
                        "most 3 in a row. fast: F1, 0.30 inside a step mask. distilled: for about "
                        "8 steps. custom: the widgets below."
                    ),
                ),
                *_block_inputs(),
                *_limit_inputs(),
                *_prediction_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The patched MODEL: wire it to any sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        front_blocks: int = 8,
        back_blocks: int = 0,
        residual_diff_threshold: float = 0.08,
        max_warmup_steps: int = 8,
        warmup_interval: int = 1,
        cooldown: int = 1,
        max_cached_steps: int = -1,
        max_continuous_cached_steps: int = -1,
        max_accumulated_residual_diff: float = 0.0,
        cfg_mode: str = "shared",
        calibrator: str = "none",
        calibrator_order: int = 1,
        scm: str = "off",
        scm_policy: str = "dynamic",
        reset_at_step: int = -1,
    ) -> io.NodeOutput:
        config, note = from_preset(
            preset, front_blocks=front_blocks, back_blocks=back_blocks,
            residual_diff_threshold=residual_diff_threshold, warmup=max_warmup_steps,
            warmup_interval=warmup_interval, cooldown=cooldown, max_cached_steps=max_cached_steps,
            max_continuous_cached_steps=max_continuous_cached_steps,
            max_accumulated_residual_diff=max_accumulated_residual_diff, cfg_mode=cfg_mode,
            calibrator=calibrator, calibrator_order=calibrator_order, scm=scm.strip() or "off",
            scm_policy=scm_policy, reset_at_step=reset_at_step,
        )  # fmt: skip
        return io.NodeOutput(apply_cache(model, config, notes=(note,) if note else ()))


def _int(name: str, default: int, low: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(
        name, default=default, min=low, max=10000, optional=True, advanced=True, tooltip=tooltip
    )


def _block_inputs() -> list:
    return [
        _int("front_blocks", 8, 1, "Fn: blocks that always run and whose change is compared. More "
             "are safer; each costs its share of every step."),
        _int("back_blocks", 0, 0, "Bn: blocks at the end that always run, to smooth over what was "
             "reused. 0 for most models."),
        io.Float.Input(
            "residual_diff_threshold", default=0.08, min=0.0, max=0.99, step=0.01,
            optional=True, advanced=True,
            tooltip=(
                "Reuse while the front blocks' result changed by less than this fraction. 0.08 is "
                "careful, 0.24 fast; the report shows the values of your run."
            ),
        ),
    ]  # fmt: skip


def _limit_inputs() -> list:
    return [
        _int("max_warmup_steps", 8, 0, "This many steps at the start are always computed."),
        _int("warmup_interval", 1, 1, "Within the warmup only every n-th step must be computed."),
        _int("cooldown", 1, 1, _COOLDOWN_TOOLTIP),
        _int("max_cached_steps", -1, -1, "At most this many reused steps in a run; -1: no limit."),
        _int("max_continuous_cached_steps", -1, -1, "At most this many reused steps in a row; -1: "
             "no limit. 3 is a good start."),
        io.Float.Input(
            "max_accumulated_residual_diff", default=0.0, min=0.0, max=10000.0, step=0.1,
            optional=True, advanced=True,
            tooltip="Stop reusing once all compared changes add up to this; 0: off.",
        ),
        io.Combo.Input("cfg_mode", options=list(CFG_MODES), default="shared", optional=True,
                       advanced=True, tooltip=_CFG_MODE_TOOLTIP),
    ]  # fmt: skip


def _prediction_inputs() -> list:
    return [
        io.Combo.Input(
            "calibrator", options=list(CALIBRATORS), default="none", optional=True, advanced=True,
            tooltip=(
                "Extrapolate what is reused instead of repeating it. taylorseer holds one more "
                "state per order; foca and dmd need cache-dit (dmd 1.5 or newer)."
            ),
        ),
        _int_small("calibrator_order", 1, "Order of taylorseer; above 2 rarely helps."),
        io.String.Input(
            "scm", default="off", optional=True, advanced=True,
            tooltip=(
                "Step mask: off, slow, medium, fast, ultra, or counts of computed and reused steps "
                "in turn that add up to the run, such as 6,1,3,2,1."
            ),
        ),
        io.Combo.Input(
            "scm_policy", options=list(SCM_POLICIES), default="dynamic", optional=True,
            advanced=True,
            tooltip=(
                "dynamic: the mask's reused steps still need a change below the threshold. static: "
                "they are always reused, without comparing."
            ),
        ),
        _int("reset_at_step", -1, -1, "Forget everything at this step, for example where a second "
             "stage begins; -1: never."),
    ]  # fmt: skip


def _int_small(name: str, default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(
        name, default=default, min=1, max=4, optional=True, advanced=True, tooltip=tooltip
    )

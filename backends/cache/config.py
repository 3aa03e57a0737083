"""CacheConfig: one parameter set for every caching strategy, checked once, with a JSON round trip.

`from_ratio` makes one from a single speed-against-fidelity number (the SlipstreamCache node),
`from_preset` from a name (SlipstreamCacheDiT). The numbers behind the ratio were looked at on the
trained demo model only, never on large models. Field names follow cache-dit's DBCache.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .schedule import SCM_SHARES, parse_counts

STRATEGIES = (
    "auto",
    "cache-dit",
    "fbcache",
    "taylorseer",
    "scm",
    "teacache",
    "deepcache",
    "pab",
    "fastercache-cfg",
    "output",
)
BLOCK_STRATEGIES = ("cache-dit", "fbcache", "taylorseer", "scm", "teacache")
ENGINES = ("auto", "cache-dit", "builtin")
CFG_MODES = ("shared", "separate")
CALIBRATORS = ("none", "taylorseer", "foca", "dmd")
SCM_NAMES = ("off", *SCM_SHARES)
SCM_POLICIES = ("dynamic", "static")
MAX_THRESHOLD = 0.99  # cache-dit reads 1.0 as "always reuse, do not compare"

_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The middle is SGLang's default (F1 B0 W4 R.24 MC3). Large models: unverified.
_THRESHOLD = (0.06, 0.12, 0.24, 0.35, 0.50)
_MAX_CONTINUOUS = (1, 2, 3, 4, 6)
_FRONT_BLOCKS = (8, 4, 2, 1, 1)
_COMPUTE_SHARE = (0.75, 0.6325, 0.515, 0.3975, 0.28)
_DEEP_INTERVAL = (2, 3, 3, 4, 5)
_CROSS_RANGE = (2, 3, 4, 6, 8)
_SELF_RANGE = (1, 1, 2, 2, 3)
_CFG_INTERVAL = (2, 2, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Everything a caching strategy may read; each reads its part.

    cache_ratio: what the other fields were made from, None if they were set one by one. With a
    ratio, front_blocks and warmup are upper bounds that short stacks and short runs lower.
    max_*: -1 = no limit; max_accumulated_residual_diff: 0 = off; reset_at_step: -1 = never.
    scm: a name, or alternating counts of computed and reused steps. compute_share: of strategy
    scm. deep_interval: DeepCache computes every n-th evaluation. cross_range, self_range: PAB
    reuses an attention output for n - 1 evaluations; memory_budget_bytes: what PAB may hold.
    cfg_interval: fastercache-cfg computes uncond every n-th evaluation.
    """

    strategy: str = "auto"
    engine: str = "auto"
    cfg_mode: str = "shared"
    cache_ratio: float | None = None
    warmup: int = 8
    warmup_interval: int = 1
    cooldown: int = 1
    front_blocks: int = 8
    back_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    max_accumulated_residual_diff: float = 0.0
    calibrator: str = "none"
    calibrator_order: int = 1
    scm: str = "off"
    scm_policy: str = "dynamic"
    compute_share: float = 0.515
    deep_interval: int = 3
    cross_range: int = 4
    self_range: int = 2
    memory_budget_bytes: int = 4 << 30
    cfg_interval: int = 2
    reset_at_step: int = -1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is '{getattr(self, name)}': choose one of {', '.join(choices)}"
                )
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}: choose a value from {low} to {high}")
        if self.scm not in SCM_NAMES:
            parse_counts(self.scm)
        if self.calibrator in ("foca", "dmd") and self.engine == "builtin":
            raise ValueError(
                f"calibrator {self.calibrator} comes with cache-dit: set engine to auto or "
                "cache-dit, or choose taylorseer"
            )
        if self.residual_diff_threshold > MAX_THRESHOLD:
            object.__setattr__(self, "residual_diff_threshold", MAX_THRESHOLD)

    @classmethod
    def from_ratio(cls, cache_ratio: float, **fields_: Any) -> "CacheConfig":
        """The settings of a cache_ratio from 0 (quality first) to 1 (speed first)."""
        if not 0 <= cache_ratio <= 1:
            raise ValueError(f"cache_ratio is {cache_ratio}: choose a value from 0 to 1")
        settings: dict[str, Any] = {
            "warmup": 4,
            "residual_diff_threshold": round(_between(cache_ratio, _THRESHOLD), 4),
            "max_continuous_cached_steps": round(_between(cache_ratio, _MAX_CONTINUOUS)),
            "front_blocks": round(_between(cache_ratio, _FRONT_BLOCKS)),
            "compute_share": round(_between(cache_ratio, _COMPUTE_SHARE), 4),
            "deep_interval": round(_between(cache_ratio, _DEEP_INTERVAL)),
            "cross_range": round(_between(cache_ratio, _CROSS_RANGE)),
            "self_range": round(_between(cache_ratio, _SELF_RANGE)),
            "cfg_interval": round(_between(cache_ratio, _CFG_INTERVAL)),
        }
        return cls(cache_ratio=cache_ratio, **{**settings, **fields_})

    def with_(self, **changes: Any) -> "CacheConfig":
        """A copy with other fields, checked again."""
        return replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "CacheConfig":
        """Raises ValueError on a field this version does not know."""
        values = json.loads(text)
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"cache settings have unknown fields: {', '.join(unknown)}")
        return cls(**values)


_CHOICES: dict[str, tuple[str, ...]] = {
    "strategy": STRATEGIES,
    "engine": ENGINES,
    "cfg_mode": CFG_MODES,
    "calibrator": CALIBRATORS,
    "scm_policy": SCM_POLICIES,
}
_MANY = 10_000
_BOUNDS: dict[str, tuple[float, float]] = {
    "cache_ratio": (0, 1),
    "warmup": (0, _MANY),
    "warmup_interval": (1, _MANY),
    "cooldown": (1, _MANY),
    "front_blocks": (0, _MANY),
    "back_blocks": (0, _MANY),
    "residual_diff_threshold": (0, _MANY),
    "max_cached_steps": (-1, _MANY),
    "max_continuous_cached_steps": (-1, _MANY),
    "max_accumulated_residual_diff": (0, _MANY),
    "calibrator_order": (1, 4),
    "compute_share": (0, 1),
    "deep_interval": (1, _MANY),
    "cross_range": (1, _MANY),
    "self_range": (1, _MANY),
    "cfg_interval": (1, _MANY),
    "reset_at_step": (-1, _MANY),
    "memory_budget_bytes": (0, 1 << 50),
}

# What a preset fixes; the widgets it does not name keep their values.
PRESETS: dict[str, dict[str, Any]] = {
    # cache-dit's DBCache defaults
    "quality": {
        "front_blocks": 8,
        "back_blocks": 0,
        "warmup": 8,
        "residual_diff_threshold": 0.08,
        "max_continuous_cached_steps": -1,
        "scm": "off",
    },
    # SGLang's defaults for its cache-dit integration
    "balanced": {
        "front_blocks": 1,
        "back_blocks": 0,
        "warmup": 4,
        "residual_diff_threshold": 0.24,
        "max_continuous_cached_steps": 3,
        "scm": "off",
    },
    "fast": {
        "front_blocks": 1,
        "back_blocks": 0,
        "warmup": 4,
        "residual_diff_threshold": 0.30,
        "max_continuous_cached_steps": -1,
        "scm": "fast",
        "scm_policy": "dynamic",
    },
    # for models distilled to about 8 steps
    "distilled": {
        "front_blocks": 1,
        "back_blocks": 0,
        "warmup": 4,
        "residual_diff_threshold": 0.50,
        "max_continuous_cached_steps": 1,
        "scm": "off",
    },
}
PRESET_NAMES = ("custom", *PRESETS)


def from_preset(preset: str, **widgets: Any) -> tuple[CacheConfig, str | None]:
    """The DBCache settings of a preset, and a sentence if it overrides widgets that were changed.

    widgets: the CacheConfig fields of SlipstreamCacheDiT's widgets.
    """
    if preset not in PRESET_NAMES:
        raise ValueError(f"preset is '{preset}': choose one of {', '.join(PRESET_NAMES)}")
    config = CacheConfig(strategy="cache-dit", **widgets)
    chosen = PRESETS.get(preset, {})
    defaults = CacheConfig()
    lost = [
        f"{name} {getattr(config, name)}"
        for name, value in chosen.items()
        if getattr(config, name) not in (value, getattr(defaults, name))
    ]
    note = f"Preset {preset} wins over {', '.join(lost)}: set preset to custom" if lost else None
    return config.with_(**chosen), note


def _between(ratio: float, values: tuple[float, ...]) -> float:
    """Linear between the table's columns."""
    position = ratio * (len(_RATIOS) - 1)
    left = min(int(position), len(_RATIOS) - 2)
    return values[left] + (values[left + 1] - values[left]) * (position - left)

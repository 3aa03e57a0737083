"""The caches' curves of the quality lab: each strategy over its one most telling setting."""

from typing import Any

from ..backends.cache.apply import apply_cache
from ..backends.cache.config import CacheConfig, from_preset
from ..backends.run import run_log
from .draw import save_sheet
from .goals import DEFAULT
from .paired import BASELINE
from .quality_report import Lab
from .scores import timed_points


def curves(lab: Lab) -> list[dict[str, Any]]:
    """All of them, with a contact sheet for the first and for the whole-step ones."""
    return [
        _curve(
            lab,
            "SlipstreamCache: cache_ratio",
            "Strategy auto, which is cache-dit's block cache on this model.",
            {DEFAULT if r == 0.5 else f"ratio {r:g}": CacheConfig.from_ratio(r) for r in _RATIOS},
            sheet="cache-ratio.png",
        ),
        _curve(
            lab,
            "Threshold against streak",
            "F1 B0, warmup 4, order 1: what reuses more at the same quality, a higher threshold or "
            "a longer streak (reused evaluations in a row)? cache_ratio 0.5 has 0.48 and 3.",
            {
                f"streak {streak}, threshold {threshold:g}": _block(
                    "taylorseer", threshold=threshold, streak=streak
                )
                for streak in (1, 2, 3, 4)
                for threshold in (0.12, 0.24, 0.48, 0.96)
            },
        ),
        _curve(
            lab,
            "Block cache without extrapolation: always reuse, at most n in a row",
            "F1 B0, warmup 4, threshold off, order 0: the kept residual is repeated.",
            {f"{n} in a row": _block("none", threshold=0.99, streak=n) for n in (1, 2, 3, 4)},
        ),
        _curve(
            lab,
            "Presets of SlipstreamCacheDiT",
            "As the node has them.",
            {name: from_preset(name)[0] for name in ("quality", "balanced", "fast")},
        ),
        _curve(
            lab,
            "Step masks (strategy scm)",
            "The share of steps that are computed; the others are extrapolated, order 1.",
            {
                f"{share:g} computed": CacheConfig.from_ratio(0.5, strategy="scm").with_(
                    compute_share=share
                )
                for share in (0.75, 0.6, 0.5, 0.4, 0.3)
            },
            sheet="cache-scm.png",
        ),
        _curve(
            lab,
            "Whole output (strategy output)",
            "The model's output is reused: a reused step costs next to nothing.",
            {f"ratio {r:g}": CacheConfig.from_ratio(r, strategy="output") for r in _RATIOS},
        ),
        _core(lab),
    ]


_RATIOS = (0.25, 0.5, 0.75, 1.0)


def _block(calibrator: str, *, threshold: float, streak: int) -> CacheConfig:
    return CacheConfig(
        strategy="fbcache" if calibrator == "none" else "taylorseer",
        warmup=4,
        front_blocks=1,
        residual_diff_threshold=threshold,
        max_continuous_cached_steps=streak,
        calibrator=calibrator,
    )


def _core(lab: Lab) -> dict[str, Any]:
    """EasyCache and LazyCache over their threshold."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    models = {}
    for node, name in ((EasyCacheNode, "EasyCache"), (LazyCacheNode, "LazyCache")):
        for threshold in (0.05, 0.1, 0.2):
            made = node.execute(lab.demo.model, threshold, 0.15, 0.95, False)
            models[f"{name}, threshold {threshold:g}"] = made.args[0]
    about = "ComfyUI's own caches, start 0.15, end 0.95; 0.2 is their default."
    return _measured(lab, "EasyCache and LazyCache", about, models)


def _curve(
    lab: Lab, title: str, about: str, configs: dict[str, CacheConfig], *, sheet: str = ""
) -> dict[str, Any]:
    models = {name: apply_cache(lab.demo.model, config) for name, config in configs.items()}
    return _measured(lab, title, about, models, sheet=sheet)


def _measured(
    lab: Lab, title: str, about: str, models: dict[str, Any], *, sheet: str = ""
) -> dict[str, Any]:
    lab.bar.set_description(title)
    works, failed = lab.that_run(models)
    points, pictures = timed_points(lab.demo, works, lab.num_seeds, lab.bar)
    for point in points:
        reused = _num_reused(works[point["name"]])
        if reused is not None:
            point["reused"] = reused
    curve: dict[str, Any] = {"title": title, "about": about, "points": points, "failed": failed}
    if points and all("reused" in point for point in points):
        curve["columns"] = {"reused": "reused of 20"}
    if sheet:
        import torch

        rows = torch.cat([pictures[name][:10] for name in (BASELINE, *works)])
        save_sheet(rows, lab.folder / sheet, columns=10, zoom=2)
        curve |= {"sheet": sheet, "sheet_rows": [BASELINE, *works]}
    return curve


def _num_reused(model: Any) -> int | None:
    """Evaluations that the latest run reused, of a cache of ours."""
    log = run_log(model)
    record = log.latest() if log is not None else None
    return record.sections["cache"].json["hits"] if record and "cache" in record.sections else None

"""The project's goals for the trained model, held against a quality.json: met or missed, as found.

Goals: the cache at its default settings 1.5x as fast at 32 dB; some policy 1.7x at 28 dB; SVDQuant
with a rank of 1/16 of the width 2 dB above rounding at the same bits, and better with calibration.
"""

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
DEFAULT = "ratio 0.5 (default)"
_OURS = "cache"  # the part of the JSON that core's caches share, apart from their title
_CORE = "EasyCache"


def goals(found: Json) -> list[tuple[str, str, str]]:
    """(goal, "met" or "missed", what was found); goals whose part is absent are left out."""
    caches = [c for c in found["curves"] if c["part"] == _OURS and _CORE not in c["title"]]
    rows = []
    if caches:
        rows += [_default(caches), _policy(caches)]
    full = [c for c in found["curves"] if c["part"] == "svdquant" and "4-bit inputs" in c["title"]]
    if full:
        rows += _svdquant({point["name"]: point["psnr_db"] for point in full[0]["points"]})
    return rows


def _default(caches: Sequence[Json]) -> tuple[str, str, str]:
    point = next(p for curve in caches for p in curve["points"] if p["name"] == DEFAULT)
    met = _reaches(point, 1.5, 32)
    return ("cache at default settings: 1.5x at 32 dB", met, _said(point))


def _policy(caches: Sequence[Json]) -> tuple[str, str, str]:
    """The best policy that is fast enough; without one, the fastest that is good enough."""
    points = [(p, f"{curve['title']}: {p['name']}, ") for curve in caches for p in curve["points"]]
    fast = [one for one in points if one[0]["speed"]["median"] >= 1.7]
    key = (lambda one: one[0]["psnr_db"]) if fast else (lambda one: one[0]["speed"]["median"])
    good = [one for one in points if one[0]["psnr_db"] >= 28]
    point, where = max(fast or good or points, key=key)
    return ("some cache policy: 1.7x at 28 dB", _reaches(point, 1.7, 28), where + _said(point))


def _svdquant(psnr: dict[str, float]) -> list[tuple[str, str, str]]:
    rounding, plain, calibrated = (psnr[n] for n in ("rounding", "rank 8", "rank 8, calibrated"))
    best = max(plain, calibrated) - rounding
    gain = calibrated - plain
    return [
        (
            "SVDQuant, rank 1/16 of the width: 2 dB above rounding",
            "met" if best >= 2 else "missed",
            f"{plain - rounding:+.1f} dB, calibrated {calibrated - rounding:+.1f} dB",
        ),
        (
            "SVDQuant: calibrated above uncalibrated",
            "met" if gain > 0 else "missed",
            f"{gain:+.1f} dB at rank 8",
        ),
    ]


def _reaches(point: Json, speed: float, psnr_db: float) -> str:
    met = point["speed"]["median"] >= speed and point["psnr_db"] >= psnr_db
    return "met" if met else "missed"


def _said(point: Json) -> str:
    return f"{point['speed']['median']:.2f}x at {point['psnr_db']:.1f} dB"

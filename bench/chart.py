"""Charts of the measurements, with Pillow, in the colours of the report's picture."""

from collections.abc import Sequence
from typing import Any

from ..backends.picture import canvas

_ROW, _LEFT, _TOP = 44, 520, 104
_RIGHT = canvas.WIDTH - canvas.MARGIN - 90
_COLOURS = {"slipstream": canvas.PALETTE[0], "core": canvas.PALETTE[1]}


def draw_suite(found: dict[str, Any]) -> Any:
    """A bar for each side: its speed against plain, with quartiles; the noise is a grey strip."""
    return canvas.stack([_draw_subject(subject) for subject in found["subjects"]])


def _draw_subject(subject: dict[str, Any]) -> Any:
    sides = subject["sides"]
    image, pen = canvas.sheet(_TOP + _ROW * len(sides) + 56)
    canvas.write(pen, canvas.MARGIN, 36, subject["name"], canvas.HEADING)
    canvas.write(pen, canvas.MARGIN, 76, subject["about"], canvas.TINY, canvas.MUTED)
    most = max(max(side["speed"]["high"] for side in sides) * 1.05, 1.2)

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * value / most

    low, high = subject["noise_band"]
    bottom = _TOP + _ROW * len(sides)
    pen.rectangle((x(low), _TOP, x(high), bottom), fill=canvas.EMPTY)
    pen.line((x(1), _TOP, x(1), bottom), fill=canvas.LINE, width=2)
    for index, side in enumerate(sides):
        _draw_side(pen, side, _TOP + _ROW * index, x)
    return image


def _draw_side(pen: Any, side: dict[str, Any], top: int, x: Any) -> None:
    middle, speed = top + _ROW // 2, side["speed"]
    canvas.write(pen, _LEFT - 16, middle, side["name"], canvas.TINY, canvas.TEXT, "rm")
    pen.rectangle(
        (_LEFT, top + 10, x(speed["median"]), top + _ROW - 10), fill=_COLOURS[side["owner"]]
    )
    pen.line((x(speed["low"]), middle, x(speed["high"]), middle), fill=canvas.TEXT, width=3)
    text = f"{speed['median']:.2f}x"
    canvas.write(pen, x(speed["high"]) + 12, middle, text, canvas.TINY, canvas.MUTED, "lm")


def draw_curves(curves: Sequence[dict[str, Any]], title: str) -> Any:
    """PSNR over speed, a line of points for each curve that has speeds."""
    image, pen = canvas.sheet(760)
    canvas.write(pen, canvas.MARGIN, 36, title, canvas.HEADING)
    points = [p for curve in curves for p in curve["points"] if "speed" in p]
    shown = [p for p in points if p["psnr_db"] < 99]
    xs = [p["speed"]["median"] for p in shown] or [1.0]
    ys = [p["psnr_db"] for p in shown] or [40.0]
    left, right = min(*xs, 1.0) - 0.05, max(*xs, 1.2) + 0.05
    low, high = min(ys) - 2, max(ys) + 2

    def at(point: dict[str, Any]) -> tuple[float, float]:
        across = (point["speed"]["median"] - left) / (right - left)
        up = (point["psnr_db"] - low) / (high - low)
        return 150 + across * (canvas.WIDTH - 260), 640 - up * 520

    _draw_axes(pen, (left, right), (low, high))
    for index, curve in enumerate(curves):
        colour = canvas.PALETTE[index % len(canvas.PALETTE)]
        for point in curve["points"]:
            if "speed" not in point or point["psnr_db"] >= 99:
                continue
            x, y = at(point)
            pen.ellipse((x - 8, y - 8, x + 8, y + 8), fill=colour)
            canvas.write(pen, x + 14, y, point["name"], canvas.TINY, colour, "lm")
    return image


def _draw_axes(pen: Any, xs: tuple[float, float], ys: tuple[float, float]) -> None:
    first, last = int(ys[0] // 5 + 1) * 5, int(ys[1])
    for value in range(first, last + 1, 5):
        y = 640 - (value - ys[0]) / (ys[1] - ys[0]) * 520
        pen.line((150, y, canvas.WIDTH - 110, y), fill=canvas.LINE, width=2)
        canvas.write(pen, 138, y, f"{value} dB", canvas.TINY, canvas.FAINT, "rm")
    for tenth in range(int(xs[0] * 5) + 1, int(xs[1] * 5) + 1):
        value = tenth / 5
        x = 150 + (value - xs[0]) / (xs[1] - xs[0]) * (canvas.WIDTH - 260)
        pen.line((x, 120, x, 640), fill=canvas.LINE, width=2)
        canvas.write(pen, x, 668, f"{value:.1f}x", canvas.TINY, canvas.FAINT, "mm")

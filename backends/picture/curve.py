"""Draws a Curve: one value per evaluation against its threshold, reused evaluations marked."""

import itertools
import math
from typing import Any

from ..report import Curve
from . import canvas

LEFT = canvas.MARGIN + 98
PLOT_WIDTH = 980 - 98
PLOT_HEIGHT = 300
TOP = 84


def draw_curve(curve: Curve) -> Any:
    """A strip of the picture with the curve, its axes and its legend (PIL image)."""
    image, pen = canvas.sheet(TOP + PLOT_HEIGHT + 74 + 48)
    canvas.write(pen, canvas.MARGIN, 40, curve.title, canvas.HEADING)
    values = [y for y in curve.ys if y is not None and math.isfinite(y)]
    if not values:
        image, pen = canvas.sheet(TOP + 64)
        canvas.write(pen, canvas.MARGIN, 40, curve.title, canvas.HEADING)
        canvas.write(
            pen, canvas.MARGIN, TOP + 16, "Nothing was recorded.", canvas.BODY, canvas.MUTED
        )
        return image
    highest = max(*values, curve.threshold or 0.0, 0.0)
    step = nice_step(highest / 3)
    top_value = max(step * math.ceil(highest / step * 1.02), step)
    _draw_axes(pen, curve, step, top_value)
    _draw_values(pen, curve, top_value)
    _draw_legend(pen, curve)
    return image


def nice_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten at or above `rough`; 1 for nothing to show."""
    if rough <= 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _x(curve: Curve, index: int) -> float:
    first, last = curve.xs[0], curve.xs[-1]
    share = 0.5 if last == first else (curve.xs[index] - first) / (last - first)
    return LEFT + 12 + share * (PLOT_WIDTH - 24)


def _y(value: float, top_value: float) -> float:
    return TOP + PLOT_HEIGHT * (1 - max(value, 0.0) / top_value)


def _draw_axes(pen: Any, curve: Curve, step: float, top_value: float) -> None:
    for number in range(round(top_value / step) + 1):
        y = _y(number * step, top_value)
        pen.line((LEFT, y, LEFT + PLOT_WIDTH, y), fill=canvas.LINE, width=2)
        canvas.write(pen, LEFT - 14, y, f"{number * step:g}", canvas.TINY, canvas.FAINT, "rm")
    stride = max(round(nice_step(len(curve.xs) / 12)), 1)
    for index in range(0, len(curve.xs), stride):
        label = f"{curve.xs[index]:g}"
        y = TOP + PLOT_HEIGHT + 20
        canvas.write(pen, _x(curve, index), y, label, canvas.TINY, canvas.FAINT, "mm")
    middle = LEFT + PLOT_WIDTH / 2
    canvas.write(
        pen, middle, TOP + PLOT_HEIGHT + 54, "evaluation", canvas.SMALL, canvas.MUTED, "mm"
    )


def _draw_values(pen: Any, curve: Curve, top_value: float) -> None:
    if curve.threshold is not None:
        y = _y(curve.threshold, top_value)
        for dash in range(LEFT, LEFT + PLOT_WIDTH, 18):
            pen.line((dash, y, min(dash + 9, LEFT + PLOT_WIDTH), y), fill=canvas.TEXT, width=2)
    placed = [
        (_x(curve, i), _y(y, top_value)) if y is not None and math.isfinite(y) else None
        for i, y in enumerate(curve.ys)
    ]
    for start, end in itertools.pairwise(placed):
        if start is not None and end is not None:
            pen.line((*start, *end), fill=canvas.FAINT, width=3)
    radius = 7 if len(placed) <= 60 else 4
    for point, reused in zip(placed, curve.marks, strict=True):
        if point is not None:
            x, y = point
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(box, fill=canvas.REUSED if reused else canvas.COMPUTED)


def _draw_legend(pen: Any, curve: Curve) -> None:
    left, right = LEFT + PLOT_WIDTH + 56, canvas.WIDTH - canvas.MARGIN
    num_reused = sum(curve.marks)
    rows = (
        (canvas.COMPUTED, "computed", len(curve.marks) - num_reused),
        (canvas.REUSED, "reused", num_reused),
    )
    y = TOP + 8
    for colour, words, count in rows:
        if not count:
            continue
        pen.ellipse((left + 3, y + 6, left + 18, y + 21), fill=colour)
        canvas.write(pen, left + 38, y + 23, words, canvas.SMALL)
        canvas.write(pen, right, y + 23, str(count), canvas.SMALL, canvas.MUTED, "rs")
        y += 48
    if curve.threshold is not None:
        pen.line((left, y + 14, left + 8, y + 14), fill=canvas.TEXT, width=2)
        pen.line((left + 14, y + 14, left + 22, y + 14), fill=canvas.TEXT, width=2)
        canvas.write(pen, left + 38, y + 23, "threshold", canvas.SMALL)
        value = f"{curve.threshold:g}"
        canvas.write(pen, right, y + 23, value, canvas.SMALL, canvas.MUTED, "rs")

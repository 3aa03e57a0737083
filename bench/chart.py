"""Charts of the measurements, with Pillow, in the colours of the report's picture."""

from collections.abc import Sequence
from typing import Any

from ..backends.picture import canvas

_ROW, _LEFT, _TOP = 44, 520, 104
_RIGHT = canvas.WIDTH - canvas.MARGIN - 90
MOST_DB, _BOTTOM = 55.0, 740  # of the curves
_COLOURS = dict(zip(("slipstream", "core", "other pack"), canvas.PALETTE, strict=False))


def draw_suite(found: dict[str, Any]) -> Any:
    """A bar for each side: its speed against plain, with quartiles; the noise is a grey strip."""
    return canvas.stack([_draw_subject(subject) for subject in found["subjects"]])


def _draw_subject(subject: dict[str, Any]) -> Any:
    sides = subject["sides"]
    image, pen = canvas.sheet(_TOP + _ROW * len(sides) + 56)
    canvas.write(pen, canvas.MARGIN, 36, subject["name"], canvas.HEADING)
    canvas.write(pen, canvas.MARGIN, 76, subject["about"], canvas.TINY, canvas.MUTED)
    _draw_owners(pen, {side["owner"] for side in sides})
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


def _draw_owners(pen: Any, owners: set[str]) -> None:
    """Whose a bar is, at the top right."""
    right = canvas.WIDTH - canvas.MARGIN
    for name in reversed([name for name in _COLOURS if name in owners]):
        canvas.write(pen, right, 28, name, canvas.TINY, canvas.MUTED, "rm")
        right -= canvas.width_of(name, canvas.TINY) + 12
        pen.rectangle((right - 18, 19, right, 37), fill=_COLOURS[name])
        right -= 46


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
    """PSNR over speed: a line a series of settings; what is above MOST_DB lies at the top."""
    series = _series(curves)
    image, pen = canvas.sheet(_BOTTOM + 110 + 36 * len(series))
    canvas.write(pen, canvas.MARGIN, 36, title, canvas.HEADING)
    points = [point for line in series.values() for point in line] or [(1.0, MOST_DB)]
    left = min(*(x for x, _ in points), 1.0) - 0.05
    right = max(*(x for x, _ in points), 1.2) + 0.05
    low = min(y for _, y in points) - 2

    def at(x: float, y: float) -> tuple[float, float]:
        up = (min(y, MOST_DB) - low) / (MOST_DB - low)
        across = (x - left) / (right - left)
        return 150 + across * (canvas.WIDTH - 260), _BOTTOM - up * (_BOTTOM - 90)

    _draw_axes(pen, (left, right), low, at)
    for index, (name, line) in enumerate(series.items()):
        round_, place = divmod(index, len(canvas.PALETTE))
        colour = canvas.PALETTE[place]
        mark = pen.rectangle if round_ else pen.ellipse  # a colour's second series has squares
        places = [at(*point) for point in line]
        pen.line(places, fill=colour, width=4)
        y_name = _BOTTOM + 84 + 36 * index
        for x, y in (*places, (canvas.MARGIN + 12, y_name)):
            mark((x - 9, y - 9, x + 9, y + 9), fill=colour)
        canvas.write(pen, canvas.MARGIN + 36, y_name, name, canvas.SMALL, canvas.TEXT, "lm")
    return image


def draw_quality(found: dict[str, Any]) -> Any:
    """The curves of a quality.json that have speeds."""
    timed = [c for c in found["curves"] if any("speed" in point for point in c["points"])]
    return draw_curves(timed, "PSNR over speed, on the trained model")


def _series(curves: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (speed, PSNR) from slow to fast; settings named "kind, value" are a series a kind."""
    found: dict[str, list[tuple[float, float]]] = {}
    for curve in curves:
        for point in curve["points"]:
            kind, comma, _ = point["name"].partition(", ")
            name = f"{curve['title']}: {kind}" if comma else curve["title"]
            found.setdefault(name, []).append((point["speed"]["median"], point["psnr_db"]))
    return {name: sorted(points) for name, points in found.items()}


def _draw_axes(pen: Any, xs: tuple[float, float], low: float, at: Any) -> None:
    for value in range(int(low // 10 + 1) * 10, int(MOST_DB) + 1, 10):
        _, y = at(1.0, value)
        pen.line((150, y, canvas.WIDTH - 110, y), fill=canvas.LINE, width=2)
        canvas.write(pen, 138, y, f"{value} dB", canvas.TINY, canvas.FAINT, "rm")
    for fifth in range(int(xs[0] * 5) + 1, int(xs[1] * 5) + 1):
        x, _ = at(fifth / 5, low)
        pen.line((x, 90, x, _BOTTOM), fill=canvas.LINE, width=2)
        canvas.write(pen, x, _BOTTOM + 28, f"{fifth / 5:.1f}x", canvas.TINY, canvas.FAINT, "mm")

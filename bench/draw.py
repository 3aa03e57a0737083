"""Training pictures that are drawn, not downloaded: ten classes, one solid shape on a plain ground.

draw(labels, generator) gives [N, 3, SIZE, SIZE] in 0 to 1. All randomness is the generator's, so a
seed repeats the pictures bit for bit. Colours come from two short lists; place and size vary a
little. Shapes are signed distances in units of the shape, y down.
"""

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

CLASSES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "two",
    "four",
    "seven",
)
SIZE = 64
GROUNDS = ((0.08, 0.10, 0.16), (0.16, 0.13, 0.11), (0.93, 0.92, 0.88), (0.82, 0.88, 0.93))
COLOURS = (
    (0.90, 0.22, 0.21),
    (0.98, 0.60, 0.10),
    (0.20, 0.66, 0.33),
    (0.13, 0.47, 0.85),
    (0.56, 0.27, 0.68),
    (0.90, 0.35, 0.60),
)
_JITTER = 0.08  # of half the picture's width, to either side
_SCALES = (0.64, 0.74)
_STROKES = {
    "two": ((-0.55, -0.5), (-0.3, -0.82), (0.25, -0.82), (0.55, -0.45), (-0.55, 0.8), (0.6, 0.8)),
    "four": ((0.3, 0.85), (0.3, -0.85), (-0.65, 0.3), (0.7, 0.3)),
    "seven": ((-0.6, -0.75), (0.6, -0.75), (-0.1, 0.85)),
}
_STROKE_RADIUS = 0.19


def batch(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [num, 3, SIZE, SIZE] and labels [num] of random classes."""
    labels = torch.randint(0, len(CLASSES), (num,), generator=generator)
    return draw(labels, generator), labels


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """One picture for each label, [N] -> [N, 3, SIZE, SIZE] in 0 to 1, edges antialiased."""
    num = len(labels)
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    place = (torch.rand(2, num, 1, 1, generator=generator) * 2 - 1) * _JITTER
    low, high = _SCALES
    scale = low + (high - low) * torch.rand(num, 1, 1, generator=generator)
    colour = _pick(COLOURS, num, generator)
    ground = _pick(GROUNDS, num, generator)
    px, py = (x - place[0]) / scale, (y - place[1]) / scale
    distance = torch.empty(num, SIZE, SIZE)
    for index, name in enumerate(CLASSES):
        rows = labels == index
        distance[rows] = signed_distance(name, px[rows], py[rows])
    inside = (0.5 - distance * scale * SIZE / 2).clamp(0, 1)[:, None]
    return ground * (1 - inside) + colour * inside


def signed_distance(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Negative inside the shape `name`, of about unit size around 0."""
    radius = torch.hypot(x, y)
    if name == "circle":
        return radius - 0.95
    if name == "ring":
        return (radius - 0.7).abs() - 0.24
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.82
    if name == "triangle":
        return torch.maximum(y - 0.6, 0.866 * x.abs() - 0.5 * y - 0.5)
    if name == "cross":
        upright = torch.maximum(x.abs() - 0.3, y.abs() - 0.95)
        return torch.minimum(upright, torch.maximum(x.abs() - 0.95, y.abs() - 0.3))
    if name == "heart":
        lobes = torch.hypot(x.abs() - 0.45, y + 0.35) - 0.55
        return torch.minimum((x.abs() + (y - 0.08).abs() - 0.86) * 0.707, lobes)
    if name == "star":
        return _star(x, y)
    points = _STROKES[name]
    strokes = [_segment(x, y, *ends) for ends in itertools.pairwise(points)]
    return torch.stack(strokes).amin(0) - _STROKE_RADIUS


def _star(x: Tensor, y: Tensor, inner: float = 0.45) -> Tensor:
    """Five points: the plane folded onto half a point, there one straight edge."""
    turn = 2 * math.pi / 5
    angle = (torch.atan2(x, -y) + turn / 2).remainder(turn) - turn / 2
    radius = torch.hypot(x, y)
    u, v = radius * angle.cos(), radius * angle.sin().abs()
    corner_u, corner_v = inner * math.cos(turn / 2), inner * math.sin(turn / 2)
    length = math.hypot(corner_v, corner_u - 1)
    return (corner_v * (u - 1) - (corner_u - 1) * v) / length


def _segment(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def _pick(
    palette: tuple[tuple[float, float, float], ...], num: int, generator: torch.Generator
) -> Tensor:
    """[num, 3, 1, 1], rows of the palette."""
    rows = torch.randint(0, len(palette), (num,), generator=generator)
    return torch.tensor(palette)[rows, :, None, None]


def save_sheet(pictures: Tensor, path: Path, *, columns: int, zoom: int = 1) -> None:
    """Save [N, 3, H, W] in rows of `columns` as one image; needs Pillow."""
    from PIL import Image

    large = pictures.float().clamp(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    tiles = torch.nn.functional.pad(large, (1, 1, 1, 1), value=1.0)
    num, channels, height, width = tiles.shape
    rows = -(-num // columns)
    grid = torch.ones(rows * columns, channels, height, width)
    grid[:num] = tiles
    grid = grid.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    image = (grid.reshape(rows * height, columns * width, channels) * 255).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (columns * width, rows * height), image.numpy().tobytes()).save(path)

"""Draws a Grid: layers downwards, steps to the right, one coloured cell for what happened there.

Rows are gathered by the part of their label before the slash (block type), so that the axis names
a few groups and not every layer. The cell size follows from the number of rows and columns.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..report import Grid
from . import canvas

PLOT_WIDTH = 980  # at most; the legend has the rest
PLOT_HEIGHT = 640
MAX_CELL = (72, 44)
MIN_ROW = 3
HEAD = 84  # title above the cells
FOOT = 74  # step numbers and their name below
LEGEND_GAP = 56
_NICE = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000)
_MAX_GROUPS = 24


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of one block type: first row, number of rows, their y and height."""

    name: str
    first: int
    count: int
    top: int
    height: int


@dataclass(frozen=True)
class Layout:
    """Where everything of a Grid goes; edges are column boundaries relative to `left`."""

    left: int
    row_name_width: int
    row_height: float
    edges: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def right(self) -> int:
        return self.left + self.edges[-1]

    @property
    def bottom(self) -> int:
        return self.groups[-1].top + self.groups[-1].height if self.groups else HEAD


def draw_grid(grid: Grid) -> Any:
    """A strip of the picture with the grid, its axes and its legend (PIL image)."""
    layout = plan(grid)
    entries = legend_entries(grid)
    legend_left = max(layout.right + LEGEND_GAP, canvas.MARGIN + 420)
    legend_width = min(canvas.WIDTH - canvas.MARGIN - legend_left, 560)
    lines = [canvas.wrap(e[1], canvas.SMALL, legend_width - 126, 3) for e in entries]
    legend_height = 40 + sum(30 * max(len(line), 1) + 18 for line in lines)
    image, pen = canvas.sheet(max(layout.bottom + FOOT, HEAD + legend_height) + 48)
    canvas.write_title(pen, grid.title, _size(grid))
    if not grid.row_labels or not grid.column_labels:
        canvas.write(
            pen, canvas.MARGIN, HEAD + 16, "Nothing was recorded.", canvas.BODY, canvas.MUTED
        )
        return image
    _draw_cells(pen, grid, layout, {e[0]: e[3] for e in entries})
    _draw_rows(pen, grid, layout)
    _draw_columns(pen, grid, layout)
    _draw_legend(pen, entries, lines, legend_left, legend_width)
    return image


def plan(grid: Grid) -> Layout:
    """Cell sizes and positions for this many rows and columns."""
    runs = group_rows(grid.row_labels)
    name_width = max((canvas.width_of(name, canvas.SMALL) for name, _, _ in runs), default=0)
    widest = max((canvas.width_of(_row_label(r), canvas.TINY) for r in grid.row_labels), default=0)
    row_name_width = min(max(widest, 60), 90 if name_width else 260)
    left = canvas.MARGIN + min(name_width, 260) + (24 if name_width else 0) + row_name_width + 14
    num_columns = max(len(grid.column_labels), 1)
    column = min((PLOT_WIDTH - left + canvas.MARGIN) / num_columns, MAX_CELL[0])
    edges = tuple(round(i * column) for i in range(num_columns + 1))
    row = max(min(PLOT_HEIGHT / max(len(grid.row_labels), 1), MAX_CELL[1]), MIN_ROW)
    if row > 8:
        row = float(int(row))
    groups = []
    top = HEAD
    for name, first, count in runs:
        height = round(count * row)
        groups.append(Group(name, first, count, top, height))
        top += max(height + 14, 34)
    return Layout(left, row_name_width, row, edges, tuple(groups))


def group_rows(labels: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """(block type, first row, number of rows) of neighbouring rows whose label starts alike."""
    found: list[tuple[str, int, int]] = []
    for index, label in enumerate(labels):
        name = label.rpartition("/")[0]
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], found[-1][2] + 1)
        else:
            found.append((name, index, 1))
    return found if len(found) <= _MAX_GROUPS else [("", 0, len(labels))]


def _row_label(label: str) -> str:
    return label.rpartition("/")[2]


def legend_entries(grid: Grid) -> list[tuple[str, str, int, tuple[int, int, int]]]:
    """(category, words, number of cells, colour) of every category that occurs, legend order."""
    counts = Counter(cell for row in grid.cells for cell in row if cell is not None)
    order = [*grid.legend, *(c for c in counts if c not in grid.legend)]
    colours = canvas.colours_of(order)
    return [(c, grid.legend.get(c, c), counts[c], colours[c]) for c in order if counts[c]]


def _draw_cells(pen: Any, grid: Grid, layout: Layout, colours: dict[str, Any]) -> None:
    narrowest = min(b - a for a, b in zip(layout.edges, layout.edges[1:], strict=False))
    gap_x = 3 if narrowest >= 16 else 1 if narrowest >= 5 else 0
    gap_y = 3 if layout.row_height >= 16 else 1 if layout.row_height >= 5 else 0
    radius = 4 if min(narrowest, layout.row_height) >= 16 else 0
    for group in layout.groups:
        for offset in range(group.count):
            y0 = group.top + round(offset * layout.row_height)
            y1 = group.top + round((offset + 1) * layout.row_height) - 1 - gap_y
            row = grid.cells[group.first + offset]
            for column, cell in enumerate(row):
                x0 = layout.left + layout.edges[column]
                x1 = layout.left + layout.edges[column + 1] - 1 - gap_x
                colour = canvas.EMPTY if cell is None else colours[cell]
                if x1 >= x0:
                    pen.rounded_rectangle((x0, y0, x1, max(y1, y0)), radius, fill=colour)


def _draw_rows(pen: Any, grid: Grid, layout: Layout) -> None:
    """Group names, and the rows' own names as densely as they stay readable."""
    for group in layout.groups:
        middle = group.top + group.height / 2
        name = canvas.fit(group.name, canvas.SMALL, 260)
        canvas.write(pen, canvas.MARGIN, middle, name, canvas.SMALL, canvas.MUTED, "lm")
        names = [_row_label(label) for label in grid.row_labels]
        last = group.first + group.count - 1
        if layout.row_height >= 24:
            rows = range(group.first, last + 1)
        elif group.height >= 56:
            rows = range(group.first, last + 1, max(group.count - 1, 1))
        else:
            text = names[group.first] + (f"-{names[last]}" if group.count > 1 else "")
            _row_name(pen, layout, middle, text)
            continue
        for row in rows:
            y = group.top + (row - group.first + 0.5) * layout.row_height
            _row_name(
                pen, layout, min(max(y, group.top + 8), group.top + group.height - 8), names[row]
            )


def _row_name(pen: Any, layout: Layout, y: float, text: str) -> None:
    text = canvas.fit(text, canvas.TINY, layout.row_name_width)
    canvas.write(pen, layout.left - 14, y, text, canvas.TINY, canvas.FAINT, "rm")


def _draw_columns(pen: Any, grid: Grid, layout: Layout) -> None:
    labels = grid.column_labels
    widest = max(canvas.width_of(label, canvas.TINY) for label in labels)
    column = layout.edges[-1] / len(labels)
    stride = next((n for n in _NICE if n * column >= widest + 14), len(labels))
    y = layout.bottom + 20
    for index in range(0, len(labels), stride):
        x = layout.left + (layout.edges[index] + layout.edges[index + 1]) / 2 - 1
        canvas.write(pen, x, y, labels[index], canvas.TINY, canvas.FAINT, "mm")
    middle = layout.left + layout.edges[-1] / 2
    canvas.write(pen, middle, y + 34, grid.column, canvas.SMALL, canvas.MUTED, "mm")


def _draw_legend(
    pen: Any, entries: list[Any], lines: list[list[str]], left: int, width: int
) -> None:
    """A bar of shares, then per category its colour, words, share and count."""
    total = max(sum(entry[2] for entry in entries), 1)
    x = float(left)
    for _, _, count, colour in entries:
        part = count / total * width
        pen.rectangle((round(x), HEAD, max(round(x + part) - 3, round(x)), HEAD + 13), fill=colour)
        x += part
    y = HEAD + 40
    for (_, _, count, colour), words in zip(entries, lines, strict=True):
        pen.rounded_rectangle((left, y + 4, left + 21, y + 25), 4, fill=colour)
        for number, line in enumerate(words):
            canvas.write(pen, left + 38, y + 23 + 30 * number, line, canvas.SMALL)
        right = left + width
        canvas.write(pen, right, y + 23, _share(count, total), canvas.SMALL, canvas.MUTED, "rs")
        y += 30 * max(len(words), 1) + 18


def _size(grid: Grid) -> str:
    rows, columns = len(grid.row_labels), len(grid.column_labels)
    return f"{canvas.counted(rows, grid.row)}, {canvas.counted(columns, grid.column)}"


def _share(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{share:.0f} %" if share >= 1 or not count else "< 1 %"

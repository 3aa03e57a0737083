"""Type, colour and text fitting for the report's picture: everything that is not a figure.

Sizes are pixels of a picture 1600 wide, which is read at a third of that on a node and in full
when opened. The colours differ in lightness too, so that they stay apart without colour vision.
Pillow comes with ComfyUI and is imported where it is used. Its built-in font is ASCII and a few
marks: other characters are spelled out.
"""

import functools
import unicodedata
from typing import Any

WIDTH, MARGIN = 1600, 64
INNER = WIDTH - 2 * MARGIN

BACKGROUND = (16, 18, 23)
EMPTY = (31, 35, 43)  # a cell in which nothing happened
LINE = (44, 49, 59)
TEXT = (233, 236, 241)
MUTED = (159, 167, 181)
FAINT = (126, 134, 149)
WARN = (240, 190, 110)

# After Okabe and Ito, dimmed for a dark ground; past the last one, grey.
PALETTE = (
    (70, 130, 178),
    (228, 168, 72),
    (62, 164, 134),
    (208, 126, 174),
    (230, 218, 140),
    (204, 100, 70),
    (100, 104, 186),
    (170, 206, 226),
)
REST = (128, 136, 150)
COMPUTED, REUSED = PALETTE[0], PALETTE[1]  # the same in every figure

TITLE, HEADING, BODY, SMALL, TINY = 60, 32, 27, 24, 21

_SPELLED = {"×": "x", "–": "-", "—": "-", "−": "-", "’": "'", "→": "->", "≤": "<=", "≥": ">="}
_DRAWN = "·…°“”"


def colours_of(categories: list[str]) -> dict[str, tuple[int, int, int]]:
    """A colour per category, in the order given; computed and reused always have their own."""
    fixed = {"computed": COMPUTED, "reused": REUSED}
    taken = [fixed[c] for c in categories if c in fixed]
    free = iter(colour for colour in PALETTE if colour not in taken)
    return {c: fixed[c] if c in fixed else next(free, REST) for c in categories}


@functools.cache
def font(size: int) -> Any:
    """Pillow's own scalable typeface."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def sheet(height: int) -> tuple[Any, Any]:
    """An empty strip of the picture, WIDTH x height, and the pen that draws on it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, max(height, 1)), BACKGROUND)
    return image, ImageDraw.Draw(image)


def stack(strips: list[Any], *, above: int = MARGIN, below: int = MARGIN) -> Any:
    """One picture: `strips` below each other, with empty rows above and below."""
    image, _ = sheet(sum(strip.height for strip in strips) + above + below)
    top = above
    for strip in strips:
        image.paste(strip, (0, top))
        top += strip.height
    return image


def drawable(text: str) -> str:
    """`text` in the characters that the font has."""
    spelled = "".join(_SPELLED.get(c, c) for c in text)
    kept = []
    for character in spelled:
        if character in _DRAWN:
            kept.append(character)
            continue
        decomposed = unicodedata.normalize("NFKD", character)
        ascii_part = "".join(c for c in decomposed if " " <= c <= "~")
        kept.append(ascii_part or (" " if character.isspace() else "?"))
    return "".join(kept)


def counted(number: int, word: str) -> str:
    """A number with its word: 1 step, 1,000 steps, 2 branches."""
    plural = "es" if word.endswith(("s", "ch", "sh", "x")) else "s"
    return f"{number:,} {word}" + ("" if number == 1 else plural)


def width_of(text: str, size: int) -> int:
    return round(font(size).getlength(drawable(text)))


def fit(text: str, size: int, width: int) -> str:
    """`text`, cut with an ellipsis if it is wider than `width`."""
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, size: int, width: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of at most `width` pixels."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        if len(lines) == max_lines - 1:
            lines.append(fit(" ".join(words), size, width))
            break
        line = words.pop(0)
        while words and width_of(f"{line} {words[0]}", size) <= width:
            line += " " + words.pop(0)
        lines.append(fit(line, size, width))
    return lines


def write(
    pen: Any, x: float, y: float, text: str, size: int, colour: Any = TEXT, anchor: str = "ls"
) -> None:
    """Draw one line of text; anchor as Pillow's (l, m or r, then s for baseline or m)."""
    pen.text((x, y), drawable(text), font=font(size), fill=colour, anchor=anchor)


def write_title(pen: Any, title: str, aside: str) -> None:
    """A figure's title, and a muted remark behind it."""
    write(pen, MARGIN, 40, fit(title, HEADING, INNER - 320), HEADING)
    x = MARGIN + width_of(fit(title, HEADING, INNER - 320), HEADING) + 28
    write(pen, x, 40, aside, SMALL, FAINT)

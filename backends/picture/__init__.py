"""A finished run as one picture: what was sampled, how long it took, what each technique did.

`draw` takes a Report and returns an RGB PIL image 1600 pixels wide, as high as its content;
a report without a run becomes a small picture with its sentence. `to_tensor` makes it a ComfyUI
IMAGE. Needs Pillow, which comes with ComfyUI.
"""

from typing import Any

import torch

from ..report import Grid, Report, RunRecord
from . import canvas
from .curve import draw_curve
from .grid import draw_grid

MAX_NOTES = 5
MAX_REASONS = 3


def draw(report: Report) -> Any:
    """The picture of a report (PIL image, RGB)."""
    if report.record is None:
        return canvas.stack([_sentence(report.remark)])
    record = report.record
    strips = [_header(record)]
    if report.remark:
        strips.append(_paragraph(report.remark, canvas.WARN))
    strips.append(_techniques(record))
    for section in record.sections.values():
        for figure in section.figures:
            strips.append(draw_grid(figure) if isinstance(figure, Grid) else draw_curve(figure))
    if record.notes:
        strips.append(_notes(record))
    return canvas.stack(strips)


def to_tensor(image: Any) -> torch.Tensor:
    """A PIL image as ComfyUI IMAGE: float32 [1, H, W, 3], 0 to 1."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, image.height, image.width, 3).float() / 255


def _header(record: RunRecord) -> Any:
    """Model and time in large type, the facts of the run below."""
    image, pen = canvas.sheet(178)
    left, right = canvas.MARGIN, canvas.WIDTH - canvas.MARGIN
    time = f"{record.seconds:.2f} s" if record.seconds < 100 else f"{record.seconds:.0f} s"
    room = canvas.INNER - canvas.width_of(time, canvas.TITLE) - 40
    canvas.write(pen, left, 50, canvas.fit(record.model, canvas.TITLE, room), canvas.TITLE)
    canvas.write(pen, right, 50, time, canvas.TITLE, anchor="rs")
    per_step = record.step_s
    aside = f"{per_step:.3f} s per step" if record.completed else "did not finish"
    colour = canvas.MUTED if record.completed else canvas.WARN
    canvas.write(pen, right, 104, aside, canvas.BODY, colour, "rs")
    facts = [f"Slipstream run {record.id}", canvas.counted(record.num_steps, "step")]
    facts.append(canvas.counted(record.num_evaluations, "evaluation"))
    facts.append(record.device)
    names = {"comfyui": "ComfyUI", "torch": "torch"}
    facts.extend(f"{names[k]} {v}" for k, v in record.versions.items() if k in names)
    room = canvas.INNER - canvas.width_of(aside, canvas.BODY) - 40
    text = canvas.fit("  ·  ".join(facts), canvas.BODY, room)
    canvas.write(pen, left, 104, text, canvas.BODY, canvas.MUTED)
    pen.line((left, 142, right, 142), fill=canvas.LINE, width=2)
    return image


def _techniques(record: RunRecord) -> Any:
    """Per technique: the first line it has to say, what stands before the colon apart, and below
    it the next lines (reasons), muted."""
    said = [section.lines for section in record.sections.values() if section.lines]
    if not said:
        return _paragraph("No technique had anything to report in this run.", canvas.MUTED)
    heads = [line.partition(": ") if ": " in line else ("", "", line) for line, *_ in said]
    labels = [canvas.fit(head, canvas.BODY, 420) for head, _, _ in heads]
    left = canvas.MARGIN + max(canvas.width_of(label, canvas.BODY) for label in labels)
    left += 40 if any(labels) else 0
    room = canvas.WIDTH - canvas.MARGIN - left
    strips = []
    for label, (_, _, text), (_, *reasons) in zip(labels, heads, said, strict=True):
        lines = [
            (line, canvas.BODY, canvas.TEXT) for line in canvas.wrap(text, canvas.BODY, room, 3)
        ]
        for reason in reasons[:MAX_REASONS]:
            shown = canvas.wrap(reason, canvas.SMALL, room, 2)
            lines += [(line, canvas.SMALL, canvas.MUTED) for line in shown]
        image, pen = canvas.sheet(38 * len(lines) + 16)
        canvas.write(pen, canvas.MARGIN, 28, label, canvas.BODY, canvas.MUTED)
        for number, (line, size, colour) in enumerate(lines):
            canvas.write(pen, left, 28 + 38 * number, line, size, colour)
        strips.append(image)
    return canvas.stack(strips, above=0, below=36)


def _notes(record: RunRecord) -> Any:
    """What the user should know, the rest counted."""
    shown = list(record.notes.items())[:MAX_NOTES]
    texts = [note if count == 1 else f"{note} ({count} times)" for note, count in shown]
    if len(record.notes) > MAX_NOTES:
        texts.append(f"{len(record.notes) - MAX_NOTES} more in the report's text")
    wrapped = [canvas.wrap(text, canvas.SMALL, canvas.INNER - 30, 2) for text in texts]
    image, pen = canvas.sheet(44 + sum(34 * len(lines) + 10 for lines in wrapped))
    pen.line((canvas.MARGIN, 0, canvas.WIDTH - canvas.MARGIN, 0), fill=canvas.LINE, width=2)
    y = 50
    for lines in wrapped:
        pen.ellipse((canvas.MARGIN, y - 13, canvas.MARGIN + 9, y - 4), fill=canvas.WARN)
        for line in lines:
            canvas.write(pen, canvas.MARGIN + 30, y, line, canvas.SMALL, canvas.MUTED)
            y += 34
        y += 10
    return image


def _paragraph(text: str, colour: Any) -> Any:
    lines = canvas.wrap(text, canvas.BODY, canvas.INNER, 3)
    image, pen = canvas.sheet(38 * len(lines) + 30)
    for number, line in enumerate(lines):
        canvas.write(pen, canvas.MARGIN, 28 + 38 * number, line, canvas.BODY, colour)
    return image


def _sentence(text: str) -> Any:
    """The whole picture of a report that has no run to show."""
    lines = canvas.wrap(text, canvas.HEADING, canvas.INNER, 6)
    image, pen = canvas.sheet(64 + 48 * len(lines))
    canvas.write(pen, canvas.MARGIN, 24, "Slipstream Report", canvas.SMALL, canvas.FAINT)
    for number, line in enumerate(lines):
        canvas.write(pen, canvas.MARGIN, 84 + 48 * number, line, canvas.HEADING, canvas.MUTED)
    return image

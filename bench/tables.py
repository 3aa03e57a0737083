"""Markdown from the JSON of a measurement: docs/benchmarks holds nothing that is typed by hand.

Each *_page function takes one loaded JSON and returns the whole file. PAGES maps a JSON's name to
its function; a test renders every JSON under docs/benchmarks again and compares.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .goals import goals

Json = dict[str, Any]


REHEARSAL = "**A rehearsal** with tiny sizes: it shows that the program runs. No number is meant."


def suite_name(found: Json) -> str:
    """Of a suite's files: a quick run does not take the place of a whole one."""
    return "suite-quick" if found.get("quick") else "suite"


def suite_page(found: Json) -> str:
    """docs/benchmarks/suite.md and suite-quick.md"""
    title = "# Every technique against plain ComfyUI"
    parts = [title + (", in few rounds" if found.get("quick") else ""), *preface(found)]
    if "seconds" in found:
        each = ", ".join(f"{s['name']} {s['seconds']:.0f}" for s in found["subjects"])
        parts.append(f"Took {found['seconds']:.0f} s: {each}.")
    if "interrupted" in found:
        parts.append(f"**Partial**: {found['interrupted']}.")
    parts.append(
        "Speed is plain time over the side's time, the median of paired rounds with its quartiles. "
        "Within noise means inside the band in which plain ComfyUI differs from itself: quartiles, "
        "or extremes below 8 rounds; or that the quartiles lie on both sides of 1. PSNR and SSIM "
        "compare the pictures to plain ones of the same seeds; 100 dB is identical."
    )
    parts.append(f"![Speed of every side]({suite_name(found)}.png)")
    for subject in found["subjects"]:
        parts += _suite_subject(subject)
    return "\n\n".join(parts) + "\n"


def full_width_page(found: Json) -> str:
    """docs/benchmarks/full-width.md"""
    parts = ["# Every technique on models of full width", *preface(found)]
    parts.append(
        "Random weights of full width on a GPU: speed is meant, pictures would be noise. Speed is "
        "plain time over the side's time of a whole run, the median of paired rounds with its "
        "quartiles; a step is the median over the steps of all runs, reused ones included. Within "
        "noise means inside the band in which plain ComfyUI differs from itself."
    )
    parts += ["![Speed of every side](full-width.png)"] if found["subjects"] else []
    for subject in found["subjects"]:
        parts += _suite_subject(subject)
    lines = [f"- {name}: {why}" for name, why in found["failed"].items()]
    parts += ["## Failed", "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def _suite_subject(subject: Json) -> list[str]:
    parts = [f"## {subject['name']}", _sentence(subject["about"]), _band(subject)]
    parts.append(_suite_table(subject))
    notes = [f"- {s['name']}: {s['about']}" for s in subject["sides"] if "about" in s]
    parts += ["Notes:\n\n" + "\n".join(notes)] if notes else []
    for key, word in (("failed", "Failed"), ("not_measured", "Not measured")):
        lines = [f"- {name}: {why}" for name, why in subject[key].items()]
        parts += [f"{word}:\n\n" + "\n".join(lines)] if lines else []
    return parts


def _suite_table(subject: Json) -> str:
    has_pictures = any("psnr_db" in side for side in subject["sides"])
    header = ["side", "of", "speed", "quartiles", "verdict", "ms a run", "latent error"]
    header += ["ms a step"] if "model" in subject else []
    header += ["PSNR dB", "SSIM"] if has_pictures else []
    rows = []
    for side in subject["sides"]:
        speed = side["speed"]
        error = "identical" if side["identical"] else f"{side['latent_rel_l2']:.2g}"
        row = [
            side["name"],
            side["owner"],
            f"{speed['median']:.2f}x",
            f"{speed['low']:.2f} to {speed['high']:.2f}",
            side["verdict"],
            f"{side['total_duration_ms']:.0f}",
            error,
        ]
        if "model" in subject:
            steps = [step["duration_ms"] for step in side["denoise_steps_ms"]]
            row.append(f"{statistics.median(steps):.1f}")
        if has_pictures:
            row += [f"{side['psnr_db']:.1f}", f"{side['ssim']:.3f}"]
        rows.append(row)
    return table(header, rows)


def _band(subject: Json) -> str:
    low, high = subject["noise_band"]
    return f"{subject['num_rounds']} rounds; noise {low:.2f} to {high:.2f}."


def attention_page(found: Json) -> str:
    """docs/benchmarks/attention.md"""
    parts = ["# Attention kernels", *preface(found)]
    if not found["shapes"]:
        parts.append(
            "**Unverified**: no GPU was at hand. The command above fills this page on a machine "
            "with one; it takes a few minutes."
        )
        return "\n\n".join(parts) + "\n"
    parts.append(
        "Milliseconds of one call (median), peak extra memory, relative L1 error against fp32 on "
        "256 rows, of random bf16 tensors: errors of quantised kernels on a model's own tensors "
        "are lower or higher."
    )
    header = ["kernel", "kind", "ms", "peak MB", "rel. L1"]
    for shape in found["shapes"]:
        sizes = "B {batch}, heads {heads}, tokens {q_tokens} x {k_tokens}, head_dim {head_dim}"
        parts += [f"## {shape['name']}", sizes.format(**shape)]
        rows = [
            [k["id"], k["category"], f"{k['ms']:.3f}", f"{k['peak_mb']:.0f}", f"{k['rel_l1']:.4f}"]
            for k in shape["kernels"]
        ]
        parts.append(table(header, rows))
        for key, word in (("failed", "Failed"), ("not_measured", "Not measured")):
            lines = [f"- {name}: {why}" for name, why in shape.get(key, {}).items()]
            parts += [f"{word}:\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join(parts) + "\n"


def quality_page(found: Json) -> str:
    """docs/benchmarks/quality.md"""
    parts = ["# Speed against quality on the trained model", *preface(found)]
    parts.append(
        "Every row is sampled from the same seeds as the plain pictures that it is compared to: "
        f"{found['num_seeds']} of them at batch 1, 20 steps, euler, cfg 3. Speed is the median of "
        "paired ratios with its quartiles. PSNR is the mean over the pictures (100 dB where "
        "identical); pooled is that of the mean squared error of all of them."
    )
    parts.append("![PSNR over speed](quality.png)")
    held = goals(found)
    parts += ["## Goals", table(["goal", "", "found"], held)] if held else []
    for curve in found["curves"]:
        about = f"{curve['about']} Measured at commit {curve['commit']}."
        parts += [f"## {curve['title']}", about, _curve_table(curve)]
        lines = [f"- {name}: {why}" for name, why in curve.get("failed", {}).items()]
        parts += ["Failed:\n\n" + "\n".join(lines)] if lines else []
        if "sheet" in curve:
            parts.append(f"![{curve['title']}]({curve['sheet']})")
        if "sheet_rows" in curve:
            rows = "\n".join(f"{i}. {name}" for i, name in enumerate(curve["sheet_rows"], 1))
            parts.append(f"Rows of the picture:\n\n{rows}")
    if found.get("accuracy"):
        parts += ["## Accuracy of the classifier", _accuracy(found["accuracy"])]
    return "\n\n".join(parts) + "\n"


def _curve_table(curve: Json) -> str:
    has_speed = any("speed" in point for point in curve["points"])
    header = ["setting", *(["speed", "quartiles"] if has_speed else [])]
    header += [*curve.get("columns", {}).values()]
    header += ["PSNR dB", "pooled", "10th percentile", "SSIM"]
    rows = []
    for point in curve["points"]:
        row = [point["name"]]
        if has_speed:
            speed = point["speed"]
            row += [f"{speed['median']:.2f}x", f"{speed['low']:.2f} to {speed['high']:.2f}"]
        row += [f"{point[key]:g}" for key in curve.get("columns", {})]
        row += [f"{point[key]:.1f}" for key in ("psnr_db", "psnr_pooled_db", "psnr_p10_db")]
        row.append(f"{point['ssim']:.3f}")
        rows.append(row)
    return table(header, rows)


def _accuracy(accuracy: Json) -> str:
    header = ["setting", "right", "of", "right only plain", "right only here", "two-sided p"]
    rows = []
    for row in accuracy["rows"]:
        pairs = [str(row.get(key, "-")) for key in ("only_plain", "only_here")]
        p = f"{row['p_value']:.2g}" if "p_value" in row else "-"
        rows.append([row["name"], str(row["num_right"]), str(accuracy["num_seeds"]), *pairs, p])
    note = (
        f"{accuracy['num_seeds']} pictures in batches of {accuracy['batch']} (a cache decides once "
        "for a batch), paired with plain ones of the same seeds; p of the discordant pairs by the "
        "exact binomial test (McNemar)."
    )
    if all(row["num_right"] == accuracy["num_seeds"] for row in accuracy["rows"]):
        note += (
            " All pictures are right in every row: accuracy would show a picture that broke, and "
            "cannot tell these settings apart."
        )
    return note + "\n\n" + table(header, rows)


def model_page(found: Json) -> str:
    """docs/benchmarks/demo-model.md"""
    parts = ["# The trained demo model", *preface(found)]
    stages = [
        [name, ", ".join(f"{key} {_number(value)}" for key, value in stage.items())]
        for name, stage in found["training"].items()
    ]
    parts += ["## Training", table(["stage", "measured"], stages)]
    scores = [
        [f"{s['cfg']:g}", str(s["num"]), f"{100 * s['accuracy']:.1f} %", _by_class(s["by_class"])]
        for s in found["scores"]
    ]
    parts += ["## Accuracy", table(["cfg", "pictures", "right", "by class"], scores)]
    sizes = [[name, f"{size / 1e6:.2f}"] for name, size in found["file_bytes"].items()]
    total = sum(found["file_bytes"].values()) / 1e6
    parts += ["## Files", table(["file", "MB"], [*sizes, ["all", f"{total:.2f}"]])]
    parts.append("![Samples at cfg 3](demo-model.png)")
    return "\n\n".join(parts) + "\n"


def _by_class(scores: Json) -> str:
    return ", ".join(f"{name} {100 * value:.0f}" for name, value in scores.items())


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def preface(found: Json) -> list[str]:
    made = found["environment"]
    versions = [f"torch {made['torch']}"]
    versions += [f"ComfyUI {made['comfyui']}"] if "comfyui" in made else []
    versions += [f"{name} {at}" for name, at in made["packages"].items()]
    device = made["device"] if made["device"] != "cpu" else made["cpu"]
    where = f"{device}, {made['threads']} threads of {made['cores']} cores"
    if made.get("clock") == "cpu":
        where += ", times are processor time (the machine did other work too)"
    return [
        f"Made by `{found['command']}`; regenerate this page from its JSON with "
        "`python bench pages`.",
        f"Commit {made['commit']}, {made['date']}, {where}, load {made['load']} at the start. "
        f"{', '.join(versions)}.",
        *([REHEARSAL] if found.get("rehearsal") else []),
    ]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGES: dict[str, Callable[[Json], str]] = {
    "suite": suite_page,
    "suite-quick": suite_page,
    "full-width": full_width_page,
    "attention": attention_page,
    "quality": quality_page,
    "demo-model": model_page,
}

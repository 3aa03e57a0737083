"""docs/offload.md says what its commands print, and names what exists."""

import json
import re

import comfy_home
from slipstream.backends.offload.config import MODES
from slipstream.bench import offload
from slipstream.bench.offload_arithmetic import CARDS, CASES, row

TEXT = (comfy_home.PACK_ROOT / "docs" / "offload.md").read_text(encoding="utf-8")


def test_table_is_what_the_arithmetic_gives():
    cells = re.findall(
        r"^\| [^|]+ \| ([\d.]+) GB \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) s \| (.+?) \|$",
        TEXT,
        re.M,
    )
    wanted = []
    for case in CASES.values():
        one = row(case)
        hidden = "hidden" if one["prefetch"] <= one["computing"] * 1.01 else "not hidden"
        numbers = (one["computing"], one["per_module"], one["prefetch"])
        wanted.append((f"{one['gigabytes']:.1f}", *(f"{n:.2f}" for n in numbers), hidden))
    assert sorted(cells) == sorted(wanted)


def test_assumed_rates_are_named():
    for name, card in CARDS.items():
        compute, copy = card.compute_rate / 1e12, card.copy_rate / 1e9
        assert re.search(rf"{name}\s+{compute:g}(?: TFLOP/s)? / {copy:g}", TEXT), name


def test_overhead_is_what_was_measured():
    call, block = re.search(
        r"About (\d+) microseconds of Python per model call, and (\d+) per\s+block", TEXT
    ).groups()
    page = comfy_home.PACK_ROOT / "docs" / "benchmarks" / "offload-overhead.json"
    costs = json.loads(page.read_text(encoding="utf-8"))["costs"]
    assert round(max(costs[mode]["median_us"] for mode in ("auto", "speed"))) == int(call)
    assert round(costs["timed_block"]["median_us"]) == int(block)


def test_every_mode_has_a_row():
    assert [mode for mode in MODES if not re.search(rf"^\| {mode} \|", TEXT, re.M)] == []


def test_commands_exist():
    assert "python bench offload --out" in TEXT
    assert offload.MODELS == ("wan", "flux", "qwen")
    assert "./test gpu -k offload" in TEXT

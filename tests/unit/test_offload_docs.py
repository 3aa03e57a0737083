"""docs/offload.md says what its commands print, and names what exists."""

import json
import re

import comfy_home
from slipstream.backends.offload.config import MODES
from slipstream.bench import offload
from slipstream.bench.offload_arithmetic import CARDS, CASES, FITTED, gain, row, verdict

TEXT = (comfy_home.PACK_ROOT / "docs" / "offload.md").read_text(encoding="utf-8")


def test_tables_are_what_the_arithmetic_gives():
    whole = re.findall(
        r"^\| [^|]+ \| ([\d.]+) GB \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) s \| ([a-z ]+) \|$",
        TEXT,
        re.M,
    )
    fitted = re.findall(
        r"^\| [^|]+ \| ([\d.]+) of ([\d.]+) GB \| ([\d.]+) s \| ([\d.]+) s \| ([\d.]+) s \| "
        r"(-?\d+%) \|$",
        TEXT,
        re.M,
    )

    def seconds(one):
        return tuple(f"{one[name]:.2f}" for name in ("computing", "per_module", "prefetch"))

    rows = [row(case) for case in CASES.values()]
    wanted = [(f"{one['gigabytes']:.1f}", *seconds(one), verdict(one)) for one in rows]
    assert sorted(whole) == sorted(wanted)
    rows = [row(case) for case in FITTED.values()]
    wanted = [
        (f"{one['resident']:.1f}", f"{one['gigabytes']:.1f}", *seconds(one), f"{gain(one):.0%}")
        for one in rows
    ]
    assert fitted == wanted


def test_every_size_of_card_has_rows():
    memory = {CARDS[case.card].memory_gb for case in FITTED.values()}
    assert memory == {8, 12, 16}
    for name, case in FITTED.items():
        card = f"RTX {case.card} {CARDS[case.card].memory_gb} GB"
        slot = ", x8" if CARDS[case.card].copy_rate in (12.5e9, 26e9) else ""
        assert f"{card}{slot} |" in TEXT, name


def test_rates_and_where_they_come_from():
    for name, card in CARDS.items():
        compute, copy = card.compute_rate / 1e12, card.copy_rate / 1e9
        source = card.source or "assumed"
        assert f"| {name} | {compute:g} TFLOP/s / {copy:g} GB/s | {source} |" in TEXT, name


def test_says_first_what_the_node_does_not_do():
    first = TEXT.split("\n\n")[1]
    assert first.startswith("**What this node is not.** ComfyUI without any node already keeps")
    assert "4-bit or fp8 file" in first


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

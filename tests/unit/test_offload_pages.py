"""The benchmark pages on offload: what they show, and that nothing is made up without a GPU."""

import copy
import json

import comfy_home
import pytest
import torch
from slipstream.bench import offload, offload_overhead, pages
from slipstream.bench.offload_pages import LINES, offload_page, overhead_page

ENVIRONMENT = {
    "commit": "abc", "date": "2026-01-01", "torch": "2.11", "threads": 1, "cores": 4,
    "cpu": "a cpu", "device": "a gpu", "load": 0.1, "packages": {},
}  # fmt: skip
BENCHMARKS = comfy_home.PACK_ROOT / "docs" / "benchmarks"
MODEL = {
    "model": "flux",
    "manager": "dynamic",
    "copy_rates": [25e9, 3e9],
    "weight_bytes": 24_000_000_000,
    "caps": [
        {"share": 0.5, "resident_bytes": 12_000_000_000, "excess_bytes": -5_000_000},
        {"share": 1.0, "resident_bytes": 24_000_000_000, "excess_bytes": 0, "refilled": 1.0},
    ],
    "times": [
        {"size": "1024", "resident": 0.5, "speed": 0.503, "core": 1.0, "prefetch": 0.8,
         "copying": 0.96, "overlap": 0.69},
    ],
    "equal_bits": True,
    "equal_bits_cached": False,
    "plan": {"predicted": 0.6, "measured": 0.75, "error": 0.2},
    "flat": {"runs": 20, "growth_bytes": {"ram": 1_000_000, "pinned": 0, "device": 0}},
}  # fmt: skip
FAILED = {"model": "wan", "manager": "classic", "error": "no CUDA"}


def result(*models):
    made = {"command": "python bench offload", "environment": ENVIRONMENT}
    return copy.deepcopy({**made, "models": list(models)})


@pytest.mark.parametrize(
    "line",
    [
        "python bench offload",
        "## flux, dynamic memory management",
        "24.0 GB of weights; copies 25.0 GB/s from pinned RAM, 3.0 GB/s from pageable RAM.",
        "| 50% | 12.00 | -5 |",
        "| 1024 | 0.960 | 0.500 | 0.503 | 1.000 | 0.800 | +20.0% | 69% |",
        "| at least 15% shorter | flux, dynamic | +20.0% | met |",
        "| plan within 10% | flux, dynamic | 20.0% | **missed** |",
        "| under 1% if nothing is offloaded | flux, dynamic | +0.6% | met |",
        "equal bits with three seeds: yes; with a cache: **no**",
        "growth over 20 runs: ram +1 MB",
        "## wan, classic memory management\n\nFailed: no CUDA",
    ],
)
def test_gpu_page_shows_gains_misses_and_failures(line):
    assert line in offload_page(result(MODEL, FAILED))


def test_video_is_held_against_comfyui_not_against_a_gain():
    video = MODEL | {"model": "wan", "times": [MODEL["times"][0] | {"prefetch": 1.02}]}
    assert "| never slower than ComfyUI's streaming | wan, dynamic | -2.0% | met |" in offload_page(
        result(video)
    )
    slower = MODEL | {"model": "wan", "times": [MODEL["times"][0] | {"prefetch": 1.05}]}
    assert "-5.0% | **missed** |" in offload_page(result(slower))


def test_json_and_page_are_written_together(tmp_path):
    assert offload.write(tmp_path / "out", [MODEL, FAILED])
    found = json.loads((tmp_path / "out" / "offload.json").read_text("utf-8"))
    assert found["models"][0]["weight_bytes"] == MODEL["weight_bytes"]
    assert found["command"] == "python bench offload --out docs/benchmarks"
    assert pages.stale(tmp_path / "out") == []  # `python bench pages` writes the same


def test_nothing_is_written_where_nothing_was_measured(tmp_path, capsys):
    assert not offload.write(tmp_path, [FAILED])
    assert list(tmp_path.iterdir()) == []
    assert "nothing was measured" in capsys.readouterr().out


def test_page_is_unverified_until_it_exists():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if "`python bench offload --out" in line]
    assert ("unverified" in row) == (not (BENCHMARKS / "offload.json").is_file())


@pytest.mark.host
def test_without_a_gpu_the_measurement_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = offload.measure("wan", "classic")
    if not found["error"].startswith("ComfyUI not found"):
        assert found["error"] == offload.NO_GPU
    assert offload.lines(found)[1].startswith("  failed:")


def test_overhead_is_that_of_a_run_that_offload_has_taken(monkeypatch):
    monkeypatch.setattr(offload_overhead, "CALLS", 20)
    found = offload_overhead.measure(3)
    assert set(found) == set(LINES)
    assert found["run"]["median_us"] > 0
    for mode, reason in (("off", "mode is off"), ("speed", None), ("auto", None)):
        run = offload_overhead.settled_run(mode)
        assert run.states["offload"].outcome.reason == reason
    page = overhead_page(
        {"command": "python bench offload_overhead", "environment": ENVIRONMENT, "costs": found}
    )
    assert all(line in page for line in LINES.values())
    assert "**unverified**" in page

"""Every page of docs/benchmarks is its JSON, and the renderers show losses and absences."""

import copy
import json

import pytest
from slipstream.bench import pages, tables


def test_every_page_is_what_its_json_says():
    assert pages.rendered(), "docs/benchmarks holds no measurement"
    assert pages.stale() == []


def test_a_typed_number_is_caught(tmp_path):
    for path, text in pages.rendered().items():
        source = path.with_suffix(".json")
        (tmp_path / source.name).write_text(source.read_text("utf-8"), "utf-8")
        (tmp_path / path.name).write_text(text, "utf-8")
    assert pages.stale(tmp_path) == []
    page = next(iter(tmp_path.glob("*.md")))
    page.write_text(page.read_text("utf-8").replace("1", "2", 1), "utf-8")
    assert pages.stale(tmp_path) == [page.name]


def test_every_page_names_its_command_and_machine():
    for path, text in pages.rendered().items():
        found = json.loads(path.with_suffix(".json").read_text("utf-8"))
        assert found["command"] in text
        assert found["environment"]["torch"] in text


ENVIRONMENT = {
    "commit": "abc",
    "date": "2026-01-01",
    "torch": "2.11",
    "threads": 1,
    "cores": 4,
    "cpu": "a cpu",
    "device": "cpu",
    "load": 0.1,
    "packages": {},
}


def side(name, median, **more):
    speed = {"median": median, "low": median - 0.1, "high": median + 0.1, "num_pairs": 5}
    made = {"name": name, "owner": "slipstream", "speed": speed, "verdict": "slower"}
    made |= {"identical": False, "latent_rel_l2": 0.1, "total_duration_ms": 10.0}
    return made | more


SUITE = {
    "command": "python bench suite",
    "environment": ENVIRONMENT,
    "subjects": [
        {
            "name": "a model",
            "about": "some steps",
            "num_rounds": 5,
            "noise_band": [0.95, 1.05],
            "sides": [side("a loss", 0.5)],
            "failed": {"a broken one": "RuntimeError: why"},
            "not_measured": {"an absent one": "needs a GPU"},
        }
    ],
}


@pytest.mark.parametrize(
    "line",
    [
        "| a loss | slipstream | 0.50x |",
        "slower",
        "- a broken one: RuntimeError: why",
        "needs a GPU",
    ],
)
def test_losses_failures_and_absences_are_shown(line):
    assert line in tables.suite_page(copy.deepcopy(SUITE))


def test_without_a_gpu_the_attention_page_is_unverified():
    found = {"command": "python bench attention_kernels", "environment": ENVIRONMENT, "shapes": []}
    page = tables.attention_page(found)
    assert "**Unverified**" in page
    assert "python bench attention_kernels" in page

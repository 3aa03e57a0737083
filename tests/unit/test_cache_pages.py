"""The cache's benchmark pages show failures, changes and absences as what they are."""

import json

from comfy_home import PACK_ROOT
from slipstream.bench import cache_pages

FOLDER = PACK_ROOT / "docs" / "benchmarks"


def found(name):
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def test_decisions_cost_at_most_100_microseconds_and_half_ratio_saves_1_8x():
    numbers = found("cache")
    assert max(us for name, us in numbers["decision_us"].items() if name != "with cache-dit") < 100
    auto = [row for row in numbers["strategies"] if row["strategy"] == "auto"]
    assert {row["family"] for row in auto} == {"flux", "wan"}
    assert all(row["fewer"] >= 1.8 for row in auto)


def test_beside_the_other_packs_ours_leaves_the_model_alone_and_keeps_split_branches_right():
    ours = [row for row in found("cache-peers")["sides"] if row["side"].startswith("Slipstream")]
    assert len(ours) == 2
    for row in ours:
        assert row["unnoded_equal"]
        assert row["attributes_left"] == 0
        assert row["error_split"] < 1.5 * row["error_batched"]


def test_a_changed_model_and_a_failure_cannot_be_overlooked():
    page = found("cache-peers")
    page["sides"] = [
        {"side": "a", "family": "flux", "failed": "ImportError: gone"},
        {**page["sides"][0], "side": "b", "unnoded_equal": False, "repeats": False},
    ]
    text = cache_pages.peers_page(page)
    assert "- a, flux: ImportError: gone" in text
    assert "**changed**" in text
    assert "**another image**" in text

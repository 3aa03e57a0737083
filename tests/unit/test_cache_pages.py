"""The cache's benchmark pages show failures, changes and absences as what they are."""

import json

from comfy_home import PACK_ROOT
from slipstream.backends.cache.config import MAX_THRESHOLD, CacheConfig
from slipstream.backends.cache.strategy import EXTRAPOLATED_THRESHOLD
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


def test_the_guide_shows_the_measured_table_and_the_ratio_table_of_the_code():
    guide = (PACK_ROOT / "docs" / "caching.md").read_text("utf-8")
    page = cache_pages.peers_page(found("cache-peers"))
    rows = [line for line in page.splitlines() if line.startswith(("| ", "- "))]
    assert len(rows) > 12
    assert [row for row in rows if row not in guide] == []

    configs = [CacheConfig.from_ratio(ratio) for ratio in (0, 0.25, 0.5, 0.75, 1)]
    plain = [c.residual_diff_threshold for c in configs]
    extrapolated = [min(EXTRAPOLATED_THRESHOLD * one, MAX_THRESHOLD) for one in plain]
    thresholds, doubled = (
        " | ".join(f"{one:.2f}"[1:] for one in row) for row in (plain, extrapolated)
    )
    streaks = " | ".join(str(c.max_continuous_cached_steps) for c in configs)
    shares = " | ".join(f"{c.compute_share + 1e-9:.2f}"[1:] for c in configs)
    intervals = " | ".join(str(c.deep_interval) for c in configs)
    for row in (thresholds, doubled, streaks, shares, intervals):
        assert f"| {row} |" in guide

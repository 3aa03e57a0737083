"""Goals are held against what was measured: met and missed as found, never typed."""

import pytest
from slipstream.bench.goals import DEFAULT, goals


def point(name, speed, psnr_db):
    return {"name": name, "psnr_db": psnr_db, "speed": {"median": speed}}


def curve(points, title="ours"):
    return {"part": "cache", "title": title, "points": points}


@pytest.mark.parametrize(
    ("speed", "psnr_db", "expected"),
    [(1.5, 32, "met"), (1.49, 40, "missed"), (2, 31.9, "missed")],
)
def test_default_settings(speed, psnr_db, expected):
    found = {"curves": [curve([point(DEFAULT, speed, psnr_db)])]}
    assert goals(found)[0][1] == expected


def test_the_best_policy_is_named():
    others = [point("fast and bad", 3, 10), point("fast and good", 1.7, 28), point("slow", 1, 50)]
    found = {"curves": [curve([point(DEFAULT, 1, 40), *others])]}
    _, met, said = goals(found)[1]
    assert met == "met"
    assert "fast and good" in said


def test_no_policy_is_good_enough():
    found = {"curves": [curve([point(DEFAULT, 1.2, 40), point("fast and bad", 3, 10)])]}
    assert goals(found)[1][1] == "missed"


def test_cores_caches_are_not_ours():
    core = curve([point("EasyCache", 3, 60)], title="EasyCache and LazyCache")
    found = {"curves": [curve([point(DEFAULT, 1, 40)]), core]}
    assert goals(found)[1][1] == "missed"


@pytest.mark.parametrize(
    ("plain", "calibrated", "expected"),
    [(28, 31, ["met", "met"]), (31, 28.5, ["met", "missed"]), (27, 27.5, ["missed", "met"])],
)
def test_svdquant(plain, calibrated, expected):
    points = [
        {"name": "rounding", "psnr_db": 26},
        {"name": "rank 8", "psnr_db": plain},
        {"name": "rank 8, calibrated", "psnr_db": calibrated},
    ]
    title = "SVDQuant: int4 weights, 4-bit inputs"
    found = {"curves": [{"part": "svdquant", "title": title, "points": points}]}
    assert [row[1] for row in goals(found)] == expected

"""The timing cache on disk: shared between starts, never trusted when it is damaged."""

import json

import pytest
import torch
from slipstream.backends.attention.request import Request
from slipstream.backends.attention.timings import (
    FILE_NAME,
    Timings,
    bucket,
    measure_ms,
    shape_key,
)

REQUEST = Request(
    device_type="cuda", dtype="float16", batch=1, heads=24, kv_heads=24, q_tokens=4608,
    k_tokens=4608, head_dim=128,
)  # fmt: skip
VERSIONS = {"torch": "2.11.0"}


def test_kept_between_starts_apart_by_device_and_version(tmp_path):
    first = Timings(tmp_path, "H100", VERSIONS)
    first.put(REQUEST, "cudnn", 1.25)
    assert first.save() is None
    again = Timings(tmp_path, "H100", VERSIONS)
    assert again.get(REQUEST, "cudnn") == 1.25
    assert again.get(REQUEST, "sage2") is None
    assert Timings(tmp_path, "4090", VERSIONS).get(REQUEST, "cudnn") is None
    assert Timings(tmp_path, "H100", {"torch": "2.12.0"}).get(REQUEST, "cudnn") is None
    other = Timings(tmp_path, "4090", VERSIONS)
    other.put(REQUEST, "cudnn", 3.0)
    other.save()
    assert Timings(tmp_path, "H100", VERSIONS).get(REQUEST, "cudnn") == 1.25
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"format": 9}', '{"format": 1, "timings": {"H100": 3}}',
        '{"format": 1, "timings": {"H100": {"x": {"cudnn": "fast"}}}}',
        '{"format": 1, "timings": {"H100": {"x": {"cudnn": -1}}}}',
    ],
)  # fmt: skip
def test_damaged_file_is_written_anew(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    timings = Timings(tmp_path, "H100", VERSIONS)
    assert timings.get(REQUEST, "cudnn") is None
    timings.put(REQUEST, "cudnn", 2.0)
    assert timings.save() is None
    assert json.loads((tmp_path / FILE_NAME).read_text())["format"] == 1
    assert Timings(tmp_path, "H100", VERSIONS).get(REQUEST, "cudnn") == 2.0


def test_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    timings = Timings(blocker / "folder", "H100", VERSIONS)
    timings.put(REQUEST, "cudnn", 2.0)
    assert "could not be saved" in timings.save()
    assert blocker.read_text() == ""


def test_near_shapes_share_a_timing():
    assert bucket(4608) == bucket(4600)
    assert bucket(4608) != bucket(5300)
    assert all(n <= bucket(n) <= n * 1.2 + 1 for n in range(1, 100000, 37))
    masked = shape_key(REQUEST).replace("none", "bias")
    assert masked != shape_key(REQUEST)


def test_measure_on_a_cpu_counts_warm_up_and_repeats():
    calls = []
    ms = measure_ms(lambda: calls.append(0), torch.device("cpu"))
    assert len(calls) == 4
    assert ms >= 0

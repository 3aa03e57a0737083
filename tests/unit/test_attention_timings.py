"""The timing cache on disk: shared between starts, never trusted when it is damaged."""

import json
from dataclasses import replace

import pytest
from slipstream.backends.attention.request import Request
from slipstream.backends.attention.timings import (
    FILE_NAME,
    FORMAT,
    Timings,
    bucket,
    machine_key,
    shape_key,
)

REQUEST = Request(
    device_type="cuda", dtype="float16", batch=1, heads=24, kv_heads=24, q_tokens=4608,
    k_tokens=4608, head_dim=128, value_dim=128, device_name="H100",
)  # fmt: skip
ELSEWHERE = replace(REQUEST, device_name="4090")
VERSIONS = {"torch": "2.11.0"}


def test_kept_between_starts_apart_by_device_and_version(tmp_path):
    first = Timings(tmp_path, VERSIONS)
    first.put(REQUEST, "cudnn", 1.25)
    assert first.get(REQUEST, "cudnn") == 1.25
    assert first.save() is None
    again = Timings(tmp_path, VERSIONS)
    assert again.get(REQUEST, "cudnn") == 1.25
    assert again.get(REQUEST, "sage2") is None
    assert again.get(ELSEWHERE, "cudnn") is None
    assert Timings(tmp_path, {"torch": "2.12.0"}).get(REQUEST, "cudnn") is None
    other = Timings(tmp_path, VERSIONS)
    other.put(ELSEWHERE, "cudnn", 3.0)
    other.save()
    assert Timings(tmp_path, VERSIONS).get(REQUEST, "cudnn") == 1.25
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_an_update_of_comfyui_keeps_them(tmp_path):
    first = Timings(tmp_path, {**VERSIONS, "comfyui": "0.33.0"})
    first.put(REQUEST, "cudnn", 1.25)
    first.save()
    assert Timings(tmp_path, {**VERSIONS, "comfyui": "0.46.0"}).get(REQUEST, "cudnn") == 1.25
    assert "comfyui" not in machine_key("H100", {**VERSIONS, "comfyui": "0.33.0"})


def test_measured_anew_on_request(tmp_path):
    first = Timings(tmp_path, VERSIONS)
    first.put(REQUEST, "cudnn", 1.25)
    first.put(REQUEST, "sage2", 0.8)
    first.save()
    again = Timings(tmp_path, VERSIONS, forget=True)
    assert again.get(REQUEST, "cudnn") is None
    again.put(REQUEST, "cudnn", 2.5)
    again.save()
    assert Timings(tmp_path, VERSIONS).get(REQUEST, "cudnn") == 2.5


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"format": 1, "timings": {}}', '{"format": 2, "timings": {"H100": 3}}',
        '{"format": 2, "timings": {"H100": {"x": {"cudnn": "fast"}}}}',
        '{"format": 2, "timings": {"H100": {"x": {"cudnn": -1}}}}',
    ],
)  # fmt: skip
def test_damaged_file_is_written_anew(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    timings = Timings(tmp_path, VERSIONS)
    assert timings.get(REQUEST, "cudnn") is None
    timings.put(REQUEST, "cudnn", 2.0)
    assert timings.save() is None
    assert json.loads((tmp_path / FILE_NAME).read_text())["format"] == FORMAT
    assert Timings(tmp_path, VERSIONS).get(REQUEST, "cudnn") == 2.0


def test_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    timings = Timings(blocker / "folder", VERSIONS)
    timings.put(REQUEST, "cudnn", 2.0)
    assert "could not be saved" in timings.save()
    assert blocker.read_text() == ""


def test_near_shapes_share_a_timing():
    assert bucket(4608) == bucket(4600)
    assert bucket(4608) != bucket(5300)
    assert all(n <= bucket(n) <= n * 1.2 + 1 for n in range(1, 100000, 37))


@pytest.mark.parametrize(
    "other",
    [
        {"mask": "bias", "mask_dims": "bk"},
        {"mask": "bias", "mask_dims": "bhqk"},
        {"value_dim": 64},
        {"has_scale": True},
        {"dtype": "bfloat16"},
        {"kv_heads": 8},
    ],
)
def test_what_a_kernel_cares_about_is_in_the_key(other):
    keys = {shape_key(REQUEST), shape_key(replace(REQUEST, **other))}
    keys.add(shape_key(replace(REQUEST, mask="bias", mask_dims="qk")))
    assert len(keys) == 3

"""The suite's JSON: names of SGLang-Diffusion's perf dump; the recorded quick run kept its time."""

import itertools
import json

import torch
from slipstream.bench import pages, perf_dump, suite, tables
from slipstream.bench.trained import Sampled

# What dump_benchmark_report writes (sgl-project/sglang, multimodal_gen, perf_logger.py).
DUMP = {
    "timestamp", "request_id", "commit_hash", "tag", "total_duration_ms", "steps",
    "denoise_steps_ms", "memory_checkpoints", "meta",
}  # fmt: skip
MEMORY = {"allocated_mb", "reserved_mb", "peak_allocated_mb", "peak_reserved_mb"}
MADE = {"date": "2026-01-01T00:00:00+00:00", "commit": "abc", "clock": "cpu"}


def dumped():
    runs = [Sampled(torch.zeros(1), seconds, (10.0, 20.0)) for seconds in (0.03, 0.04, 0.08)]
    return perf_dump.perf_dump(runs, request_id="a model: plain", made=MADE)


def test_a_side_has_the_fields_of_a_perf_dump():
    found = dumped()
    assert found.keys() == DUMP == set(perf_dump.FIELDS)
    assert found["total_duration_ms"] == 40.0
    assert found["steps"] == [{"name": "DenoisingStage", "duration_ms": 40.0}]
    assert found["denoise_steps_ms"] == [
        {"step": 0, "duration_ms": 10.0},
        {"step": 1, "duration_ms": 20.0},
    ]
    assert (found["commit_hash"], found["timestamp"]) == ("abc", MADE["date"])
    assert found["meta"] == {"num_runs": 3, "clock": "cpu"}


def test_memory_is_named_as_there(monkeypatch):
    assert perf_dump.memory_checkpoints() == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 << 20)
        monkeypatch.setattr(torch.cuda, f"max_{name}", lambda: 5 << 20)
    found = perf_dump.memory_checkpoints()["after_DenoisingStage"]
    assert found.keys() == MEMORY
    assert (found["allocated_mb"], found["peak_reserved_mb"]) == (3.0, 5.0)


def test_the_recorded_suites_have_those_fields():
    found = [json.loads(path.read_text("utf-8")) for path in pages.FOLDER.glob("suite*.json")]
    recorded = [one for one in found if one["schema"] >= 2]
    assert recorded
    for subject in itertools.chain.from_iterable(one["subjects"] for one in recorded):
        for side in subject["sides"]:
            assert side.keys() >= DUMP, (subject["name"], side["name"])
            assert side["denoise_steps_ms"][0].keys() == {"step", "duration_ms"}


def test_the_recorded_quick_run_took_at_most_10_minutes_on_2_cores():
    found = json.loads((pages.FOLDER / "suite-quick.json").read_text("utf-8"))
    assert found["quick"]
    assert "--only" not in found["command"]
    assert found["environment"]["cores"] == 2
    assert found["seconds"] <= 600
    assert f"Took {found['seconds']:.0f} s" in tables.suite_page(found)


def part(name, num_rounds):
    return {
        "name": name,
        "about": "one side",
        "num_rounds": num_rounds,
        "noise_band": [0.9, 1.1],
        "sides": [],
        "not_measured": {},
        "failed": {},
        "seconds": 1.0,
    }


def test_ctrl_c_within_a_subject_keeps_its_rounds_and_ends_the_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "save", lambda found, out: None)
    done = []

    def measured(name, num_rounds):
        done.append(name)
        return part(name, 3 if name == "second" else num_rounds)

    planned = [(lambda name=name: name, 8) for name in ("first", "second", "third")]
    found = {"subjects": []}
    assert not suite.run(found, planned, measured, tmp_path)
    assert done == ["first", "second"]
    assert [one["num_rounds"] for one in found["subjects"]] == [8, 3]
    assert found["interrupted"] == "stopped with 2 of 3 subjects measured, second in 3 rounds"


def test_ctrl_c_before_anything_is_measured_saves_nothing(tmp_path):
    def measured(subject, num_rounds):
        raise KeyboardInterrupt

    found = {"subjects": []}
    assert not suite.run(found, [(lambda: "first", 8)], measured, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "0 of 1 subjects" in found["interrupted"]

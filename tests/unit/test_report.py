"""Fingerprints, which run a latent belongs to, text and JSON."""

import dataclasses
import json

import pytest
import torch
from slipstream.backends.report import (
    NO_RUN,
    NO_TECHNIQUE,
    OTHER_LATENT,
    Report,
    RunRecord,
    Section,
    fingerprint,
    report_on,
)
from slipstream.backends.run import RunLog


def latent(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (1, 16, 32, 32), generator=torch.Generator().manual_seed(seed))


def record(samples: torch.Tensor | None = None, **changes) -> RunRecord:
    base = RunRecord(
        id=1,
        num_steps=4,
        num_evaluations=8,
        num_calls=8,
        seconds=2.0,
        loading_s=0.5,
        device="cpu",
        model="Flux",
        versions={"torch": "2.11.0"},
        completed=True,
        notes={},
        sections={},
        result=fingerprint(samples) if samples is not None else (),
    )
    return dataclasses.replace(base, **changes)


class Nested:
    """ComfyUI's NestedTensor as far as a report touches it (LTX-AV: video and audio)."""

    is_nested = True

    def __init__(self, *parts: torch.Tensor):
        self.parts = parts

    def unbind(self):
        return self.parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 50.0])
def test_cast_latent_matches_its_run_and_another_seed_does_not(dtype, scale):
    run = record(latent(1) * scale)
    assert run.made(fingerprint((latent(1) * scale).to(dtype)))
    assert not run.made(fingerprint((latent(2) * scale).to(dtype)))


def test_other_size_and_edited_latent_do_not_match():
    run = record(latent(1, 1, 4, 8, 8))
    assert not run.made(fingerprint(latent(1, 1, 4, 16, 16)))
    assert not run.made(fingerprint(latent(1, 1, 4, 8, 8) * 1.1))
    assert not record(None).made(fingerprint(latent(1)))


def test_fingerprint_reads_all_of_a_small_latent_and_the_end_of_a_large_one():
    small = latent(1, 1, 1, 4, 4)
    changed = small.clone()
    changed[..., -1, -1] += 5
    assert not record(small).made(fingerprint(changed))
    large = latent(1)
    late = large.clone()
    late[:, 8:] = 0
    assert not record(large).made(fingerprint(late))


def test_fingerprint_of_nan_and_of_nothing():
    assert fingerprint(torch.full((1, 4, 2, 2), float("nan"))) == (0.0,) * 16
    assert fingerprint(torch.zeros(0, 4)) == ()


def test_nested_latent_matches_the_packed_result_of_its_run():
    video, audio = latent(1, 1, 8, 3, 4, 4), latent(2, 1, 8, 20, 16)
    packed = torch.cat([video.reshape(1, 1, -1), audio.reshape(1, 1, -1)], -1)
    run = record(packed)
    assert run.made(fingerprint(Nested(video, audio)))
    assert not run.made(fingerprint(Nested(video, latent(3, 1, 8, 20, 16))))


def test_report_finds_the_run_of_an_older_latent():
    log = RunLog()
    log.add(record(latent(1), id=1))
    log.add(record(latent(2), id=2))
    assert report_on(log, latent(1)).record.id == 1
    assert report_on(log, latent(2)).record.id == 2
    assert report_on(log, latent(1)).remark == ""


def test_report_of_an_unknown_latent_shows_the_latest_run_and_says_so():
    log = RunLog()
    log.add(record(latent(1), id=5))
    report = report_on(log, latent(9))
    assert report.record.id == 5
    assert report.text.splitlines()[0] == OTHER_LATENT
    assert "Run 5" in report.text
    assert json.loads(report.json_text)["remark"] == OTHER_LATENT


@pytest.mark.parametrize(("log", "sentence"), [(None, NO_TECHNIQUE), (RunLog(), NO_RUN)])
def test_report_without_a_run_is_a_sentence(log, sentence):
    report = report_on(log, latent(1))
    assert report.text == sentence
    assert json.loads(report.json_text) == {"schema": 1, "run": None, "remark": sentence}


def test_json_contract():
    section = Section({"calls": {"math": 8}}, ("Attention: 8 calls",))
    run = record(latent(1), sections={"attention": section}, notes={"it fell back": 3})
    assert json.loads(Report(run).json_text) == {
        "schema": 1,
        "run": {
            "id": 1,
            "steps": 4,
            "evaluations": 8,
            "model_calls": 8,
            "seconds": 2.0,
            "loading_seconds": 0.5,
            "device": "cpu",
            "model": "Flux",
            "completed": True,
            "versions": {"torch": "2.11.0"},
            "notes": {"it fell back": 3},
        },
        "attention": {"calls": {"math": 8}},
    }


def test_json_has_no_nan():
    section = Section({"rel_l1": float("nan"), "layers": [{"ms": float("inf")}], "n": 1.5})
    found = Report(record(sections={"cache": section})).json_text
    assert "NaN" not in found
    assert "Infinity" not in found
    assert json.loads(found)["cache"] == {"rel_l1": None, "layers": [{"ms": None}], "n": 1.5}


def test_text_has_the_run_every_line_and_counted_notes():
    section = Section({}, ("Attention: 8 calls", "  mask (2 calls)"))
    run = record(sections={"attention": section}, notes={"once": 1, "often": 4})
    assert Report(run).text.splitlines() == [
        "Run 1: Flux on cpu, 4 steps (8 evaluations), 2.00 s, 0.375 s per step",
        "Attention: 8 calls",
        "  mask (2 calls)",
        "once",
        "often (4 times)",
    ]
    assert "did not finish" in Report(record(completed=False)).text
    assert Report(record(num_steps=0)).text.startswith("Run 1")

"""The memory section from tables of snapshots: what is said, and to whom."""

import json
import sys

import pytest
from slipstream.backends.memory import host
from slipstream.backends.memory.section import (
    GIB,
    LoadedModel,
    MemoryUse,
    could_stay,
    gib,
    merged,
    section,
)


def model(name="Flux", kind="diffusion model", total=10.0, loaded=10.0, **more):
    fields = {"key": hash(name), "device": "cuda:0", "pinned_bytes": 0, **more}
    return LoadedModel(
        name=name, kind=kind, total_bytes=int(total * GIB), loaded_bytes=int(loaded * GIB), **fields
    )


def use(*models, peak=12.0, total=24.0, reserve=0.0, flags=()):
    return MemoryUse(
        device="cuda:0",
        total_bytes=int(total * GIB),
        reserve_bytes=int(reserve * GIB),
        stages={"load": int(5 * GIB), "sampling": int(peak * GIB), "decode": None},
        models=models,
        flags=frozenset(flags),
    )


def test_headroom_is_what_was_left_at_the_fullest():
    assert use(peak=12, reserve=2).headroom_bytes == 10 * GIB
    assert use(peak=30).headroom_bytes == 0


@pytest.mark.parametrize(
    ("one", "flags", "how"),
    [
        (model(loaded=4, is_sampled=True, is_capped=True), (), "set Slipstream Layer Offload to "),
        (model("T5", "text encoder", 9, 0, on_cpu=True), (), "it runs on the CPU: choose the"),
        (model("KL", "VAE", 1, 0, on_cpu=True), ("--cpu-vae",), "start ComfyUI without --cpu-vae"),
        (model(loaded=4), ("--novram",), "start ComfyUI without --novram"),
        (model(loaded=4), ("--lowvram",), "start ComfyUI without --lowvram"),
        (model(loaded=4), ("--disable-smart-memory",), "start ComfyUI without --disable-smart-mem"),
        (model(loaded=4), ("--reserve-vram",), "give --reserve-vram less"),
        (model(loaded=4), (), "start ComfyUI with --highvram"),
        (model(loaded=4, is_dynamic=True), ("--lowvram",), "nothing to set: ComfyUI loads it"),
    ],
)
def test_what_makes_it_resident(one, flags, how):
    (found,) = could_stay(use(one, flags=flags))
    assert found.how.startswith(how)
    assert found.needed_bytes == one.offloaded_bytes


def test_budget_that_would_do():
    (found,) = could_stay(use(model(total=11.87, loaded=4, is_capped=True)))
    assert "mode auto with vram_budget_gb 11.9 or more" in found.how


def test_only_what_fits_together_the_sampled_model_first():
    sampled = model("Wan", loaded=2, is_sampled=True)  # 8 GiB missing
    text = model("T5", "text encoder", 5, 0, on_cpu=True)
    vae = model("KL", "VAE", 1, 0)
    names = [r.model.name for r in could_stay(use(text, vae, sampled, peak=12))]
    assert names == ["Wan", "KL"]  # 12 GiB of headroom: 8 and 1, but not 5 more
    names = [r.model.name for r in could_stay(use(text, vae, sampled, peak=20))]
    assert names == ["KL"]


def test_nothing_to_say():
    assert could_stay(use(model())) == []
    assert could_stay(use(model(total=1, loaded=1 - 1e-5))) == []  # kilobytes do not count
    assert could_stay(use(model(loaded=4), peak=24)) == []


def test_models_gone_since_the_start_count_as_offloaded():
    before = [model("T5", "text encoder", 9, 9, pinned_bytes=5), model("Flux", loaded=0)]
    after = [model("Flux", loaded=10)]
    flux, text = merged(before, after)
    assert flux.loaded_bytes == 10 * GIB
    assert (text.name, text.loaded_bytes, text.pinned_bytes) == ("T5", 0, 0)
    assert text.offloaded_bytes == 9 * GIB


def test_json_and_lines():
    made = section(use(model(loaded=4, is_sampled=True, pinned_bytes=3 * GIB)))
    fields = json.loads(json.dumps(made.json))
    assert fields["peak_bytes"] == 12 * GIB
    assert fields["stages"] == {"load": 5 * GIB, "sampling": 12 * GIB, "decode": None}
    (one,) = fields["models"]
    assert (one["resident_bytes"], one["streamed_bytes"]) == (4 * GIB, 6 * GIB)
    assert one["pinned_bytes"] == 3 * GIB
    (stays,) = fields["could_stay_resident"]
    assert stays["name"] == "Flux"
    assert stays["bytes"] == 6 * GIB
    assert made.lines == (
        "memory: peak 12.0 of 24.0 GiB (load 5.00, sampling 12.0)",
        "  Flux (diffusion model, cuda:0): 10.0 GiB, 4.00 resident, 6.00 offloaded, 3.00 pinned",
        "  Flux could stay resident: start ComfyUI with --highvram, which keeps whole models on "
        "the device",
    )


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("cpu", "memory: the model runs on the CPU, so there is no VRAM to count"),
        ("mps", "memory: mps has no counters of device memory"),
    ],
)
def test_a_device_without_counters(device, line):
    stages = dict.fromkeys(("load", "sampling", "decode"))
    one = model(on_cpu=device == "cpu", device=device)
    made = section(
        MemoryUse(device=device, total_bytes=None, reserve_bytes=0, stages=stages, models=(one,))
    )
    assert made.json["peak_bytes"] is None
    assert made.json["could_stay_resident"] == []
    assert made.lines[0] == line


def test_without_comfyui_nothing_is_loaded_or_reserved(monkeypatch):
    monkeypatch.delitem(sys.modules, "comfy", raising=False)
    monkeypatch.delitem(sys.modules, "comfy.cli_args", raising=False)
    assert host.loaded_models(None) == []
    assert host.reserve_bytes() == 0
    assert host.start_flags() == frozenset()


def test_precision_of_sizes():
    assert [gib(size) for size in (0, 2**20, 9 * GIB, 123 * GIB)] == [
        "0.00",
        "0.00",
        "9.00",
        "123.0",
    ]

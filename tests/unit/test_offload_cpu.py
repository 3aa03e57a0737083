"""The node where there is nothing to offload, on the stand-in: nothing changes, and it says why."""

import logging

import fake_patcher
import pytest
import torch
from slipstream.backends import conflicts, host
from slipstream.backends.offload.apply import apply_offload
from slipstream.backends.offload.config import MODES, OffloadConfig, OffloadError
from slipstream.backends.run import Run, attached, run_log
from slipstream.bench.offload_overhead import RoomyPatcher

CPU_REASON = "the model runs on the CPU: there is no VRAM to budget"


def noise():
    return torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_changes_and_the_report_says_why(mode):
    model = fake_patcher.FakePatcher()
    plain = fake_patcher.sample(model, noise(), steps=3)
    patched = apply_offload(model, OffloadConfig(mode=mode, vram_budget_gb=1.0))
    assert fake_patcher.sample(patched, noise(), steps=3).equal(plain)
    record = run_log(patched).latest()
    section = record.to_json()["offload"]
    assert section["mode"] == mode
    assert section["reason"] == ("mode is off" if mode == "off" else CPU_REASON)
    assert section["plan"] is None
    assert record.sections["offload"].lines == (f"offload: nothing done, {section['reason']}",)


def test_input_is_left_alone_and_a_second_application_replaces_the_first():
    model = fake_patcher.FakePatcher()
    before = (model.model_options, model.wrappers, model.callbacks, dict(model.attachments))
    first = apply_offload(model, OffloadConfig(mode="speed"))
    second = apply_offload(first, OffloadConfig(mode="memory"))
    assert (model.model_options, model.wrappers, model.callbacks, model.attachments) == before
    assert attached(model) == {}
    assert attached(first)["offload"].config.mode == "speed"
    assert attached(second)["offload"].config.mode == "memory"
    for kind in ("apply_model", "prepare_sampling"):
        assert len(second.get_wrappers(kind, "slipstream.offload")) == 1


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("SLIPSTREAM_DISABLE", "offload")
    patched = apply_offload(fake_patcher.FakePatcher(), OffloadConfig(mode="speed"))
    fake_patcher.sample(patched, noise(), steps=2)
    record = run_log(patched).latest()
    assert "offload" not in record.sections
    assert "memory" in record.sections


def test_memory_section_without_device_counters():
    patched = apply_offload(fake_patcher.FakePatcher(), OffloadConfig())
    fake_patcher.sample(patched, noise(), steps=2)
    memory = run_log(patched).latest().to_json()["memory"]
    assert memory["peak_bytes"] is None
    assert memory["could_stay_resident"] == []


@pytest.mark.parametrize(
    ("device", "offload_device", "reason"),
    [
        ("cpu", "cpu", CPU_REASON),
        ("mps", "cpu", "this device shares its memory with the CPU"),
        ("cuda", "cuda", "ComfyUI was started with --highvram or --gpu-only"),
    ],
)
@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_manual_without_vram_is_a_note(caplog, device, offload_device, reason, budget):
    """Workflows travel: what another machine needs is no error on this one."""
    model = fake_patcher.FakePatcher()
    model.load_device, model.offload_device = torch.device(device), torch.device(offload_device)
    with caplog.at_level(logging.INFO, "slipstream"):
        patched = apply_offload(model, OffloadConfig(mode="manual", vram_budget_gb=budget))
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"Slipstream Layer Offload: nothing to do, {reason}")
    state = attached(patched)["offload"].start(Run(patched, torch.tensor([1.0, 0.0]), {}))
    assert state.outcome.reason.startswith(reason)


class Large(RoomyPatcher):
    def model_size(self):
        return 3 << 30


def test_manual_on_an_accelerator_needs_a_budget():
    sentence = r"mode manual needs vram_budget_gb above 0; this model's weights are 3\.00 GiB\."
    with pytest.raises(OffloadError, match=sentence):
        apply_offload(Large(), OffloadConfig(mode="manual"))


class FSDPModule:
    """torch gives sharded networks this base."""


class Sharded(FSDPModule, fake_patcher.FakeNet):
    pass


class Foreign(fake_patcher.FakeNet):
    pass


Foreign.__module__ = "custom_nodes.ComfyUI-nunchaku.wrappers.flux"


def distorch(model):
    model.model._distorch_v2_meta = {}


def network(cls):
    return lambda model: setattr(model.model, "diffusion_model", cls())


@pytest.mark.parametrize(
    ("feature", "change"),
    [("distorch2", distorch), ("fsdp", network(Sharded)), ("nunchaku_pack", network(Foreign))],
)
def test_packs_that_move_weights_themselves_are_refused(feature, change):
    model = fake_patcher.FakePatcher()
    assert feature not in host.features(model)
    change(model)
    assert feature in host.features(model)
    patched = apply_offload(model, OffloadConfig())
    with pytest.raises(conflicts.ConflictError, match="remove Slipstream Layer"):
        fake_patcher.sample(patched, noise(), steps=2)

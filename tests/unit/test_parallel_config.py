"""Settings: every sentence, every layout of up to eight processes and forty heads, devices."""

import pytest
import torch
from slipstream.parallel import model_facts
from slipstream.parallel.config import (
    ParallelError,
    SequenceParallelConfig,
    choose_devices,
    choose_layout,
)
from slipstream.parallel.cost import Measured, advice, estimate
from slipstream.parallel.mesh import Layout

TWO = ["cuda:0", "cuda:1"]


def config(**fields):
    return SequenceParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"workers": -1}, "workers is -1: choose 0 (automatic) to 64."),
        ({"cfg": 3}, "cfg is 3: choose 0 (automatic) to 2."),
        ({"timeout_s": 0}, "timeout_s is 0: choose a number above 0."),
        ({"idle_s": -1}, "idle_s is -1: choose 0 (never) or more."),
        (
            {"workers": 3, "cfg": 2, "ulysses": 2, "ring": 1},
            "cfg 2 x ulysses 2 x ring 1 is 4 processes, but workers is 3. "
            "Set one of them to 0 (auto) or workers to 4.",
        ),
        (
            {"workers": 4, "ulysses": 3},
            "ulysses 3 is 3 processes, but workers is 4. "
            "Set one of them to 0 (auto) or workers to 3.",
        ),
        (
            {"workers": 4, "devices": "cuda:0,cuda:1"},
            "devices names 2 devices for 4 workers. Name 4, or leave it empty.",
        ),
        (
            {"devices": "cuda:0, cuda:0"},
            "devices names cuda:0 twice; NCCL allows one process per GPU. "
            "Name another, or lower workers.",
        ),
        ({"devices": "mps"}, "devices: 'mps' is not cpu or cuda:0, cuda:1, ..."),
    ],
)
def test_mistakes_get_a_sentence(fields, sentence):
    with pytest.raises(ParallelError) as caught:
        config(**fields)
    assert str(caught.value) == sentence


def test_json_round_trip():
    one = config(workers=4, devices="cpu,cpu,cpu,cpu", ulysses=2, timeout_s=5)
    assert config(**one.to_json()) == one


@pytest.mark.parametrize(
    ("fields", "found", "own", "expected"),
    [
        ({}, TWO, "cuda:0", ("cuda:0", "cuda:1")),
        ({}, TWO, "cuda:1", ("cuda:1", "cuda:0")),
        ({}, ["cuda:0"], "cuda:0", ("cuda:0",)),
        ({}, [], "cpu", ("cpu",)),
        ({"workers": 1}, TWO, "cuda:0", ("cuda:0",)),
        ({"workers": 2}, [*TWO, "cuda:2"], "cuda:0", ("cuda:0", "cuda:1")),
        ({"devices": "cpu,cpu"}, [], "cpu", ("cpu", "cpu")),
        ({"devices": "CUDA:0 , cuda:1"}, TWO, "cuda:0", ("cuda:0", "cuda:1")),
    ],
)
def test_devices(fields, found, own, expected):
    assert choose_devices(config(**fields), found=found, alike=found, own=own) == expected


@pytest.mark.parametrize(
    ("fields", "found", "own", "sentence"),
    [
        (
            {"devices": "cuda:0,cuda:3"}, TWO, "cuda:0",
            "devices: 'cuda:3' does not exist here (found cuda:0, cuda:1).",
        ),
        (
            {"devices": "cuda:1,cuda:0"}, TWO, "cuda:0",
            "devices starts with cuda:1, but ComfyUI has this model on cuda:0: put cuda:0 first.",
        ),
        (
            {"workers": 4}, TWO, "cuda:0",
            "workers is 4, but cuda:0, cuda:1 is all there is here. Lower workers, "
            "or name devices ('cpu' may repeat).",
        ),
    ],
)  # fmt: skip
def test_devices_that_are_not_there(fields, found, own, sentence):
    with pytest.raises(ParallelError) as caught:
        choose_devices(config(**fields), found=found, alike=found, own=own)
    assert str(caught.value) == sentence


UNLIKE = ["NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 4090"]


@pytest.fixture
def unlike_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", UNLIKE.__getitem__)
    monkeypatch.setattr(model_facts, "num_installed_gpus", lambda: 2)


def test_unlike_gpus_share_where_they_are_named(unlike_gpus):
    found, alike = model_facts.gpus(torch.device("cuda:0"))
    named = config(devices="cuda:0,cuda:1")
    assert choose_devices(named, found=found, alike=alike, own="cuda:0") == ("cuda:0", "cuda:1")
    assert choose_devices(config(), found=found, alike=alike, own="cuda:0") == ("cuda:0",)
    with pytest.raises(
        ParallelError, match=r"workers is 2, but cuda:0 is all .* \(cuda:1: another"
    ):
        choose_devices(config(workers=2), found=found, alike=alike, own="cuda:0")
    assert model_facts.why_one_device(torch.device("cuda:0")).endswith(
        "To use unlike GPUs name them: devices cuda:0, cuda:1"
    )


@pytest.mark.parametrize(("system", "what"), [("nt", "--cuda-device all"), ("posix", "hidden")])
def test_hidden_gpus_are_told(monkeypatch, system, what):
    """On Windows ComfyUI shows itself one GPU; elsewhere --cuda-device does."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(model_facts, "num_installed_gpus", lambda: 3)
    monkeypatch.setattr(model_facts, "is_windows", lambda: system == "nt")
    sentence = model_facts.why_one_device(torch.device("cuda:0"))
    assert what in sentence
    assert " 2 " in sentence


def test_other_accelerators_are_not_shared():
    assert "not xpu" in model_facts.why_one_device(torch.device("xpu:0"))
    assert model_facts.why_one_device(torch.device("cpu")).endswith("as without the node")


def test_installed_gpus_are_counted(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'; echo 'GPU 1: B (UUID: y)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert model_facts.num_installed_gpus() == 2
    monkeypatch.setenv("PATH", "")
    assert model_facts.num_installed_gpus() == 0


@pytest.mark.parametrize("num_conds", [1, 2])
@pytest.mark.parametrize("world", range(2, 9))
def test_automatic_layouts(world, num_conds):
    """All processes are used, cfg comes first, and Ulysses has as many ranks as heads allow."""
    for heads in range(1, 41):
        layout = choose_layout(config(), world=world, num_conds=num_conds, num_heads=heads)
        assert layout.world == world
        assert layout.cfg == (2 if num_conds == 2 and world % 2 == 0 else 1)
        assert layout.ulysses <= max(heads, 1)
        larger = range(layout.ulysses + 1, min(heads, layout.ranks) + 1)
        assert not any(layout.ranks % u == 0 for u in larger)


def test_layout_of_chosen_degrees():
    def layout(num_conds=2, world=4, **fields):
        return choose_layout(config(**fields), world=world, num_conds=num_conds, num_heads=40)

    assert layout(ulysses=2) == Layout(cfg=2, ulysses=2)
    assert layout(ulysses=4) == Layout(ulysses=4), "no room left for cfg"
    assert layout(ring=2) == Layout(cfg=2, ring=2)
    assert layout(cfg=1) == Layout(ulysses=4)
    assert layout(cfg=1, ring=2) == Layout(ulysses=2, ring=2)
    assert layout(ulysses=2, ring=2) == Layout(ulysses=2, ring=2)
    assert layout(cfg=2, num_conds=1) == Layout(ulysses=2), "half of them have nothing to do"
    assert layout(num_conds=1, ulysses=2) == Layout(ulysses=2, ring=2)
    assert str(Layout(cfg=2, ulysses=2)) == "batch 1 x cfg 2 x ulysses 2 x ring 1"


def measured(**changes):
    fields = {
        "total_s": 1.0, "exchange_s": 0.1, "broadcast_s": 0.0, "bytes_sent": 10**8,
        "tokens": 4096, "link_bytes_per_s": 1e9,
    }  # fmt: skip
    return Measured(**{**fields, **changes})


def test_sharing_that_pays_needs_no_advice():
    found = estimate(measured(), Layout(ulysses=2))
    assert found.one_s == pytest.approx(1.8)
    assert found.speedup == pytest.approx(1.8)
    assert advice(measured(), Layout(ulysses=2)) is None


def test_sharing_that_does_not_pay_is_said():
    slow = measured(exchange_s=0.8, bytes_sent=8 * 10**8)
    assert estimate(slow, Layout(ulysses=2)).speedup < 1
    assert advice(slow, Layout(ulysses=2)) == (
        "One device would be about 2.5 times as fast as batch 1 x cfg 1 x ulysses 2 x ring 1: 4096 "
        "tokens send 800 MB a call at 1.0 GB/s, which is 80% of its time"
    )


def test_waiting_for_a_slow_rank_does_not_count_as_a_slow_link():
    waiting = measured(exchange_s=0.8, bytes_sent=10**6)
    assert estimate(waiting, Layout(ulysses=2)).speedup == pytest.approx(0.4 / 0.201)

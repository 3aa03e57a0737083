"""Sequence parallel's benchmark: its page, its goals, and what the ceiling's shares compute."""

import argparse
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from slipstream.bench import parallel, parallel_ceiling, parallel_page
from slipstream.bench.parallel_models import SUBJECTS, inputs_of
from slipstream.parallel import batch
from slipstream.parallel.mesh import Layout, Mesh

ENVIRONMENT = {
    "commit": "abc", "date": "2026-01-01", "torch": "2.11", "threads": 1, "cores": 4,
    "cpu": "a cpu", "device": "cpu", "load": 0.1, "packages": {},
}  # fmt: skip


def row(speed, ceiling, goal=1.7):
    seconds = {"compute": 0.93, "exchange": 0.06, "broadcast": 0.01}
    report = {"layout": str(Layout(ulysses=2)), "seconds": seconds}
    found = {
        "devices": "cpu,cpu", "speed": {"median": speed, "low": 1.5, "high": 1.9, "num_pairs": 5},
        "goal": goal, "verdict": "faster", "noise": [0.95, 1.05], "report": report,
        "stolen": 0.07,
    }  # fmt: skip
    return found | ({"ceiling": {"median": ceiling}} if ceiling else {})


@pytest.mark.parametrize(
    ("speed", "ceiling", "said"),
    [
        (1.7, 1.8, "met"),
        (1.69, 1.8, "missed"),
        (1.69, None, "missed"),
        (1.5, 1.6, "missed (beyond this machine)"),
    ],
)
def test_goals_are_held_against_what_was_measured(speed, ceiling, said):
    assert parallel_page.met(row(speed, ceiling)) == said


def test_the_page_shows_losses_shares_and_the_ceiling():
    found = {
        "command": "python bench parallel", "environment": ENVIRONMENT, "model": "a Wan",
        "rows": [row(1.69, 1.82)],
    }  # fmt: skip
    text = parallel_page.parallel_page(found)
    for words in ("| missed |", "| 1.82x |", "| 6.0% |", "| 1.0% |", "| 7% |", "**unverified**"):
        assert words in text
    found["rows"] = [row(1.9, None, goal=None)]
    assert "Ceiling" not in parallel_page.parallel_page(found)


def test_time_that_the_host_of_a_virtual_machine_took():
    kind = namedtuple("times", "user nice system idle iowait irq softirq steal")
    before, after = kind(10, 0, 2, 50, 0, 0, 0, 1), kind(16, 1, 4, 99, 9, 9, 9, 2)
    assert parallel.stolen_share(before, after) == pytest.approx(0.1)
    without = namedtuple("times", "user system idle")
    assert parallel.stolen_share(without(1, 1, 1), without(2, 2, 2)) == 0


def test_the_default_subject_has_the_tokens_that_the_goal_asks_for():
    assert SUBJECTS["wan-small"].num_tokens == 8192
    assert replace(SUBJECTS["wan-small"], frames=13).num_tokens == 4096
    assert "8,192 tokens" in str(SUBJECTS["wan-small"])


def test_the_command_repeats_the_measurement():
    fields = {
        "devices": None, "model": "wan-small", "frames": None, "prompt": None,
        "rounds": parallel.NUM_ROUNDS, "steps": parallel.NUM_STEPS, "batch": 1,
    }  # fmt: skip
    command = parallel._command(argparse.Namespace(**fields))
    assert command == "python bench parallel --out docs/benchmarks"
    given = fields | {"devices": ["cpu,cpu"], "frames": 13}
    command = parallel._command(argparse.Namespace(**given))
    assert command == "python bench parallel --devices cpu,cpu --frames 13 --out docs/benchmarks"
    command = parallel._command(argparse.Namespace(**fields | {"rounds": 4, "steps": 6}))
    assert command == "python bench parallel --rounds 4 --steps 6 --out docs/benchmarks"


@pytest.mark.parametrize("model", ["sdxl", "flux", "wan"])
def test_a_batch_of_a_subject(model):
    subject = replace(SUBJECTS[model], batch=3)
    inputs = inputs_of(subject)
    assert batch.rows(inputs) == 3
    assert all(value.shape[0] == 3 for value in inputs.values())
    assert str(subject).endswith("batch of 3")
    assert subject.latent_node[1]["batch_size"] == 3


def test_shares_of_a_batch_are_its_rows():
    seen = []

    def network(x, transformer_options):
        seen.append(x.flatten().tolist())

    inputs = {"x": torch.arange(3.0).view(3, 1)}
    for rank in range(2):
        parallel_ceiling.share(network, inputs, rank, 2)()
    parallel_ceiling.share(network, inputs, 0, 1)()
    assert seen == [[0, 1], [2], [0, 1, 2]]


def test_a_silent_group_has_the_shapes_of_a_real_one():
    mesh = Mesh(Layout(ulysses=2), 1, "share", parallel_ceiling.Silence)
    rows = torch.ones(1, 3, 4, 8)
    received = mesh.heads.exchange(rows.split(2, 2), [(1, 4, 2, 8), (1, 3, 2, 8)])
    assert received.joined(1).shape == (1, 7, 2, 8)
    assert mesh.gather(rows, (4, 3), 1, leader_only=True) is None

"""What the report says of a run under a budget: what was in force, and nothing that was not."""

import json

import pytest
from slipstream.backends.offload.config import GIB, OffloadConfig
from slipstream.backends.offload.plan import Forecast, OffloadPlan, all_resident
from slipstream.backends.offload.section import Outcome, write
from slipstream.backends.offload.trial import Setting

HIDDEN = OffloadPlan(
    resident_bytes=3 * GIB,
    resident_blocks=(1, 4),
    depth=1,
    forecast=Forecast(seconds=1.0, stall_seconds=0.0),
    why="copies hide behind computing",
)
OWNER = "LTXAVModel streams its own blocks"


def lines(mode, **fields):
    outcome = Outcome(
        manager="classic", resident_bytes=4 * GIB, streamed_bytes=8 * GIB, pinned_bytes=0, **fields
    )
    return write(OffloadConfig(mode=mode), outcome).lines


@pytest.mark.parametrize(
    ("mode", "fields", "line"),
    [
        ("memory", {"is_plan_in_force": True}, "plan: 3.00 GiB resident, 1 block ahead: copies"),
        ("auto", {"is_plan_in_force": True}, "plan: 3.00 GiB resident, 1 block ahead: copies"),
        ("manual", {}, "plan for prefetch, not used: 3.00 GiB resident, 1 block ahead: copies"),
        ("speed", {}, "best with prefetch: 3.00 GiB resident, 1 block ahead: copies"),
        (
            "memory",
            {"is_plan_in_force": True, "no_prefetch": OWNER},
            "plan: 3.00 GiB resident, estimated as if blocks were copied ahead: copies hide",
        ),
    ],
)
def test_plan_is_called_what_it_is(mode, fields, line):
    found = [one for one in lines(mode, plan=HIDDEN, **fields) if one.startswith(f"  {line}")]
    assert len(found) == 1


@pytest.mark.parametrize("mode", ["auto", "speed", "manual"])
def test_no_plan_for_prefetch_where_there_is_none(mode):
    text = "\n".join(lines(mode, plan=HIDDEN, no_prefetch=OWNER, prefetch_gain=0.5))
    assert "ahead" not in text
    assert "could save" not in text
    assert ("no block prefetch" in text) == (mode != "auto")


STAGED, LESS = Setting(prefetches=True), Setting(resident_bytes=GIB)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"verdict": "kept", "gain": 0.214, "tried": STAGED},
            "block prefetch: tried and kept, a model call is 21.4% shorter",
        ),
        (
            {"verdict": "undone", "gain": -0.01, "tried": STAGED},
            "block prefetch: tried and undone, a model call was 1.0% longer",
        ),
        (
            {"verdict": "undone", "gain": -0.05, "tried": LESS},
            "holding fewer weights, the device is too full: tried and undone, a model call was "
            "5.0% longer",
        ),
        (
            {"verdict": "not comparable", "tried": STAGED},
            "block prefetch: tried and undone, no two steps did the same work to compare",
        ),
        (
            {"verdict": "kept before", "gain": 0.2, "tried": STAGED},
            "block prefetch: from the first step on, an earlier run measured calls 20.0% shorter",
        ),
        (
            {"verdict": "undone before", "gain": 0.01, "tried": STAGED},
            "block prefetch: not tried, an earlier run measured calls 1.0% shorter",
        ),
        (
            {"verdict": "too few steps", "prefetch_gain": 0.2, "num_steps": 4},
            "block prefetch: could save up to 20% of a step (estimated), not tried in 4 steps",
        ),
    ],
)
def test_auto_says_what_it_tried(fields, line):
    assert lines("auto", plan=HIDDEN, **fields)[-1] == f"  {line}"


@pytest.mark.parametrize("fields", [{}, {"verdict": "too few steps"}, {"prefetch_gain": 0.01}])
def test_auto_is_silent_where_nothing_was_expected(fields):
    assert len(lines("auto", plan=HIDDEN, **fields)) == 1


def test_undone_plan():
    text = "\n".join(lines("memory", plan=HIDDEN, is_rolled_back=True))
    assert "the plan was tried and undone: it made a step over 3 % longer" in text


def test_all_resident_measures_no_copies():
    text = "\n".join(lines("speed", plan=all_resident([]), measured_step_seconds=0.5))
    assert "offload gains nothing here, off is as fast" in text
    assert "GB/s" not in text
    assert "waiting" not in text


def test_copies_and_times():
    fields = {"copy_rates": (25e9, 3e9), "measured_step_seconds": 0.5, "stall_seconds": 0.1}
    found = lines("manual", predicted_step_seconds=0.45, budget_bytes=6 * GIB, depth=2, **fields)
    assert found == (
        "offload: manual, classic, budget 6.00 GiB: 4.00 GiB resident, 8.00 streamed, "
        "2 blocks ahead, buffers 0.00",
        "  step 0.500 s, predicted 0.450 s, 0.100 s of it waiting for copies",
        "  copies: 25.0 GB/s from pinned RAM, 3.0 else, measured",
    )


def test_json_has_the_fields_that_programs_read():
    section = write(OffloadConfig(mode="memory"), Outcome(manager="dynamic", plan=HIDDEN))
    found = json.loads(json.dumps(section.json))
    wanted = {"mode", "budget_bytes", "resident_bytes", "streamed_bytes", "stall_seconds", "plan"}
    assert wanted | {"predicted_step_seconds", "measured_step_seconds"} <= set(found)
    assert found["plan"]["resident_blocks"] == [1, 4]

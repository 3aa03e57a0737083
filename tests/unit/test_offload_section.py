"""What the report says of a run under a budget: what was in force, and nothing that was not."""

import json

import pytest
from slipstream.backends.offload.config import GIB, OffloadConfig
from slipstream.backends.offload.plan import Forecast, OffloadPlan, all_resident
from slipstream.backends.offload.section import Outcome, write

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
        ("auto", {}, "plan for prefetch, not used: 3.00 GiB resident, 1 block ahead: copies"),
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

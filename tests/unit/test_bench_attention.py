"""`python bench attention_kernels`: the GPU path on a faked GPU, crashes, time's end, resuming."""

import json
import os
import subprocess
import sys

import comfy_home
import pytest
import torch
from slipstream.backends.attention.kernels.table import KERNELS
from slipstream.bench import attention_kernels, pages
from slipstream.bench.tables import REHEARSAL

FAKED = comfy_home.PACK_ROOT / "tests" / "faked_gpu.py"
OF_TORCH = ("cudnn", "flash_sdpa", "efficient")  # the faked GPU computes their operators


def on_faked_gpu(*arguments):
    command = [sys.executable, str(FAKED), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    done = on_faked_gpu("attention_kernels", "--rehearse", "--repeats", "2", "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_kernel_has_an_answer_for_every_shape(measured):
    found = json.loads((measured / "attention.json").read_text("utf-8"))
    assert found["environment"]["device"] != "cpu"
    assert [part["name"] for part in found["shapes"]] == list(attention_kernels.REHEARSED)
    for part in found["shapes"]:
        assert attention_kernels.known_of(part) == KERNELS.keys()
        rows = {row["id"]: row for row in part["kernels"]}
        assert rows.keys() >= set(OF_TORCH)
        for row in rows.values():
            assert row["ms"] > 0
            assert row["finite"]
            assert row["rel_l1"] < 0.01
        assert [row["ms"] for row in part["kernels"]] == sorted(r["ms"] for r in rows.values())


def test_its_page_is_what_the_json_says(measured):
    assert pages.stale(measured) == []
    page = (measured / "attention.md").read_text("utf-8")
    assert REHEARSAL in page
    assert all(f"## {name}" in page for name in attention_kernels.REHEARSED)
    assert all(f"| {name} | exact |" in page for name in OF_TORCH)


def options(**changed):
    fields = {"repeats": 1, "rehearse": False} | changed
    return type("Options", (), fields)()


def answering(tmp_path, monkeypatch, text):
    """A child that runs `text`, with `say` to answer and `known` as it was told."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        f"mark, ids = {attention_kernels.MARK!r}, {list(KERNELS)!r}\n"
        "known = set(sys.argv[sys.argv.index('--known') + 1].split(','))\n"
        "say = lambda **said: print(mark + json.dumps(said), flush=True)\n"
        "row = lambda id: say(id=id, category='exact', ms=1.0)\n"
        "left = [id for id in ids if id not in known]\n" + text
    )
    monkeypatch.setattr(
        attention_kernels, "command", lambda name, *rest: [sys.executable, str(script), *rest]
    )


def test_a_kernel_that_takes_its_process_down_is_a_line_and_the_rest_is_measured(
    tmp_path, monkeypatch
):
    answering(tmp_path, monkeypatch, (
        "for id in left:\n"
        "    say(id=id)\n"
        "    if id == 'efficient':\n"
        "        print('an illegal memory access', file=sys.stderr, flush=True)\n"
        "        os.abort()\n"
        "    row(id)\n"
    ))  # fmt: skip
    part = attention_kernels.empty_shape("Flux", (1, 1, 1, 1, 1))
    assert attention_kernels.fill(part, options(), float("inf"))
    assert part["failed"] == {"efficient": "an illegal memory access"}
    assert {row["id"] for row in part["kernels"]} == KERNELS.keys() - {"efficient"}


def test_a_process_that_measures_nothing_ends_it_with_its_last_words(tmp_path, monkeypatch):
    answering(tmp_path, monkeypatch, "sys.exit('no such GPU')\n")
    part = attention_kernels.empty_shape("Flux", (1, 1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="Flux: nothing was measured: no such GPU"):
        attention_kernels.fill(part, options(), float("inf"))


def test_what_is_measured_already_is_not_measured_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = {"commit": "a", "torch": "b", "device": "c", "driver": "d", "packages": {},
            "date": "today", "threads": 1, "cores": 1, "cpu": "x", "load": 0}  # fmt: skip
    monkeypatch.setattr(attention_kernels, "environment", lambda: dict(made))
    monkeypatch.setattr(sys, "argv", ["x", "--resume", "--seconds", "0", "--out", str(tmp_path)])
    assert attention_kernels.main() == 1  # the time is up at once
    assert "--resume goes on" in capsys.readouterr().err
    saved = json.loads((tmp_path / "attention.json").read_text("utf-8"))
    assert [part["kernels"] for part in saved["shapes"]] == [[]] * len(attention_kernels.SHAPES)
    for part in saved["shapes"]:
        part["not_measured"] = dict.fromkeys(KERNELS, "for a reason")
    (tmp_path / "attention.json").write_text(json.dumps(saved), "utf-8")
    assert attention_kernels.main() == 0
    kept = json.loads((tmp_path / "attention.json").read_text("utf-8"))
    assert kept["shapes"] == saved["shapes"]
    made["torch"] = "another"  # nothing of another version stands beside it
    assert attention_kernels.main() == 1

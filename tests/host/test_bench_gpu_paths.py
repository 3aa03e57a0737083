"""Every GPU path of bench/ on a faked GPU (fake_cuda.py), as `python bench NAME` runs it.

Numbers mean nothing here; that each writes the JSON and the page that it promises does.
"""

import json
import math
import os
import subprocess
import sys

import pytest
from comfy_home import PACK_ROOT
from patience import patience
from slipstream.backends.attention.kernels.table import POLICIES
from slipstream.bench import gpu_parts, pages
from slipstream.bench.gpu_page import DONE
from slipstream.bench.offload_steps import SHARES
from slipstream.bench.paired import AGAIN, BASELINE
from slipstream.bench.tables import REHEARSAL

FAKED = PACK_ROOT / "tests" / "faked_gpu.py"
GPU = "NVIDIA Faked GPU"
# `./test full host` walks one more of each kind, and in a test of its own all of them.
CHOSEN = ("steps-flux", "svdquant-layers")
LONGER = ("svdquant-flux", "offload-flux-classic")


def run(comfy, *arguments):
    command = [sys.executable, str(FAKED), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(comfy)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, check=False, timeout=900 * patience()
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def read(folder, name):
    found = json.loads((folder / f"{name}.json").read_text("utf-8"))
    assert found["environment"]["device"] == GPU
    assert found["rehearsal"]
    assert REHEARSAL in (folder / f"{name}.md").read_text("utf-8")
    return found


@pytest.fixture(scope="module")
def chosen(request):
    return (*CHOSEN, *LONGER) if request.config.getoption("--full") else CHOSEN


@pytest.fixture(scope="module")
def hour(comfy, tmp_path_factory, chosen):
    """What `python bench gpu` wrote and said, of the chosen parts."""
    folder = tmp_path_factory.mktemp("gpu")
    said = run(comfy, "gpu", "--rehearse", "--only", ",".join(chosen), "--out", folder)
    return folder, said


# The parts call "full_width", "svdquant_layers", "svdquant_flux", "offload" and "gpu_preflight".


def test_the_hour_does_every_part_and_says_so(hour, chosen):
    folder, said = hour
    parts = read(folder, "gpu")["parts"]
    assert {name: row["state"] for name, row in parts.items()} == dict.fromkeys(chosen, DONE)
    planned = {part.name: part for part in gpu_parts.parts()}
    for name in chosen:
        assert f"{name}: {planned[name].title}" in said
        assert all((folder / file).is_file() for file in planned[name].files)
        assert (folder / "logs" / f"{name}.log").is_file()
    assert f"In {folder}: " in said
    assert GPU in said.splitlines()[0]
    assert pages.stale(folder) == []


def test_full_width_has_a_row_for_plain_and_each_technique(hour):
    found = read(hour[0], "full-width")
    (subject,) = found["subjects"]
    assert subject["model"] == "flux"
    assert "needs a GPU" not in json.dumps(subject["not_measured"])
    rows = {side["name"]: side for side in subject["sides"]}
    ours = {f"attention, {policy}" for policy in POLICIES} | {"cache, ratio 0.5"}
    assert rows.keys() >= {BASELINE, AGAIN, "EasyCache", "layer offload, auto"} | ours
    assert not {name for name in subject["failed"] if "INT8" not in name}  # it needs a real GPU
    for side in rows.values():
        assert side["speed"]["median"] > 0
        assert len(side["denoise_steps_ms"]) == 12
        assert side["memory_checkpoints"]
        assert math.isfinite(side["latent_rel_l2"])
    assert rows["layer offload, auto"]["identical"]
    page = (hour[0] / "full-width.md").read_text("utf-8")
    assert all(f"| {name} |" in page for name in rows)


def test_svdquant_layers_have_a_line_per_backend(hour):
    lines = read(hour[0], "svdquant-layers")["lines"]
    measured = [line for line in lines if "ms" in line]
    backends = {line["backend"] for line in measured}
    assert {"bf16 Linear", "kitchen", "kitchen, tiles", "dequant"} <= backends
    assert all(line["peak_bytes"] > 0 for line in measured)
    by_backend = {line["backend"]: line["error"] for line in measured}
    assert by_backend["bf16 Linear"] < 0.01 < by_backend["kitchen"] < 0.2
    assert not [line for line in lines if "failed" in line.get("reason", "")]


@pytest.mark.full
def test_a_step_of_flux_is_measured_with_each_backend(hour):
    rows = {row["backend"]: row for row in read(hour[0], "svdquant-flux")["rows"]}
    assert rows.keys() == {"bf16", "kitchen", "dequant"}
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["peak_bytes"] >= row["weight_bytes"]
    assert rows["kitchen"]["weight_bytes"] < rows["bf16"]["weight_bytes"]


@pytest.mark.full
def test_offload_is_measured_at_every_budget(hour):
    (one,) = read(hour[0], "offload")["models"]
    assert (one["model"], one["manager"]) == ("flux", "classic")
    assert [cap["share"] for cap in one["caps"]] == [*SHARES, 1.0]
    resident = [cap["resident_bytes"] for cap in one["caps"][:-1]]
    assert resident == sorted(resident)
    assert resident[0] < resident[-1] == one["weight_bytes"]
    assert one["equal_bits"]
    assert one["equal_bits_cached"]
    assert all(each["core"] > 0 and each["prefetch"] > 0 for each in one["times"])


WHERE = f"""
import sys
sys.path.insert(0, {str(PACK_ROOT / "tests")!r})
import comfy_home, fake_cuda
comfy_home.load_pack()
fake_cuda.start()
from slipstream.bench.environment import environment
from slipstream.bench.trained import TrainedModel
model = TrainedModel().model
print(model.load_device, environment()["device"])
"""


def test_the_trained_model_runs_on_the_gpu(comfy):
    """The suite and quality sample it: ComfyUI was told to stay on the CPU there once."""
    done = subprocess.run(
        [sys.executable, "-c", WHERE], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(comfy)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == [f"cuda:0 {GPU}"], done.stderr[-2000:]


@pytest.mark.full
def test_the_suite_measures_on_the_gpu(comfy, tmp_path):
    run(comfy, "suite", "--quick", "--rehearse", "--only", "attention, exact", "--out", tmp_path)
    found = read(tmp_path, "suite-quick")
    assert len(found["subjects"]) == 2
    for subject in found["subjects"]:
        assert [side["name"] for side in subject["sides"]] == [BASELINE, AGAIN, "attention, exact"]
        for side in subject["sides"]:
            (memory,) = side["memory_checkpoints"].values()
            assert memory["peak_allocated_mb"] > 1, "nothing was on the GPU"
    assert pages.stale(tmp_path) == []


def test_the_doctor_sees_the_gpu(comfy):
    said = run(comfy, "doctor")
    assert f"cuda:0: {GPU}, compute capability 9.0" in said
    assert "workers 0: 1 processes on cuda:0" in said


@pytest.mark.full
def test_all_parts_of_the_hour(comfy, tmp_path):
    run(comfy, "gpu", "--rehearse", "--minutes", "60", "--out", tmp_path)
    parts = read(tmp_path, "gpu")["parts"]
    planned = gpu_parts.rehearsed(gpu_parts.parts())
    assert {name: row["state"] for name, row in parts.items()} == {p.name: DONE for p in planned}
    assert pages.stale(tmp_path) == []


@pytest.mark.full
def test_quality_is_measured_on_the_gpu(comfy, tmp_path):
    run(comfy, "quality", "--parts", "attention", "--num-seeds", "1", "--out", tmp_path)
    found = json.loads((tmp_path / "quality.json").read_text("utf-8"))
    assert found["environment"]["device"] == GPU
    assert found["curves"]
    assert pages.stale(tmp_path) == []

"""`python bench gpu`: its plan, time, failures, resuming, Ctrl-C, and what it says."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import comfy_home
import pytest
import torch
from slipstream.bench import children, gpu, gpu_parts, gpu_preflight, in_process, pages
from slipstream.bench.gpu_page import DONE, FAILED, LEFT
from slipstream.bench.gpu_parts import Part

BENCH = comfy_home.PACK_ROOT / "bench"
ENVIRONMENT = {
    "commit": "abc", "date": "2026-01-01", "torch": "2.11", "threads": 1, "cores": 4,
    "cpu": "a cpu", "device": "a gpu", "driver": "1", "load": 0.1, "packages": {},
}  # fmt: skip
HERE = {"environment": ENVIRONMENT, "missing": {"sage2": "sageattention 2.x is not installed"}}


def part(name, **changed):
    fields = {"title": f"the part {name}", "arguments": (name,), "estimate_s": 1, "limit_s": 60}
    return Part(name, **fields | changed)


@pytest.fixture
def hour(tmp_path, monkeypatch):
    """hour(parts, *words) -> the exit code; a part runs tmp_path/NAME.py."""

    def command(name, *rest):
        return [sys.executable, str(tmp_path / f"{name}.py"), *rest]

    monkeypatch.setattr(gpu_parts, "command", command)
    here = json.loads(json.dumps(HERE))
    monkeypatch.setattr(gpu_preflight, "ask", lambda: here)

    def run(parts, *words, **changed):
        here.update(changed)
        monkeypatch.setattr(gpu_parts, "parts", lambda: list(parts))
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out"), *words])
        return gpu.main()

    run.write = lambda name, text: (tmp_path / f"{name}.py").write_text(text)
    run.json = lambda: json.loads((tmp_path / "out" / "gpu.json").read_text("utf-8"))
    run.folder = tmp_path / "out"
    return run


COUNTED = (
    "import pathlib, sys\n"
    "p = pathlib.Path(sys.argv[sys.argv.index('--out') + 1], 'count')\n"
    "p.write_text(str(int(p.read_text()) + 1) if p.exists() else '1')\n"
)


def test_what_is_done_is_not_done_twice_and_what_failed_is_tried_again_last(hour, capsys):
    hour.write("first", COUNTED)
    hour.write("broken", "import sys\nprint('half way')\nsys.exit('a kernel that does not start')")
    hour.write("last", "import time\n")
    parts = [part("broken"), part("first"), part("last")]
    assert hour(parts) == 1
    states = {name: row["state"] for name, row in hour.json()["parts"].items()}
    assert states == {"first": DONE, "broken": FAILED, "last": DONE}
    row = hour.json()["parts"]["broken"]
    assert row["why"] == "exit code 1: a kernel that does not start"
    assert row["log"] == ["half way", "a kernel that does not start"]
    said = capsys.readouterr().out
    assert "Failed:\n  broken" in said
    assert "goes on with what is not done" in said
    hour.write("broken", "print('now it works')")
    assert hour(parts) == 0
    said = capsys.readouterr().out
    assert said.index("last: done before") < said.index("broken: the part broken")
    assert (hour.folder / "count").read_text() == "1"
    assert hour(parts, "--again") == 0
    assert (hour.folder / "count").read_text() == "2"


def test_another_gpu_starts_anew(hour, capsys):
    hour.write("first", COUNTED)
    hour([part("first")])
    hour([part("first")], environment=ENVIRONMENT | {"device": "another gpu"})
    assert "Another GPU" in capsys.readouterr().out
    assert (hour.folder / "count").read_text() == "2"


def test_a_crash_leaves_the_rest(hour):
    hour.write("crash", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    hour.write("next", "pass")
    assert hour([part("crash"), part("next")]) == 1
    found = hour.json()["parts"]
    assert found["crash"]["why"] == "ended by signal 11: it said nothing"
    assert found["next"]["state"] == DONE


def test_a_part_is_ended_at_its_limit_with_all_that_it_started(hour):
    hour.write("slow", (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "(out / 'pid').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    ))  # fmt: skip
    started = time.monotonic()
    assert hour([part("slow", limit_s=2)]) == 1
    assert time.monotonic() - started < 30
    assert hour.json()["parts"]["slow"]["why"] == "ended after 2 s, its limit"
    pid = int((hour.folder / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_does_not_fit_is_left_with_the_sentence(hour, capsys):
    hour.write("short", "pass")
    parts = [part("long", estimate_s=120), part("short", estimate_s=0.5)]
    assert hour(parts, "--minutes", "0.5") == 1
    found = hour.json()["parts"]
    assert found["short"]["state"] == DONE
    assert found["long"]["state"] == LEFT
    assert found["long"]["why"].startswith("needs about 120 s, ")
    assert "Not done:\n  long" in capsys.readouterr().out


def test_seconds_for_those_that_take_them():
    timed = part("kernels", is_timed=True).command(Path("x"), 100, rehearse=False)
    assert timed[-4:] == ["--out", "x", "--seconds", "60"]
    assert "--seconds" not in part("other").command(Path("x"), 100, rehearse=False)


def test_a_missing_package_is_named(hour):
    error = "ComfyUI imports it: bring it"
    hour.write("needs", "import torchsde_that_is_not_there\n")
    hour.write("other", "pass")
    assert hour([part("needs"), part("other", needs_comfyui=True)], comfyui_error=error) == 1
    found = hour.json()["parts"]
    assert "the package torchsde_that_is_not_there is not installed" in found["needs"]["why"]
    assert found["other"] == {"state": LEFT, "title": "the part other", "why": error}
    assert error in (hour.folder / "gpu.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("No module named 'torchsde'", "the package torchsde is not installed"),
        ("No module named 'comfy_api.latest'", "the ComfyUI here has no comfy_api/latest"),
        ("No module named 'folder_paths'", "the ComfyUI here has no folder_paths"),
        ("something else", "something else"),
    ],
)
def test_what_to_bring(message, said):
    assert in_process.lacking(message).startswith(said)


def test_the_tests_say_how_many_passed_or_why_none_ran(hour, monkeypatch):
    def says(text, code):
        script = hour.folder.parent / "tests.py"
        script.write_text(f"print({text!r})\nraise SystemExit({code})")
        monkeypatch.setattr(Part, "command", lambda *_, **__: [sys.executable, str(script)])
        hour([part("tests", program="test")], "--again")
        return hour.json()["parts"]["tests"]

    row = says("x\ngpu     ran: 7 passed, 0 failed, 2 skipped in 9 s\n7 passed", 0)
    assert (row["state"], row["why"]) == (DONE, "ran: 7 passed, 0 failed, 2 skipped in 9 s")
    row = says("gpu     did not run: no CUDA device\nNo test ran.", 1)
    assert (row["state"], row["why"]) == (FAILED, "did not run: no CUDA device")
    row = says("gpu     FAILED: 1 passed, 3 failed, 0 skipped in 2 s", 1)
    assert (row["state"], row["why"]) == (FAILED, "FAILED: 1 passed, 3 failed, 0 skipped in 2 s")


def test_the_page_is_what_the_json_says(hour):
    hour.write("first", "pass")
    hour.write("broken", "raise SystemExit('a | in a sentence')")
    hour([part("first"), part("broken")])
    assert pages.stale(hour.folder) == []
    page = (hour.folder / "gpu.md").read_text("utf-8")
    assert "| first | the part first | done |" in page
    assert r"a \| in a sentence" in page
    assert "## broken failed\n\n```text\na | in a sentence\n```" in page
    assert "- sage2: sageattention 2.x is not installed" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_part_and_keeps_what_is_finished(tmp_path, number):
    script = tmp_path / "interrupted.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(comfy_home.PACK_ROOT / "tests")!r})
import comfy_home
comfy_home.load_pack()
from slipstream.bench import gpu, gpu_parts, gpu_preflight
gpu_parts.command = lambda name, *rest: [sys.executable, "-c", name]
sleep = "import time; time.sleep(600)"
gpu_parts.parts = lambda: [
    gpu_parts.Part(name, name, (code,), 1, 100) for name, code in (("a", "pass"), ("b", sleep))
]
gpu_preflight.ask = lambda: {HERE!r}
sys.argv = ["gpu", "--out", {str(tmp_path)!r}]
sys.exit(gpu.main())
""")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    log, end = tmp_path / "logs" / "b.log", time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == gpu.EXIT_INTERRUPTED, said
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert {name: row["state"] for name, row in found["parts"].items()} == {"a": DONE, "b": LEFT}
    assert found["interrupted"]
    assert "it was running when all was ended" in said
    assert "ended by Ctrl-C" in (tmp_path / "gpu.md").read_text("utf-8")


def test_without_a_gpu_it_is_one_sentence_and_a_code_of_its_own():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, str(BENCH), "gpu"], capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != children.ENTRY},
    )  # fmt: skip
    assert done.returncode == gpu.EXIT_NO_GPU
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench gpu needs a CUDA or ROCm GPU")


# --- every GPU path is walked somewhere

# Measurement -> where its GPU path runs on the faked GPU.
WALKED = {
    "attention_kernels": "unit/test_bench_attention.py",
    "doctor": "host/test_bench_gpu_paths.py",
    "full_width": "host/test_bench_gpu_paths.py",
    "gpu": "host/test_bench_gpu_paths.py",
    "gpu_preflight": "host/test_bench_gpu_paths.py",
    "offload": "host/test_bench_gpu_paths.py",
    "quality": "host/test_bench_gpu_paths.py",
    "suite": "host/test_bench_gpu_paths.py",
    "svdquant_flux": "host/test_bench_gpu_paths.py",
    "svdquant_layers": "host/test_bench_gpu_paths.py",
}
NO_PATH = {"environment"}  # names the GPU; every walk asks it
STAY_ON_CPU = {"quality_baseline", "score_demo"}  # they say so before anything asks for a GPU


def imported(path):
    """Modules of bench/ that `path` imports, in functions too."""
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [name.name for name in node.names]
            found |= {name for name in names if (BENCH / f"{name}.py").is_file()}
    return found


def reached(name, known):
    if name not in known:
        known.add(name)
        for other in imported(BENCH / f"{name}.py"):
            reached(other, known)
    return known


def listed():
    """The measurements that `python bench` lists."""
    done = subprocess.run([sys.executable, str(BENCH)], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in done.stdout.splitlines()]


def has_gpu_path(name):
    texts = [(BENCH / f"{one}.py").read_text("utf-8") for one in reached(name, set()) - NO_PATH]
    return any("torch.cuda" in text or ".is_cuda" in text for text in texts)


def test_every_measurement_with_a_gpu_path_is_walked():
    for name in STAY_ON_CPU:
        assert "use_comfyui()" in (BENCH / f"{name}.py").read_text("utf-8")
    found = {name for name in listed() if has_gpu_path(name)}
    assert found == WALKED.keys() | STAY_ON_CPU


def test_where_it_is_walked_it_is_named():
    for name, file in WALKED.items():
        text = (comfy_home.PACK_ROOT / "tests" / file).read_text("utf-8")
        assert f'"{name}"' in text, (name, file)


def test_the_plan_names_measurements_and_pages_that_exist():
    known = set(listed())
    for one in gpu_parts.parts():
        assert 0 < one.estimate_s <= one.limit_s
        if one.program == "bench":
            assert one.arguments[0] in known
            assert one.files
        for name in one.files:
            assert name.endswith(".json") or Path(name).stem in pages.PAGES
    names = [one.name for one in gpu_parts.parts()]
    assert len(names) == len(set(names))
    files = {path.name for path in (comfy_home.PACK_ROOT / "tests" / "gpu").glob("test_*.py")}
    tested = {Path(one.arguments[1]).name for one in gpu_parts.parts() if one.program == "test"}
    assert files == tested | set(gpu_parts._MEASURED_ELSEWHERE)

"""What ./run and ./test find, what they say when something is missing, and the standalone mode."""

import json
import os
import subprocess
import sys

import comfy_home
import newest_home
import pytest
import tiers
from slipstream.bench import install, launch, setup_env
from slipstream.bench.setup_env import SetupError

ROOT = comfy_home.PACK_ROOT


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch, tmp_path):
    """No ComfyUI anywhere, no variable set, nothing of .slipstream."""
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(setup_env, "OWN_COMFYUI", tmp_path / "own" / "ComfyUI")
    monkeypatch.setattr(setup_env, "PACK_ROOT", tmp_path / "pack")


def checkout(root):
    """A folder that looks like a ComfyUI checkout."""
    (root / "comfy").mkdir(parents=True)
    (root / "comfy" / "model_patcher.py").touch()
    (root / "main.py").touch()
    return root


def test_comfyui_is_found_in_this_order(monkeypatch, tmp_path):
    assert setup_env.find_comfyui() is None
    own = checkout(tmp_path / "own" / "ComfyUI")
    assert setup_env.find_comfyui() == own
    home = checkout(tmp_path / "home" / "comfy" / "ComfyUI")
    assert setup_env.find_comfyui() == home
    around = checkout(tmp_path / "around")
    monkeypatch.setattr(setup_env, "PACK_ROOT", around / "custom_nodes" / "slipstream")
    assert setup_env.find_comfyui() == around
    variable = checkout(tmp_path / "variable")
    monkeypatch.setenv("COMFYUI_PATH", str(variable))
    assert setup_env.find_comfyui() == variable
    named = checkout(tmp_path / "named")
    assert setup_env.find_comfyui(str(named)) == named


def test_wrong_places_are_named(monkeypatch, tmp_path):
    with pytest.raises(SetupError, match=r"--comfyui .*nowhere has no comfy/model_patcher\.py"):
        setup_env.find_comfyui(str(tmp_path / "nowhere"))
    monkeypatch.setenv("COMFYUI_PATH", "nowhere")
    with pytest.raises(SetupError, match=r"^COMFYUI_PATH=nowhere has no comfy/model_pa"):
        setup_env.find_comfyui()
    monkeypatch.setenv("COMFYUI_PYTHON", "nowhere/python")
    with pytest.raises(SetupError, match=r"^COMFYUI_PYTHON=nowhere/python does not exist"):
        setup_env.named_python()


def test_python_of_the_user_that_cannot_run_comfyui_is_an_error(monkeypatch, tmp_path):
    root = checkout(tmp_path / "comfyui")
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setattr(setup_env, "_PROBE", "import no_such_package_of_comfyui")
    with pytest.raises(SetupError, match="cannot run ComfyUI: ModuleNotFoundError: No module"):
        setup_env.find_python(root)
    monkeypatch.setenv("COMFYUI_PATH", str(root))
    with pytest.raises(SetupError, match="cannot run ComfyUI"):
        launch.choose(launch.parser().parse_args([]))


def test_mismatched_torchvision_is_a_sentence():
    probe = "raise RuntimeError('operator torchvision::nms does not exist')"
    reason = setup_env.cannot_run(sys.executable, probe)
    assert "do not match (operator torchvision::nms does not exist)" in reason
    assert reason.endswith("install both from the same place")


def test_without_a_network_the_standalone_mode_says_why(monkeypatch):
    def no_network(**ignored):
        raise SetupError("pip cannot install comfy-cli: no network")

    monkeypatch.setattr(install, "make_comfyui", no_network)
    monkeypatch.setattr(launch, "standalone_python", lambda: "python-with-torch")
    part, python, further = launch.choose(launch.parser().parse_args([]))
    assert (part, python) == (launch.STANDALONE, "python-with-torch")
    assert further == ["--reason", "pip cannot install comfy-cli: no network"]


def test_pip_without_a_registry_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "OWN", tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        SetupError, match=r"pip cannot install no-such-package --no-index: .*pip\.log"
    ):
        install.pip_install(sys.executable, ["no-such-package", "--no-index"])


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--port", "70000"]])
def test_bad_options_are_sentences(arguments, capsys):
    assert launch.start(arguments) == 1
    assert f"{arguments[0]} is {arguments[1]}: choose a number from 1 to" in capsys.readouterr().err


def test_standalone_mode_runs_the_engine():
    done = subprocess.run(
        [sys.executable, str(ROOT / "run"), "--standalone", "--cpu", "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "This is the STANDALONE mode" in done.stdout
    assert "2 of 2 steps" in done.stdout
    assert "Attention (balanced): " in done.stdout
    assert "bit-identical to one sampled without Slipstream" in done.stdout
    assert "For the full demo" in done.stdout
    report = json.loads((ROOT / "output" / "slipstream-report.json").read_text())
    assert report["schema"] == 1
    assert report["run"]["steps"] == 2
    assert sum(report["attention"]["calls"].values()) == 2 * 16


def test_only_what_is_in_tests_is_a_path(monkeypatch):
    monkeypatch.chdir(tiers.TESTS.parent)  # which has a folder `parallel`
    rest = ["-k", "parallel", "tests/unit/test_launch.py::test_x", "tests/unit", "-x"]
    options, paths = tiers.split_paths(rest)
    assert options == ["-k", "parallel", "-x"]
    unit = tiers.TESTS / "unit"
    assert paths == [f"{unit / 'test_launch.py'}::test_x", str(unit)]


def test_tiers_are_split_from_pytest_arguments():
    assert tiers.split([]) == ([], [])
    assert tiers.split(["unit", "host", "-k", "unit"]) == (["unit", "host"], ["-k", "unit"])
    assert tiers.split(["-x"]) == ([], ["-x"])
    assert "kernels" not in tiers.by_default([])  # it installs packages
    assert tiers.by_default(["--full"]) == [*tiers.by_default([]), "kernels", "newest"]
    assert tiers.split(["full"]) == ([], ["--full"])
    assert tiers.split(["full", "host", "-x"]) == (["host"], ["--full", "-x"])


@pytest.fixture
def newest(monkeypatch, tmp_path):
    """A pip that leaves a folder with torchaudio's library; .installed counts its calls."""

    class Pip:
        installed = 0
        error = None

        def install(self, python, arguments, *, target):
            if self.error:
                raise SetupError(self.error)
            self.installed += 1
            (target / "torchaudio" / "lib").mkdir(parents=True, exist_ok=True)
            (target / "torchaudio" / "lib" / "_torchaudio.abi3.so").touch()

    pip = Pip()
    monkeypatch.setattr(setup_env, "OWN", tmp_path / "own")
    monkeypatch.setattr(install, "pip_install", pip.install)
    monkeypatch.setattr(newest_home, "_PROBE", "import json")
    monkeypatch.setattr(newest_home, "_VERSIONS", "print('torch 9')")
    return pip


def test_newest_packages_are_installed_once_and_again_after_a_week(newest):
    folder, versions = newest_home.make(sys.executable)
    assert (versions, newest.installed) == ("torch 9", 2)
    assert folder.is_dir()
    assert not list(folder.rglob("*.so")), "torchaudio's library would refuse another CUDA"
    newest_home.make(sys.executable)
    assert newest.installed == 2
    done = folder.with_name(f"{folder.name}.done")
    os.utime(done, (0, 0))
    newest_home.make(sys.executable)
    assert newest.installed == 4


def test_newest_packages_stay_where_pip_cannot_renew_them(newest, capsys):
    folder, _ = newest_home.make(sys.executable)
    os.utime(folder.with_name(f"{folder.name}.done"), (0, 0))
    newest.error = "pip cannot install torch: no network"
    assert newest_home.make(sys.executable)[0] == folder
    assert "stays as it is: pip cannot install torch: no network" in capsys.readouterr().err


def test_the_newest_tier_says_why_it_did_not_run(newest, monkeypatch):
    monkeypatch.setattr(tiers, "comfy_python", lambda: sys.executable)
    newest.error = "pip cannot install torch: no network"
    said = tiers.run_tier("newest", []).sentence
    assert said == "did not run: pip cannot install torch: no network"
    newest.error = None
    monkeypatch.setattr(newest_home, "_PROBE", "raise SystemExit('operator nms does not exist')")
    said = tiers.run_tier("newest", []).sentence
    assert "do not work with ComfyUI's Python: operator nms does not exist" in said


def test_what_installs_packages_runs_when_it_is_asked_for():
    assert tiers.split(["newest", "-x"]) == (["newest"], ["-x"])
    assert "newest" not in tiers.by_default([])
    assert "newest" in tiers.by_default(["--full"])
    assert "gpu" not in tiers.by_default(["--full"])


XML = """<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10" /></testsuites>"""


def test_outcome_counts_errors_as_failures(tmp_path):
    xml = tmp_path / "result.xml"
    xml.write_text(XML)
    outcome = tiers.outcome_of("unit", 1, 2.0, xml)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (4, 3, 3)
    assert not outcome.ok
    assert tiers.outcome_of("unit", None, 2.0, xml).failed == 4
    assert tiers.outcome_of("unit", 2, 2.0, tmp_path / "none").failed == 1
    nothing = tiers.outcome_of("unit", 5, 2.0, xml)
    assert nothing.ok
    assert nothing.passed == 0


@pytest.mark.parametrize(
    ("outcomes", "code", "last"),
    [
        ([tiers.Outcome("unit", "", passed=2, skipped=1)], 0, "2 passed, 0 failed, 1 skipped"),
        ([tiers.Outcome("unit", "", ok=False, failed=1)], 1, "0 passed, 1 failed, 0 skipped"),
        ([tiers.Outcome("host", "did not run: why")], 1, "0 passed, 0 failed, 0 skipped"),
        ([tiers.Outcome("unit", "", skipped=4)], 1, "0 passed, 0 failed, 4 skipped"),
        (
            [tiers.Outcome("lint", "FAILED", ok=False), tiers.Outcome("unit", "", passed=1)],
            1,
            "1 passed, 0 failed, 0 skipped",
        ),
    ],
    ids=["passed", "failed", "no tier ran", "all skipped", "lint failed"],
)
def test_verdict(outcomes, code, last, capsys):
    assert tiers.verdict(outcomes) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_kernel_packages_that_cannot_be_had_are_the_closing_line(monkeypatch, tmp_path):
    def no_network(python, arguments, *, target):
        raise setup_env.SetupError(f"pip cannot install {' '.join(arguments)}: no network")

    monkeypatch.setattr(tiers, "engine_python", lambda: sys.executable)
    monkeypatch.setattr(setup_env, "OWN", tmp_path)
    monkeypatch.setattr(install, "pip_install", no_network)
    outcome = tiers.run_tier("kernels", [])
    assert (outcome.ran, outcome.ok) == (False, True)
    assert outcome.sentence == "did not run: pip cannot install numpy<2.3: no network"

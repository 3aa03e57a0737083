"""`./test`: from nothing to a verdict. Stdlib only; every tier is a process of its own.

    ./test                     ruff, mypy, and every tier whose needs are met
    ./test unit host -k cache  these tiers; everything behind them goes to pytest
    ./test full                every tier with its longer matrices (tests marked `full`)
    ./test kernels             real kernel packages on a CPU; in `full`, as it installs them
    ./test newest              unit and host with PyPI's newest torch; in `full`, as it installs

What is missing for the unit tier is installed into .venv and .slipstream, which git ignores.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import browser_home
import comfy_home
import kernels_home
import newest_home

comfy_home.load_pack()
from slipstream.bench import install, setup_env  # noqa: E402
from slipstream.bench.setup_env import SetupError  # noqa: E402

ROOT = comfy_home.PACK_ROOT
TESTS = ROOT / "tests"
TIERS = ("lint", "unit", "host", "server", "browser", "kernels", "newest", "gpu")
ASKED_FOR = {
    "kernels": "installs packages: ./test kernels, or ./test full",
    "newest": "installs packages: ./test newest, or ./test full",
    "gpu": "by hand, on a CUDA device: ./test gpu",
}
FULL = "full"  # before the names of tiers: their longer matrices too
ENGINE = ("torch", "safetensors", "numpy", "PIL")  # what the unit tier imports
PIP_NAMES = {"PIL": "pillow"}
TIMEOUT_S = 2100  # a tier; the host tier takes a quarter of an hour of processor time
FULL_TIMEOUT_S = 3 * 3600  # a tier with its longer matrices
_INTERRUPTED = 130


@dataclass
class Outcome:
    """What one tier did. `ran`: it got as far as running; `sentence`: its closing line."""

    tier: str
    sentence: str
    ran: bool = False
    ok: bool = True
    passed: int = 0
    failed: int = 0
    skipped: int = 0


class NotHere(Exception):  # noqa: N818 - no error: the tier's needs are not met
    """Why a tier does not run on this machine."""


def main(arguments: Sequence[str]) -> int:
    """Run the tiers that `arguments` start with, or all; returns the exit code."""
    tiers, rest = split(arguments)
    outcomes: list[Outcome] = []
    try:
        for tier in tiers or by_default(rest):
            print(f"== {tier}", flush=True)
            outcomes.append(run_tier(tier, rest))
    except KeyboardInterrupt:
        print("interrupted")
        return _INTERRUPTED
    if not tiers:
        left = [tier for tier in TIERS if tier not in by_default(rest)]
        outcomes += [Outcome(tier, f"did not run: {ASKED_FOR[tier]}") for tier in left]
    return verdict(outcomes)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Leading tier names, and what goes to pytest; `full` in front becomes pytest's --full."""
    if list(arguments[:1]) == [FULL]:
        tiers, rest = split(arguments[1:])
        return tiers, ["--full", *rest]
    count = next((i for i, a in enumerate(arguments) if a not in TIERS), len(arguments))
    return list(arguments[:count]), list(arguments[count:])


def by_default(rest: Sequence[str]) -> list[str]:
    """Tiers of a run that names none."""
    longer = ("kernels", "newest") if "--full" in rest else ()
    return [t for t in TIERS if t not in ASKED_FOR or t in longer]


def verdict(outcomes: Sequence[Outcome]) -> int:
    """Print one closing line per tier and the totals; the exit code."""
    print()
    for outcome in outcomes:
        print(f"{outcome.tier:8}{outcome.sentence}")
    passed, failed, skipped = (
        sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("passed", "failed", "skipped")
    )
    tested = passed + failed > 0 or all(outcome.tier == "lint" for outcome in outcomes)
    if not tested:
        print("No test ran.")
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 0 if tested and all(outcome.ok for outcome in outcomes) else 1


def run_tier(tier: str, rest: Sequence[str]) -> Outcome:
    """One tier, whatever becomes of it."""
    functions: dict[str, Callable[[Sequence[str]], Outcome]] = {
        "lint": lint,
        "unit": unit,
        "host": host,
        "server": server,
        "browser": browser,
        "kernels": kernels,
        "newest": newest,
        "gpu": gpu,
    }
    try:
        return functions[tier](rest)
    except NotHere as reason:
        return Outcome(tier, f"did not run: {reason}")
    except (SetupError, comfy_home.ComfyUIError) as error:
        return Outcome(tier, f"FAILED: {error}", ok=False)


def lint(rest: Sequence[str]) -> Outcome:
    """ruff check, ruff format, mypy over the engine under its package name."""
    python = engine_python()
    try:
        env = with_tools(python, ("ruff", "mypy"))
    except SetupError as error:
        raise NotHere(str(error)) from error
    ruff = [python, "-m", "ruff"]
    complaints = []
    for name, command in (
        ("ruff check", [*ruff, "check", "."]),
        ("ruff format", [*ruff, "format", "--check", "."]),
    ):
        if subprocess.run(command, cwd=ROOT, env=env).returncode:
            complaints.append(name)
    # Relative imports reach up to the pack root, whose folder may have any name.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "slipstream").symlink_to(ROOT, target_is_directory=True)
        typed = ("backends", "parallel", "nodes", "bench")
        packages = [word for name in typed for word in ("-p", f"slipstream.{name}")]
        config = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
        command = [python, "-m", "mypy", "--follow-imports=silent", *config, *packages]
        if subprocess.run(command, cwd=folder, env={**env, "MYPYPATH": folder}).returncode:
            complaints.append("mypy")
    if complaints:
        return Outcome("lint", f"FAILED: {', '.join(complaints)}", ran=True, ok=False)
    return Outcome("lint", "ran: ruff check, ruff format, mypy: no complaints", ran=True)


def unit(rest: Sequence[str]) -> Outcome:
    """What needs torch only."""
    python = engine_python()
    return pytest_tier("unit", python, ["unit"], ["-m", "not host"], rest)


def host(rest: Sequence[str]) -> Outcome:
    """ComfyUI in one process; the contract tests of the unit tier again, on the real patcher."""
    python = comfy_python()
    return pytest_tier("host", python, ["host", "unit"], ["-m", "host"], rest)


def server(rest: Sequence[str]) -> Outcome:
    """One real server for all."""
    return pytest_tier("server", comfy_python(), ["server"], [], rest)


def browser(rest: Sequence[str]) -> Outcome:
    """The real frontend in headless chromium; playwright-core comes from npm if it can."""
    python = comfy_python()
    found = browser_home.install()
    if found is None:
        raise NotHere(browser_home.NOT_FOUND)
    os.environ["CHROMIUM"] = found.chromium
    return pytest_tier("browser", python, ["browser"], [], rest)


def kernels(rest: Sequence[str]) -> Outcome:
    """The real kernel packages, with CUDA faked or in Triton's interpreter."""
    python = engine_python()
    try:
        os.environ[kernels_home.FOLDER] = str(kernels_home.make(python))
    except SetupError as error:
        raise NotHere(str(error)) from error
    return pytest_tier("kernels", python, ["kernels"], [], rest)


def newest(rest: Sequence[str]) -> Outcome:
    """The unit and host tiers with the newest torch, comfy-kitchen and comfy-aimdo."""
    python = comfy_python()
    try:
        overlay, versions = newest_home.make(python)
    except SetupError as error:
        raise NotHere(str(error)) from error
    print(versions, flush=True)
    outcome = pytest_tier("newest", python, ["unit", "host"], [], rest, overlay=overlay)
    outcome.sentence += f" ({versions})"
    return outcome


def gpu(rest: Sequence[str]) -> Outcome:
    """Kernels, memory and speed on a CUDA device: by hand."""
    python = engine_python()
    if setup_env.cannot_run(python, "import torch; assert torch.cuda.is_available()"):
        raise NotHere("no CUDA device")
    return pytest_tier("gpu", python, ["gpu"], [], rest)


def pytest_tier(
    tier: str,
    python: str,
    folders: Sequence[str],
    select: Sequence[str],
    rest: Sequence[str],
    *,
    overlay: Path | None = None,
) -> Outcome:
    """pytest in its own process; paths among `rest` replace the tier's folders.

    overlay: a folder of packages in front of those of `python`.
    """
    if not any(any((TESTS / folder).glob("test_*.py")) for folder in folders):
        raise NotHere("it has no tests yet")
    env = with_tools(python, ("pytest",))
    if overlay is not None:
        places = (str(overlay), env.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    options, paths = split_paths(rest)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "result.xml"
        command = [python, "-m", "pytest", "-rfEs", "--continue-on-collection-errors"]
        command += [f"--junitxml={xml}", *select, *options]
        # From tests/, so that the folder that `-m` puts on sys.path is not the pack root.
        code, seconds = run_limited([*command, *(paths or folders)], TESTS, env)
        return outcome_of(tier, code, seconds, xml)


def split_paths(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options, paths): what exists in tests/ is a path; `parallel` in `-k parallel` is none."""
    options, paths = [], []
    for argument in rest:
        file, *names = argument.split("::")
        path = Path(file).absolute()
        if path.is_relative_to(TESTS) and path.exists():
            paths.append("::".join([str(path), *names]))
        else:
            options.append(argument)
    return options, paths


def outcome_of(tier: str, code: int | None, seconds: float, xml: Path) -> Outcome:
    """Counts from pytest's XML. An end before its verdict is one failure more."""
    if code == 5:  # pytest: nothing collected, for example because of -k
        return Outcome(tier, "ran: no test selected")
    problem = "" if code in (0, 1) else f"pytest ended with {code}, "
    if code is None:
        problem = f"not finished after {seconds:.0f} s, "
    count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if xml.exists():
        suite = ElementTree.parse(xml).getroot()[0]
        count = {name: int(suite.get(name, 0)) for name in count}
    skipped, failed = count["skipped"], count["failures"] + count["errors"]
    passed = count["tests"] - failed - skipped
    failed += bool(problem)
    sentence = f"{passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s"
    sentence = f"FAILED: {problem}{sentence}" if failed else f"ran: {sentence}"
    return Outcome(tier, sentence, True, not failed, passed, failed, skipped)


def run_limited(command: Sequence[str], cwd: Path, env: dict[str, str]) -> tuple[int | None, float]:
    """(exit code, seconds); None for the code if it had to be ended."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, env=env)
    try:
        code: int | None = process.wait(FULL_TIMEOUT_S if "--full" in command else TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest tears its fixtures down: servers end
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        code = None
    except KeyboardInterrupt:  # the terminal sent it to pytest too, which now stops its servers
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    return code, time.monotonic() - started


def engine_python() -> str:
    """The first Python with torch: this one, COMFYUI_PYTHON, ComfyUI's, .venv, made if need be."""
    probe = "import " + ", ".join(ENGINE)
    named = setup_env.named_python()
    places = (Path.home() / "comfy" / "venv", setup_env.OWN_VENV, ROOT / ".venv")
    others = [str(p) for p in map(setup_env.venv_python, places) if p.is_file()]
    for python in (sys.executable, *([named] if named else []), *others):
        if setup_env.cannot_run(python, probe) is None:
            return python
    python = install.make_venv(ROOT / ".venv")
    print("Installing torch for the unit tier (some minutes)", flush=True)
    install.pip_install(python, [PIP_NAMES.get(name, name) for name in ENGINE])
    return python


def comfy_python() -> str:
    """A Python that runs the ComfyUI found; NotHere without one of the two."""
    if comfy_home.find() is None:
        elsewhere = setup_env.find_comfyui()
        if elsewhere is None:
            raise NotHere(comfy_home.NOT_FOUND)
        os.environ["COMFYUI_PATH"] = str(elsewhere)
    root = comfy_home.find()
    assert root is not None
    python = setup_env.find_python(root)
    if python is None:
        raise NotHere(f"no Python can import what {root} needs: name one with COMFYUI_PYTHON")
    return python


def with_tools(python: str, modules: Sequence[str]) -> dict[str, str]:
    """The environment in which `python` can import `modules`; missing ones are installed beside it.

    Raises SetupError with pip's reason if they cannot be.
    """
    env = setup_env.clean_env()
    folder = setup_env.OWN / f"tools-{sys.implementation.cache_tag}"
    if python != sys.executable:
        code = "import sys; print(sys.implementation.cache_tag)"
        tag = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
        folder = setup_env.OWN / f"tools-{tag}"
    probe = "from importlib.util import find_spec as f; import sys; sys.exit(not all(map(f, {})))"
    for attempt in (env, {**env, "PYTHONPATH": str(folder)}):
        if subprocess.run([python, "-c", probe.format(list(modules))], env=attempt).returncode == 0:
            return attempt
    print(f"Installing {', '.join(modules)} into {folder}", flush=True)
    install.pip_install(python, modules, target=folder)
    return {**env, "PYTHONPATH": str(folder)}

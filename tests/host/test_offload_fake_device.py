"""Offload under both memory managements on a fake accelerator: runs tests/fakedev/checks_*.py.

Each management gets a process of its own, because the checks replace functions of ComfyUI's
modules; every check is one test here.
"""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import comfy_home
import pytest
from patience import patience

HERE = Path(__file__).resolve().parents[1]
FAKEDEV = HERE / "fakedev"
BOTH = (
    "checks_both.py",
    "checks_modes.py",
    "checks_auto.py",
    "checks_compose.py",
    "checks_queue_owners.py",
    "checks_bench.py",
)
FILES = {
    "classic": (*BOTH, "checks_classic.py"),
    "dynamic": (*BOTH, "checks_dynamic.py"),
}


def names(manager: str) -> list[str]:
    """The check functions of a management's files."""
    trees = [ast.parse((FAKEDEV / file).read_text()) for file in FILES[manager]]
    functions = (node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))
    return [node.name for node in functions if node.name.startswith("test_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """manager -> check -> messages of its failures and skips; runs a management when asked."""
    if comfy_home.find() is None:
        pytest.skip(comfy_home.NOT_FOUND)
    sys.path.insert(0, str(FAKEDEV))
    try:
        import fake_device
    finally:
        sys.path.remove(str(FAKEDEV))
    reason = fake_device.missing_tool()
    if reason is not None:
        pytest.skip(reason)
    known = {}

    def of(manager: str) -> dict[str, list[ElementTree.Element]]:
        if manager not in known:
            full = ["--full"] if request.config.getoption("--full") else []
            known[manager] = run(manager, tmp_path_factory.mktemp(manager) / "results.xml", full)
        return known[manager]

    return of


def run(manager: str, report: Path, options: list[str]) -> dict[str, list[ElementTree.Element]]:
    files = [str(FAKEDEV / file) for file in FILES[manager]]
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), *files]
    env = os.environ | {"SLIPSTREAM_FAKE_MANAGER": manager, "OMP_NUM_THREADS": "1"}
    command += [f"--junitxml={report}", *options]
    # Not in the pack's root: Python puts the folder on sys.path, and our nodes/ would be found.
    limit_s = 200 * patience()
    done = subprocess.run(
        command, cwd=HERE, env=env, capture_output=True, text=True, timeout=limit_s, check=False
    )
    assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    cases: dict[str, list[ElementTree.Element]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        cases.setdefault(case.get("name", "").split("[")[0], []).append(case)
    return cases


@pytest.mark.parametrize(
    ("manager", "check"), [(manager, check) for manager in FILES for check in names(manager)]
)
def test_check(results, manager, check):
    cases = results(manager).get(check)
    assert cases, f"{check} did not run under {manager} memory management"
    failed = [part for case in cases for part in case if part.tag in ("failure", "error")]
    assert not failed, "\n".join(
        (part.text or part.get("message") or "")[-3000:] for part in failed
    )
    skipped = [part for case in cases for part in case if part.tag == "skipped"]
    if len(skipped) == len(cases):
        pytest.skip(skipped[0].get("message"))

"""`ask`: a question to kernels_child.py, in a process with the packages that a test names."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import comfy_home
import kernels_home
import pytest

CHILD = comfy_home.PACK_ROOT / "tests" / "kernels_child.py"


@pytest.fixture(scope="session")
def ask() -> Callable[..., Any]:
    """ask(question, packages, interpret=False, sm=None, **arguments) -> the child's answer."""
    if kernels_home.FOLDER not in os.environ:
        pytest.skip("the packages are not installed: ./test kernels does it")
    folders = {path.name for path in os.scandir(os.environ[kernels_home.FOLDER])}

    def ask(question: str, packages: tuple[str, ...], *, interpret: bool = False, **more: Any):
        names = [*packages, *(["triton"] if "triton" in folders else [])]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if interpret:
            env["TRITON_INTERPRET"] = "1"
            names.insert(0, "numpy")
        content = json.dumps({"ask": question, "packages": names, **more})
        command = [sys.executable, *(["-O"] if interpret else []), str(CHILD), content]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return ask

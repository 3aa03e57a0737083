"""`ask`: a question to kernels_child.py, in a process with the packages that a test names."""

import os
from collections.abc import Callable
from typing import Any

import kernels_home
import pytest


@pytest.fixture(scope="session")
def ask() -> Callable[..., Any]:
    """kernels_home.ask, where the packages are installed."""
    if kernels_home.FOLDER not in os.environ:
        pytest.skip("the packages are not installed: ./test kernels does it")
    return kernels_home.ask

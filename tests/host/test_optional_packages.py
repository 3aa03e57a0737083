"""The whole pack imports in ComfyUI with the packages it can use absent, or broken at import.

ComfyUI is imported once; each case is a fork of that process.
"""

import asyncio
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable

import comfy_home
import pytest
from fake_packages import ERRORS, OPTIONAL, broken_packages

NAMES = (*OPTIONAL, "comfy_kitchen")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: not on Windows")


@pytest.fixture(scope="module", autouse=True)
def _comfy_is_loaded(comfy):
    import comfy.sd  # noqa: F401
    import comfy_api.latest  # noqa: F401


class Absent:
    """An import hook to which none of NAMES is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def in_fork(prepare: Callable[[], None], work: Callable[[], None]) -> str:
    """ "" or the traceback of prepare() and work() in a fork."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        text = ""
        try:
            prepare()
            work()
        except BaseException:  # noqa: BLE001 - goes to the parent as text
            text = traceback.format_exc()
        with os.fdopen(writer, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def forget(*names: str) -> None:
    """Drop these packages and the pack from sys.modules, as if never imported."""
    for module in list(sys.modules):
        if module.partition(".")[0] in (*names, "slipstream"):
            del sys.modules[module]
    importlib.invalidate_caches()


def import_everything() -> None:
    """Load the pack as ComfyUI does, every module of it, and every node's schema."""
    pack = comfy_home.load_pack()
    for folder in ("nodes", "backends", "parallel"):
        package = importlib.import_module(f"{pack.__name__}.{folder}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)

    async def schemas():
        extension = await pack.comfy_entrypoint()
        return [node.GET_SCHEMA() for node in await extension.get_node_list()]

    assert asyncio.run(schemas())


def ask_every_kernel() -> None:
    """available() is a sentence or None, whatever the packages do at import."""
    import_everything()
    kernels = importlib.import_module("slipstream.backends.attention.kernels.table").KERNELS
    kernels = kernels.values() if isinstance(kernels, dict) else kernels
    for kernel in kernels:
        reason = kernel.available()
        assert reason is None or isinstance(reason, str)


def test_all_absent():
    def prepare():
        forget(*NAMES)
        sys.meta_path.insert(0, Absent())

    assert in_fork(prepare, ask_every_kernel) == ""


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NAMES)
def test_one_broken(tmp_path, name, error):
    folder = broken_packages(tmp_path, error, [name])

    def prepare():
        forget(name)
        sys.path.insert(0, str(folder))

    assert in_fork(prepare, ask_every_kernel) == ""


@pytest.mark.parametrize("error", ERRORS)
def test_fork_reports_a_careless_import(tmp_path, error):
    """Negative control: what the cases above must not do is seen."""
    folder = broken_packages(tmp_path, error, ["sageattention"])

    def prepare():
        forget("sageattention")
        sys.path.insert(0, str(folder))

    assert f"{error}: undefined symbol" in in_fork(
        prepare, lambda: importlib.import_module("sageattention")
    )

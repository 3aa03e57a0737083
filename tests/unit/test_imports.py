"""The import table of the architecture, read from the source, with fakes that must be caught."""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import comfy_home
import pytest

ROOT = comfy_home.PACK_ROOT
FOLDERS = ("nodes", "backends", "parallel", "bench")
ENGINE = {"torch", "safetensors"}
# Kernel packages and libraries that may be missing: only inside the function that needs them.
OPTIONAL = {
    "PIL",
    "cache_dit",
    "comfy_kitchen",
    "diffusers",
    "flash_attn",
    "flash_attn_interface",
    "numpy",
    "nunchaku",
    "ray",
    "sageattention",
    "sageattn3",
    "spas_sage_attn",
    "triton",
    "xformers",
}
COMFYUI = {
    "comfy",
    "comfy_aimdo",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
# The modules that may touch ComfyUI, and who in parallel/ may use them.
HOSTS = {
    "backends/host.py",
    "backends/memory/host.py",
    "backends/offload/host.py",
    "backends/svdquant/host.py",
    "backends/svdquant/host_cache.py",
    "backends/svdquant/host_detection.py",
    "backends/svdquant/host_dtype.py",
    "backends/svdquant/host_files.py",
    "backends/svdquant/host_operations.py",
    "backends/svdquant/host_patcher.py",
    "backends/svdquant/host_text.py",
    "backends/worker_host.py",
}
HOST_USERS = {"parallel/worker.py", "parallel/apply.py", "parallel/wrappers.py"}
# Techniques build on what every run and report has (run.py, report.py, memory/, ...), never the
# other way round.
TECHNIQUES = {"attention", "cache", "offload", "prompts", "svdquant"}


@dataclass(frozen=True)
class Import:
    """One imported module: absolute name, or path in the pack for a relative import."""

    line: int
    name: str
    is_relative: bool
    in_function: bool


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import statement, import_module("x") and __import__("x") of a file in the pack."""
    package = path.split("/")[:-1]

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False, in_function)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield Import(node.lineno, node.module or "", False, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(node.lineno, "/".join([*base, alias.name]), True, in_function)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.lineno, node.args[0].value, False, in_function)
        inside = in_function or isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = True  # never runs
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def violations(files: Mapping[str, str]) -> list[str]:
    """One sentence for every import that the table forbids. files: path in the pack -> source."""
    found = []
    for path, source in sorted(files.items()):
        for one in imports(path, source):
            check = _relative if one.is_relative else _absolute
            problem = check(path, one)
            if problem:
                found.append(f"{path}:{one.line}: {one.name}: {problem}")
    return found


def _relative(path: str, one: Import) -> str | None:
    own, target = path.split("/")[0], one.name.split("/")[0]
    if own == "__init__.py":
        ok = target == "nodes" and one.in_function
        return None if ok else "the entry point imports nodes when it is called, nothing else"
    if own == "bench":
        return None
    if target == "nodes" and own != "nodes":
        return "nobody imports nodes"
    allowed = {
        "nodes": {"nodes", "backends", "parallel"},
        "parallel": {"parallel", "backends"},
    }.get(own, {own})
    if target not in allowed:
        return f"{own} may import {', '.join(sorted(allowed))} of the pack"
    if own == "backends" and _technique(one.name) and not _technique(path):
        return "every run has this module: it may not need a technique"
    is_host = any(f"{one.name}/".startswith(f"{host[:-3]}/") for host in HOSTS)
    if own == "parallel" and is_host and path not in HOST_USERS:
        return "parallel works without the host"
    return None


def _technique(path: str) -> str | None:
    """The technique folder that a path in the pack belongs to."""
    parts = path.split("/")
    return parts[1] if len(parts) > 1 and parts[1] in TECHNIQUES else None


def _absolute(path: str, one: Import) -> str | None:
    own, top = path.split("/")[0], one.name.split(".")[0]
    if top == "slipstream" or (top in FOLDERS and top not in COMFYUI):
        return "relative imports only"
    if own == "bench":
        return None
    if own == "nodes":
        ok = top in ("comfy_api", "__future__", "collections", "typing")
        return None if ok else "nodes import comfy_api, backends and parallel"
    if top in ENGINE or top in sys.stdlib_module_names:
        return None
    if top in COMFYUI:
        if path not in HOSTS:
            return "only the host modules touch ComfyUI"
        return None if one.in_function else "ComfyUI is imported when called: the engine runs alone"
    if top in OPTIONAL:
        return None if one.in_function else "optional: import it in the function that needs it"
    return "not a package that the engine may use"


def pack_files() -> dict[str, str]:
    """Path in the pack -> source, of everything that is shipped."""
    found = [ROOT / "__init__.py"]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in found}


def test_pack_keeps_the_table():
    files = pack_files()
    assert {path.split("/")[0] for path in files} >= {"__init__.py", "nodes", "backends", "bench"}
    assert violations(files) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("__init__.py", "from .nodes import SlipstreamExtension", "when it is called"),
        ("__init__.py", "from . import backends", "when it is called"),
        ("nodes/cache.py", "import torch", "nodes import comfy_api"),
        ("nodes/cache.py", "import comfy.model_management", "nodes import comfy_api"),
        ("nodes/cache.py", "from ..bench import draw", "nodes may import"),
        ("backends/run.py", "from ..nodes import cache", "nobody imports nodes"),
        ("backends/run.py", "from ..parallel import wire", "backends may import backends"),
        ("backends/run.py", "from .. import parallel", "backends may import backends"),
        ("backends/run.py", "def f():\n    import comfy.ops", "only the host modules"),
        ("backends/run.py", "import folder_paths", "only the host modules"),
        ("backends/run.py", "import backends.report", "relative imports only"),
        ("backends/run.py", "from slipstream.backends import report", "relative imports only"),
        ("backends/run.py", "import requests", "not a package"),
        ("backends/run.py", "import numpy", "in the function that needs it"),
        ("backends/run.py", "class A:\n    import numpy", "in the function that needs it"),
        ("backends/run.py", "try:\n    import xformers.ops\nexcept ImportError: 0", "optional"),
        ("backends/run.py", "import importlib as i\ni.import_module('sageattention')", "optional"),
        ("backends/run.py", "comfy = __import__('comfy')", "only the host modules"),
        ("backends/host.py", "import comfy.ops", "imported when called"),
        ("backends/run.py", "from .offload.watch import MemoryWatch", "not need a technique"),
        ("backends/report.py", "from . import cache", "not need a technique"),
        ("backends/memory/watch.py", "from ..offload import host", "not need a technique"),
        ("parallel/comm.py", "from ..backends import host", "without the host"),
        ("parallel/comm.py", "from ..backends.host import features", "without the host"),
        (
            "parallel/comm.py",
            "def f():\n    from ..backends.offload import host",
            "without the host",
        ),
        ("parallel/comm.py", "from ..bench import server", "parallel may import"),
    ],
)
def test_table_catches(path, source, problem):
    found = violations({path: source})
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "async def comfy_entrypoint():\n    from .nodes import X\n    return X()"),
        ("nodes/cache.py", "from comfy_api.latest import io\nfrom ..backends.run import Run"),
        ("backends/host.py", "def f():\n    import comfy.ops"),
        ("backends/attention/op.py", "import math\nimport torch\nfrom ..run import Run"),
        ("backends/attention/op.py", "def f():\n    import sageattention"),
        ("backends/offload/state.py", "from ..memory import host\nfrom ..run import Run"),
        ("backends/x.py", "if TYPE_CHECKING:\n    import numpy"),
        ("parallel/worker.py", "from ..backends import host, run"),
        ("bench/demo.py", "import aiohttp\nfrom ..nodes import cache"),
    ],
)
def test_table_allows(path, source):
    assert violations({path: source}) == []

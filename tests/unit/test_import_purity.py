"""Nothing happens at import: of the pack as ComfyUI does it, and of the engine's every module."""

import json
import subprocess
import sys
import textwrap

import comfy_home
import pytest
from patience import patience

ROOT = comfy_home.PACK_ROOT
LOAD = """
import importlib, importlib.util, json, os, pkgutil, sys, threading, time

def load(alias, root):
    spec = importlib.util.spec_from_file_location(
        alias, os.path.join(root, "__init__.py"), submodule_search_locations=[root])
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module

def submodules(module, *folders):
    for folder in folders:
        package = importlib.import_module(f"{module.__name__}.{folder}")
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(found.name)

def state():
    return {"path": list(sys.path), "environ": dict(os.environ), "cwd": os.getcwd(),
            "threads": threading.active_count(), "hooks": len(sys.meta_path)}
"""


def run(code: str, *arguments: str) -> dict:
    """JSON that `code` prints, in a fresh Python after LOAD, away from the pack's folder."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IMPORT_PACK = """
before, known = state(), set(sys.modules)
started = time.perf_counter()
for i in range(5):
    load(f"pack{i}", sys.argv[1])
seconds = (time.perf_counter() - started) / 5
after = state()
new = sorted({name.split(".")[0] for name in set(sys.modules) - known})
print(json.dumps({"seconds": seconds, "new": new,
                  "changed": [k for k in before if before[k] != after[k]]}))
"""


def test_importing_the_pack_does_nothing_and_is_fast():
    seen = run(IMPORT_PACK, str(ROOT))
    assert seen["new"] == [f"pack{i}" for i in range(5)], "no torch, no ComfyUI, nothing at all"
    assert seen["changed"] == []
    assert seen["seconds"] < 0.010 * patience()


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("import sys; sys.path.append('x')", ["path"]),
        ("import os; os.environ['X_SLIPSTREAM'] = '1'", ["environ"]),
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(1,)).start()",
            ["threads"],
        ),
    ],
)
def test_careless_pack_is_seen(tmp_path, line, changed):
    (tmp_path / "__init__.py").write_text(line)
    assert run(IMPORT_PACK, str(tmp_path))["changed"] == changed


IMPORT_ENGINE = """
import torch
def torch_state():
    return {"cuda": torch.cuda.is_initialized(), "threads": torch.get_num_threads(),
            "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.benchmark,
            "seed": torch.initial_seed(), "flash": torch.backends.cuda.flash_sdp_enabled()}
before, known = {**state(), **torch_state()}, set(sys.modules)
submodules(load("slipstream", sys.argv[1]), *sys.argv[2:])
after = {**state(), **torch_state()}
new = {name.split(".")[0] for name in set(sys.modules) - known} - set(sys.stdlib_module_names)
own = [name for name in sys.modules if name.startswith("slipstream.")]
print(json.dumps({"new": sorted(new), "num": len(own),
                  "changed": [k for k in before if before[k] != after[k]]}))
"""


def test_importing_the_engine_changes_nothing():
    folders = [f for f in ("backends", "parallel") if (ROOT / f / "__init__.py").exists()]
    seen = run(IMPORT_ENGINE, str(ROOT), *folders)
    assert seen["num"] > 20
    assert seen["changed"] == []
    # Importing parts of torch loads what torch itself depends on.
    assert not set(seen["new"]) & {"comfy", "folder_paths", "server", "nodes", "aiohttp", "PIL"}
    assert not set(seen["new"]) & {
        "cache_dit",
        "diffusers",
        "sageattention",
        "flash_attn",
        "xformers",
    }

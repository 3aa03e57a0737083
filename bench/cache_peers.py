"""The cache beside ComfyUI's own and other packs', on the same model, prompt and seed.

    python bench cache_peers [--packs FOLDER] [--out FILE.json]     with ComfyUI's Python

FOLDER holds clones of the packs (ComfyUI-CacheDiT, Comfy-WaveSpeed, ComfyUI-TeaCache); what is not
there is listed as not measured. Every side runs in a process of its own, since some packs patch
globals, on tiny Flux and Wan with random weights (cache_models.py), 20 steps, euler, cfg 4.
Settings are each pack's defaults or its documented example. The error ranks mechanisms, never
pictures.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import cache_models
from .cache_pages import peers_page
from .environment import environment
from .in_process import use_comfyui

MARK = "cache_peers result: "
OURS = "SlipstreamCache, ratio 0.5"


def ours(model: Any, family: str, packs: Path | None) -> Any:
    from ..backends.cache.apply import apply_cache
    from ..backends.cache.config import CacheConfig

    return apply_cache(model, CacheConfig.from_ratio(0.5))


def easy_cache(model: Any, family: str, packs: Path | None) -> Any:
    from comfy_extras.nodes_easycache import EasyCacheNode

    return EasyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]


def lazy_cache(model: Any, family: str, packs: Path | None) -> Any:
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 0.2, 0.15, 0.95, False).args[0]


def cache_dit_pack(model: Any, family: str, packs: Path | None) -> Any:
    nodes = _pack(packs, "ComfyUI-CacheDiT").NODE_CLASS_MAPPINGS
    if family == "wan":
        return nodes["WanCacheOptimizer"]().optimize(model, True, 4, 2, False)[0]
    return nodes["CacheDiT_Model_Optimizer"]().optimize(model, True, "Auto", 0, 0, False)[0]


def wave_speed(model: Any, family: str, packs: Path | None) -> Any:
    node = _pack(packs, "Comfy-WaveSpeed").NODE_CLASS_MAPPINGS["ApplyFBCacheOnModel"]()
    return node.patch(model, "diffusion_model", 0.12)[0]


def tea_cache(model: Any, family: str, packs: Path | None) -> Any:
    node = _pack(packs, "ComfyUI-TeaCache").NODE_CLASS_MAPPINGS["TeaCache"]()
    kind, threshold = ("flux", 0.4) if family == "flux" else ("wan2.1_t2v_1.3B_ret_mode", 0.08)
    return node.apply_teacache(model, kind, threshold, 0.0, 1.0, "cpu")[0]


SIDES: dict[str, tuple[str | None, Callable[..., Any]]] = {
    OURS: (None, ours),
    "core EasyCache, 0.2": (None, easy_cache),
    "core LazyCache, 0.2": (None, lazy_cache),
    "Jasonzzt/ComfyUI-CacheDiT": ("ComfyUI-CacheDiT", cache_dit_pack),
    "chengzeyi/Comfy-WaveSpeed, 0.12": ("Comfy-WaveSpeed", wave_speed),
    "welltop-cn/ComfyUI-TeaCache": ("ComfyUI-TeaCache", tea_cache),
}


def _pack(packs: Path | None, name: str) -> Any:
    """A pack as ComfyUI imports it: by path."""
    assert packs is not None
    path = packs / name
    spec = importlib.util.spec_from_file_location(
        name.replace("-", "_"), path / "__init__.py", submodule_search_locations=[str(path)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(side: str, family: str, packs: Path | None) -> dict[str, Any]:
    """One side on one model: errors with batched and split CFG, what is left on the model."""
    model = cache_models.load(family)
    network = model.model.diffusion_model
    counter = cache_models.BlockCounter(model, family)
    reference = {False: _sample(model, family, False)}
    plain_blocks = counter.take()
    reference[True] = _sample(model, family, True)
    attributes = _attributes(network)
    patched = SIDES[side][1](model, family, packs)
    found: dict[str, Any] = {"side": side, "family": family}
    counter.take()
    first = _sample(patched, family, False)
    blocks = counter.take()
    found["fewer_blocks"] = round(plain_blocks / max(blocks, 1), 2)
    found["error_batched"] = round(cache_models.relative_error(reference[False], first), 4)
    again = _sample(patched, family, False)
    found["repeats"] = torch.equal(first, again)
    split = _sample(patched, family, True)
    found["error_split"] = round(cache_models.relative_error(reference[True], split), 4)
    after = _sample(model, family, False)
    found["unnoded_equal"] = torch.equal(after, reference[False])
    found["unnoded_error"] = round(cache_models.relative_error(reference[False], after), 4)
    found["attributes_left"] = _attributes(network) - attributes
    return found


def _sample(model: Any, family: str, split: bool) -> torch.Tensor:
    return cache_models.sample(model, family, split=split)


def _attributes(network: torch.nn.Module) -> int:
    return sum(len(module.__dict__) for module in network.modules())


def run_side(side: str, family: str, packs: Path | None) -> dict[str, Any]:
    """`measure` in a process of its own; {"failed": reason} if it raises."""
    command = [sys.executable, "-P", str(Path(__file__).parent), "cache_peers"]
    command += ["--one", side, "--family", family] + (["--packs", str(packs)] if packs else [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return json.loads(lines[-1][len(MARK) :])
    return {"side": side, "family": family, "failed": done.stderr.strip()[-300:]}


def one(side: str, family: str, packs: Path | None) -> None:
    """The inner process: prints one line of JSON."""
    try:
        with torch.inference_mode():
            found = measure(side, family, packs)
    except Exception as error:  # noqa: BLE001 - another pack's failure is a result of this table
        found = {"side": side, "family": family, "failed": failure(error)}
    print(MARK + json.dumps(found))


def failure(error: Exception) -> str:
    """What another pack raised and where, without a local folder's name."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = re.sub(r" \(/[^)]*\)", "", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", type=Path, help="folder with clones of the other packs")
    parser.add_argument("--out", type=Path, help="write JSON there; a page is made of it")
    parser.add_argument("--one", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--family", choices=cache_models.FAMILIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    comfyui = use_comfyui()
    if args.one:
        one(args.one, args.family, args.packs)
        return
    found = {
        "command": "python bench cache_peers --packs FOLDER --out docs/benchmarks/cache-peers.json",
        "environment": environment(comfyui=comfyui),
        "sides": all_sides(args.packs),
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(peers_page(found))


def all_sides(packs: Path | None) -> list[dict[str, Any]]:
    """Every side on every model, one after the other."""
    rows = []
    for side, (pack, _) in SIDES.items():
        there = pack is None or (packs is not None and (packs / pack).is_dir())
        for family in cache_models.FAMILIES:
            row = run_side(side, family, packs) if there else None
            rows.append(row or {"side": side, "family": family, "failed": "not measured"})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows

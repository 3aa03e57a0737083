"""A VRAM budget on this GPU: caps, step times, overlap, equal bits, plan error, memory over runs.

    python bench offload [--models wan flux qwen] [--managers dynamic classic] [--out FOLDER]
                         [--resume]

Random weights of full width, ComfyUI's own loader and sampler, one process per model and memory
management. Needs a CUDA GPU and, for Flux, 40 GB of RAM. docs/offload.md says how to read it.
--resume keeps what FOLDER holds of the other pairs from the same GPU, versions and commit.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

MODELS = ("wan", "flux", "qwen")
MANAGERS = ("dynamic", "classic")
NO_GPU = "bench offload needs a CUDA GPU: torch sees none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--managers", nargs="+", choices=MANAGERS, default=MANAGERS)
    parser.add_argument("--out", type=Path, help="write offload.json and offload.md here")
    parser.add_argument("--resume", action="store_true", help="keep the other pairs' results")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return answer(*options.child, rehearse=options.rehearse)
    import torch  # the children import it after comfy-aimdo, each in its own process

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    found = []
    for pair in itertools.product(options.models, options.managers):
        found.append(measure(*pair, rehearse=options.rehearse))
        print("\n".join(lines(found[-1])), flush=True)
        if options.out is not None and "error" not in found[-1]:
            write(options.out, found, resume=options.resume, rehearsal=options.rehearse)
    if options.out is not None:
        write(options.out, found, resume=options.resume, rehearsal=options.rehearse)
    return 0 if all("error" not in one for one in found) else 1


def write(
    folder: Path, found: list[dict[str, Any]], *, resume: bool = False, rehearsal: bool = False
) -> bool:
    """offload.json and its page into `folder`; nothing if every model failed (no GPU)."""
    from .children import write_text
    from .environment import environment
    from .offload_pages import offload_page
    from .setup_env import find_comfyui

    if all("error" in one for one in found):
        why = found[-1]["error"] if found else "nothing was asked for"
        print(f"nothing was measured ({why}): offload.json and offload.md are left as they are")
        return False
    result: dict[str, Any] = {
        "command": "python bench offload --out docs/benchmarks",
        "environment": environment(comfyui=find_comfyui()),
        **({"rehearsal": True} if rehearsal else {}),
    }
    asked = {(one["model"], one["manager"]) for one in found}
    result["models"] = list(found)
    if resume:
        result["models"] = sorted(
            [*kept(folder, result, asked), *found],
            key=lambda one: (MODELS.index(one["model"]), MANAGERS.index(one["manager"])),
        )
    write_text(folder / "offload.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "offload.md", offload_page(result))
    return True


def kept(folder: Path, result: dict[str, Any], asked: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """What an earlier run on this machine measured of the pairs that were not asked for."""
    from .environment import same_machine

    path = folder / "offload.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if not before or not same_machine(before, result):
        return []
    return [one for one in before["models"] if (one["model"], one["manager"]) not in asked]


def measure(model: str, manager: str, *, rehearse: bool = False) -> dict[str, Any]:
    """One child process; its result, or the last line of what it said (all of it is shown)."""
    from .children import ask

    flags = ["--rehearse"] if rehearse else []
    return {"model": model, "manager": manager, **ask("offload", "--child", model, manager, *flags)}


def answer(model: str, manager: str, *, rehearse: bool = False) -> int:
    """The child's side of `measure`: JSON, or the sentence that says what is missing."""
    from . import children
    from .setup_env import SetupError

    try:
        children.answer(child(model, manager, rehearse=rehearse))
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def child(model: str, manager: str, *, rehearse: bool = False) -> dict[str, Any]:
    """Measure one model here. comfy-aimdo has to come before torch, so nothing above imports it."""
    from .setup_env import SetupError, find_comfyui

    root = find_comfyui()
    if root is None:
        raise SetupError("ComfyUI not found: set COMFYUI_PATH to a ComfyUI checkout")
    sys.path.insert(0, str(root))
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing(False)
    if manager == "dynamic":
        import comfy_aimdo.control as control  # type: ignore[import-not-found]

        control.init()
    import torch

    if not torch.cuda.is_available():
        raise SetupError(NO_GPU)
    from . import offload_models, offload_steps

    case = offload_models.make(model, rehearse=rehearse)
    num_runs = offload_steps.NUM_RUNS
    if rehearse:
        num_runs, sizes = 3, dict(list(case.sizes.items())[:1])
        case = dataclasses.replace(case, sizes=sizes)
    if manager == "dynamic":
        offload_models.turn_dynamic_on()
    return {"model": model, "manager": manager, **offload_steps.measure(case, num_runs=num_runs)}


def lines(found: dict[str, Any]) -> list[str]:
    """What a person reads of one result."""
    head = f"{found['model']}, {found['manager']} memory management"
    if "error" in found:
        return [head, f"  failed: {found['error']}"]
    pinned, pageable = (rate / 1e9 for rate in found["copy_rates"])
    out = [head, f"  copies {pinned:.1f} GB/s pinned, {pageable:.1f} GB/s pageable"]
    for cap in found["caps"]:
        out.append(
            f"  budget {cap['share']:.0%}: {cap['resident_bytes'] / 1e9:.2f} GB resident, "
            f"device {cap['excess_bytes'] / 1e6:+.0f} MB against the budget"
        )
    for one in found["times"]:
        out.append(
            f"  {one['size']}: resident {one['resident']:.3f} s, streamed by ComfyUI "
            f"{one['core']:.3f}, with prefetch {one['prefetch']:.3f}, "
            f"{one['overlap']:.0%} of the copies hidden"
        )
    out.append(f"  equal bits: {found['equal_bits']}; with a cache: {found['equal_bits_cached']}")
    plan = found["plan"]
    out.append(f"  planned {plan['predicted']:.3f} s, measured {plan['measured']:.3f} s")
    out.append(f"  growth over {found['flat']['runs']} runs: {found['flat']['growth_bytes']}")
    return out

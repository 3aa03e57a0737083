"""Everything that a GPU is needed for, in order of worth, within the minutes given: the GPU hour.

    python bench gpu [--minutes 25] [--out FOLDER] [--only TEXT,TEXT] [--again] [--list]

Runs ./test gpu, the attention kernels, steps of full-width models, SVDQuant and offload, each part
as a process of its own with a limit of its own: what fails or crashes is written down with the end
of its log, and the next part begins. FOLDER (default output/gpu) gets the JSON and the pages of
docs/benchmarks, gpu.json, gpu.md and logs/. Run it again with the same FOLDER: what is done is not
done twice (--again: it is). Ctrl-C keeps what is finished.

Exit code: 0 everything is done, 1 something failed or is left, 3 there is no GPU, 130 Ctrl-C.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import gpu_parts, gpu_preflight
from .children import write_text
from .environment import same_machine
from .gpu_page import DONE, FAILED, LEFT, gpu_page
from .gpu_parts import Part
from .in_process import lacking
from .setup_env import PACK_ROOT

OUTPUT = PACK_ROOT / "output" / "gpu"
NO_GPU = (
    "bench gpu needs a CUDA or ROCm GPU that torch sees: {why}. Run it where `nvidia-smi` lists one"
)
EXIT_NO_GPU, EXIT_INTERRUPTED = 3, 130
_GRACE_S = 20  # between asking a part to end and ending it
_TAIL_LINES = 12

Json = dict[str, Any]


def main() -> int:
    options = _options()
    wanted = options.only.split(",")
    planned = [part for part in gpu_parts.parts() if any(text in part.name for text in wanted)]
    if options.rehearse:
        planned = gpu_parts.rehearsed(planned)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.list:
        for part in planned:
            limit = f"{part.estimate_s:.0f} to {part.limit_s:.0f} s"
            print(f"{part.name:26} {limit:14} {part.title}")
        return 0
    here = gpu_preflight.ask()
    if "no_gpu" in here:
        print(NO_GPU.format(why=here["no_gpu"]), file=sys.stderr)
        return EXIT_NO_GPU
    print("\n".join(gpu_preflight.lines(here)), flush=True)
    found = begun(options, here)
    try:
        with _terminated_as_interrupted():
            run_all(found, planned, options, here)
    except KeyboardInterrupt:
        found["interrupted"] = True
    save(found, options.out)
    print("\n" + "\n".join(summary(found, planned, options)))
    if found.get("interrupted"):
        return EXIT_INTERRUPTED
    return 0 if all(state(found, part) == DONE for part in planned) else 1


def begun(options: argparse.Namespace, here: Json) -> Json:
    """A new gpu.json, with what FOLDER holds of this GPU, these versions and this commit."""
    found: Json = {
        "command": "python bench gpu --out docs/benchmarks",
        "environment": here["environment"],
        **({"rehearsal": True} if options.rehearse else {}),
        "comfyui": here.get("comfyui_error"),
        "missing": here["missing"],
        "parts": {},
    }
    path = options.out / "gpu.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if before and not options.again and same_machine(before, found):
        found["parts"] = before["parts"]
    elif before and not options.again:
        print("Another GPU, version or commit made what is there: everything is measured again")
    return found


def run_all(found: Json, planned: list[Part], options: argparse.Namespace, here: Json) -> None:
    """Every part that is not done, has what it needs and fits into the time; failed ones last."""
    ends = time.monotonic() + options.minutes * 60
    for part in sorted(planned, key=lambda part: state(found, part) == FAILED):
        if state(found, part) == DONE:
            print(f"{part.name}: done before")
            continue
        left = ends - time.monotonic()
        estimate, limit = part.times(rehearse=options.rehearse)
        why = None
        if part.needs_comfyui and here.get("comfyui_error"):
            why = here["comfyui_error"]
        elif left < estimate:
            why = f"needs about {estimate:.0f} s, {max(left, 0):.0f} s were left"
        if why is not None:
            found["parts"][part.name] = {"state": LEFT, "title": part.title, "why": why}
            print(f"{part.name}: not run: {why}", flush=True)
        else:
            print(f"{part.name}: {part.title}", flush=True)
            found["parts"][part.name] = {
                "state": LEFT, "title": part.title, "why": "it was running when all was ended",
            }  # fmt: skip
            save(found, options.out)
            found["parts"][part.name] = run_part(part, options, min(limit, left))
            print("  " + _said(found["parts"][part.name]), flush=True)
        save(found, options.out)


def run_part(part: Part, options: argparse.Namespace, seconds: float) -> Json:
    """One process, its output in logs/; Ctrl-C ends it and goes on upwards."""
    log = options.out / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = part.command(options.out, seconds, rehearse=options.rehearse)
    started = time.monotonic()
    timed_out = False
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=PACK_ROOT, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out, code = True, None
        finally:
            _end(process)
    row: Json = {
        "state": DONE if code == 0 else FAILED,
        "title": part.title,
        "seconds": round(time.monotonic() - started, 1),
    }
    tail = _tail(log)
    if part.program == "test":
        row["why"] = next((x for x in reversed(tail) if x.startswith("gpu ")), "")[3:].strip()
        if "did not run" in row["why"]:  # ./test says so, and fails nothing
            row["state"] = FAILED
    if row["state"] == FAILED:
        reason = f"ended after {seconds:.0f} s, its limit" if timed_out else _reason(code, tail)
        row["why"] = row.get("why") or reason
        row["log"] = tail
    return row


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask the part and all that it started to end, then end them."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    _signal(process, signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """To the part's own session, also after it has ended: its children may be left."""
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "nt":
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)


def _reason(code: int | None, tail: list[str]) -> str:
    """Why a part failed, in a line: the package that it lacks, or what it said last."""
    missing = [line for line in tail if line.startswith("ModuleNotFoundError")]
    if missing:
        return lacking(missing[-1])
    how = f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return f"{how}: {tail[-1] if tail else 'it said nothing'}"


def _tail(log: Path) -> list[str]:
    """The last lines of a log; of a line that was drawn again and again, the last state."""
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-_TAIL_LINES:]


def state(found: Json, part: Part) -> str:
    """DONE, FAILED, or LEFT for what was not run."""
    return found["parts"].get(part.name, {}).get("state", LEFT)


def _said(row: Json) -> str:
    seconds = f" in {row['seconds']:.0f} s" if "seconds" in row else ""
    return f"{row['state']}{seconds}" + (f": {row['why']}" if row.get("why") else "")


def save(found: Json, folder: Path) -> None:
    """gpu.json and gpu.md."""
    write_text(folder / "gpu.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "gpu.md", gpu_page(found))


def summary(found: Json, planned: list[Part], options: argparse.Namespace) -> list[str]:
    """What was done, what was not and why, where it is, and how to go on."""
    lines = []
    for kind, title in ((DONE, "Done"), (FAILED, "Failed"), (LEFT, "Not done")):
        chosen = [part for part in planned if state(found, part) == kind]
        lines += [f"{title}:"] if chosen else []
        for part in chosen:
            row = found["parts"].get(part.name, {"state": LEFT, "why": "not reached"})
            lines.append(f"  {part.name:26} {_said(row)}")
    written = {name for part in planned for name in part.files if (options.out / name).is_file()}
    lines.append(f"In {options.out}: {', '.join(sorted({*written, 'gpu.json', 'gpu.md'}))}, logs/")
    if any(state(found, part) != DONE for part in planned):
        lines.append("The same command goes on with what is not done")
    return lines


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the parts too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument(
        "--only", default="", help="only parts with this, or one of these, in their name"
    )
    parser.add_argument("--again", action="store_true", help="what is done, too")
    parser.add_argument("--list", action="store_true", help="the parts and their seconds")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.absolute()
    return options

"""A run's kernel plan that later runs repeat: the same seed then gives the same picture.

A plan is a name, kept as a file in ComfyUI's user folder, or the JSON of a report's `plan`, kept
in the workflow itself. A run that meets a call without an entry decides it as usual; a named plan
gets the entry when the run is over.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..store import Store
from .request import BlockKey, Request
from .timings import shape_key

FOLDER = "slipstream_attention_plans"
FORMAT = 1
ALL = "*"  # stands for every block of a shape that has no entry of its own

Choices = dict[str, dict[str, str]]  # "shape dense" -> block or ALL -> kernel id


def is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def problem_with(text: str) -> str | None:
    """Why `text` is no plan, or None."""
    if not text:
        return None
    if not is_json(text):
        if re.fullmatch(r"[\w][\w .-]*", text.strip()):
            return None
        return (
            f"freeze takes a name of letters, digits, spaces, dots and dashes, or the JSON of a "
            f"report's plan; got '{text}'."
        )
    try:
        content = json.loads(text)
    except ValueError as error:
        return f"The plan in 'freeze' is not JSON ({error}): copy `plan` of a report again."
    if _choices(content) is None:
        return "The plan in 'freeze' has no choices: copy `plan` of a report, with its braces."
    return None


def _choices(content: Any) -> Choices | None:
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, dict):
        return None
    for blocks in choices.values():
        if not isinstance(blocks, dict) or not all(isinstance(k, str) for k in blocks.values()):
            return None
    return choices


def plan_of(decided: Iterable[tuple[BlockKey, Request, bool, str]], machine: str) -> dict[str, Any]:
    """The plan of what a run decided: (block, request, dense, kernel id) each. machine: a note."""
    by_shape: dict[str, dict[str, str]] = {}
    for block, request, dense, kernel_id in decided:
        by_shape.setdefault(_shape(request, dense), {})[str(block)] = kernel_id
    choices: Choices = {}
    for shape, blocks in by_shape.items():
        usual = Counter(blocks.values()).most_common(1)[0][0]
        others = {block: kernel for block, kernel in blocks.items() if kernel != usual}
        choices[shape] = {ALL: usual, **others}
    return {"format": FORMAT, "machine": machine, "choices": choices}


def _shape(request: Request, dense: bool) -> str:
    return f"{shape_key(request)} {'dense' if dense else 'open'}"


class FrozenPlan:
    """The plan that `text` names or holds. forget: begin a named one anew.

    num_missing: calls that the plan did not know; they were decided as usual.
    """

    def __init__(self, text: str, folder: Path | None, *, forget: bool = False):
        self._store: Store | None = None
        if is_json(text):
            content = json.loads(text)
        else:
            folder = folder / FOLDER if folder is not None else None
            self._store = Store(folder, f"{text.strip()}.json", FORMAT)
            content = {} if forget else self._store.read()
        self._choices = _choices(content) or {}
        self.machine = str(content.get("machine", ""))
        self.num_missing = 0

    @property
    def is_new(self) -> bool:
        return not self._choices

    def choice(self, block: BlockKey, request: Request, dense: bool) -> str | None:
        """The kernel id that the plan names for this call, or None."""
        blocks = self._choices.get(_shape(request, dense), {})
        found = blocks.get(str(block), blocks.get(ALL))
        if found is None and not self.is_new:
            self.num_missing += 1
        return found

    def save(self, plan: dict[str, Any]) -> str | None:
        """Add a finished run's choices to a named plan; returns a sentence if that fails.

        Entries that the file has stay. Several processes may add their own shapes.
        """
        if self._store is None:
            return None
        content = {} if self.is_new else self._store.read()
        known = _choices(content) or {}
        merged = {**plan["choices"], **known}
        if merged == known:
            return None
        machine = content.get("machine", plan["machine"])
        why = self._store.write({"machine": machine, "choices": merged})
        return None if why is None else f"Kernel plan: {why}"

"""Say of two suite.json files whether each side became faster, slower, or stayed within the noise.

    python bench compare BEFORE.json AFTER.json

What is compared is each side's speed against plain ComfyUI of its own file, so that two machines
that are not equally fast can be compared too; milliseconds are not. Exit code 1: a side is slower.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .paired import FASTER, NOISE, SLOWER
from .tables import table

ABSENT = "only in one file"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(subject, side, change, verdict) of every side of either file.

    Within noise: the medians differ by less than the wider noise band of the two, or the quartiles
    of the two overlap.
    """
    rows = []
    old, new = _sides(before), _sides(after)
    for key in list(dict.fromkeys((*old, *new))):
        if key not in old or key not in new:
            rows.append((*key, "-", ABSENT))
            continue
        (a, a_noise), (b, b_noise) = old[key], new[key]
        change = b["median"] / a["median"]
        overlap = a["low"] <= b["high"] and b["low"] <= a["high"]
        if overlap or abs(change - 1) <= max(a_noise, b_noise):
            word = NOISE
        else:
            word = FASTER if change > 1 else SLOWER
        rows.append((*key, f"{a['median']:.2f}x to {b['median']:.2f}x", word))
    return rows


def _sides(found: dict[str, Any]) -> dict[tuple[str, str], tuple[dict[str, float], float]]:
    """(subject, side) -> its speed and the reach of its subject's noise band."""
    return {
        (subject["name"], side["name"]): (side["speed"], subject["noise_band"][1] - 1)
        for subject in found["subjects"]
        for side in subject["sides"]
        if side["verdict"] != "baseline"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    files = []
    for path in (options.before, options.after):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            files.append((found, _sides(found)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path} is no suite.json of `python bench suite`: {error}", file=sys.stderr)
            return 2
    (before, _), (after, _) = files
    rows = compare(before, after)
    print(table(["subject", "side", "speed against plain", "verdict"], rows))
    for label, found in (("before", before), ("after", after)):
        made = found["environment"]
        print(f"{label}: commit {made['commit']}, {made['device']}, torch {made['torch']}")
    return 1 if any(row[-1] == SLOWER for row in rows) else 0

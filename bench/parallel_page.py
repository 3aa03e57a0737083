"""The page of docs/benchmarks on sequence parallel, from its JSON."""

from collections.abc import Callable
from typing import Any

from .tables import preface, table

Json = dict[str, Any]


def shares_of(row: Json) -> dict[str, float]:
    """Shares of a shared call's time on rank 0: compute, exchange, broadcast."""
    seconds = row["report"].get("seconds", {})
    total = sum(seconds.values()) or 1.0
    return {name: value / total for name, value in seconds.items()}


def met(row: Json) -> str:
    """Whether a row reaches its goal, and if not, whether its machine could."""
    if not row["goal"]:
        return "-"
    if row["speed"]["median"] >= row["goal"]:
        return "met"
    ceiling = row.get("ceiling")
    beyond = ceiling is not None and ceiling["median"] < row["goal"]
    return "missed (beyond this machine)" if beyond else "missed"


def parallel_page(found: Json) -> str:
    """docs/benchmarks/parallel.md"""
    parts = ["# Sequence parallel against one device", *preface(found)]
    parts.append(
        f"{found['model']}. Seconds per sampling step (all but the first), through a private "
        "ComfyUI server; a speed is the median of paired rounds with its quartiles. Every CPU rank "
        "has one thread, so has the server. Within noise means inside the band in which one device "
        "differs from itself."
    )
    header = ["devices", "layout", "speed", "quartiles", "goal", "", "ceiling", "verdict"]
    header += ["exchange", "broadcast", "stolen"]
    parts.append(table(header, [_cells(row) for row in found["rows"]]))
    low, high = found["rows"][0]["noise"]
    rounds = f"{found['rows'][0]['speed']['num_pairs']} rounds; noise {low:.2f} to {high:.2f}. "
    parts.append(
        f"{rounds}Exchange counts waiting for slower ranks; exchange and broadcast are shares of "
        "a shared call on rank 0. Stolen: of the time in which the processors had work, what a "
        "virtual machine's host gave to others meanwhile; a rank that waits for its processor lets "
        "all others wait."
    )
    if any("ceiling" in row for row in found["rows"]):
        parts.append(
            "Ceiling: as many processes as ranks, one thread each, do the ranks' shares of a call "
            "at the same time and exchange nothing, against one that does all of it; median of the "
            "same rounds. What it lacks to the number of ranks is the machine's: memory bandwidth, "
            "clock speed under load, whatever else runs on it."
        )
    parts.append(
        "GPUs: **unverified**, nobody has run "
        "`python bench parallel --devices cuda:0,cuda:1 --model wan-1.3b --out docs/benchmarks`."
    )
    return "\n\n".join(parts) + "\n"


def _cells(row: Json) -> list[str]:
    speed, report, shares = row["speed"], row["report"], shares_of(row)
    return [
        row["devices"],
        report.get("layout") or _degrees(report),
        f"{speed['median']:.2f}x",
        f"{speed['low']:.2f} to {speed['high']:.2f}",
        f"{row['goal']}x" if row["goal"] else "-",
        met(row),
        f"{row['ceiling']['median']:.2f}x" if "ceiling" in row else "-",
        row["verdict"],
        f"{shares['exchange']:.1%}",
        f"{shares['broadcast']:.1%}",
        f"{row['stolen']:.0%}",
    ]


def _degrees(report: Json) -> str:
    """Layout of a measurement from before batches were shared."""
    return f"cfg {report['cfg']} x ulysses {report['ulysses']} x ring {report['ring']}"


PAGES: dict[str, Callable[[Json], str]] = {"parallel": parallel_page}

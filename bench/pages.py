"""Write every page and chart of docs/benchmarks again from its JSON; --check only compares."""

import argparse
import json
from pathlib import Path

from . import cache_pages, chart, gpu_page, offload_pages, parallel_page, svdquant_pages, tables
from .setup_env import PACK_ROOT

FOLDER = PACK_ROOT / "docs" / "benchmarks"
PAGES = (
    tables.PAGES
    | cache_pages.PAGES
    | gpu_page.PAGES
    | offload_pages.PAGES
    | parallel_page.PAGES
    | svdquant_pages.PAGES
)
CHARTS = {
    "suite": chart.draw_suite,
    "suite-quick": chart.draw_suite,
    "full-width": chart.draw_suite,
    "quality": chart.draw_quality,
}


def rendered(folder: Path = FOLDER) -> dict[Path, str]:
    """Page -> what its JSON says, for every JSON in `folder` that has a page."""
    return {
        folder / f"{name}.md": page(json.loads((folder / f"{name}.json").read_text("utf-8")))
        for name, page in PAGES.items()
        if (folder / f"{name}.json").is_file()
    }


def stale(folder: Path = FOLDER) -> list[str]:
    """Names of the pages that are absent or differ from their JSON."""
    return [
        path.name
        for path, text in rendered(folder).items()
        if not path.is_file() or path.read_text("utf-8") != text
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    found = stale()
    if options.check:
        print("\n".join(f"{name} differs from its JSON" for name in found) or "All pages agree")
        return 1 if found else 0
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(PACK_ROOT)}: {'written' if path.name in found else 'the same'}")
    for name, draw in CHARTS.items():
        source = FOLDER / f"{name}.json"
        if source.is_file():
            draw(json.loads(source.read_text("utf-8"))).save(FOLDER / f"{name}.png")
    return 0

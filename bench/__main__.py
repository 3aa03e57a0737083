"""`python bench NAME [options]` runs bench/NAME.py; `python bench` lists what there is.

The pack is loaded by path under the name `slipstream`, so that its root stays off sys.path.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_pack() -> None:
    """The pack as `slipstream`."""
    spec = importlib.util.spec_from_file_location(
        "slipstream", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["slipstream"] = module
    spec.loader.exec_module(module)


def measurements() -> dict[str, str]:
    """Name -> first line of its docstring, for every module here that has a main()."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name != "__main__.py" and "\ndef main(" in text and text.startswith('"""'):
            found[path.stem] = text[3:].splitlines()[0].rstrip('"')
    return found


def start() -> int:
    known = measurements()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        for name, line in known.items():
            print(f"{name:24} {line}")
        if len(sys.argv) > 1:
            print(f"There is no measurement '{sys.argv[1]}': choose one of these.", file=sys.stderr)
        return 2
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    load_pack()
    name = sys.argv.pop(1)
    return importlib.import_module(f"slipstream.bench.{name}").main() or 0


if __name__ == "__main__":
    sys.exit(start())

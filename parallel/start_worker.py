"""The worker program: python start_worker.py HOST PORT NUMBER, with a key on stdin.

With "probe" as the first argument it is one of the two processes of probe.py.

Loads this pack under an alias, as ComfyUI does: by path, its root never on sys.path.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

ALIAS = "slipstream_worker"

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        ALIAS, folder.parent / "__init__.py", submodule_search_locations=[str(folder.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[ALIAS] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[ALIAS])
    name, arguments = "worker", sys.argv[1:]
    if arguments[0] == "probe":
        name, *arguments = arguments
    importlib.import_module(f"{ALIAS}.parallel.{name}").main(arguments)

"""`python tests/faked_gpu.py NAME ...` is `python bench NAME ...` on a faked GPU."""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]
    sys.path.insert(0, str(HERE))
    import fake_cuda

    sys.path.pop(0)
    fake_cuda.start()
    os.environ["SLIPSTREAM_BENCH_ENTRY"] = __file__  # its children fake it too
    sys.argv[0] = str(HERE.parent / "bench")
    runpy.run_path(sys.argv[0], run_name="__main__")

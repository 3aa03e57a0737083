"""Finds the pack under the name it has in this process: tests and workers load it differently."""

import importlib
import sys

NAMES = ("slipstream", "slipstream_worker")


def pack(module):
    """A module of the pack."""
    name = next(name for name in NAMES if name in sys.modules)
    return importlib.import_module(f"{name}.{module}")

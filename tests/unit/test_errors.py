"""Every error class of the engine: what ComfyUI prints in front of its sentence is no disk path."""

import importlib
import pkgutil

import pytest
import slipstream
from slipstream.backends.errors import SlipstreamError


def _error_classes():
    """All exception classes that the engine's modules define."""
    found = set()
    for package in ("backends", "parallel"):
        root = importlib.import_module(f"slipstream.{package}")
        for module_info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            if module_info.name.endswith((".start_worker", ".__main__")):
                continue
            module = importlib.import_module(module_info.name)
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, BaseException):
                    found.add(value)
    return found


def _shown_by_comfyui(error):
    """The type as ComfyUI's execution.py prints it: module and name, only the name of builtins."""
    kind = type(error)
    prefix = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{prefix}{kind.__qualname__}: {error}"


def test_no_error_of_ours_begins_with_a_path():
    inside = f"{slipstream.__name__}."
    plain = {c.__name__ for c in _error_classes() if c.__module__.startswith(inside)}
    # The base is never raised; the others are caught where sequence parallel makes its calls.
    assert plain == {"SlipstreamError", "Alone", "BeginAgain", "EarlyExit"}
    ours = {c.__name__ for c in _error_classes() if c.__module__ == "slipstream"}
    assert {"AttentionError", "OffloadError", "ParallelError", "CheckpointError"} <= ours


def test_the_pack_under_a_disk_path_prints_the_sentence():
    """ComfyUI names a pack's module after its folder."""

    class MadeUnderAPathError(SlipstreamError, ValueError):
        __module__ = "/home/someone/ComfyUI/custom_nodes/slipstream.backends.made"

    shown = _shown_by_comfyui(MadeUnderAPathError("Choose a kernel."))
    assert shown.startswith("slipstream.")
    assert shown.endswith("MadeUnderAPathError: Choose a kernel.")
    with pytest.raises(ValueError, match="Choose"):
        raise MadeUnderAPathError("Choose a kernel.")

"""MemoryWatch: the device's memory over one run, by stage, with or without the offload node.

Stages: load (until the first model call), sampling (until the run ends), and decode: what happened
between the run before and this one, so its decode and the text encoding. Holds numbers only.
"""

from typing import Any

from ..report import Section
from . import counters, host
from .section import MemoryUse, merged, section


class MemoryWatch:
    """The memory section of one run of `patcher`. is_first: no run came before in this process."""

    def __init__(self, patcher: Any, *, is_first: bool):
        self._patcher = patcher
        self._device = patcher.load_device
        self._before = host.loaded_models(patcher)
        self._counts = counters.free_and_total(self._device) is not None  # a CPU has no counters
        self._stages: dict[str, int | None] = {"load": None, "sampling": None, "decode": None}
        if not is_first:
            self._stages["decode"] = counters.used_peak(self._device)
        counters.reset_peak(self._device)

    def before_call(self) -> None:
        """The first model call ends the load stage."""
        if self._counts and self._stages["load"] is None:
            self._seen("load")
            counters.reset_peak(self._device)

    def after_call(self) -> None:
        """A model call has ended, or raised."""
        if self._counts:
            self._seen("sampling")

    def section(self) -> Section:
        """Called when sampling is over, before the models are let go."""
        counted = counters.free_and_total(self._device)
        if counted is not None:
            self._seen("sampling" if self._stages["load"] is not None else "load")
        return section(
            MemoryUse(
                device=str(self._device),
                total_bytes=None if counted is None else counted[1],
                reserve_bytes=0 if counted is None else host.reserve_bytes(),
                stages=dict(self._stages),
                models=merged(self._before, host.loaded_models(self._patcher)),
                flags=host.start_flags(),
            )
        )

    def close(self) -> None:
        """What comes next is the decode: its peak is counted from here."""
        counters.reset_peak(self._device)
        self._patcher = None

    def _seen(self, stage: str) -> None:
        used = counters.used_peak(self._device)
        if used is not None:
            self._stages[stage] = max(used, self._stages[stage] or 0)

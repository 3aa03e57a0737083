"""The worker processes that run, and how missing ones are started. No models, no groups here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .launcher import Launcher, Spec
from .messages import Start
from .workers import Meanwhile, Worker, collect

_START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Setting:
    """What new workers are told; comfyui and arguments as in messages.Start."""

    comfyui: str
    arguments: Any
    num_threads: int
    timeout_s: float
    idle_s: float


class Crew:
    """Workers in the order of their processes' numbers: workers[0] is process 1."""

    def __init__(self, launcher: Callable[[], Launcher]):
        self._make_launcher = launcher
        self._launcher: Launcher | None = None
        self.workers: list[Worker] = []

    @property
    def folder(self) -> Path:
        """A private folder that all workers can read."""
        assert self._launcher is not None
        return self._launcher.folder

    def require(
        self,
        devices: Sequence[str],
        setting: Setting,
        *,
        meanwhile: Meanwhile = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> bool:
        """Put workers for `devices` first, started where there are none; others stay behind them.

        True if the order changed, so that groups are void. Raises StartFailed, WorkerError.
        """
        before = list(self.workers)
        for worker in [w for w in self.workers if not w.is_alive]:
            worker.kill()
            self.workers.remove(worker)
        spare = list(self.workers)
        found: list[Worker | None] = []
        for device in devices:
            fit = next((w for w in spare if w.device == device), None)
            found.append(fit)
            if fit is not None:
                spare.remove(fit)
        missing = [device for device, one in zip(devices, found, strict=True) if one is None]
        started = self._launch(missing, setting, meanwhile) if missing else []
        fresh = iter(started)
        self._set([next(fresh) if one is None else one for one in found] + spare)
        self._greet(started, setting, meanwhile, progress)
        return self.workers != before

    def drop(self, lost: Sequence[Worker]) -> None:
        """Forget workers that are gone."""
        self._set([worker for worker in self.workers if worker not in lost])

    def _set(self, workers: list[Worker]) -> None:
        self.workers = workers
        for number, worker in enumerate(workers, 1):
            worker.number = number

    def _launch(
        self, devices: Sequence[str], setting: Setting, meanwhile: Meanwhile
    ) -> list[Worker]:
        if self._launcher is None:
            self._launcher = self._make_launcher()
        specs = [Spec(device=device, num_threads=setting.num_threads) for device in devices]
        handles = self._launcher.start(specs, meanwhile=meanwhile)
        return [
            Worker(handle, device, idle_s=setting.idle_s)
            for handle, device in zip(handles, devices, strict=True)
        ]

    def _greet(
        self,
        started: list[Worker],
        setting: Setting,
        meanwhile: Meanwhile,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        for worker in started:
            device = "cpu" if worker.device == "cpu" else "cuda:0"  # it sees its own GPU only
            start = Start(
                setting.comfyui, setting.arguments, device, setting.num_threads, setting.idle_s
            )
            worker.send(start)
        for count, worker in enumerate(started, 1):
            collect([worker], timeout_s=_START_TIMEOUT_S, meanwhile=meanwhile)
            worker.is_started = True
            if progress is not None:
                progress(count, len(started))

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.exit()
        self.workers = []
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None

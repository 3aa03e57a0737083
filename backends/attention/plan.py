"""The decision for one kind of call: which kernel answers it, found at its first occurrence.

An Entry is made once per (block, shape, dense or open) and followed until the run ends or its
kernel fails. Making one filters the policy's kernels, times the survivors, probes the
approximate ones on the call's own q, k, v, and returns the result of the winner with the Entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..registry import eligible
from .config import AttentionConfig
from .kernels.base import EXACT, Kernel
from .layout import Views
from .policy import ON_CPU, closed
from .probe import Verdict, probe
from .request import BlockKey, Request
from .timings import Timings, measure_ms

DEFAULT = "default"  # the kernel id under which ComfyUI's own function is timed
GAIN = 0.97  # a kernel must take less than this share of the default's time
FATAL = ("illegal memory access", "device-side assert", "unspecified launch failure")

Answer = Callable[[], torch.Tensor]


@dataclass
class Entry:
    """What answers one kind of call. kernel None: ComfyUI's function (or an earlier patch)."""

    block: BlockKey
    request: Request
    kernel: Kernel | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # kernel id -> sentence
    verdict: Verdict | None = None
    answers: dict[str, int] = field(default_factory=dict)  # kernel id or DEFAULT -> calls
    probes: int = 0
    chosen_ms: float | None = None
    exact_ms: float | None = None
    refused: bool = False  # a kernel was wanted and none could take it
    steps: list[tuple[int, str]] = field(default_factory=list)  # (step, kernel id), one per step
    last_step: int = -1

    @property
    def calls(self) -> int:
        return sum(self.answers.values())


class Planner:
    """Makes and repairs entries for one Run and device."""

    def __init__(
        self,
        config: AttentionConfig,
        approximate: tuple[Kernel, ...],
        exact: tuple[Kernel, ...],
        last_resort: Kernel,
        timings: Timings,
    ):
        self.config, self.approximate, self.exact = config, approximate, exact
        self.last_resort, self.timings = last_resort, timings
        self.disabled: dict[str, str] = {}  # kernel id -> why this run no longer uses it
        self._checked: set[tuple[str, str, str, int]] = set()  # exact kernels, see _is_new

    def plan(
        self,
        block: BlockKey,
        request: Request,
        views: Views,
        default: Answer,
        *,
        dense_step: bool,
        dense_block: bool,
        default_is_exact: bool,
    ) -> tuple[Entry, torch.Tensor | None]:
        """The Entry for this call, and the call's result if a kernel made one (else None)."""
        entry = Entry(block, request)
        shut = None
        if self.approximate:
            shut = closed(self.config, request, dense_step=dense_step, dense_block=dense_block)
        if shut is None:
            approximate, entry.reasons = eligible(self.approximate, request, self.disabled)
        else:
            approximate, entry.reasons = [], {k.id: shut for k in self.approximate}
        exact, rejected = eligible(self.exact, request, self.disabled)
        entry.reasons.update(rejected)
        if not approximate and not exact:
            if not default_is_exact and (shut or self.config.policy == "exact"):
                return entry, self._try(entry, self.last_resort, views, probe_now=False)
            entry.refused = bool(rejected) or shut is None
            if request.device_type != "cuda" and self.config.policy != "manual":
                on_cpu = {DEFAULT: ON_CPU.format(request.device_type)}
                entry.reasons = {**on_cpu, "schedule": shut} if shut else on_cpu
            return entry, None
        best_exact, approximate = self._rank(
            entry, approximate, exact, views, default, default_is_exact=default_is_exact
        )
        for kernel in approximate:
            out = self._try(entry, kernel, views, probe_now=self.config.probe)
            if out is not None:
                entry.chosen_ms = self.timings.get(request, kernel.id)
                return entry, out
        entry.chosen_ms = entry.exact_ms
        if best_exact is None:
            entry.refused = self.config.policy == "manual"
            return entry, None
        check = self.config.probe and self._is_new(best_exact, request)
        out = self._try(entry, best_exact, views, probe_now=check)
        entry.refused = out is None
        return entry, out

    def _is_new(self, kernel: Kernel, request: Request) -> bool:
        """Whether an exact kernel meets this kind of call for the first time in the run.

        Exact by construction is not exact by build: a wrong one is a black picture.
        """
        kind = (kernel.id, request.mask, request.dtype, request.head_dim)
        is_new = kind not in self._checked
        self._checked.add(kind)
        return is_new and not request.capturing

    def _try(
        self, entry: Entry, kernel: Kernel, views: Views, *, probe_now: bool
    ) -> torch.Tensor | None:
        """The kernel's result, or None with the reason on the entry; probes it if asked."""
        out = self.answer(kernel, views)
        if isinstance(out, str):
            entry.reasons[kernel.id] = out
            return None
        if probe_now:
            verdict = probe(out, views.q, views.k, views.v, mask=views.mask, scale=views.scale)
            entry.probes += 1
            why = verdict.against(self.config.max_rel_l1, self.config.min_cos)
            entry.verdict = verdict
            if why is not None:
                sentence = f"{kernel.id} failed the accuracy check ({why})"
                entry.reasons[kernel.id] = sentence
                if kernel.category == EXACT:  # broken, not imprecise: no layer will like it
                    self.disabled[kernel.id] = sentence
                return None
        entry.kernel = kernel
        return out

    def answer(self, kernel: Kernel, views: Views) -> torch.Tensor | str:
        """The kernel's output [B,H,Nq,D], or the sentence of its failure; it is not used again.

        A CUDA error that leaves the context dead is re-raised: nothing can be computed after it.
        """
        try:
            return _run(kernel, views)
        except torch.cuda.OutOfMemoryError:
            why = f"{kernel.id} ran out of memory"
        except Exception as error:  # third-party kernels raise anything; it goes to the report
            if any(word in str(error) for word in FATAL):
                raise
            why = f"{kernel.id} failed ({type(error).__name__}: {_first_line(error)})"
        self.disabled[kernel.id] = why
        return why

    def _rank(
        self,
        entry: Entry,
        approximate: list[Kernel],
        exact: list[Kernel],
        views: Views,
        default: Answer,
        *,
        default_is_exact: bool,
    ) -> tuple[Kernel | None, list[Kernel]]:
        """(exact kernel or None for the default, approximate kernels that beat it, best first)."""
        request = entry.request
        if self.config.policy == "manual":
            return (exact[0] if exact else None), approximate
        if not self.config.autotune or request.capturing or not _has_room(views):
            return (exact[0] if exact else None), approximate
        device = views.q.device
        times = {}
        for kernel in (*exact, *approximate):
            if (ms := self._time(request, kernel, views, device)) is not None:
                times[kernel.id] = ms
        best: Kernel | None = min(
            (k for k in exact if k.id in times), key=lambda k: times[k.id], default=None
        )
        default_ms = self._default_ms(request, default, device)
        if default_is_exact and (best is None or times[best.id] > GAIN * default_ms):
            if best is not None:
                entry.reasons[best.id] = _slower(best.id, times[best.id], "default", default_ms)
            best = None
        entry.exact_ms = times[best.id] if best is not None else default_ms
        faster = []
        for kernel in sorted((k for k in approximate if k.id in times), key=lambda k: times[k.id]):
            if times[kernel.id] < GAIN * entry.exact_ms:
                faster.append(kernel)
            else:
                name = best.id if best is not None else "default"
                entry.reasons[kernel.id] = _slower(
                    kernel.id, times[kernel.id], name, entry.exact_ms
                )
        return best, faster

    def _time(
        self, request: Request, kernel: Kernel, views: Views, device: torch.device
    ) -> float | None:
        known = self.timings.get(request, kernel.id)
        if known is not None:
            return known
        if isinstance(self.answer(kernel, views), str):
            return None
        ms = measure_ms(lambda: _run(kernel, views), device)
        self.timings.put(request, kernel.id, ms)
        return ms

    def _default_ms(self, request: Request, default: Answer, device: torch.device) -> float:
        known = self.timings.get(request, DEFAULT)
        if known is None:
            known = measure_ms(default, device)
            self.timings.put(request, DEFAULT, known)
        return known

    def check_again(self, entry: Entry, out: torch.Tensor, views: Views) -> bool:
        """Probe a running approximate kernel; False takes it off this entry."""
        assert entry.kernel is not None
        verdict = probe(out, views.q, views.k, views.v, mask=views.mask, scale=views.scale)
        entry.probes += 1
        if entry.verdict is None or verdict.rel_l1 > entry.verdict.rel_l1:
            entry.verdict = verdict
        why = verdict.against(self.config.max_rel_l1, self.config.min_cos)
        if why is not None:
            entry.reasons[entry.kernel.id] = f"{entry.kernel.id} failed the accuracy check ({why})"
        return why is None


def _run(kernel: Kernel, views: Views) -> torch.Tensor:
    out = kernel.run(views.q, views.k, views.v, mask=views.mask, scale=views.scale)
    assert isinstance(out, torch.Tensor)
    return out


def _slower(kernel_id: str, ms: float, other: str, other_ms: float) -> str:
    return f"{kernel_id} is not faster here ({ms:.3g} ms, {other} {other_ms:.3g} ms)"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def _has_room(views: Views) -> bool:
    """Whether a second result and a quantised copy of q, k, v fit in free device memory."""
    if views.q.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(views.q.device)
    needed = 3 * (views.q.nbytes + views.k.nbytes + views.v.nbytes)
    return free > needed


def reasons_of(entries: Mapping[object, Entry]) -> dict[str, int]:
    """Sentence -> number of calls it stood against, over all entries."""
    found: dict[str, int] = {}
    for entry in entries.values():
        for sentence in set(entry.reasons.values()):
            found[sentence] = found.get(sentence, 0) + entry.calls
    return found

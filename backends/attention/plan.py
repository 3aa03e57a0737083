"""The decision for one kind of call: which kernel answers it, found at its first occurrence.

An Entry is made once per (block, shape, dense or open) and followed until the run ends or its
kernel fails. Making one filters the policy's kernels, times the survivors, checks the
approximate ones on the call's own q, k, v, and returns the result of the winner with the Entry.
Nothing that is tried here may end a run: a kernel that fails is a reason.
"""

from collections.abc import Mapping

import torch

from .. import host
from ..registry import eligible
from . import failures
from .config import AttentionConfig
from .entry import DEFAULT, Entry, Fallback, answer_of
from .failures import Failures
from .kept import Kept
from .kernels.base import APPROXIMATE, EXACT, Kernel
from .layout import Views
from .policy import ON_CPU, closed
from .probe import Verdict, probe
from .ranking import Ranking
from .request import BlockKey, Request
from .timings import shape_key

CAPTURING = "{} is not used while a CUDA graph is captured: it cannot be checked there"
NOT_CHECKED = "{} is not used: there was no memory to check it ({})"


class Planner:
    """Makes and repairs entries for one Run."""

    def __init__(
        self,
        config: AttentionConfig,
        approximate: tuple[Kernel, ...],
        exact: tuple[Kernel, ...],
        last_resort: Kernel,
        kept: Kept,
        num_calls: int = 0,
    ):
        self.config, self.approximate, self.exact = config, approximate, exact
        self.last_resort, self.kept = last_resort, kept
        self.failures = Failures()
        self._ranking = Ranking(config, kept, num_calls)
        self._by_id = {k.id: k for k in (*approximate, *exact, last_resort)}
        self._checked: set[tuple[str, str, str, int]] = set()  # exact kernels, see _is_new
        self._distrusted: set[tuple[str, str]] = set()  # (kernel id, shape): see was_trusted

    def plan(
        self,
        block: BlockKey,
        request: Request,
        views: Views,
        fallback: Fallback,
        *,
        dense_step: bool,
        dense_block: bool,
    ) -> tuple[Entry, torch.Tensor | None]:
        """The Entry for this call, and the call's result if a kernel made one (else None)."""
        entry = Entry(block, request)
        shut = None
        if self.approximate:
            shut = closed(self.config, request, dense_step=dense_step, dense_block=dense_block)
        entry.is_dense = shut is not None
        if self.kept.frozen is not None:
            name = self.kept.frozen.choice(block, request, entry.is_dense)
            if name is not None:
                return entry, self._repeat(entry, name, views)
        failed = self.failures.against(request)
        if shut is None:
            approximate, entry.reasons = eligible(self.approximate, request, failed)
        else:
            approximate, entry.reasons = [], {k.id: shut for k in self.approximate}
        exact, rejected = eligible(self._exact_for(fallback), request, failed)
        entry.reasons.update(rejected)
        if not approximate and not exact:
            return entry, self._without_kernels(entry, rejected, shut, views, fallback)
        best_exact, approximate = self._ranking.rank(entry, approximate, exact, views, fallback)
        for kernel in approximate:
            out = self._try_approximate(entry, kernel, views)
            if out is not None:
                entry.chosen_ms = self.kept.timings.get(request, kernel.id)
                return entry, out
        entry.chosen_ms = entry.exact_ms
        wanted = self.config.policy == "manual" and shut is None
        if best_exact is None:
            entry.refused = wanted
            return entry, None
        check = self.config.probe and self._is_new(best_exact, request)
        out = self._try(entry, best_exact, views, check=check)
        entry.refused = out is None or (wanted and best_exact.id != self.config.backend)
        return entry, out

    def _exact_for(self, fallback: Fallback) -> tuple[Kernel, ...]:
        """Exact kernels that may be tried; beside a kernel chosen by hand only where needed."""
        manual = self.config.policy == "manual" and self.approximate
        return () if manual and fallback.may_stay else self.exact

    def _without_kernels(
        self,
        entry: Entry,
        rejected: Mapping[str, str],
        shut: str | None,
        views: Views,
        fallback: Fallback,
    ) -> torch.Tensor | None:
        """No kernel can take the call: ComfyUI's function does, if it is what was promised."""
        if not fallback.may_stay and (shut or self.config.policy == "exact"):
            return self._try(entry, self.last_resort, views, check=False)
        entry.refused = bool(rejected) or shut is None
        if entry.request.device_type != "cuda" and self.config.policy != "manual":
            on_cpu = {DEFAULT: ON_CPU.format(entry.request.device_type)}
            entry.reasons = {**on_cpu, "schedule": shut} if shut else on_cpu
        return None

    def _repeat(self, entry: Entry, name: str, views: Views) -> torch.Tensor | None:
        """The kernel that a frozen plan names, unchecked and untimed, or None for the default."""
        if name == DEFAULT:
            return None
        kernel = self._by_id.get(name)
        if kernel is None:
            entry.reasons[name] = f"{name} is in the frozen plan, but policy has no such kernel"
        else:
            fit, reasons = eligible((kernel,), entry.request, self.failures.against(entry.request))
            entry.reasons.update(reasons)
            if fit:
                return self._try(entry, kernel, views, check=False)
        entry.refused = True
        return None

    def _is_new(self, kernel: Kernel, request: Request) -> bool:
        """Whether an exact kernel meets this kind of call for the first time in the run.

        Exact by construction is not exact by build: a wrong one is a black picture.
        """
        kind = (kernel.id, request.mask, request.dtype, request.head_dim)
        is_new = kind not in self._checked and not request.capturing
        if is_new:
            self._checked.add(kind)
        return is_new

    def _try_approximate(self, entry: Entry, kernel: Kernel, views: Views) -> torch.Tensor | None:
        """As _try, with what earlier runs know about this layer."""
        if not self.config.probe:
            return self._try(entry, kernel, views, check=False)
        verdicts, block, request = self.kept.verdicts, entry.block, entry.request
        entry.verdict = None  # of a kernel tried before
        known = verdicts.known(block, request, kernel.id)
        if known is not None:
            why = self._against(kernel, known)
            if why is not None:
                entry.reasons[kernel.id], entry.verdict = why, known
                return None
            is_sample = verdicts.is_sample(
                block, request, kernel.id, lambda verdict: self._against(kernel, verdict) is None
            )
            if request.capturing or not is_sample:
                entry.verdict = known
                return self._try(entry, kernel, views, check=False)
        if request.capturing:
            entry.reasons[kernel.id] = CAPTURING.format(kernel.id)
            return None
        out = self._try(entry, kernel, views, check=True)
        entry.is_due = out is not None
        if out is None and known is not None and entry.verdict is not None:
            verdicts.distrust(request, kernel.id)
            self._distrusted.add((kernel.id, shape_key(request)))
        return out

    def was_trusted(self, entry: Entry) -> bool:
        """Whether the entry's kernel runs on an earlier run's word that has turned out void."""
        assert entry.kernel is not None
        kind = (entry.kernel.id, shape_key(entry.request))
        return entry.probes == 0 and kind in self._distrusted

    def _try(
        self, entry: Entry, kernel: Kernel, views: Views, *, check: bool
    ) -> torch.Tensor | None:
        """The kernel's result, or None with the reason on the entry."""
        out = self.answer(kernel, entry.request, views)
        if isinstance(out, str):
            entry.reasons[kernel.id] = out
            return None
        if check:
            why = self._check(entry, kernel, out, views)
            if why is not None:
                entry.reasons[kernel.id] = why
                if kernel.category == EXACT:  # broken, not imprecise: no layer will like it
                    self.failures.give_up(kernel.id, why)
                return None
        entry.kernel = kernel
        return out

    def _check(self, entry: Entry, kernel: Kernel, out: torch.Tensor, views: Views) -> str | None:
        """Compare the kernel's output with fp32; why it may not be used, or None."""
        entry.probes += 1
        try:
            verdict = probe(out, views.q, views.k, views.v, mask=views.mask, scale=views.scale)
        except Exception as error:
            if failures.must_raise(error):
                raise
            if isinstance(error, torch.cuda.OutOfMemoryError):
                host.release_cached_memory()
            return NOT_CHECKED.format(kernel.id, failures.sentence("the check", error))
        if entry.verdict is None or verdict.rel_l1 > entry.verdict.rel_l1:
            entry.verdict = verdict
        if kernel.category == APPROXIMATE:
            self.kept.verdicts.put(entry.block, entry.request, kernel.id, verdict)
        return self._against(kernel, verdict)

    def _against(self, kernel: Kernel, verdict: Verdict) -> str | None:
        why = verdict.against(self.config.max_rel_l1, self.config.min_cos)
        return None if why is None else f"{kernel.id} failed the accuracy check ({why})"

    def answer(self, kernel: Kernel, request: Request, views: Views) -> torch.Tensor | str:
        """The kernel's output [B,H,Nq,D], or the sentence of its failure.

        Out of memory is tried once more with torch's cached blocks handed back. A CUDA error that
        leaves the context dead, and the user's cancel, are raised: nothing can be done after it.
        """
        try:
            return answer_of(kernel, views)
        except torch.cuda.OutOfMemoryError:
            host.release_cached_memory()
        except Exception as error:  # third-party kernels raise anything; it goes to the report
            if failures.must_raise(error):
                raise
            return self._failed(kernel, request, error)
        try:
            return answer_of(kernel, views)
        except Exception as error:
            if failures.must_raise(error):
                raise
            return self._failed(kernel, request, error)

    def _failed(self, kernel: Kernel, request: Request, error: Exception) -> str:
        why = failures.sentence(kernel.id, error)
        is_memory = isinstance(error, torch.cuda.OutOfMemoryError)
        self.failures.add(kernel.id, request, why, transient=is_memory)
        return why

    def check_again(self, entry: Entry, out: torch.Tensor, views: Views) -> bool:
        """Check a running approximate kernel; False takes it off this entry."""
        assert entry.kernel is not None
        entry.is_due = False
        why = self._check(entry, entry.kernel, out, views)
        if why is not None:
            entry.reasons[entry.kernel.id] = why
        return why is None

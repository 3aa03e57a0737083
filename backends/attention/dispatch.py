"""The attention of one sampling run: every call finds its Entry, and its kernel or the default.

`AttentionRun` lives as long as the Run; `BoundCall` is its view of one model call, put into that
call's transformer_options and, for compiled graphs, bound to the device in op.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import host
from ..calls import ModelCall
from ..compiler import unrecorded
from ..report import Section
from ..run import Run
from .config import AttentionConfig, AttentionError
from .defaults import Attention, Defaults
from .entry import DEFAULT, Entry
from .finite import FiniteCheck
from .frozen import plan_of
from .kept import kept_for
from .kernels.base import APPROXIMATE, Kernel
from .kernels.comfyui import ComfyUIPytorch
from .layout import Views, read_call, request_of, write_output
from .places import Place, Places, block_numbers, by_place, num_blocks, place_in
from .plan import Planner
from .policy import Schedule, order
from .probe import is_finite
from .request import BlockKey
from .section import Outcome, section_of

Key = tuple[Any, ...]  # ((block type, index), ordinal, shapes, dtype, ...): see BoundCall.key


class AttentionRun:
    """One Run's plans and failures. `previous`: the override found when applied."""

    def __init__(
        self,
        run: Run,
        config: AttentionConfig,
        kernels: Mapping[str, Kernel],
        policies: Mapping[str, tuple[str, ...]],
        previous: Attention | None,
    ):
        self.run, self.config = run, config
        network = host.diffusion_model(run.patcher)
        self.is_compiled = "torch_compile" in host.features(run.patcher)
        self.schedule = Schedule(config, block_numbers(network), run.position)
        self.places = Places(network, is_compiled=self.is_compiled)
        self.preferred = host.preferred_attention(network)
        self.kept = kept_for(run.patcher, config)
        approximate, exact = order(config, kernels, policies)
        self.defaults = Defaults(
            previous, by_place(network, self.preferred), exact_only=not approximate
        )
        self.planner = Planner(
            config, approximate, exact, ComfyUIPytorch(), self.kept,
            num_calls=num_blocks(network) * run.num_steps,
        )  # fmt: skip
        self.finite = FiniteCheck(run)
        self.entries: dict[Key, Entry] = {}
        self.num_model_calls = self.num_attention_calls = 0
        self.displaced_by: str | None = None  # an override that was put on top of ours

    def bind(self, call: ModelCall, options: dict[str, Any]) -> "BoundCall":
        """The view of one model call with these transformer_options."""
        self.num_model_calls += 1
        # Without approximate kernels the schedule decides nothing: one plan serves every step.
        dense = self.planner.approximate and self.schedule.dense_step(call.step)
        return BoundCall(self, bool(dense), call.step, options)

    def evaluate(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """One evaluation, computed again if a kernel has made it NaN."""
        out = compute()
        if all(entry.kernel is None for entry in self.entries.values()):
            return out
        return self.finite.checked(out, compute)

    def section(self) -> Section:
        """The technique's part of the report."""
        decided = (
            (e.block, e.request, e.is_dense, e.kernel.id if e.kernel is not None else DEFAULT)
            for e in self.entries.values()
        )
        plan = plan_of(decided, self.kept.machine)
        remarks = [*self._remarks(), *self.kept.save(plan, is_complete=self.run.is_complete)]
        return section_of(
            Outcome(
                config=self.config,
                entries=self.entries,
                num_steps=self.run.num_steps,
                num_model_calls=self.num_model_calls,
                num_attention_calls=self.num_attention_calls,
                is_compiled=self.is_compiled,
                displaced_by=self.displaced_by,
                schedule=self.schedule.sentence() if self.planner.approximate else "",
                plan=plan,
                remarks=remarks,
            )
        )

    def _remarks(self) -> list[str]:
        remarks = []
        if self.config.backend != "auto" and self.config.policy != "manual":
            remarks.append(
                f"backend '{self.config.backend}' is not used by policy "
                f"'{self.config.policy}': it is for policy 'manual'"
            )
        if self.defaults.previous is not None:
            named = host.qualified_name(self.defaults.previous)
            remarks.append(f"calls not taken go on to {named}")
        if self.preferred:
            remarks.append(
                f"The checkpoint asks for 8-bit attention in {len(self.preferred)} layers: "
                "calls that no kernel takes there use it"
            )
        return remarks

    def close(self) -> None:
        self.entries.clear()
        self.planner.failures.clear()


class BoundCall:
    """One model call's attention. `inside` guards against meeting ourselves in the chain.

    place: the block that runs, where ComfyUI does not say it; options: transformer_options.
    """

    __slots__ = ("dense_step", "inside", "options", "ordinals", "owner", "place", "step")

    def __init__(self, owner: AttentionRun, dense_step: bool, step: int, options: dict[str, Any]):
        self.owner, self.dense_step, self.step, self.options = owner, dense_step, step, options
        self.ordinals: dict[Any, int] = {}
        self.place: Place | None = None
        self.inside = False

    def key(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        skip_reshape: bool,
        options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> Key:
        """What decides about a call. options: transformer_options; kwargs: of the call."""
        place = place_in(options, self.place)
        ordinal = self.ordinals.get(place, 0)
        self.ordinals[place] = ordinal + 1
        return (
            place, ordinal, q.shape, k.shape, q.dtype, q.device,
            None if mask is None else (mask.dtype, mask.shape), skip_reshape, kwargs.get("scale"),
            kwargs.get("low_precision_attention", True), self.dense_step,
        )  # fmt: skip

    def declines(self, key: Key) -> bool:
        """Whether the call is known to be ComfyUI's own; then it is counted here."""
        entry = self.owner.entries.get(key)
        if entry is None or entry.kernel is not None:
            return False
        self.owner.num_attention_calls += 1
        self._count(entry, DEFAULT)
        return True

    def function(self, key: Key, func: Attention) -> Attention:
        """ComfyUI's function for this call: `func`, or what the checkpoint prefers there."""
        return self.owner.defaults.function(func, key[0])

    def attend(
        self,
        key: Key,
        func: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None,
        skip_reshape: bool,
        skip_output_reshape: bool,
        options: dict[str, Any],
        default: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """A call that `declines` did not take. options: the call's scale, enable_gqa and so on."""
        owner = self.owner
        owner.num_attention_calls += 1
        entry = owner.entries.get(key)
        views = read_call(
            q, k, v, heads, mask=mask, skip_reshape=skip_reshape,
            enable_gqa=options.get("enable_gqa", False), scale=options.get("scale"),
        )  # fmt: skip
        # Plans, checks and kernels of ours allocate differently from call to call.
        with unrecorded():
            if entry is None:
                entry, out = self._first(key, views, options, func)
            else:
                out = self._again(entry, views)
            if out is not None:
                out = write_output(out, skip_output_reshape=skip_output_reshape)
            if out is not None and owner.finite.is_looking and not is_finite(out):
                out = self._replaced(entry, out, default)
        self._count(entry, DEFAULT if entry.kernel is None else entry.kernel.id)
        return default() if out is None else out

    def _first(
        self, key: Key, views: Views, options: dict[str, Any], func: Attention
    ) -> tuple[Entry, torch.Tensor | None]:
        owner, block = self.owner, BlockKey(key[0][0], key[0][1], key[1])
        request = request_of(
            views, low_precision=options.get("low_precision_attention", True) is not False,
            dense=self.dense_step,
        )  # fmt: skip
        inside, self.inside = self.inside, True  # the default is timed, and may lead back to us
        try:
            entry, out = owner.planner.plan(
                block, request, views, owner.defaults.fallback(func, options),
                dense_step=self.dense_step, dense_block=owner.schedule.dense_block(block),
            )  # fmt: skip
        finally:
            self.inside = inside
        entry.default_name = owner.defaults.name(func)
        entry.default_accuracy = owner.defaults.accuracy(func)
        if owner.config.strict and entry.refused:
            raise AttentionError(_strict(owner.config, entry, _first_reason(owner.config, entry)))
        if not request.capturing:
            owner.entries[key] = entry
        return entry, out

    def _again(self, entry: Entry, views: Views) -> torch.Tensor | None:
        """A planned kernel's result; None if it failed now or at the check in mid-run."""
        owner, kernel = self.owner, entry.kernel
        assert kernel is not None
        out = owner.planner.answer(kernel, entry.request, views)
        if isinstance(out, str):
            entry.kernel, entry.reasons[kernel.id] = None, out
            if owner.config.strict:
                raise AttentionError(_strict(owner.config, entry, out))
            return None
        is_due = entry.is_due and self.step >= owner.run.num_steps // 2
        is_due = (is_due or owner.planner.was_trusted(entry)) and not _capturing(out)
        if is_due and not owner.planner.check_again(entry, out, views):
            entry.kernel = None
            return None
        return out

    def _replaced(
        self, entry: Entry, out: torch.Tensor, default: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """ComfyUI's answer if it is finite where a kernel's is not; that kernel is to blame."""
        kernel, exact = entry.kernel, default()
        assert kernel is not None
        if not is_finite(exact):
            return out
        why = f"{kernel.id} gave NaN or infinite values in block {entry.block} at step {self.step}"
        entry.kernel, entry.reasons[kernel.id] = None, why
        if self.owner.config.strict:
            raise AttentionError(_strict(self.owner.config, entry, why))
        self.owner.finite.blame(why)
        return exact

    def _count(self, entry: Entry, answer: str) -> None:
        entry.answers[answer] = entry.answers.get(answer, 0) + 1
        if entry.kernel is not None and entry.kernel.category == APPROXIMATE:
            entry.used_approximate = True
        if entry.last_step != self.step:
            entry.last_step = self.step
            entry.steps.append((self.step, answer))


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _first_reason(config: AttentionConfig, entry: Entry) -> str:
    """Against the kernel that was asked for, else the first."""
    first = next(iter(entry.reasons.values()), "no kernel was left")
    return entry.reasons.get(config.backend, first)


def _strict(config: AttentionConfig, entry: Entry, why: str) -> str:
    """'Strict is on and block double/12 cannot use 'sage1': mask: sage1 takes none. ...'"""
    wanted = config.backend if config.policy == "manual" else f"policy {config.policy}"
    return (
        f"Strict is on and block {entry.block} cannot use '{wanted}': {why}. "
        "Turn strict off, or choose another backend or policy."
    )

"""The attention of one sampling run: every call finds its Entry, and its kernel or the default.

`AttentionRun` lives as long as the Run; `BoundCall` is its view of one model call, put into that
call's transformer_options and, for compiled graphs, bound to the device in op.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .. import architectures, host
from ..calls import ModelCall
from ..report import Section
from ..run import Run
from .config import AttentionConfig, AttentionError
from .kernels.base import APPROXIMATE, Kernel
from .layout import Views, read_call, request_of, write_output
from .plan import DEFAULT, Entry, Planner
from .policy import BlockNumbers, Schedule, order
from .request import BlockKey
from .section import Outcome, section_of
from .timings import Timings

APPROXIMATE_DEFAULTS = ("attention_comfy_kitchen_int8", "attention_sage", "attention3_sage")

NO_BLOCK = ("call", 0)  # the place of a call without a block id

Attention = Callable[..., torch.Tensor]
Key = tuple[Any, ...]  # ((block type, index), ordinal, shapes, dtype, ...): see BoundCall.key


class AttentionRun:
    """One Run's plans, failures and timings. `previous`: the override found when applied."""

    def __init__(
        self,
        run: Run,
        config: AttentionConfig,
        kernels: Mapping[str, Kernel],
        policies: Mapping[str, tuple[str, ...]],
        previous: Attention | None,
    ):
        self.run, self.config, self.previous = run, config, previous
        network = host.diffusion_model(run.patcher)
        self.schedule = Schedule(config, block_numbers(network))
        approximate, exact = order(config, kernels, policies)
        device = run.patcher.load_device
        self.timings = Timings(host.user_folder(), host.device_name(device), host.versions())
        self.planner = Planner(config, approximate, exact, kernels["math"], self.timings)
        self.entries: dict[Key, Entry] = {}
        self.default_name = ""
        self.num_model_calls = self.num_attention_calls = 0
        self.is_compiled = "torch_compile" in host.features(run.patcher)
        # A block cache skips blocks, which shifts the ordinals that stand for missing block ids.
        self.ordinals_shift = "cache" in run.states
        self.remarks = self._remarks()

    def _remarks(self) -> list[str]:
        remarks = []
        if self.config.backend != "auto" and self.config.policy != "manual":
            remarks.append(
                f"backend '{self.config.backend}' is not used by policy "
                f"'{self.config.policy}': it is for policy 'manual'"
            )
        if self.previous is not None:
            remarks.append(f"calls not taken go on to {host.qualified_name(self.previous)}")
        return remarks

    def bind(self, call: ModelCall) -> "BoundCall":
        """The view of one model call."""
        self.num_model_calls += 1
        self.ordinals_shift = "cache" in self.run.states
        # Without approximate kernels the schedule decides nothing: one plan serves every step.
        dense = self.planner.approximate and self.schedule.dense_step(call.step, self.run.num_steps)
        return BoundCall(self, bool(dense), call.step)

    def default_is_exact(self, func: Attention) -> bool:
        """Whether a declined call is answered by an exact kernel, as far as can be known."""
        return self.previous is None and func.__name__ not in APPROXIMATE_DEFAULTS

    def section(self) -> Section:
        """The technique's part of the report."""
        why = self.timings.save()
        return section_of(
            Outcome(
                config=self.config,
                entries=self.entries,
                default_name=self.default_name,
                num_steps=self.run.num_steps,
                num_model_calls=self.num_model_calls,
                num_attention_calls=self.num_attention_calls,
                is_compiled=self.is_compiled,
                remarks=[*self.remarks, *([why] if why else [])],
            )
        )

    def close(self) -> None:
        self.entries.clear()
        self.planner.disabled.clear()


class BoundCall:
    """One model call's attention. `inside` guards against meeting ourselves in the chain."""

    __slots__ = ("dense_step", "inside", "ordinals", "owner", "step")

    def __init__(self, owner: AttentionRun, dense_step: bool, step: int):
        self.owner, self.dense_step, self.step = owner, dense_step, step
        self.ordinals: dict[Any, int] = {}
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
        place = block_id(options)
        if place is None:
            place = NO_BLOCK
        if place is NO_BLOCK and self.owner.ordinals_shift:
            ordinal = 0
        else:
            ordinal = self.ordinals.get(place, 0)
            self.ordinals[place] = ordinal + 1
        return (
            place, ordinal, q.shape, k.shape, q.dtype, q.device,
            None if mask is None else mask.dtype, skip_reshape, kwargs.get("scale"),
            kwargs.get("low_precision_attention", True), self.dense_step,
        )  # fmt: skip

    def declines(self, key: Key) -> bool:
        """Whether the call is known to be ComfyUI's own; then it is counted here."""
        entry = self.owner.entries.get(key)
        if entry is None or entry.kernel is not None:
            return False
        self.owner.num_attention_calls += 1
        entry.answers[DEFAULT] = entry.answers.get(DEFAULT, 0) + 1
        if entry.last_step != self.step:
            entry.last_step = self.step
            entry.steps.append((self.step, DEFAULT))
        return True

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
        out: torch.Tensor | None
        if entry is None:
            entry, out = self._first(key, views, options, func, default)
        else:
            out = self._again(entry, views)
        self._count(entry)
        if out is None:
            return default()
        return write_output(out, skip_output_reshape=skip_output_reshape)

    def _first(
        self,
        key: Key,
        views: Views,
        options: dict[str, Any],
        func: Attention,
        default: Callable[[], torch.Tensor],
    ) -> tuple[Entry, torch.Tensor | None]:
        owner, block = self.owner, BlockKey(key[0][0], key[0][1], key[1])
        owner.default_name = owner.default_name or func.__name__
        request = request_of(
            views, low_precision=options.get("low_precision_attention", True) is not False,
            dense=self.dense_step,
        )  # fmt: skip
        entry, out = owner.planner.plan(
            block, request, views, default,
            dense_step=self.dense_step, dense_block=owner.schedule.dense_block(block),
            default_is_exact=owner.default_is_exact(func),
        )  # fmt: skip
        if owner.config.strict and entry.refused:
            raise AttentionError(_strict(owner.config, entry))
        if not request.capturing:
            owner.entries[key] = entry
        return entry, out

    def _again(self, entry: Entry, views: Views) -> torch.Tensor | None:
        """A planned kernel's result; None if it failed now or at the check in mid-run."""
        owner, kernel = self.owner, entry.kernel
        assert kernel is not None
        out = owner.planner.answer(kernel, views)
        if isinstance(out, str):
            entry.kernel, entry.reasons[kernel.id] = None, out
            if owner.config.strict:
                raise AttentionError(_strict(owner.config, entry))
            return None
        due = entry.probes == 1 and self.step >= owner.run.num_steps // 2
        shared = entry.block.block_type == "call" and owner.ordinals_shift
        checked = kernel.category == APPROXIMATE and entry.probes and (due or shared)
        if checked and not owner.planner.check_again(entry, out, views):
            entry.kernel = None
            return None
        return out

    def _count(self, entry: Entry) -> None:
        answer = DEFAULT if entry.kernel is None else entry.kernel.id
        entry.answers[answer] = entry.answers.get(answer, 0) + 1
        if entry.last_step != self.step:
            entry.last_step = self.step
            entry.steps.append((self.step, answer))


def block_id(options: dict[str, Any]) -> tuple[str, int] | None:
    """(block type, index) that ComfyUI put into transformer_options; a U-Net's block is a pair."""
    block_type, index = options.get("block_type"), options.get("block_index")
    unet_block = options.get("block")
    if unet_block is not None:
        block_type = f"{unet_block[0]}{unet_block[1]}"
    return None if block_type is None or index is None else (block_type, index)


def block_numbers(network: torch.nn.Module) -> BlockNumbers:
    """Where each block type starts when blocks are counted over all stacks."""
    architecture = architectures.find(network)
    starts: dict[str, int] = {}
    number = 0
    for stack in architecture.stacks if architecture else ():
        starts[stack.block_type] = number
        number += len(architectures.stack_blocks(network, stack))
    return BlockNumbers(starts)


def _strict(config: AttentionConfig, entry: Entry) -> str:
    """'Strict is on and block double/12 cannot use 'sage1': mask: sage1 takes none. ...'"""
    wanted = config.backend if config.policy == "manual" else f"policy {config.policy}"
    why = next(iter(entry.reasons.values()), "no kernel was left")
    return (
        f"Strict is on and block {entry.block} cannot use '{wanted}': {why}. "
        "Turn strict off, or choose another backend or policy."
    )

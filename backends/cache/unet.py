"""DeepCache (arXiv 2312.00858): a U-Net's deep levels run every n-th evaluation.

The host's loop runs on. In a reused call the skipped levels hand on placeholders of the shapes
seen before, and the last skipped output level returns the kept feature. Placeholders are real
zeros where ControlNet or patches (FreeU) write into them, else one zero, expanded.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..architectures import Architecture, called_modules, stack_blocks
from ..calls import CALL, ModelCall
from ..compiler import unrecorded
from ..forwards import forward_slot, overridden
from .blocks import adds_between, signature_of
from .decisions import Decisions, Event, branch_name
from .mechanism import Deciding

Level = tuple[str, int]  # block_type, index


class DeepCache(Deciding):
    """The mechanism. full_level: compute the whole finest level, not only its outermost part."""

    hook = "diffusion_model"
    unit = "U-Net levels"

    def __init__(self, architecture: Architecture, decisions: Decisions, *, full_level: bool):
        super().__init__(decisions)
        self._stacks = {stack.block_type: stack for stack in architecture.stacks}
        self._full_level = full_level
        self._shapes: dict[tuple[Any, Level], torch.Size] = {}

    def call(self, executor: Any, args: Any, kwargs: dict[str, Any], options: Any) -> Any:
        """One model call: everything, or the outer levels around the kept feature."""
        call: ModelCall = options[CALL]
        signature = signature_of(args)
        decision = self.decisions.begin(call, signature) or self.decisions.ask(call, None)
        levels = self._levels(executor.class_obj)
        deep = self._deep(levels)
        feature_level = [level for level in deep if level[0] == "output"][-1]
        kept: dict[str, torch.Tensor] = {}
        if decision.reuse:
            writable = adds_between(args, kwargs, options)
            (feature,) = self.decisions.predict(call)
            forwards = self._skipping(call, levels, deep, feature_level, feature, writable)
        else:
            forwards = self._recording(call, levels, deep, feature_level, kept)
        self._publish(call, decision.reuse, levels, deep)
        with overridden(forwards):
            output = executor(*args, **kwargs)
        if "feature" in kept:
            self.decisions.store(call, (kept["feature"],), signature)
        skipped = len(deep) if decision.reuse else 0
        self.events.append(
            Event(call.step, call.evaluation, branch_name(call), decision,
                  len(levels) - skipped, skipped)
        )  # fmt: skip
        for level in levels:
            self.layers[f"{level[0]} {level[1]}", call.evaluation] = (
                decision.reuse and level in deep
            )
        return output

    def close(self) -> None:
        super().close()
        self._shapes.clear()

    def _levels(self, network: torch.nn.Module) -> dict[Level, list[torch.nn.Module]]:
        """The modules that the host calls for each level, in execution order."""
        return {
            (name, index): called_modules(block, stack)
            for name, stack in self._stacks.items()
            for index, block in enumerate(stack_blocks(network, stack))
        }

    def _deep(self, levels: dict[Level, list[torch.nn.Module]]) -> list[Level]:
        """What a reused call skips: it keeps `outer` input levels and their mirrors."""
        inputs = [level for level in levels if level[0] == "input"]
        outputs = [level for level in levels if level[0] == "output"]
        outer = 1
        if self._full_level:
            downs = [i for _, i in inputs if _is_downsample(levels["input", i])]
            outer = min(downs[0] if downs else 1, len(inputs) - 1)
        middle = [level for level in levels if level[0] == "middle"]
        return inputs[outer:] + middle + outputs[: len(outputs) - outer]

    def _publish(
        self, call: ModelCall, reuse: bool, levels: dict[Level, Any], deep: list[Level]
    ) -> None:
        order = list(levels)
        call.num_blocks = len(order)
        call.skipped_blocks = frozenset(order.index(d) for d in deep) if reuse else frozenset()

    def _recording(
        self,
        call: ModelCall,
        levels: dict[Level, list[torch.nn.Module]],
        deep: list[Level],
        feature_level: Level,
        kept: dict[str, torch.Tensor],
    ) -> list[tuple[torch.nn.Module, Callable[..., Any]]]:
        def recorder(level: Level, forward: Callable[..., Any]) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                result = forward(*args, **kwargs)
                self._shapes[call.key, level] = result.shape
                if level == feature_level:
                    with unrecorded():
                        kept["feature"] = result.clone()  # FreeU scales it in place
                return result

            return record

        lasts = [(level, levels[level][-1]) for level in deep]
        return [(m, recorder(level, getattr(m, forward_slot(m)))) for level, m in lasts]

    def _skipping(
        self,
        call: ModelCall,
        levels: dict[Level, list[torch.nn.Module]],
        deep: list[Level],
        feature_level: Level,
        feature: torch.Tensor,
        writable: bool,
    ) -> list[tuple[torch.nn.Module, Callable[..., Any]]]:
        def hand_on(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return x

        def ending(level: Level) -> Callable[..., Any]:
            shape = self._shapes[call.key, level]

            def end(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if level == feature_level:
                    return feature.clone() if writable else feature
                return x.new_zeros(shape) if writable else x.new_zeros(()).expand(shape)

            return end

        forwards: list[tuple[torch.nn.Module, Callable[..., Any]]] = []
        for level in deep:
            *first, last = levels[level]
            forwards += [(module, hand_on) for module in first]
            forwards.append((last, ending(level)))
        return forwards


def _is_downsample(modules: list[torch.nn.Module]) -> bool:
    return any(type(module).__name__ == "Downsample" for module in modules)

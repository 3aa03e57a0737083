"""One call of a network on several forked ranks against the same call on one.

`record(family)` samples a tiny model and keeps the arguments of the first call of its network;
`compare` replays them under every layout. Needs a ComfyUI.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from forked_ranks import Rank, run_ranks
from slipstream.backends.architectures.plans import find_plan
from slipstream.backends.architectures.tokens import TokenPlan
from slipstream.parallel.attention import SharedAttention, options_of_part
from slipstream.parallel.bind import bind
from slipstream.parallel.control import LocalControl
from slipstream.parallel.engine import Call, EarlyExit
from slipstream.parallel.hooks import installed
from slipstream.parallel.mesh import Layout

U2, U3, U4 = Layout(ulysses=2), Layout(ulysses=3), Layout(ulysses=4)
R2, R3, R4, HYBRID = Layout(ring=2), Layout(ring=3), Layout(ring=4), Layout(ulysses=2, ring=2)
LAYOUTS = (U2, R3, HYBRID)
MANY = (U2, U3, U4, R2, R3, R4, HYBRID)  # with three heads, ulysses 4 leaves a rank without any
FEW = (U3, HYBRID)


@dataclass
class Recorded:
    """A call of a network: its module, and the arguments by parameter name."""

    network: torch.nn.Module
    arguments: dict[str, Any]

    def with_(self, **changes: Any) -> "Recorded":
        return Recorded(self.network, {**self.arguments, **changes})

    def run(self, options: Mapping[str, Any]) -> list[torch.Tensor]:
        arguments = {k: _copy(v) for k, v in self.arguments.items()}
        with torch.inference_mode():
            return flat(self.network(**arguments, transformer_options=dict(options)))


def record(
    family: str, *, heads: int = 3, shape: tuple[Any, ...] | None = None, **sampling: Any
) -> Recorded:
    """The first call of the family's network in a run of the sampler."""
    model = tiny.load(family, heads=heads)
    network = model.model.diffusion_model
    calls: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        names = _parameters(module)
        calls.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        tiny.sample(model, family, steps=1, shape=shape or odd_shape(family), **sampling)
    finally:
        handle.remove()
    arguments = {k: v for k, v in calls[0].items() if k != "transformer_options"}
    return Recorded(network, arguments)


def odd_shape(family: str) -> tuple[Any, ...]:
    """The family's latent with token counts that nothing divides: 3 frames, 7 x 5 patches."""
    if tiny.ALL[family].odd:
        return tiny.ALL[family].odd
    shape = tiny.latent_shape(family)
    if isinstance(shape[0], int):
        return _odd(shape)
    return (_odd(shape[0]), *shape[1:])


def _odd(shape: tuple[int, ...]) -> tuple[int, ...]:
    height, width = (7, 5) if shape[-1] <= 8 else (14, 10)
    frames = (3,) if len(shape) == 5 and shape[2] > 1 else shape[2:-2]
    return (*shape[:2], *frames, height, width)


def shared(
    recorded: Recorded, rank: Rank, layout: Layout, name: str, plan: TokenPlan
) -> list[torch.Tensor] | None:
    """One rank's part of the call: rank 0's result, None elsewhere."""
    links = rank.links(layout, name)
    assert links.mesh is not None
    bound = bind(plan.for_call(recorded.arguments), recorded.network)
    call = Call(bound, links.mesh, rank.clock)
    arguments = dict(recorded.arguments)
    if arguments.get("control") is not None:
        arguments["control"] = LocalControl(call, arguments["control"], bound.plan.control)
    options = options_of_part(recorded.network, {}, SharedAttention(call))
    with installed(call):
        try:
            out = Recorded(recorded.network, arguments).run(options)
        except EarlyExit:
            return None
    assert call.is_over, "the call never came to its gather"
    assert call.num_exchanged > 0, "no attention was exchanged"
    return out if links.mesh.rank == 0 else None


def differences(
    recorded: Recorded,
    layouts: Iterable[Layout] = LAYOUTS,
    *,
    plan: TokenPlan | None = None,
) -> dict[str, float]:
    """Layout -> largest difference to one rank, relative to the largest value."""
    wanted = list(layouts)
    if plan is None:
        found = find_plan(recorded.network)
        assert isinstance(found, TokenPlan), found
        plan = found
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = recorded.run({})
        assert all(torch.isfinite(t).all() and t.std() > 0 for t in expected)
        results = run_ranks(max(one.world for one in wanted), _body(recorded, wanted, plan))[0]
    finally:
        torch.set_num_threads(threads)
    scale = max(t.abs().max().item() for t in expected)
    return {
        str(layout): max(
            (a - b).abs().max().item() / scale for a, b in zip(out, expected, strict=True)
        )
        for layout, out in zip(wanted, results, strict=True)
    }


def _body(recorded: Recorded, layouts: list[Layout], plan: TokenPlan) -> Callable[[Rank], Any]:
    def body(rank: Rank) -> list[list[torch.Tensor] | None]:
        return [
            shared(recorded, rank, layout, f"layout{number}", plan)
            for number, layout in enumerate(layouts)
            if rank.number < layout.world
        ]

    return body


def assert_same(recorded: Recorded, layouts: Iterable[Layout] = LAYOUTS) -> None:
    """At most 1e-6 relative, the bar of the design page."""
    found = differences(recorded, layouts)
    assert max(found.values()) <= 1e-6, found


def flat(out: Any) -> list[torch.Tensor]:
    return [out] if torch.is_tensor(out) else [t for part in out for t in flat(part)]


def _parameters(module: torch.nn.Module) -> list[str]:
    import inspect

    return list(inspect.signature(type(module).forward).parameters)[1:]


def _copy(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_copy(v) for v in value)
    if type(value) is dict:
        return {k: _copy(v) for k, v in value.items()}
    return value

"""One shared call carried out: its rows dealt to lanes, handed over, the own part, the results.

Rank 0's side. Which calls are shared, and under which layout, run_state.py decides.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends.architectures import find, whole_sequence
from ..backends.calls import CALL
from ..backends.run import Run
from . import batch
from .attention import SharedAttention, options_of_part
from .bind import Bound, bind
from .block_cache import Decisions
from .comm import StopWatch
from .config import SequenceParallelConfig
from .control import local_control
from .cost import Meter
from .engine import Call
from .hooks import installed
from .mesh import Layout, Links
from .messages import Forward
from .network_call import NetworkCall
from .pool import Ticket
from .route import BRANCH, Baton, Cancelled
from .runs import CallFacts
from .shared import OVERRIDE, Alone, Shared
from .wire import Meta, Unsupported, encode

_DROPPED = ("wrappers", "callbacks", OVERRIDE, "patches", "patches_replace")
_TIMED = range(1, 3)  # calls of a run under a layout: the first one warms up
_FORGIVEN = 0.5  # of the time that a lane without rows was known for, at each run: then it is tried
_DOUBT = 1.25  # a lane is left out only if it is that much too slow: times vary

Executor = Callable[..., Any]


@dataclass(frozen=True)
class Part:
    """What one lane does of a call. encoded, tensors: for the wire; None where it stays here."""

    lane: int
    num_rows: int
    call: NetworkCall
    encoded: Any = None
    tensors: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Timed:
    """A call that was timed: seconds of all of it, of the own part, and rows of both."""

    total_s: float
    own_s: float
    num_rows: int
    own_rows: int


@dataclass
class Lane:
    """A lane in the report: its devices, the rows of its latest part, seconds for one if known."""

    devices: tuple[str, ...]
    num_rows: int
    row_s: float | None


@dataclass
class Done:
    """What came of a call. meter: of the own exchange of tokens, tokens: how many were shared."""

    output: Any
    timed: Timed | None = None
    meter: Meter | None = None
    num_tokens: int = 0


@dataclass
class _Times:
    """Seconds for a row of each lane under one layout, in this run. num_calls: so far."""

    row_s: list[float | None]
    num_calls: int = 0


@dataclass
class Distributor:
    """Carries out the shared calls of one run. lanes: by layout and number, of its latest call."""

    run: Run
    shared: Shared
    config: SequenceParallelConfig
    decisions: Decisions
    lanes: dict[Layout, dict[int, Lane]] = field(default_factory=dict)
    _bound: dict[int, Bound] = field(default_factory=dict)
    _times: dict[Layout, _Times] = field(default_factory=dict)

    # --- before: which lane does what

    def deal(self, layout: Layout, num_rows: int, branch: int = 0) -> list[int]:
        """Rows of each lane of a branch: by what was measured, or as evenly as can be.

        Only the lanes of branch 0 are measured: the other one waits for this process too.
        """
        known = None if branch else self._known(layout)
        if known is None:
            return batch.deal(num_rows, [1.0] * layout.batch)
        speeds = [1 / max(seconds, 1e-9) for seconds in known]
        times = self._times.get(layout)
        if times is not None and times.num_calls < _TIMED.stop:
            return batch.deal(num_rows, speeds, leaves_out=False)
        counts = batch.deal(num_rows, speeds)
        doubted = [
            speed if count else speed * _DOUBT for speed, count in zip(speeds, counts, strict=True)
        ]
        return batch.deal(num_rows, doubted)

    def _known(self, layout: Layout) -> list[float] | None:
        times = self._times.get(layout)
        kept = self.shared.pool.row_seconds.get(self._key(layout))
        if times is None or self._is_dealt_once:
            return kept
        found = [
            now or before for now, before in zip(times.row_s, kept or times.row_s, strict=True)
        ]
        return None if None in found else found  # type: ignore[return-value]

    def _key(self, layout: Layout) -> Hashable:
        return self.shared.devices, self.shared.model.load.key, layout

    @property
    def _is_dealt_once(self) -> bool:
        """A block cache on the workers keeps residuals of their rows."""
        return "cache" in self.shared.techniques

    def parts(self, layout: Layout, call: NetworkCall) -> list[Part]:
        """The call's parts. Raises Alone where something in it cannot travel."""
        branch = call.options.get(BRANCH, 0)
        lanes = layout.lanes(branch)
        num_rows = batch.rows(call.arguments) or 1
        counts = self.deal(layout, num_rows, branch) if layout.batch > 1 else [num_rows]
        architecture = find(self.shared.network)
        unbatched = architecture.notes.unbatched if architecture else ()
        found = []
        for number, start, length in batch.spans(counts):
            part = call
            if length < num_rows:
                part = call.with_(
                    batch.cut(call.arguments, num_rows, start, length, unbatched),
                    # what a host kept of other rows is of no use to these
                    whole_sequence(
                        architecture, batch.cut_options(call.options, num_rows, start, length)
                    ),
                )
            found.append(self._encoded(Part(lanes[number], length, part), layout))
        if layout.batch > 1:
            self._note(layout, branch, counts)
            if len(found) == 1 and layout.world == layout.batch:
                raise Alone("the other devices are so slow that they would get no row")
        return found

    def _encoded(self, part: Part, layout: Layout) -> Part:
        if part.lane == 0 and layout.ranks == 1:
            return part
        plan = self.shared.plan
        rebuilt = plan.rebuilt if plan is not None else ()
        try:
            encoded, tensors = part.call.encode(rebuilt, dropped=_DROPPED)
        except Unsupported as error:
            raise Alone(f"{error}, which cannot travel") from None
        return Part(part.lane, part.num_rows, part.call, encoded, tensors)

    def _note(self, layout: Layout, branch: int, counts: Sequence[int]) -> None:
        known = None if branch else self._known(layout)
        noted = self.lanes.setdefault(layout, {})
        for number, (lane, count) in enumerate(zip(layout.lanes(branch), counts, strict=True)):
            devices = tuple(self.shared.devices[p] for p in layout.members(lane))
            noted[lane] = Lane(devices, count, known[number] if known else None)

    # --- the call

    def carry_out(
        self,
        layout: Layout,
        parts: Sequence[Part],
        method: str,
        executor: Executor,
        *,
        baton: Baton | None,
        is_judged: bool,
    ) -> Done:
        """The call's output from its parts. Raises what a worker or the transport raises.

        is_judged: measure the exchange of tokens.
        """
        links = self.shared.pool.links(layout, self.shared.setting, self.shared.device)
        if parts[0].call.options.get(BRANCH):
            assert baton is not None
            return Done(self._remote(links, parts, method, baton))
        times = self._times.setdefault(layout, _Times([None] * layout.batch))
        is_timed = layout.batch > 1 and times.num_calls in _TIMED
        times.num_calls += 1
        meter = Meter(links.clock) if is_judged and links.mesh is not None else None
        now = parts[0].call.options[CALL]
        now.num_ranks = layout.batch * layout.ranks
        others = [part for part in parts if part.encoded is not None]
        self.decisions.groups = tuple(links.entry(part.lane) for part in others)
        early = self.decisions.take_early(now)
        device = self.shared.device if is_timed else None
        timeout_s = self.config.timeout_s
        whole = StopWatch(device)
        try:
            with (
                links.clock.measure("call"),
                self.shared.pool.over(links, [part.lane for part in parts], timeout_s=timeout_s),
            ):
                tickets = [
                    self._hand_over(links, part, method, early, is_timed=is_timed)
                    for part in others
                ]
                own = StopWatch(device)
                output, num_tokens = self._own(links, parts[0].call, executor)
                own_s = own.seconds()
                with links.clock.measure("exchange"):
                    results = [ticket.result(timeout_s=timeout_s) for ticket in tickets]
        finally:
            self.decisions.groups = ()
        remote = [found for part, found in zip(others, results, strict=True) if part.lane]
        done = Done(batch.join([output, *(out for out, _ in remote)]), None, meter, num_tokens)
        if is_timed:
            seconds = [own_s, *(s for _, s in remote)]
            self._measured(layout, parts, seconds)
            total_s, num_rows = whole.seconds() or 0.0, sum(part.num_rows for part in parts)
            if times.num_calls == _TIMED.stop:
                done.timed = Timed(total_s, own_s or 0.0, num_rows, parts[0].num_rows)
        return done

    def _hand_over(
        self,
        links: Links,
        part: Part,
        method: str,
        early: Sequence[bool] = (),
        *,
        is_timed: bool = False,
    ) -> Ticket:
        facts = CallFacts.of(self.run, part.call.options[CALL], decisions=early)
        message = Forward(
            key=self.shared.model.load.key,
            groups=links.name,
            method=method,
            arguments=part.encoded,
            metas=[Meta.of(t).to_json() for t in part.tensors],
            call=encode(facts.to_dict(), []),
            is_timed=is_timed,
        )
        return self.shared.pool.hand_over(links, part.lane, message, part.tensors)

    def _own(self, links: Links, call: NetworkCall, executor: Executor) -> tuple[Any, int]:
        """This process's part: the output of its rows, and how many tokens its lane shared."""
        shared = self.shared
        if links.mesh is None:
            return call.run(executor), 0
        assert shared.plan is not None
        plan = shared.plan.for_call(call.arguments)
        if id(plan) not in self._bound:
            self._bound[id(plan)] = bind(plan, shared.network)
        part = Call(
            self._bound[id(plan)], links.mesh, links.clock, may_skip="cache" in shared.techniques
        )
        own = SharedAttention(part, call.options.get(OVERRIDE))
        local = call.with_(
            local_control(part, call.arguments),
            options_of_part(shared.network, call.options, own),
        )
        with installed(part):
            return local.run(executor), sum(part.lengths.values())

    def _remote(self, links: Links, parts: Sequence[Part], method: str, baton: Baton) -> Any:
        """A call of branch 1, which workers do alone."""
        over_since: list[float] = []

        def watch() -> None:
            if baton.is_cancelled:
                raise Cancelled
            if baton.first_is_over.is_set():
                over_since.append(time.monotonic())
                if time.monotonic() - over_since[0] > self.config.timeout_s:
                    raise TimeoutError

        pool = self.shared.pool
        with pool.over(links, [part.lane for part in parts], timeout_s=None):
            tickets = [self._hand_over(links, part, method) for part in parts]
            results = [
                ticket.result(
                    timeout_s=self.config.timeout_s, waiting=baton.released(), meanwhile=watch
                )
                for ticket in tickets
            ]
        return batch.join([out for out, _ in results])

    # --- afterwards

    def _measured(
        self, layout: Layout, parts: Sequence[Part], seconds: Sequence[float | None]
    ) -> None:
        """Remember how fast each lane is, for later calls and runs."""
        times = self._times[layout]
        for part, found in zip(parts, seconds, strict=True):
            if found is not None:
                before = times.row_s[part.lane]
                now = found / part.num_rows
                times.row_s[part.lane] = now if before is None else min(before, now)

    def close(self) -> None:
        """Keep what was measured for the next run of this model on these devices."""
        kept = self.shared.pool.row_seconds
        for layout, lanes in self.lanes.items():
            key = self._key(layout)
            times = self._times.get(layout, _Times([None] * layout.batch)).row_s
            found = list(zip(times, kept.get(key, times), strict=True))
            if any(now is None and old is None for now, old in found):
                continue
            left_out = [not lanes[lane].num_rows for lane in range(layout.batch)]
            kept[key] = [
                (now or old or 0.0) * (_FORGIVEN if without else 1)
                for (now, old), without in zip(found, left_out, strict=True)
            ]
        self._bound.clear()

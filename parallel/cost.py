"""Whether sharing pays, from one shared call's times, its bytes and the measured link speed."""

from dataclasses import dataclass

from .comm import Clock
from .mesh import Layout


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One shared call on rank 0. bytes_sent: by this rank, without the broadcast; tokens: of all
    streams; link_bytes_per_s: what one rank can send."""

    total_s: float
    exchange_s: float
    broadcast_s: float
    bytes_sent: int
    tokens: int
    link_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of a call on one device and shared."""

    one_s: float
    shared_s: float

    @property
    def speedup(self) -> float:
        return self.one_s / max(self.shared_s, 1e-9)


def estimate(measured: Measured, layout: Layout) -> Estimate:
    """What one device would need for the same work, and what sharing needs at link speed.

    Waiting for slower ranks counts as exchange when measured, so the bytes at link speed stand
    for the exchange where they give less. Both branches of a CFG layout are one device's work.
    """
    compute_s = max(measured.total_s - measured.exchange_s - measured.broadcast_s, 0.0)
    wire_s = measured.bytes_sent / max(measured.link_bytes_per_s, 1.0)
    exchange_s = min(measured.exchange_s, wire_s)
    return Estimate(
        one_s=compute_s * layout.world,
        shared_s=compute_s + exchange_s + measured.broadcast_s,
    )


def advice(measured: Measured, layout: Layout) -> str | None:
    """The sentence for a call that one device would do faster, else None."""
    found = estimate(measured, layout)
    if found.speedup >= 1:
        return None
    share = measured.exchange_s / max(measured.total_s, 1e-9)
    return (
        f"One device would be about {1 / found.speedup:.1f} times as fast as {layout}: "
        f"{measured.tokens} tokens send {measured.bytes_sent / 1e6:.0f} MB a call at "
        f"{measured.link_bytes_per_s / 1e9:.1f} GB/s, which is {share:.0%} of its time"
    )


def advice_on_rows(total_s: float, one_s: float, layout: Layout) -> str | None:
    """The sentence for a batch that one device would do faster, else None.

    total_s: of a call whose rows were shared; one_s: of all its rows at the pace of rank 0's own.
    """
    if total_s <= one_s:
        return None
    return (
        f"One device would be about {total_s / max(one_s, 1e-9):.1f} times as fast as {layout}: "
        "the others are slower, or handing rows over takes longer than computing them"
    )


class Meter:
    """What a clock has counted since this object was made."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._seconds, self._bytes = clock.seconds(), clock.bytes_sent

    def seconds(self) -> dict[str, float]:
        """Seconds by kind."""
        return {k: v - self._seconds.get(k, 0.0) for k, v in self._clock.seconds().items()}

    def bytes_sent(self) -> int:
        return self._clock.bytes_sent - self._bytes

    def measured(self, tokens: int, link_bytes_per_s: float) -> Measured:
        """The call that was made since."""
        spent = self.seconds()
        return Measured(
            total_s=spent.get("call", 0.0),
            exchange_s=spent.get("exchange", 0.0) + spent.get("gather", 0.0),
            broadcast_s=spent.get("broadcast", 0.0),
            bytes_sent=self.bytes_sent(),
            tokens=tokens,
            link_bytes_per_s=link_bytes_per_s,
        )

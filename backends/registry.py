"""Named implementations with capabilities, and the one rule by which they are picked.

A candidate says why it cannot take a request (`ineligible`: cheap, pure, asked first) and why it
is not installed (`available`: may import a package); `eligible` gives all that can, `select` the
first, both with the reason of every one passed over. The same sentences go to the log, the report
and the tests.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

R_contra = TypeVar("R_contra", contravariant=True)


class Candidate(Protocol[R_contra]):
    """One implementation. Reasons are sentences that start with the fact and end with the fix."""

    @property
    def id(self) -> str: ...

    def available(self) -> str | None: ...

    def ineligible(self, request: R_contra) -> str | None: ...


C = TypeVar("C")


@dataclass(frozen=True)
class Choice(Generic[C]):
    """The candidate picked, and candidate id -> reason for those that stood before it."""

    candidate: C
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """No candidate fits: candidate id -> reason, in the order they were asked."""

    reasons: dict[str, str]

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())


def reason_against(candidate: Candidate[R_contra], request: R_contra) -> str | None:
    """Why `candidate` cannot take `request` on this machine, or None.

    `ineligible` only looks at the request; `available` may import a package, so it is asked last,
    and not at all of a candidate that could not take the request anyway.
    """
    return candidate.ineligible(request) or candidate.available()


def eligible(
    candidates: Iterable[C], request: object, disabled: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[C], dict[str, str]]:
    """All candidates that can take `request`, in order, and the reason against each other one.

    disabled: candidate id -> why the caller no longer uses it, whatever it says itself.
    """
    fit: list[C] = []
    reasons: dict[str, str] = {}
    for candidate in candidates:
        name: str = candidate.id  # type: ignore[attr-defined]
        reason = disabled.get(name) or reason_against(candidate, request)  # type: ignore[arg-type]
        if reason is None:
            fit.append(candidate)
        else:
            reasons[name] = reason
    return fit, reasons


def select(
    candidates: Iterable[C], request: object, disabled: Mapping[str, str] = MappingProxyType({})
) -> "Choice[C] | Refusal":
    """The first candidate that is available and eligible; never raises for an unusable one.

    disabled: as for `eligible`.
    """
    rejected: dict[str, str] = {}
    for candidate in candidates:
        name: str = candidate.id  # type: ignore[attr-defined]
        reason = disabled.get(name) or reason_against(candidate, request)  # type: ignore[arg-type]
        if reason is None:
            return Choice(candidate, rejected)
        rejected[name] = reason
    return Refusal(rejected)

"""ControlNet residuals under a token plan, cut when a block asks: lengths are known only then."""

from collections.abc import Mapping
from typing import Any

from ..backends.architectures.tokens import Tok
from .engine import Call


def local_control(call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    """A network's arguments with its ControlNet residuals, if any, cut for this rank."""
    control = arguments.get("control")
    if not control:
        return arguments
    return {**arguments, "control": LocalControl(call, control, call.plan.control)}


class LocalControl(dict):
    """A call's control dict whose residual lists give this rank's tokens."""

    def __init__(self, call: Call, control: Mapping[str, Any], toks: Mapping[str, Tok]):
        super().__init__(
            {k: Residuals(call, v, toks[k]) if k in toks and v else v for k, v in control.items()}
        )


class Residuals:
    """A list of residuals [B,N,C] or None; reading one cuts it.

    One may be shorter than its stream (it covers the first tokens only): then a rank gets as many
    rows as fall into its part.
    """

    def __init__(self, call: Call, residuals: list[Any], tok: Tok):
        self.call, self.residuals, self.tok = call, residuals, tok

    def __len__(self) -> int:
        return len(self.residuals)

    def __getitem__(self, index: int) -> Any:
        residual, shards = self.residuals[index], self.call.shards
        (stream,) = self.tok.streams
        if residual is None or not self.call.is_active or stream in shards.replicated:
            return residual
        length, offset = residual.shape[self.tok.dim], shards.offset(stream)
        first = min(offset, length)
        last = min(offset + shards.parts[stream][shards.rank], length)
        return residual.narrow(self.tok.dim, first, last - first)

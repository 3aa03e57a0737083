"""What a user is told about a file or a choice that cannot be used."""

from ..errors import SlipstreamError


class CheckpointError(SlipstreamError, ValueError):
    """A model file that cannot be used, in one sentence: what is wrong, where, what to do."""


class BackendError(SlipstreamError, ValueError):
    """A backend that was asked for and cannot run here, in one sentence with the fix."""

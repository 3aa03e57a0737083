"""What errors for users have in common."""


class SlipstreamError(Exception):
    """An error whose text is a sentence for users.

    ComfyUI prints an error's module in front of its text, which for a pack is a folder on the
    user's disk; these say "slipstream" there (ComfyUI 0.33, execution.py, full_type_name).
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__module__ = "slipstream"

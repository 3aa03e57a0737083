"""JSON files of measurements in ComfyUI's user folder: written atomically, never trusted.

A damaged or foreign file counts as empty and is written anew.
"""

import json
import os
from pathlib import Path
from typing import Any


class Store:
    """One file. folder: None where there is no ComfyUI, then nothing is kept."""

    def __init__(self, folder: Path | None, file_name: str, format_: int):
        self.path = folder / file_name if folder is not None else None
        self._format = format_

    def read(self) -> dict[str, Any]:
        """The file's content; empty if there is none or it is not ours."""
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict) or content.get("format") != self._format:
            return {}
        return content

    def write(self, content: dict[str, Any]) -> str | None:
        """Replace the file; returns a sentence if that cannot be done."""
        if self.path is None:
            return None
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"format": self._format, **content}, indent=1))
            os.replace(temporary, self.path)
        except OSError as error:
            return f"{self.path.name} could not be saved ({error.strerror})"
        return None

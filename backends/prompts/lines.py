"""A list of prompts as text: comments, separators, files of the input folder, names of pictures.

Stdlib only. Every PromptsError is a sentence for the node.
"""

import codecs
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SlipstreamError

NO_FILE = "none"  # the file widget's default
MAX_BYTES = 4 * 2**20
MAX_PROMPTS = 1000  # of one run: pictures of 1024 x 1024 are 12 GB of RAM before they are saved
_NAME_CHARACTERS = 60
_NAME_BYTES = 150  # of 255; the counter and the extension are added


class PromptsError(SlipstreamError):
    """No list of prompts can be made of what the node was given."""


@dataclass(frozen=True)
class Line:
    """One prompt; number: its place in the whole list, from 1; total: length of that list."""

    text: str
    number: int
    total: int


def split(text: str, separator: str = "") -> list[str]:
    """The prompts of `text`, stripped; empty ones and lines that start with # are left out.

    separator: empty, every line is a prompt; else a prompt ends at a line that is the separator.
    A line that starts with \\# starts with # instead.
    """
    separator = separator.strip()
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        stripped = line.strip()
        if stripped == separator:  # "" too: an empty line
            blocks.append([])
        elif stripped.startswith("#"):
            continue
        else:
            blocks[-1].append(stripped.removeprefix("\\") if stripped[:2] == "\\#" else stripped)
            if not separator:
                blocks.append([])
    joined = ("\n".join(block).strip() for block in blocks)
    return [prompt for prompt in joined if prompt]


def choose(prompts: Sequence[str], first: int = 1, max_prompts: int = 0) -> list[Line]:
    """`max_prompts` lines (0: all) from the one numbered `first`. Raises PromptsError."""
    total = len(prompts)
    if not total:
        raise PromptsError(
            "There is no prompt: write one a line into text, or choose a file. Empty lines and "
            "lines that start with # do not count."
        )
    if first > total:
        raise PromptsError(f"first is {first}, but there are {total} prompts")
    last = min(total, first - 1 + max_prompts) if max_prompts else total
    if last - first + 1 > MAX_PROMPTS:
        raise PromptsError(
            f"{last - first + 1} prompts, and one run takes {MAX_PROMPTS}: set max_prompts to "
            f"{MAX_PROMPTS} and queue once more with first {first + MAX_PROMPTS}"
        )
    chosen = range(first, last + 1)
    return [Line(prompts[number - 1], number, total) for number in chosen]


def file_names(folder: Path) -> list[str]:
    """Names of the .txt files that lie in `folder` itself, sorted."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() == ".txt" and p.is_file())


def find(folder: Path, name: str) -> Path:
    """The .txt file `name` below `folder`; a name with subfolders is allowed. Raises PromptsError.

    Links are followed first: nothing outside of the folder is read.
    """
    if "\0" in name:
        raise PromptsError(f"{name!r} is no name of a file")
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise PromptsError(f"{name!r} is outside of ComfyUI's input folder: copy it there")
    if path.suffix.lower() != ".txt":
        raise PromptsError(f"{name!r} is no .txt file")
    if not path.is_file():
        raise PromptsError(
            f"{name!r} is not in ComfyUI's input folder: copy it there, and press R to refresh "
            "the list"
        )
    return path


def read(path: Path) -> str:
    """The text of a file: UTF-8 with or without a byte order mark, or UTF-16 with one."""
    if path.stat().st_size > MAX_BYTES:
        raise PromptsError(f"{path.name!r} is larger than {MAX_BYTES // 2**20} MB: split it up")
    content = path.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptsError(
            f"{path.name!r} is not in UTF-8 (byte {error.start}): save it as UTF-8"
        ) from error


def from_file(folder: Path, name: str, separator: str = "") -> list[str]:
    """The prompts of a file of the input folder; none if the widget says so."""
    return split(read(find(folder, name)), separator) if name and name != NO_FILE else []


def fingerprint(folder: Path, name: str | None) -> str:
    """Changes with the content of the file that find() would give; empty without one."""
    if not name or name == NO_FILE:
        return ""
    try:
        return hashlib.sha256(find(folder, name).read_bytes()).hexdigest()
    except (PromptsError, OSError):
        return "no file"  # execute() says what is wrong


def picture_name(line: Line) -> str:
    """A file name without extension that every system takes: number, then words of the prompt."""
    number = str(line.number).zfill(max(3, len(str(line.total))))
    kept = "".join(
        c if unicodedata.category(c)[0] in "LMN" or c == "-" else " "
        for c in unicodedata.normalize("NFC", line.text[: 8 * _NAME_CHARACTERS])
    )
    name = number
    for word in re.sub(r"-{2,}", "-", kept).split():
        longer = f"{name}_{word}"
        if len(longer) > _NAME_CHARACTERS or len(longer.encode()) > _NAME_BYTES:
            if name == number:  # a language without spaces
                name = longer[:_NAME_CHARACTERS].encode()[:_NAME_BYTES].decode(errors="ignore")
            break
        name = longer
    return name

"""Text that comes from files, which anyone may have made."""

import re
import unicodedata
from collections.abc import Sequence


def one_line(text: str) -> str:
    """The text in one line: line breaks, control and formatting codes and other invisible characters become spaces."""
    return " ".join("".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text).split())


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names of files as a sentence lists them: in one line, and the first ones only."""
    shown = ", ".join(one_line(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts names with their numbers in order: layer 2 before layer 10."""
    # Of each number its length comes first, because names from files may have more digits than int() reads.
    parts = [part.lstrip("0") if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
    return [(len(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]

"""Text that comes from files, which anyone may have made."""

import unicodedata
from collections.abc import Sequence


def one_line(text: str) -> str:
    """The text in one line: line breaks, control and formatting codes and other invisible characters become spaces."""
    return " ".join("".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in text).split())


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names of files as a sentence lists them: in one line, and the first ones only."""
    shown = ", ".join(one_line(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown

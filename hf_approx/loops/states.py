"""Folders with the state of a long run, one after the other: the newest one that was written to its end counts."""

import os
import shutil
from pathlib import Path

from hf_approx.files import sync_folder, write_text

MARK = "complete"
"""The file that is written last, and says what run the state is of."""


def begin_state(folder: Path) -> None:
    """Make the folder of a state, which is not complete from now on if it was."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).unlink(missing_ok=True)
    sync_folder(folder)


def end_state(folder: Path, identity: str) -> None:
    """Mark a state as complete, once it is on the disk, and delete those of the same kind beside it.

    Args:
        folder: Named with its kind and number, `round-3` say.
        identity: What the run that goes on from it must have in common with this one; not empty.
    """
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_text(folder / MARK, identity)
    sync_folder(folder.parent)
    for other in folder.parent.glob(f"{folder.name.partition('-')[0]}-*"):
        if other != folder and _number(other) >= 0:
            (other / MARK).unlink(missing_ok=True)
            shutil.rmtree(other)


def saved_states(folder: Path, kind: str) -> list[Path]:
    """The states in a folder that were written to their end, oldest first."""
    # Earlier versions could leave an empty mark.
    marks = [mark for mark in folder.glob(f"{kind}-*/{MARK}") if mark.is_file() and mark.stat().st_size]
    return sorted((mark.parent for mark in marks if _number(mark.parent) >= 0), key=_number)


def _number(state: Path) -> int:
    number = state.name.partition("-")[2]
    return int(number) if number.isdecimal() else -1

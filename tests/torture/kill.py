"""The killer: SIGKILL in the middle of whatever writes, at a call of the file system or at any moment."""

import contextlib
import io
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from torture.actions import Action, commands, saves, tickets, trainings
from torture.engine import Case, LostError, in_child
from torture.folders import read

SHARES = {"train": 7, "save": 5, "compress": 2, "export": 2, "card": 2, "tickets": 4}
"""Parts of the kills that each kind of action gets; those of one kind take turns."""
SHORT = ("save_pretrained", "save_pretrained in shards", "compress", "card over a card", "train sparsification")
SECONDS = 120.0


def prepare(root: Path, short: bool = False) -> list[Action]:
    """Make what the actions start from, and find out what each does if nothing comes in between.

    Args:
        root: Folder for that; it must stay.
        short: Only the few that take no time.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        made = [*saves(root / "saves"), *commands(root / "commands"), *trainings(), *tickets()]
        made = [action for action in made if not short or action.name in SHORT]
        for action in made:
            measure(action, root)
    return made


def measure(action: Action, root: Path) -> None:
    """Act undisturbed, twice: it must do the same again."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        warm, new = Path(name, "warm"), Path(name, "new")
        for folder in (warm, new):
            folder.mkdir()
            action.prepare(folder)
        action.old = action.state(new)
        action.act(warm)  # imports what it needs, for all forks to come
        started = time.monotonic()
        ended = in_child(partial(counted, action, new))
        action.seconds = time.monotonic() - started
        if ended.error is not None:
            raise ended.error
        action.places, action.new = ended.value, action.state(new)
        action.bytes = sum(-(-len(data) // 4096) * 4096 for data in read(new, hidden=True).values())
        if not action.new or action.state(warm) != action.new:
            raise AssertionError(f"{action.name} does not do the same twice: {action.describe(action.state(warm))}")


def cases(actions: list[Action], count: int, seed: int) -> list[Case]:
    """`count` kills in all."""
    kinds = {kind: [action for action in actions if action.kind == kind] for kind in SHARES}
    total = sum(SHARES[kind] for kind, own in kinds.items() if own)
    found = []
    for kind, own in kinds.items():
        for i in range(max(1, round(count * SHARES[kind] / total)) if own else 0):
            trial = _Trial(own[i % len(own)], Random(f"{seed}/{kind}/{i}"), i // len(own) % 2 == 0)
            found.append(Case(f"kill/{kind}/{i}", f"kill, {kind}", trial, trial.what, SECONDS))
    return found


class _Trial:
    """One kill. Half of them are at a call that reads or writes a file, or right after it; half at any moment."""

    def __init__(self, action: Action, random: Random, at_call: bool) -> None:
        self.action = action
        # Every place in the code is as likely: there are loops that write thousands of times.
        self.call = random.choice(random.choice(action.places)) if at_call else 0
        self.after = None if at_call else random.uniform(0, 1.05 * action.seconds)
        when = f"call {self.call}" if at_call else f"{self.after:.4f} of {action.seconds:.4f} s"
        self.what = f"{action.name}, killed at {when}"

    def __call__(self, folder: Path) -> None:
        self.action.prepare(folder)
        ended = in_child(partial(counted, self.action, folder, self.call), self.after)
        if ended.error is not None:
            raise LostError(f"undisturbed it fails: {ended.error}")
        self.action.verify(folder)


CALLS = frozenset(
    [
        "open",
        "write",
        "writelines",
        "close",
        "flush",
        "fsync",
        "replace",
        "rename",
        "renames",
        "unlink",
        "remove",
        "mkdir",
        "makedirs",
        "rmdir",
        "link",
        "symlink",
        "truncate",
        "ftruncate",
        "sendfile",
        "copy_file_range",
        "utime",
        "chmod",
        "serialize_file",
        "write_record",
        "write_end_of_file",
    ]
)
PICTURES = ("/matplotlib/", "/PIL/")


class Counter:
    """Counts calls of what reads and writes files, before and after each; kills the process at one of them.

    Those of libraries that read fonts and write pictures are not counted: they would be nearly all.
    """

    def __init__(self, last: int = 0) -> None:
        self.count, self.last = 0, last
        self.places: dict[tuple[str, int, str], list[int]] = {}

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return") or getattr(function, "__name__", "") not in CALLS:
            return
        code = frame.f_code
        if any(name in code.co_filename for name in PICTURES):
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.places.setdefault((code.co_filename, frame.f_lineno, event), []).append(self.count)


def counted(action: Action, folder: Path, last: int = 0) -> list[list[int]]:
    """Act, and count; see `Counter`. Returns the numbers of the calls at each place."""
    counter = Counter(last)
    sys.setprofile(counter)
    try:
        action.act(folder)
    finally:
        sys.setprofile(None)
    return list(counter.places.values())

"""Disks that are full, at every stage of whatever writes, and disks that are read-only."""

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from torture.actions import Action
from torture.engine import Case, LostError, WrongError, in_child
from torture.kill import SECONDS

SIZE = 64 << 20
PAGE = 4096
SPARE = 1.3
"""How much more than what is written the largest of the too small disks holds."""


@cache
def mountable() -> bool:
    """Whether this process may mount file systems; says so if not."""

    def attempt() -> bool:
        with _mounted(Path("/mnt")):
            return True

    try:
        found = in_child(attempt).value is True
    except Exception:
        found = False
    if not found:
        print("No file system can be mounted here: disks are full by a limit on the size of files.", file=sys.stderr)
    return found


def cases(actions: list[Action], count: int) -> list[Case]:
    """`count` disks that are full, from nothing left to nearly enough; and one that is read-only for each action."""
    turns = max(1, count // len(actions))
    found = []
    for turn in range(turns):
        for action in actions:
            share = SPARE * turn / turns
            run = partial(_full, action, int(share * action.bytes / PAGE) * PAGE)
            what = f"{action.name}, with {share:.0%} of the space it takes"
            found.append(Case(f"disk/{_name(action)}/{turn}", f"disk full, {action.kind}", run, what, SECONDS))
    for action in actions if mountable() else ():
        run = partial(_read_only, action)
        what = f"{action.name}, read-only"
        found.append(Case(f"disk/{_name(action)}/read-only", "disk read-only", run, what, SECONDS))
    return found


def _name(action: Action) -> str:
    return action.name.replace(",", "").replace(" ", "-")


def _full(action: Action, free: int, folder: Path) -> None:
    if not mountable():
        action.prepare(folder)
        _judge(action, folder, _limited(free))
        return
    with _mounted(folder):
        action.prepare(folder)
        filling = folder / ".filling"
        left = os.statvfs(folder).f_bavail * PAGE
        with open(filling, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(PAGE, left - free))
        _judge(action, folder, contextlib.nullcontext, filling.unlink)


def _read_only(action: Action, folder: Path) -> None:
    with _mounted(folder):
        action.prepare(folder)
        _mount("-o", "remount,ro", str(folder))
        _judge(action, folder, contextlib.nullcontext, lambda: _mount("-o", "remount,rw", str(folder)), True)


def _judge(
    action: Action,
    folder: Path,
    around: Callable[[], contextlib.AbstractContextManager[None]],
    mend: Callable[[], object] = lambda: None,
    refused: bool = False,
) -> None:
    """Act where it cannot be done, and again where it can; passes on how it was refused."""

    def act() -> None:
        with around():
            action.act(folder)

    ended = in_child(act)
    mend()
    if refused and ended.error is None:
        raise WrongError("it says that it has written")
    if ended.error is None and action.state(folder) != action.new:
        raise LostError(f"it says that it has written: {action.describe(action.state(folder))}")
    action.verify(folder)
    if ended.error is not None:
        raise ended.error


def _limited(size: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    """A small file system in memory, seen by this process and its forks alone."""
    _own_namespace()
    _mount("-t", "tmpfs", "-o", f"size={SIZE}", "torture", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


@cache
def _own_namespace() -> None:
    """Mounts of this process end with it."""
    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts) != 0:
        raise OSError(ctypes.get_errno(), "no own mounts")
    _mount("--make-rprivate", "/")


def _mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"mount {' '.join(options)}: {done.stderr.strip()}")

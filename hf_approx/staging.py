"""Writing a whole folder or nothing of it: at every moment the folder is the old one or the new one.

What is to be in a folder is written into a hidden one beside it, which takes its place in one step once everything is
on the disk. Where Linux can exchange two folders, there is no moment without one. Elsewhere the old one is renamed
first: who is killed between these two calls leaves no folder, until the next save, or `recover`, puts the old one
back. A folder that cannot be renamed (where a disk is mounted, where this process is, or in a folder that may not be
written to) is replaced file by file, its config last: who is killed then leaves files that do not fit together.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from hf_approx.files import sync_folder
from hf_approx.layout import CONFIG_FILE, stale_files
from hf_approx.logs import get_logger

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where leftovers stay: nothing tells whether their process lives
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 10
AT_FDCWD, RENAME_EXCHANGE = -100, 2
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES)

logger = get_logger(__name__)

_open: set[Path] = set()


@contextlib.contextmanager
def staged(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to write to, which takes the place of `target` if the block ends without an error.

    Files of the old folder that the new one lacks come along unless they are of the old model alone, see
    `hf_approx.layout.stale_files`; so do its subfolders, mode and owner. If anything fails, the old folder stays as
    it was.

    Args:
        target: A folder or a link to one; it need not exist. In a block within a block it is the outer one's folder.

    Raises:
        NotADirectoryError: There is a file of that name.
        PermissionError: The folder may not be written to.
    """
    target = Path(os.path.realpath(target))
    if target in _open:
        yield target
        return
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a folder to save in", str(target))
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "The folder may not be written to", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    fixed = target.is_dir() and _is_fixed(target)
    with contextlib.ExitStack() as stack:
        folder = _make(target, target if fixed else target.parent, stack)
        _open.add(folder)
        try:
            yield folder
            _sync(folder)
            (_fill if fixed else _swap)(folder, target)
        finally:
            _open.discard(folder)
            if folder.exists() and not _is_old(folder, target):
                shutil.rmtree(folder, ignore_errors=True)


def recover(target: str | os.PathLike[str]) -> None:
    """Put in order what saves that were killed left of a folder; nothing while another process saves there.

    Whoever looks for subfolders of a saved model (checkpoints of a training) calls this first: a save that was killed
    in its last moment left them in a hidden folder.
    """
    target = Path(os.path.realpath(target))
    prefix = _prefix(target)
    places = [place for place in (target.parent, target) if place.is_dir() and os.access(place, os.R_OK)]
    left = [path for place in places for path in place.iterdir() if path.name.startswith(prefix) and path.is_dir()]
    with contextlib.ExitStack() as stack:
        try:
            if not all(_lock(path, stack) for path in left):
                return
        except (BlockingIOError, FileNotFoundError):  # another process is at work
            return
        for path in left:
            if not _is_old(path, target):
                shutil.rmtree(path, ignore_errors=True)
            elif target.exists():
                _bring_along(path, target)
            else:
                os.rename(path, target)


def _prefix(target: Path) -> str:
    """What the names of a folder's hidden ones start with: short, and no other folder's."""
    return f".{target.name[:40]}-{zlib.crc32(os.fsencode(target.name)):08x}-saving-"


def _make(target: Path, parent: Path, stack: contextlib.ExitStack) -> Path:
    """A hidden folder, locked, whose name says which one it is, so that it is known again after an exchange."""
    for _ in range(ATTEMPTS):
        fresh = parent / f"{_prefix(target)}{secrets.token_hex(4)}"
        os.mkdir(fresh)
        # Another process may have taken it for a leftover before it was locked.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            _lock(fresh, stack)
            folder = fresh.with_name(f"{fresh.name}.{os.stat(fresh).st_ino}")
            os.rename(fresh, folder)
            return folder
    raise OSError(errno.EBUSY, "Too many processes save here at once", str(target))


def _is_old(folder: Path, target: Path) -> bool:
    """Whether a hidden folder is what was in the place of the target, and not what was to be."""
    _, _, own = folder.name.removeprefix(_prefix(target)).partition(".")
    return own not in ("", str(os.stat(folder).st_ino))


def _lock(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Hold a folder until the stack ends, or this process does; False where nothing can be locked.

    Raises:
        BlockingIOError: It is held already.
    """
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_fixed(target: Path) -> bool:
    """Whether a folder cannot be renamed, or should not be, as far as that can be told beforehand."""
    try:
        here = Path.cwd().is_relative_to(target)
    except FileNotFoundError:  # the current folder is gone
        here = False
    if here or os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK):
        return True
    inside = [path for path in target.iterdir() if path.is_dir() and not path.is_symlink()]
    return any(os.path.ismount(path) or not os.access(path, os.W_OK | os.X_OK) for path in inside)


def _swap(folder: Path, target: Path) -> None:
    """Put a folder in the place of another, and what comes along of that into it."""
    if target.is_dir():
        _copy_mode(target, folder)
        stale = stale_files(target, folder)
        for entry in os.scandir(target):
            if entry.name not in stale and not os.path.lexists(folder / entry.name) and _is_file(entry):
                _link(entry, folder / entry.name)
    sync_folder(folder)
    try:
        try:
            os.rename(folder, target)  # where there is no folder, or an empty one
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not _exchange(folder, target):
                old = folder.with_name(f"{folder.name}.old")
                os.rename(target, old)
                try:
                    os.rename(folder, target)
                except BaseException:
                    os.rename(old, target)
                    raise
                folder = old
            sync_folder(target.parent)
            _bring_along(folder, target)
        else:
            sync_folder(target.parent)
    except OSError as error:
        if error.errno not in CANNOT_RENAME or not folder.exists() or _is_old(folder, target):
            raise
        _fill(folder, target)


def _exchange(folder: Path, target: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(folder), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in CANNOT_EXCHANGE:
        return False
    raise OSError(error, os.strerror(error), str(target))


def _bring_along(old: Path, new: Path) -> None:
    """Move what only the old folder has into the new one, and remove the old one.

    Another process may be doing the same: what it was quicker with is done.
    """
    stale = stale_files(old, new)
    try:
        for entry in list(os.scandir(old)):
            with contextlib.suppress(FileNotFoundError):
                if entry.name not in stale and not os.path.lexists(new / entry.name):
                    os.rename(entry.path, new / entry.name)
                elif _is_file(entry):
                    os.unlink(entry.path)
                else:
                    shutil.rmtree(entry.path)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(old)
    except OSError as error:
        # The new model is in its place: nothing is lost, and nothing else would become better by stopping here.
        logger.warning("'%s' was saved; what else was in it stays in '%s': %s", new, old, error)


def _fill(folder: Path, target: Path) -> None:
    """Replace the files of a folder one by one: no moment has all of both, and one without a config is no model."""
    stale = stale_files(target, folder)
    names = sorted(os.listdir(folder), key=lambda name: (name == CONFIG_FILE, name))
    for name in names:
        if name == CONFIG_FILE:
            for other in stale - {*names}:
                (target / other).unlink(missing_ok=True)
        if (folder / name).is_dir() and (target / name).is_dir():
            shutil.rmtree(target / name)
        os.replace(folder / name, target / name)
    sync_folder(target)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or entry.is_file()


def _link(entry: os.DirEntry[str], there: Path) -> None:
    """The same file under another name, or a copy where the file system has no such links."""
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), there)
        return
    try:
        os.link(entry.path, there)
    except OSError:
        shutil.copy2(entry.path, there)
        _sync_file(there)


def _copy_mode(source: Path, folder: Path) -> None:
    wanted, now = os.stat(source), os.stat(folder)
    if (wanted.st_uid, wanted.st_gid) != (now.st_uid, now.st_gid):
        with contextlib.suppress(PermissionError):  # only root gives folders away
            os.chown(folder, wanted.st_uid, wanted.st_gid)
    os.chmod(folder, stat.S_IMODE(wanted.st_mode))


def _sync(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync_file(Path(place, name))
        sync_folder(Path(place))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

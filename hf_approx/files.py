"""Files that appear whole: what a reader finds, or a kill or a full disk leaves, is the old file or the new one."""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

ENDING = ".partial"


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, its line ends as they are, in the place of the file that is there; see `replacing`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file in the place of the one that is there; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` at the end of the block, unless that ends with an error.

    Until then it is a hidden file in the same folder, and it is on the disk before it is renamed. What killed
    processes have left of the same file is removed. A link is replaced, and never written through.

    Args:
        path: In a folder that exists. A new file gets the mode that new files get, an old one keeps its own.

    Raises:
        OSError: It cannot be written, or there is something else than a file: a folder, a device.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no such folder", str(path.parent))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "It is no file that could be replaced", str(path))
    _remove_leftovers(path)
    partial = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}{ENDING}")
    try:
        with open(partial, "xb") as file:
            try:
                _lock(file)
                yield file
                file.flush()
                if path.is_file() and not path.is_symlink():
                    partial.chmod(stat.S_IMODE(path.stat().st_mode) & 0o777)
                os.fsync(file.fileno())
                if fcntl is None:  # Windows renames no open file; elsewhere it stays locked until it is renamed
                    file.close()
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def torch_writes(folder: str | Path) -> Iterator[None]:
    """Say of what `torch.save` could not write where that was; torch says how far it came, not where and not why.

    Args:
        folder: Where files are written within the block.

    Raises:
        OSError: A file could not be written to its end.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "iostream")):
            raise
        there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        raise OSError(
            f"A file in '{folder}' could not be written to its end: {free:,} bytes are free on that disk."
        ) from error


def sync_folder(folder: Path) -> None:
    """Wait until what was created, renamed or removed in a folder is on the disk, where a system can say so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_leftovers(path: Path) -> None:
    name = re.compile(rf"{re.escape(_prefix(path))}[0-9a-f]{{8}}{re.escape(ENDING)}")
    for other in path.parent.iterdir():
        if name.fullmatch(other.name) and _abandoned(other):
            other.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name[:48]}-"


def _abandoned(partial: Path) -> bool:
    """Whether no process writes to a hidden file any more, as far as can be told."""
    try:
        if not stat.S_ISREG(partial.lstat().st_mode):
            return False
        with open(partial, "rb") as file:
            return _lock(file)
    except OSError:
        return False


def _lock(file: BinaryIO) -> bool:
    """Lock a file for this process; False if another one has it, or if there are no locks here."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return fcntl is not None

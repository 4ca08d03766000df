"""Links in a folder, which may lead to files that are none of the model's: keys, say."""

import os
import re
import stat
from pathlib import Path, PurePosixPath

from hf_approx.text import one_line

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def own_file(folder: Path, name: str) -> bool:
    """Whether a folder has a file of its own at a path.

    A link counts only if it leads to the place where the Hub's client keeps the files of that very snapshot. Hard
    links cannot be told from files.

    Raises:
        ValueError: There is a link to another place, or something that is no file.
    """
    path, mode = folder, stat.S_IFDIR
    for part in PurePosixPath(name).parts:
        path = path / part
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
        if stat.S_ISLNK(mode):
            if path == folder / name and _is_blob(folder, path):
                return True
            raise ValueError(f"'{one_line(str(path))}' is a link to another place: put the file itself there.")
    if not stat.S_ISREG(mode):
        raise ValueError(f"'{one_line(str(path))}' is no file.")
    return True


def _is_blob(folder: Path, link: Path) -> bool:
    """Whether a link leads from a snapshot in the cache of the Hub's client to a file it has downloaded for it."""
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(link))
    snapshot = next((path for path in (root, *root.parents) if path.parent.name == "snapshots"), None)
    return (
        snapshot is not None
        and target.parent == snapshot.parent.parent / "blobs"
        and _HASH.fullmatch(target.name) is not None
        and target.is_file()
    )

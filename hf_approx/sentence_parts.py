"""The parts that a model of sentence-transformers has beside its transformer, each in a folder of its own."""

import os
import re
from pathlib import Path

from hf_approx.json_files import read_json_list
from hf_approx.links import own_file
from hf_approx.packing import PackedFormatError
from hf_approx.text import one_line

PARTS_FILE = "modules.json"
"""Lists the parts, with their folders and classes."""
APART = (
    "its transformer is in a folder of its own. Load it with sentence-transformers 2.3 or later and save it again: "
    "then the transformer is where transformers looks for it."
)

_NO_FILES = ("Normalize",)
_WITH_WEIGHTS = ("CNN", "Dense", "LSTM", "LayerNorm", "StaticEmbedding", "WeightedLayerPooling", "WordEmbeddings")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def part_folders(folder: Path) -> dict[str, str]:
    """Name of the class of each part, by its folder; empty for other models.

    Raises:
        PackedFormatError: What lists the parts is damaged, or one is not in the folder.
        ValueError: A part needs code of its own, or the transformer itself is in a folder of its own.
    """
    if not own_file(folder, PARTS_FILE):
        return {}
    file, parts = folder / PARTS_FILE, {}
    for entry in read_json_list(file):
        path, kind = (entry.get(key) for key in ("path", "type")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(kind, str):
            raise PackedFormatError(f"{file} is damaged: a part has no path or no type.")
        if path and not all(re.fullmatch(r"\w[\w.-]*", step) for step in path.split("/")):
            raise PackedFormatError(f"{file} is damaged: '{path}' is no folder in this one.")
        # That of a package has more dots, that of another repository two dashes.
        if kind.count(".") == 1 and "--" not in kind:
            raise ValueError(f"'{folder}' needs code of its own, '{one_line(kind)}', which does not come along.")
        parts[path] = kind.rpartition(".")[2]
    if "" not in parts:
        raise ValueError(f"'{folder}' is a model of sentence-transformers: {APART}")
    return {path: kind for path, kind in parts.items() if path}


def part_files(folder: Path, part: str, kind: str, names: frozenset[str]) -> tuple[list[str], list[str]]:
    """Paths of the files that belong to a part, relative to the model's folder, and of those that do not.

    Args:
        folder: Of the model.
        part: Folder of the part in it.
        kind: Its class.
        names: Of files that parts have, beside weights.

    Raises:
        ValueError: The part is missing or pickled, or has a link to another place.
    """
    paths = [(path, path.rpartition("/")[2]) for path in _walk(folder, part)]
    weights = [path for path, name in paths if _WEIGHTS.fullmatch(name) and own_file(folder, path)]
    others = [path for path, name in paths if name in names and own_file(folder, path)]
    left_out = [path for path, _ in paths if path not in {*weights, *others}]
    pickles = any(path.endswith((".bin", ".pt")) for path in left_out)
    if not weights and (kind in _WITH_WEIGHTS or pickles):
        raise ValueError(
            f"'{folder / part}', a part of the model, has no weights in safetensors: load the model with "
            "sentence-transformers and save it again."
        )
    if not weights and not others and kind not in _NO_FILES:
        raise ValueError(f"'{folder / part}', a part of the model, is missing.")
    return [*weights, *others], left_out


def _walk(folder: Path, part: str) -> list[str]:
    """Paths of all that is in a part and the folders in it and is not hidden, in order; links are not followed."""
    if (folder / part).is_symlink():
        own_file(folder, part)
    return sorted(
        (Path(inner) / name).relative_to(folder).as_posix()
        for inner, folders, files in os.walk(folder / part)
        for name in [*files, *(name for name in folders if os.path.islink(os.path.join(inner, name)))]
        if not name.startswith(".")
    )

"""Reading the JSON files of a model, which anyone may have made."""

import json
import stat
from pathlib import Path
from typing import Any

from hf_approx.packing import PackedFormatError

MAX_BYTES = 64 << 20
"""Larger files are not read. A packed weight takes about 700 bytes of `config.json` as it is written, line breaks and
all: the 900 weights of a Llama of 405 billion parameters are 1 % of this, a mixture of experts with one weight for
each of 15,000 experts a sixth."""
MAX_DEPTH = 100
"""Objects and lists nested deeper than this are read by no one: transformers copies what it reads by recursion."""


def read_json(path: Path, unique_keys: bool = False) -> dict[str, Any]:
    """The object in a JSON file, read only if it is of a reasonable size.

    Args:
        path: The file.
        unique_keys: Refuse a file in which an object has a key twice; otherwise the last one counts, as for
            transformers.

    Raises:
        PackedFormatError: It is too large, no JSON, no object, or nested too deeply.
        OSError: It cannot be read.
    """
    data = _read(path, unique_keys)
    if not isinstance(data, dict):
        raise PackedFormatError(f"{path} is not a JSON object.")
    return data


def read_json_list(path: Path) -> list[Any]:
    """The list in a JSON file; see `read_json`."""
    data = _read(path)
    if not isinstance(data, list):
        raise PackedFormatError(f"{path} is not a JSON list.")
    return data


def _read(path: Path, unique_keys: bool = False) -> Any:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise PackedFormatError(f"{path} is no file.")
    if about.st_size > MAX_BYTES:
        raise PackedFormatError(f"{path} has {about.st_size:,} bytes; more than {MAX_BYTES:,} are not read.")
    try:
        data = json.loads(path.read_bytes().decode(), object_pairs_hook=_object if unique_keys else None)
    except _RepeatedKeyError:
        raise PackedFormatError(f"{path} has an object with the same key twice.") from None
    except RecursionError:
        raise PackedFormatError(f"{path} is nested too deeply.") from None
    except ValueError:
        raise PackedFormatError(f"{path} is not JSON.") from None
    level: list[Any] = [data] if isinstance(data, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, (dict, list))
        ]
    if level:
        raise PackedFormatError(f"{path} is nested too deeply.")
    return data


class _RepeatedKeyError(Exception):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise _RepeatedKeyError
    return data

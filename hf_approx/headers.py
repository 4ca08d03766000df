"""The headers of safetensors files, which say what is in them, and which anyone may have made."""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_approx.packing import PackedFormatError, shown

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
    "I64": 64,
    "U64": 64,
    "I32": 32,
    "U32": 32,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
"""Bits of a value of each dtype that the format has."""
NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
    "F4": "float4_e2m1fn",
    "C64": "complex64",
    "I64": "int64",
    "U64": "uint64",
    "I32": "int32",
    "U32": "uint32",
    "I16": "int16",
    "U16": "uint16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What torch, and the config of a packed model, call them."""
MAX_BYTES = 100_000_000
"""The format allows no longer headers."""
PREFIX = 8
"""Bytes before the header, which say how long it is."""

Header = tuple[str, tuple[int, ...]]
"""Dtype, in the notation of safetensors, and shape of a tensor."""


def read_header(path: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor in a file; see `parse_header`.

    Raises:
        PackedFormatError: The file is damaged.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_length(file.read(PREFIX), size, str(path))
        return parse_header(file.read(length), size, str(path))


def header_length(start: bytes, size: int, file: str) -> int:
    """Bytes of the header, without those before it.

    Args:
        start: The first 8 bytes of the file, or more.
        size: Of the whole file.
        file: What errors call it.

    Raises:
        PackedFormatError: The file is damaged.
    """
    length = struct.unpack("<Q", start[:PREFIX])[0] if len(start) >= PREFIX else -1
    if not 0 <= length <= min(size - PREFIX, MAX_BYTES):
        raise PackedFormatError(f"{file} is damaged: it has no header of safetensors.")
    return int(length)


def parse_header(data: bytes, size: int, file: str) -> dict[str, Header]:
    """Dtype and shape of every tensor, by name.

    Every number is checked: shapes are possible and the values of the tensors, in their order, fill the file.

    Args:
        data: The header, of the length that `header_length` returns.
        size: Bytes of the whole file.
        file: What errors call it.

    Raises:
        PackedFormatError: The header is damaged.
    """
    try:
        header = json.loads(data.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise PackedFormatError(f"{file} is damaged: its header is not JSON, or has a name twice.") from None
    if not isinstance(header, dict) or not isinstance(header.pop("__metadata__", {}), dict):
        raise PackedFormatError(f"{file} is damaged: its header is no object of JSON.")
    places = []
    tensors: dict[str, Header] = {}
    for name, entry in header.items():
        tensors[name], place = _tensor(entry, f"{file} is damaged: '{name}'")
        places.append(place)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise PackedFormatError(f"{file} is damaged: its tensors overlap, or do not follow each other.")
        end = stop
    if PREFIX + len(data) + end != size:
        raise PackedFormatError(f"{file} is damaged: its tensors do not end where the file ends.")
    return tensors


def weight_map(index: dict[str, Any], what: str) -> dict[str, str]:
    """The file of every tensor of a model in several files.

    Args:
        index: What is in its index.
        what: What errors call that.

    Raises:
        PackedFormatError: It is damaged, or names files that are elsewhere.
    """
    files = index.get("weight_map")
    # transformers puts its own into the metadata, and reads no index without.
    if not isinstance(files, dict) or not files or not isinstance(index.get("metadata"), dict):
        raise PackedFormatError(f"{what} is damaged.")
    for name in files.values():
        if not (isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name)):
            raise PackedFormatError(f"{what} is damaged: {shown(name)} is no weight file of this folder.")
    return files


def join_headers(headers: Mapping[str, Mapping[str, Header]], index: Mapping[str, str] | None) -> dict[str, Header]:
    """The headers of all tensors of a model.

    Args:
        headers: By file and tensor.
        index: The file of every tensor, if there is an index.

    Raises:
        PackedFormatError: A tensor is in two files, or is not where the index says.
    """
    stored: dict[str, Header] = {}
    home: dict[str, str] = {}
    for file, tensors in headers.items():
        for name, header in tensors.items():
            if name in stored:
                raise PackedFormatError(f"{shown(name)} is in two weight files, {home[name]} and {file}.")
            stored[name], home[name] = header, file
    for name, file in (index or {}).items():
        if home.get(name) != file:
            raise PackedFormatError(f"{shown(name)} is not in {shown(file)}, as the index of the weight files says.")
    return stored


def _tensor(entry: Any, what: str) -> tuple[Header, tuple[int, int]]:
    """What an entry says of a tensor, and where its values are."""
    keys = ("dtype", "shape", "data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in keys) if isinstance(entry, dict) else (None, None, None)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise PackedFormatError(f"{what} has no dtype that safetensors knows.")
    if not (isinstance(shape, list) and all(type(length) is int and 0 <= length < 1 << 63 for length in shape)):
        raise PackedFormatError(f"{what} has no possible shape.")
    weights = 1
    for length in shape:
        weights *= max(length, 1)
        if weights >= 1 << 63:
            raise PackedFormatError(f"{what} has more values than any file.")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise PackedFormatError(f"{what} has no place in the file.")
    start, stop = offsets
    if start < 0 or 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
        raise PackedFormatError(f"{what} has another size than its shape and dtype say.")
    return (dtype, tuple(shape)), (start, stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError
    return data

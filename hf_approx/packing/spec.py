"""What a file says about one packed tensor, checked before any byte of it is used."""

import math
import reprlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_approx.text import one_line

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

MAX_NUMEL = 1 << 40
"""Larger tensors than this (a terabyte of one-byte weights) are taken for damage, not for a model."""
MAX_DIMS = 8
"""So are tensors of more dimensions than this,"""
MAX_NAME = 500
"""and longer names."""

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = 9
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


class PackedFormatError(ValueError):
    """A packed checkpoint is truncated, corrupt, or written by something else.

    Names that come from the files may be in the message: it is one line, without codes for a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `"float16"`.

    Raises:
        ValueError: The format does not store this dtype.
    """
    name = str(dtype).removeprefix("torch.")
    dtype_from_name(name)
    return name


def dtype_from_name(name: str) -> torch.dtype:
    """`"float16"` -> `torch.float16`.

    Raises:
        ValueError: The format does not store this dtype.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"Packed weights are stored as {', '.join(DTYPES)}, not {shown(name)}.")
    return DTYPES[name]


@dataclass(frozen=True, kw_only=True)
class TensorSpec(ABC):
    """How one weight is packed; each kind of packing has its own subclass with more fields.

    Attributes:
        shape: Shape of the dense weight.
        dtype: Name of the dtype that a dense file would hold the weight in.
        nbytes: Length of the packed tensor in bytes.
        crc32: Checksum of those bytes.
    """

    kind: ClassVar[str]

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    crc32: int

    @property
    def numel(self) -> int:
        """Number of weights, zero or not."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a weight on disk, everything included."""
        return 8 * self.nbytes / self.numel

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight in a dense file."""
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Share of weights that are zero."""

    @property
    @abstractmethod
    def bound_bytes(self) -> float:
        """Bytes this kind of packing cannot go below."""

    @abstractmethod
    def check(self) -> None:
        """Raise `PackedFormatError` if the subclass's own fields are of the wrong type or impossible."""

    def check_stored(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Compare with a safetensors header; raises `PackedFormatError` unless it is a row of `nbytes` bytes."""
        if dtype != "U8" or list(shape) != [self.nbytes]:
            raise PackedFormatError(
                f"Packed weight '{name}' should be {self.nbytes} bytes, the file holds {dtype} {list(shape)}."
            )

    def read(self, packed: Tensor) -> NDArray[np.uint8]:
        """The bytes of the packed tensor; raises `PackedFormatError` unless they are those that were written."""
        if packed.dtype != torch.uint8 or packed.dim() != 1:
            raise PackedFormatError(f"expected a row of bytes, found {packed.dtype} of shape {list(packed.shape)}")
        if packed.numel() != self.nbytes:
            raise PackedFormatError(f"expected {self.nbytes} bytes, found {packed.numel()}")
        data: NDArray[np.uint8] = packed.detach().to("cpu").contiguous().numpy()
        if zlib.crc32(data.data) != self.crc32:
            raise PackedFormatError("the bytes do not match their checksum")
        return data

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, as nothing in it can change: transformers copies configs often."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, name: str, data: Any) -> Self:
        """Read and check one entry of a config.

        Raises:
            PackedFormatError: A field is missing, unknown, of the wrong type or impossible.
        """
        known = [field.name for field in fields(cls)]
        check_name(name)
        if not isinstance(data, dict) or set(data) != set(known):
            raise PackedFormatError(f"Packed weight '{name}': its entry must have the fields {', '.join(known)}.")
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        spec = cls(**values)
        try:
            check_shape("shape", spec.shape)
            if spec.numel > MAX_NUMEL:
                raise PackedFormatError(f"shape {shown(list(spec.shape))} is larger than any weight.")
            check_dtype("dtype", spec.dtype)
            check_whole("nbytes", spec.nbytes, 16 * spec.numel)
            check_whole("crc32", spec.crc32, 2**32 - 1)
            spec.check()
        except PackedFormatError as error:
            raise PackedFormatError(f"Packed weight '{name}': {error}") from None
        return spec


def shown(value: object) -> str:
    """What a file says as a message can show it: short, in one line, without control characters."""
    return _SHORT.repr(value)


def is_name(value: object) -> bool:
    """Whether the value can be the name of a tensor or a module: printable text of a reasonable length."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def check_name(value: object) -> None:
    """Raise `PackedFormatError` unless the value can be the name of a tensor or a module."""
    if not is_name(value):
        raise PackedFormatError(f"{shown(value)} is not the name of a tensor or a layer.")


def check_whole(field: str, value: Any, limit: int) -> None:
    """Raise `PackedFormatError` unless the value is an integer from 0 to `limit`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise PackedFormatError(f"{field} is {shown(value)}, expected 0 to {limit}.")


def check_shape(field: str, value: Any) -> None:
    """Raise `PackedFormatError` unless the value is a sequence of at most `MAX_DIMS` positive integers."""
    if (
        not isinstance(value, tuple)
        or not 0 < len(value) <= MAX_DIMS
        or not all(type(d) is int and d > 0 for d in value)
    ):
        raise PackedFormatError(f"{field} {shown(value)} is not a list of positive integers.")


def check_dtype(field: str, value: Any) -> None:
    """Raise `PackedFormatError` unless the value names a dtype that can be stored."""
    if not isinstance(value, str) or value not in DTYPES:
        raise PackedFormatError(f"{field} {shown(value)} is unknown.")

"""What a file says about one packed tensor, checked before any byte of it is used."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

MAX_NUMEL = 1 << 40
"""Larger tensors than this (a terabyte of one-byte weights) are taken for damage, not for a model."""


class PackedFormatError(ValueError):
    """A packed checkpoint is truncated, corrupt, or written by something else."""


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
        raise ValueError(f"Packed weights are stored as {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]


@dataclass(frozen=True)
class TensorSpec:
    """How one weight is packed.

    Attributes:
        shape: Shape of the dense weight.
        dtype: Name of the stored values' dtype.
        nnz: Number of kept weights.
        rice: Parameter k of the Rice code of the mask; 0 is a plain bit mask.
        nbytes: Length of the packed tensor in bytes.
        crc32: Checksum of those bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    nnz: int
    rice: int
    nbytes: int
    crc32: int

    @property
    def numel(self) -> int:
        """Number of weights, kept or not."""
        return math.prod(self.shape)

    @property
    def value_bytes(self) -> int:
        """Bytes of the kept values."""
        return self.nnz * DTYPES[self.dtype].itemsize

    @property
    def remainder_bytes(self) -> int:
        """Bytes of the fixed-width part of the mask."""
        return (self.nnz * self.rice + 7) // 8

    @property
    def unary_bytes(self) -> int:
        """Bytes of the variable-length part of the mask."""
        return self.nbytes - self.value_bytes - self.remainder_bytes

    @property
    def entropy_bits(self) -> float:
        """Bits no code for a random mask of this density can go below: numel * H(density)."""
        p = self.nnz / self.numel
        return 0.0 if p in (0, 1) else -self.numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p))

    def check_stored(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Compare with a safetensors header; raises `PackedFormatError` unless it is a row of `nbytes` bytes."""
        if dtype != "U8" or list(shape) != [self.nbytes]:
            raise PackedFormatError(
                f"Packed weight '{name}' should be {self.nbytes} bytes, the file holds {dtype} {list(shape)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, name: str, data: Any) -> "TensorSpec":
        """Read and check one entry of a config.

        Raises:
            PackedFormatError: A field is missing, unknown, of the wrong type or impossible.
        """
        fields = ("shape", "dtype", "nnz", "rice", "nbytes", "crc32")
        if not isinstance(data, dict) or set(data) != set(fields):
            raise PackedFormatError(f"Packed weight '{name}': its entry must have the fields {', '.join(fields)}.")

        def whole(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        shape = data["shape"]
        if not isinstance(shape, (list, tuple)) or not shape or not all(whole(d) and d > 0 for d in shape):
            raise PackedFormatError(f"Packed weight '{name}': shape {shape} is not a list of positive integers.")
        numel = math.prod(shape)
        if numel > MAX_NUMEL:
            raise PackedFormatError(f"Packed weight '{name}': shape {shape} is larger than any weight.")
        if not isinstance(data["dtype"], str) or data["dtype"] not in DTYPES:
            raise PackedFormatError(f"Packed weight '{name}': dtype {data['dtype']!r} is unknown.")
        limits = {
            "nnz": numel,
            "rice": max(numel.bit_length() - 1, 0),
            "nbytes": 9 * numel,
            "crc32": 2**32 - 1,
        }
        for field, limit in limits.items():
            if not whole(data[field]) or not 0 <= data[field] <= limit:
                raise PackedFormatError(f"Packed weight '{name}': {field} is {data[field]!r}, expected 0 to {limit}.")
        spec = cls(tuple(shape), *(data[field] for field in fields[1:]))
        longest = ((numel >> spec.rice) + spec.nnz + 7) // 8
        if not 0 <= spec.unary_bytes <= longest:
            raise PackedFormatError(
                f"Packed weight '{name}': {spec.nbytes} bytes cannot hold {spec.nnz} of {numel} weights."
            )
        return spec

"""A sparse weight as one row of bytes: the mask's low bits, its unary bits, then the kept values.

All multi-byte values are little-endian. The bytes depend on the weight alone, so packing what was unpacked
gives the same bytes.
"""

import math
import sys
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_approx.packing import rice
from hf_approx.packing.spec import DTYPES, PackedFormatError, TensorSpec, check_whole, dtype_name

if sys.byteorder != "little":
    raise ImportError("hf_approx packs and unpacks on little-endian machines only.")


@dataclass(frozen=True, kw_only=True)
class SparseSpec(TensorSpec):
    """How a sparse weight is packed.

    Attributes:
        nnz: Number of kept weights.
        rice: Parameter k of the Rice code of the mask; 0 is a plain bit mask.
    """

    kind: ClassVar[str] = "sparse"

    nnz: int
    rice: int

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero."""
        return 1 - self.nnz / self.numel

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
        return entropy_bits([self.nnz, self.numel - self.nnz])

    @property
    def bound_bytes(self) -> float:
        """Mask entropy and kept values."""
        return self.entropy_bits / 8 + self.value_bytes

    def check(self) -> None:
        """Raise `PackedFormatError` unless the numbers can be those of a packed weight."""
        check_whole("nnz", self.nnz, self.numel)
        check_whole("rice", self.rice, max(self.numel.bit_length() - 1, 0))
        longest = ((self.numel >> self.rice) + self.nnz + 7) // 8
        if not 0 <= self.unary_bytes <= longest:
            raise PackedFormatError(f"{self.nbytes} bytes cannot hold {self.nnz} of {self.numel} weights.")


def entropy_bits(counts: list[int]) -> float:
    """Bits no code for a random sequence with these counts of each symbol can go below."""
    total = sum(counts)
    return sum(count * math.log2(total / count) for count in counts if count)


def may_gain(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a weight has zeros enough to be smaller packed: each value that is kept takes a bit more at least."""
    bits = 8 * (dtype or weight.dtype).itemsize
    return int(weight.count_nonzero()) * (bits + 1) < weight.numel() * bits


def pack(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, SparseSpec]:
    """Pack a weight, rounding its values to `dtype` (default: its own).

    Args:
        weight: Any shape and device; entries equal to zero are dropped.
        dtype: float32, float16 or bfloat16.

    Returns:
        The packed bytes (uint8, one dimension, on the CPU) and what is needed to read them.

    Raises:
        ValueError: The dtype cannot be stored, or a finite weight overflows it.
    """
    name = dtype_name(dtype or weight.dtype)
    dense = weight.detach().to("cpu").reshape(-1)
    stored = dense.to(DTYPES[name])
    if bool((stored.isinf() & dense.isfinite()).any()):
        raise ValueError(f"A weight of size {float(dense.abs().max()):.3g} does not fit {name}; store bfloat16.")
    positions = stored.nonzero().reshape(-1)
    (k,), low, unary = rice.encode([positions.numpy()])
    values = stored[positions].view(torch.uint8).numpy()
    packed = np.concatenate([low, unary, values])
    spec = SparseSpec(
        shape=tuple(weight.shape),
        dtype=name,
        nnz=len(positions),
        rice=k,
        nbytes=packed.nbytes,
        crc32=zlib.crc32(packed.tobytes()),
    )
    return torch.from_numpy(packed), spec


def unpack_parts(packed: Tensor, spec: SparseSpec) -> tuple[Tensor, Tensor]:
    """Positions (int64) of the kept weights in the flattened weight, and their values, both on the CPU.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    low, unary, values = np.split(spec.read(packed), np.cumsum([spec.remainder_bytes, spec.unary_bytes]))
    (positions,) = rice.decode([spec.rice], low, unary, [spec.nnz], [spec.numel])
    # torch refuses to view an empty row of bytes as anything wider.
    kept = (
        torch.from_numpy(values.copy()).view(DTYPES[spec.dtype])
        if spec.nnz
        else torch.empty(0, dtype=DTYPES[spec.dtype])
    )
    return torch.from_numpy(positions), kept


def unpack(packed: Tensor, spec: SparseSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight on the packed tensor's device, in `dtype` (default: as stored).

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    positions, values = unpack_parts(packed, spec)
    dense = torch.zeros(spec.numel, dtype=values.dtype)
    dense[positions] = values
    return dense.reshape(spec.shape).to(device=packed.device, dtype=dtype)

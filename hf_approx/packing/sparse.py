"""A sparse weight as one row of bytes: the mask's low bits, its unary bits, then the kept values.

All multi-byte values are little-endian. The bytes depend on the weight alone, so packing what was unpacked
gives the same bytes.
"""

import sys
import zlib

import numpy as np
import torch
from torch import Tensor

from hf_approx.packing import rice
from hf_approx.packing.spec import DTYPES, PackedFormatError, TensorSpec, dtype_name

if sys.byteorder != "little":
    raise ImportError("hf_approx packs and unpacks on little-endian machines only.")


def pack(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, TensorSpec]:
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
    k, low, unary = rice.encode(positions.numpy(), stored.numel())
    values = stored[positions].view(torch.uint8).numpy()
    packed = np.concatenate([low, unary, values])
    spec = TensorSpec(tuple(weight.shape), name, len(positions), k, packed.nbytes, zlib.crc32(packed.tobytes()))
    return torch.from_numpy(packed), spec


def unpack_parts(packed: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Positions (int64) of the kept weights in the flattened weight, and their values, both on the CPU.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise PackedFormatError(f"expected a row of bytes, found {packed.dtype} of shape {list(packed.shape)}")
    if packed.numel() != spec.nbytes:
        raise PackedFormatError(f"expected {spec.nbytes} bytes, found {packed.numel()}")
    data = packed.detach().to("cpu").contiguous().numpy()
    if zlib.crc32(data.data) != spec.crc32:
        raise PackedFormatError("the bytes do not match their checksum")
    low, unary, values = np.split(data, np.cumsum([spec.remainder_bytes, spec.unary_bytes]))
    positions = rice.decode(spec.rice, low, unary, spec.nnz, spec.numel)
    # torch refuses to view an empty row of bytes as anything wider.
    kept = (
        torch.from_numpy(values.copy()).view(DTYPES[spec.dtype])
        if spec.nnz
        else torch.empty(0, dtype=DTYPES[spec.dtype])
    )
    return torch.from_numpy(positions), kept


def unpack(packed: Tensor, spec: TensorSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight on the packed tensor's device, in `dtype` (default: as stored).

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    positions, values = unpack_parts(packed, spec)
    dense = torch.zeros(spec.numel, dtype=values.dtype)
    dense[positions] = values
    return dense.reshape(spec.shape).to(device=packed.device, dtype=dtype)

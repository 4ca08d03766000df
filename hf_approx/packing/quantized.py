"""A quantized weight as one row of bytes, in which a code of k bits takes k bits.

In this order: the scales, in their own dtype; the low bits, then the unary bits, of Rice-coded masks; the codes of
all weights of one bit, those of two bits, and so on to eight, each group in the weight's order and padded
to a whole byte.

The masks tell the precision map entry by entry: the first marks the entries of the lowest precision that occurs, the
next marks those of the second lowest among the rest, and so on. Together they are as short as the map's entropy but
for the few per cent that each Rice code adds, whatever the distribution. One more mask marks the zeros among
weights of at least one bit, if there are any; zeros have no code. Each mask marks whichever is rarer, its symbol or
the others.

The bytes depend on weight and grid alone. An entry of the map whose weights are all zero counts as 0 bits.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_approx.packing import rice
from hf_approx.packing.grid import MAX_BITS, Grid, dequantize, expand, quantize
from hf_approx.packing.sparse import entropy_bits
from hf_approx.packing.spec import (
    DTYPES,
    PackedFormatError,
    TensorSpec,
    check_dtype,
    check_shape,
    check_whole,
    dtype_name,
    shown,
)

Bytes = NDArray[np.uint8]

RUN = 1 << 20
"""Codes that are joined or split at once, each of which takes a byte for a bit meanwhile; a multiple of 8."""


@dataclass(frozen=True, kw_only=True)
class QuantizedSpec(TensorSpec):
    """How a quantized weight is packed.

    Attributes:
        grid: Shape of the precision map.
        scale: Shape of the scales.
        scale_dtype: Name of their dtype.
        entries: Number of entries of the precision map with 0, 1, ..., 8 bits.
        weights: Number of weights with 0, 1, ..., 8 bits; those that are zero count as 0 bits.
        masked: Number of zeros among the weights whose entry in the map has at least one bit.
        rice: Parameter k of the Rice code of each mask.
    """

    kind: ClassVar[str] = "quantized"

    grid: tuple[int, ...]
    scale: tuple[int, ...]
    scale_dtype: str
    entries: tuple[int, ...]
    weights: tuple[int, ...]
    masked: int
    rice: tuple[int, ...]

    @property
    def nnz(self) -> int:
        """Number of weights that have a code."""
        return sum(self.weights[1:])

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero."""
        return self.weights[0] / self.numel

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales."""
        return math.prod(self.scale) * DTYPES[self.scale_dtype].itemsize

    @property
    def remainder_bytes(self) -> int:
        """Bytes of the fixed-width part of the masks."""
        return (sum(count * k for (count, _), k in zip(self.masks, self.rice, strict=True)) + 7) // 8

    @property
    def code_bytes(self) -> list[int]:
        """Bytes of the codes of 1, 2, ..., 8 bits."""
        return [(count * k + 7) // 8 for k, count in enumerate(self.weights)][1:]

    @property
    def unary_bytes(self) -> int:
        """Bytes of the variable-length part of the masks."""
        return self.nbytes - self.scale_bytes - self.remainder_bytes - sum(self.code_bytes)

    @property
    def masks(self) -> list[tuple[int, int]]:
        """How many places each mask marks, and of how many."""
        left = math.prod(self.grid)
        masks = []
        for count in [count for count in self.entries if count][:-1]:
            masks.append((min(count, left - count), left))
            left -= count
        if self.masked:
            masks.append((min(self.masked, self.nnz), self.masked + self.nnz))
        return masks

    @property
    def code_bits(self) -> int:
        """Bits of all codes: the sum of the precisions of the weights that are not zero."""
        return sum(k * count for k, count in enumerate(self.weights))

    @property
    def bound_bytes(self) -> float:
        """Codes, scales, and the entropies of the precision map and of the mask of zeros."""
        masks = entropy_bits(list(self.entries)) + entropy_bits([self.masked, self.nnz])
        return (self.code_bits + masks) / 8 + self.scale_bytes

    def check(self) -> None:
        """Raise `PackedFormatError` unless the numbers can be those of a packed weight."""
        for field, part in (("grid", self.grid), ("scale", self.scale)):
            check_shape(field, part)
            if len(part) != len(self.shape) or any(a > b for a, b in zip(part, self.shape, strict=True)):
                raise PackedFormatError(f"{field} {list(part)} does not fit shape {list(self.shape)}.")
        check_dtype("scale_dtype", self.scale_dtype)
        for field, counts, total in (
            ("entries", self.entries, math.prod(self.grid)),
            ("weights", self.weights, self.numel),
        ):
            if not isinstance(counts, tuple) or len(counts) != MAX_BITS + 1:
                raise PackedFormatError(f"{field} is {shown(counts)}, expected {MAX_BITS + 1} numbers.")
            for count in counts:
                check_whole(field, count, total)
            if sum(counts) != total:
                raise PackedFormatError(f"{field} is {list(counts)}, expected a sum of {total}.")
        check_whole("masked", self.masked, self.weights[0])
        if not isinstance(self.rice, tuple) or len(self.rice) != len(self.masks):
            raise PackedFormatError(f"rice is {shown(self.rice)}, expected {len(self.masks)} numbers.")
        for k, (_, size) in zip(self.rice, self.masks, strict=True):
            check_whole("rice", k, size.bit_length() - 1)
        longest = sum((size >> k) + count for k, (count, size) in zip(self.rice, self.masks, strict=True))
        if not 0 <= self.unary_bytes <= (longest + 7) // 8:
            raise PackedFormatError(f"{self.nbytes} bytes cannot hold weights with these numbers of bits.")

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        return {"kind": self.kind, **super().to_dict()}


def check_grid(weight: Tensor, grid: Grid) -> None:
    """Raise `ValueError` unless the grid is one that can be stored, for a finite weight of this shape."""
    if grid.bits.dtype != torch.uint8 or int(grid.bits.max()) > MAX_BITS:
        raise ValueError(f"The bits of a grid are uint8, 0 to {MAX_BITS}.")
    dtype_name(grid.scale.dtype)
    if not bool((grid.scale.isfinite() & (grid.scale > 0)).all()):
        raise ValueError("A grid has a scale that is not a positive number.")
    for part in (grid.bits, grid.scale):
        expand(part, weight.shape)
    if not bool(weight.isfinite().all()):
        raise ValueError("A weight to quantize is not a finite number.")


def pack_quantized(weight: Tensor, grid: Grid, dtype: torch.dtype | None = None) -> tuple[Tensor, QuantizedSpec]:
    """Pack the codes of the grid values nearest to a weight.

    Args:
        weight: Any shape and device; entries equal to zero stay zero.
        grid: Bits and scales, see `Grid`.
        dtype: What a dense file would hold the weight in (default: the weight's dtype); only noted in the spec.

    Returns:
        The packed bytes (uint8, one dimension, on the CPU) and what is needed to read them.

    Raises:
        ValueError: The grid does not fit the weight, a number is not finite, or a dtype cannot be stored.
    """
    name = dtype_name(dtype or weight.dtype)
    weight, grid = weight.detach().to("cpu"), Grid(grid.bits.to("cpu"), grid.scale.to("cpu"))
    check_grid(weight, grid)
    codes = quantize(weight, grid).reshape(-1).numpy()
    coded = ((weight != 0) & (expand(grid.bits, weight.shape) > 0)).reshape(-1)
    numbers = torch.arange(grid.bits.numel(), dtype=torch.int32 if grid.bits.numel() < 1 << 31 else torch.int64)
    used = torch.zeros(grid.bits.numel(), dtype=torch.bool)
    used[expand(numbers.reshape(grid.bits.shape), weight.shape).reshape(-1)[coded]] = True
    bits = grid.bits.reshape(-1) * used
    width = expand(bits.reshape(grid.bits.shape), weight.shape).reshape(-1).numpy()
    kept = coded.numpy()

    masks = []
    left = bits.numpy()
    for k in np.unique(left)[:-1]:
        masks.append(_rarer(left == k))
        left = left[left != k]
    zero = ~kept[width > 0]
    masked = int(zero.sum())
    if masked:
        masks.append(_rarer(zero))
    parameters, low, unary = rice.encode(masks)
    streams = [_join(codes[kept & (width == k)], k) for k in range(1, MAX_BITS + 1)]
    scales = grid.scale.contiguous().reshape(-1).view(torch.uint8).numpy()
    packed = np.concatenate([scales, low, unary, *streams])
    spec = QuantizedSpec(
        shape=tuple(weight.shape),
        dtype=name,
        grid=tuple(grid.bits.shape),
        scale=tuple(grid.scale.shape),
        scale_dtype=dtype_name(grid.scale.dtype),
        entries=_counts(bits.numpy()),
        weights=_counts(width * kept),
        masked=masked,
        rice=parameters,
        nbytes=packed.nbytes,
        crc32=zlib.crc32(packed.tobytes()),
    )
    return torch.from_numpy(packed), spec


def unpack_quantized(packed: Tensor, spec: QuantizedSpec, dtype: torch.dtype | None = None) -> tuple[Tensor, Grid]:
    """Undo `pack_quantized`.

    Args:
        packed: The bytes, on any device.
        spec: What `pack_quantized` returned with them.
        dtype: Of the weight; default as the spec says.

    Returns:
        The weight on the packed tensor's device, equal to `round_to_grid` of a weight of this dtype, and its grid on
        the CPU.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    lengths = [spec.scale_bytes, spec.remainder_bytes, spec.unary_bytes, *spec.code_bytes]
    scales, low, unary, *streams = np.split(spec.read(packed), np.cumsum(lengths)[:-1])
    scale = torch.from_numpy(scales.copy()).view(DTYPES[spec.scale_dtype]).reshape(spec.scale)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise PackedFormatError("a scale is not a positive number")

    counts, sizes = [count for count, _ in spec.masks], [size for _, size in spec.masks]
    masks = rice.decode(spec.rice, low, unary, counts, sizes)
    *lower, highest = [k for k, count in enumerate(spec.entries) if count]
    bits = np.full(math.prod(spec.grid), highest, np.uint8)
    left = np.arange(len(bits))
    for k, positions in zip(lower, masks, strict=False):
        hit = _marked(positions, len(left), spec.entries[k])
        bits[left[hit]] = k
        left = left[~hit]
    grid = Grid(torch.from_numpy(bits).reshape(spec.grid), scale)

    width = expand(grid.bits, torch.Size(spec.shape)).reshape(-1).numpy().copy()
    coded = np.flatnonzero(width)
    if len(coded) != spec.masked + spec.nnz:
        raise PackedFormatError(f"{len(coded)} weights have bits, its entry says {spec.masked + spec.nnz}")
    if spec.masked:
        width[coded[_marked(masks[-1], len(coded), spec.masked)]] = 0
    if _counts(width) != spec.weights:
        raise PackedFormatError("the precision map does not agree with its entry")
    codes = np.zeros(spec.numel, np.uint8)
    for k, stream in enumerate(streams, start=1):
        if len(stream):
            codes[width == k] = _split(stream, k, spec.weights[k])
    weight = dequantize(torch.from_numpy(codes).reshape(spec.shape), grid, dtype or DTYPES[spec.dtype])
    weight[torch.from_numpy(width == 0).reshape(spec.shape)] = 0
    return weight.to(packed.device), grid


def _rarer(hit: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions where `hit` is true, or where it is false if those are fewer."""
    return np.flatnonzero(hit if 2 * int(hit.sum()) <= len(hit) else ~hit)


def _marked(positions: NDArray[np.int64], size: int, hits: int) -> NDArray[np.bool_]:
    """Undo `_rarer`, knowing how often `hit` is true."""
    rarer = 2 * hits <= size
    hit = np.full(size, not rarer)
    hit[positions] = rarer
    return hit


def _counts(bits: Bytes) -> tuple[int, ...]:
    return tuple(np.bincount(bits, minlength=MAX_BITS + 1).tolist())


def _join(codes: Bytes, k: int) -> Bytes:
    """Codes of k bits, one after the other without gaps."""
    parts = np.split(codes, range(RUN, len(codes), RUN))
    bits = (np.unpackbits(part[:, None], axis=1, count=k, bitorder="little") for part in parts)
    return np.concatenate([np.packbits(part, bitorder="little") for part in bits])


def _split(stream: Bytes, k: int, count: int) -> Bytes:
    """Undo `_join`."""
    codes = np.empty(count, np.uint8)
    for start in range(0, count, RUN):
        size = min(RUN, count - start)
        bits = np.unpackbits(stream[start * k // 8 :], count=size * k, bitorder="little").reshape(size, k)
        codes[start : start + size] = np.packbits(bits, axis=1, bitorder="little")[:, 0]
    return codes

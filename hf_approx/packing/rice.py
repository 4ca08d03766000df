"""Rice coding of a sparse mask: within 2 % of its entropy at the densities pruning reaches.

The gap between two kept weights (the number of zeros before the next one) is split into `gap >> k`, written
in unary, and the low k bits, written as they are. Gaps of a random mask are geometric, for which Rice codes
with the right k are near optimal (Golomb, 1966). With k = 0 the unary stream is the bit mask itself, so
a dense mask costs what a bit mask costs. The two streams are kept apart: both then decode without a loop.
"""

import numpy as np
from numpy.typing import NDArray

from hf_approx.packing.spec import PackedFormatError

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]


def best_parameter(gaps: Positions, numel: int) -> int:
    """The k that makes the code shortest."""
    costs = [len(gaps) * (k + 1) + int((gaps >> k).sum()) for k in range(max(numel.bit_length(), 1))]
    return int(np.argmin(costs))


def encode(positions: Positions, numel: int) -> tuple[int, Bytes, Bytes]:
    """Code the sorted positions of kept weights among `numel`; returns (k, low bits, unary bits)."""
    if len(positions) == 0:
        return 0, np.empty(0, np.uint8), np.empty(0, np.uint8)
    gaps = np.diff(positions, prepend=-1) - 1
    k = best_parameter(gaps, numel)
    ones = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1, np.uint8)
    unary[ones] = 1
    low = ((gaps[:, None] >> np.arange(k)) & 1).astype(np.uint8)
    return k, np.packbits(low.reshape(-1), bitorder="little"), np.packbits(unary, bitorder="little")


def decode(k: int, low: Bytes, unary: Bytes, nnz: int, numel: int) -> Positions:
    """Positions of the kept weights.

    Raises:
        PackedFormatError: The streams do not code exactly `nnz` positions below `numel`.
    """
    ones = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(ones) != nnz:
        raise PackedFormatError(f"the mask holds {len(ones)} kept weights, its entry says {nnz}")
    if nnz == 0:
        return np.empty(0, np.int64)
    bits = np.unpackbits(low, count=nnz * k, bitorder="little").reshape(nnz, k)
    remainder = bits.astype(np.int64) @ (1 << np.arange(k, dtype=np.int64))
    gaps = ((np.diff(ones, prepend=-1) - 1) << k) + remainder
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= numel:
        raise PackedFormatError(f"the mask reaches weight {positions[-1]} of {numel}")
    return positions

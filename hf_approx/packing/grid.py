"""The grid of a quantized weight: how many bits each part of it has, and at what scale.

A weight of p bits takes the values scale * q, with q of a zero-free grid: the 2^p odd multiples of 2^(1 - p)
between -2 and 2, so p = 1 is {-1, 1} and p = 2 is {-1.5, -0.5, 0.5, 1.5}.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BITS = 8


@dataclass(frozen=True)
class Grid:
    """Bits and scale of every part of a weight.

    Both tensors have as many dimensions as the weight, and each of their entries covers a run of the weight's entries
    along every dimension: for a weight of shape (O, I), shape (1, 1) is one entry for all, (O, 1) one a row,
    (O, I / 64) one for each 64 inputs of a row, and (O, I) one a weight. See `expand`.

    Attributes:
        bits: uint8, 0 to 8; where it is 0 the weight is zero.
        scale: float32, float16 or bfloat16, positive.
    """

    bits: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> "Grid":
        """The same grid on another device."""
        return Grid(self.bits.to(device), self.scale.to(device))


def expand(part: Tensor, shape: torch.Size) -> Tensor:
    """`part` in the given shape, each entry repeated over its run; the last run of a dimension may be shorter.

    Raises:
        ValueError: The numbers of dimensions differ, or a dimension has more entries than the shape.
    """
    return spread(part, shape).expand(shape)


def spread(part: Tensor, shape: torch.Size) -> Tensor:
    """As `expand`, but dimensions of one entry stay so: in a shape that broadcasts."""
    if part.dim() != len(shape) or any(have > want for have, want in zip(part.shape, shape, strict=True)):
        raise ValueError(f"A grid of shape {list(part.shape)} does not fit a weight of shape {list(shape)}.")
    for dim, (have, want) in enumerate(zip(part.shape, shape, strict=True)):
        if 1 < have < want:
            part = part.repeat_interleave(-(-want // have), dim).narrow(dim, 0, want)
    return part


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The code of the nearest grid value for every entry: uint8 of the weight's shape, 0 to 2^bits - 1."""
    # Powers are taken a part, not a weight, and one tensor of the weight's size is worked on in place.
    half = torch.exp2(grid.bits.to(torch.float32) - 1)
    code = weight.to(torch.float32) / expand(grid.scale.to(torch.float32), weight.shape)
    code.mul_(expand(half / 2, weight.shape)).floor_().add_(expand(half, weight.shape))
    return code.clamp_(min=0).clamp_(max=expand(2 * half - 1, weight.shape)).to(torch.uint8)


def dequantize(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The weight the codes stand for, computed in float32 and rounded to `dtype`; zero where there are no bits."""
    bits = expand(grid.bits, codes.shape).to(torch.float32)
    half = torch.exp2(bits - 1)
    unit = (codes.to(torch.float32) - half + 0.5) * (2 / half)
    value = unit * expand(grid.scale, codes.shape).to(torch.float32)
    return torch.where(bits == 0, 0.0, value).to(dtype)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest weight on the grid, in the weight's dtype; entries that are exactly zero stay zero."""
    wide, half = weight.shape, torch.exp2(grid.bits.to(torch.float32) - 1)
    scale = grid.scale.to(torch.float32)
    # As `dequantize(quantize(weight, grid), grid, weight.dtype)`, with less memory.
    scale_wide, half_wide = spread(scale, wide), spread(half, wide)
    unit = weight.to(torch.float32) / scale_wide
    unit.mul_(half_wide / 2).floor_()
    unit.clamp_(min=-half_wide).clamp_(max=half_wide - 1).add_(0.5)
    unit.mul_(2 / half_wide).mul_(scale_wide)
    return unit.masked_fill_(weight == 0, 0).to(weight.dtype)

"""Weights on a grid: rounding with a straight-through gradient, learned scales, and the scale that fits best.

The grid is that of `hf_approx.packing.grid`. The gradient of the scale is that of LSQ (Esser et al., "Learned Step
Size Quantization", 2020).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from hf_approx.methods.latent import Stage, add_grad
from hf_approx.modules.sharded import whole
from hf_approx.packing.grid import Grid, round_to_grid, spread
from hf_approx.targets import Target

SCALE_DTYPE = torch.float16
"""What scales are stored in; they are rounded in every forward pass, so the model that trains is the one stored."""
SCALE_MAX = 65280.0
"""The largest number that both float16 and bfloat16 hold."""
PARTS = 64
"""Engines that hold weights of up to 7 bits as integers multiply those by this part of the scale; see `stored`."""

PartGranularity = Literal["weight", "group", "channel", "tensor"]


def parts_shape(target: Target, granularity: PartGranularity, group_size: int) -> list[int]:
    """The shape of what has one number for each weight, group, output channel, or for all; of each expert.

    Args:
        target: The weight.
        granularity: `"group"`: `group_size` input features next to each other of one output channel.
        group_size: At most; where it does not divide the inputs the groups are as equal as they can be.
    """
    shape, (out, inputs, experts) = target.value.shape, target.axes
    if granularity == "weight":
        return list(shape)
    parts = [1] * len(shape)
    if experts is not None:
        parts[experts] = shape[experts]
    if granularity != "tensor":
        parts[out] = shape[out]
    if granularity == "group":
        parts[inputs] = -(-shape[inputs] // group_size)
    return parts


def governed(shape: torch.Size, parts: torch.Size | list[int]) -> Tensor:
    """How many entries of a weight each part covers, in a shape that broadcasts to the parts."""
    sizes = torch.ones([1] * len(shape))
    for dim, (have, want) in enumerate(zip(parts, shape, strict=True)):
        run = -(-want // have)
        runs = torch.full((have,), float(run))
        runs[-1] = want - run * (have - 1)
        sizes = sizes * (runs if want % have else runs[:1]).reshape([-1] + [1] * (len(shape) - dim - 1))
    return sizes


def reduce(values: Tensor, parts: torch.Size | list[int]) -> Tensor:
    """Sums over the runs of `hf_approx.packing.grid.expand`: its transpose. Shape `parts`."""
    whole = [dim for dim, have in enumerate(parts) if have == 1 and values.shape[dim] > 1]
    if whole:
        values = values.sum(whole, keepdim=True)
    for dim, have in enumerate(parts):
        want = values.shape[dim]
        if have < want:
            run = -(-want // have)
            pad = [0, 0] * (values.dim() - dim - 1) + [0, have * run - want]
            values = nn.functional.pad(values, pad) if any(pad) else values
            values = values.unflatten(dim, (have, run)).sum(dim + 1)
    return values


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it is stored, in float32: positive and finite in `SCALE_DTYPE`.

    A weight of a narrower dtype has fewer scales, those of which the step is exact in that dtype too: other engines
    hold scales in the dtype of the model.
    """
    scale = scale.float().clamp(torch.finfo(SCALE_DTYPE).tiny, SCALE_MAX)
    if dtype not in (torch.float32, torch.float64):
        scale = (scale / PARTS).to(dtype).float() * PARTS
    return scale.to(SCALE_DTYPE).float()


def limit(bits: Tensor) -> Tensor:
    """The outermost value of the grid of scale 1: 2 - 2^(1 - bits)."""
    return 2 - torch.exp2(1 - bits.to(torch.float32))


class GridWeight(Stage):
    """w -> the nearest weight on the grid, with a straight-through gradient.

    That of the weight is masked to the clip range. That of the logarithm of the scale counts the rounding error, which
    grows with the scale, and the clipped weights, which move with it.

    Args:
        bits: Bits of every part, uint8; see `Grid`.
        scale: Scale of every part, positive.
        train_scale: Whether the scale is trained, through its logarithm.
        dtype: Of the weight.
    """

    bits: Tensor
    asks_value = True

    def __init__(self, bits: Tensor, scale: Tensor, train_scale: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("bits", bits)
        self.log_scale = nn.Parameter(scale.log(), requires_grad=train_scale)

    @property
    def scale(self) -> Tensor:
        """As it is stored, in float32."""
        return stored(whole(self.log_scale.detach()).exp(), self.dtype)

    @property
    def grid(self) -> Grid:
        """The grid the weights are on."""
        return Grid(self.bits.clone(), self.scale.to(SCALE_DTYPE))

    def bound(self) -> Tensor:
        """The largest weight that is not clipped, in the finest parts that bits and scale have together."""
        return joint_product(limit(whole(self.bits)), self.scale)

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest weight on the grid, without gradient."""
        return round_to_grid(weight.detach(), Grid(self.bits, self.scale))

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        return self.rounded(weight)

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """As of `Stage`."""
        bound = spread(self.bound().to(weight.dtype), weight.shape)
        return self.straight(grad, weight, value, weight.clamp(-bound, bound))

    def straight(self, grad: Tensor, weight: Tensor, value: Tensor, clipped: Tensor) -> Tensor:
        """The same, for a weight that was clipped to its range."""
        inside = clipped == weight
        if self.log_scale.requires_grad:
            error = torch.sub(value, weight * inside).mul_(grad)
            add_grad(self.log_scale, reduce(at_least_float(error), self.log_scale.shape))
        return grad * inside


def at_least_float(values: Tensor) -> Tensor:
    """In float32, unless they are wider."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def joint_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two tensors of parts, of which one's are as fine as the other's in every dimension."""
    shape = torch.Size(max(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    return spread(a, shape) * spread(b, shape)


@torch.no_grad()
def fit_scale(weight: Tensor, bits: Tensor, shape: list[int] | torch.Size) -> Tensor:
    """The scales of the given shape that minimize the squared rounding error, nearly.

    A search over fractions of the largest weight, then a few steps of least squares with the codes held fixed.
    """
    dtype, weight = weight.dtype, weight.detach().float()
    shape = torch.Size(shape)
    tiny = torch.finfo(SCALE_DTYPE).tiny
    top = _largest(weight, shape)
    best = top.clamp_min(tiny)
    least = torch.full_like(best, torch.inf)

    def keep_better(scale: Tensor) -> Tensor:
        nonlocal best, least
        value = round_to_grid(weight, Grid(bits, scale))
        error = reduce((value - weight).square_(), shape)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return value

    for fraction in torch.logspace(-1, 0, 12).tolist():
        keep_better(stored(top * fraction, dtype))
    coarse = best
    for factor in (0.88, 0.92, 0.96, 1.04, 1.08, 1.12):
        keep_better(stored(coarse * factor, dtype))
    for _ in range(2):
        value = round_to_grid(weight, Grid(bits, best))
        square = reduce(value * value, shape)
        keep_better(stored(torch.where(square > 0, best * reduce(value * weight, shape) / square, best), dtype))
    return best


def _largest(weight: Tensor, shape: torch.Size) -> Tensor:
    """The largest magnitude of every part."""
    size = weight.abs()
    for dim, have in enumerate(shape):
        want = size.shape[dim]
        if have < want:
            run = -(-want // have)
            pad = [0, 0] * (size.dim() - dim - 1) + [0, have * run - want]
            size = nn.functional.pad(size, pad).unflatten(dim, (have, run)).amax(dim + 1)
    return size


def baked_grid(weight: Tensor, grid: Grid) -> Grid:
    """The grid of a weight that is on it, with no bits for the parts that are all zero.

    Raises:
        ValueError: The weight is not on the grid.
    """
    if not torch.equal(round_to_grid(weight, grid), weight):
        raise ValueError("The weight is not on its grid.")
    empty = reduce((weight != 0).float(), grid.bits.shape) == 0
    return Grid(grid.bits.masked_fill(empty, 0), grid.scale)

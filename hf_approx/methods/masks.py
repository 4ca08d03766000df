"""Masks of every granularity: one score for a weight, or one for a run of features along a dimension."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_approx.methods.latent import Rows, Stage, add_grad
from hf_approx.modules.sharded import piece
from hf_approx.structures import Side
from hf_approx.targets import Target

Granularity = Literal["weight", "row", "column", "2:4", "head", "neuron", "layer"]
FLOOR = 1e-12
"""Masks that are smaller change nothing, but they make weights of subnormal numbers, with which some CPUs multiply
matrices a hundred times slower."""
GRANULARITIES: tuple[Granularity, ...] = ("weight", "row", "column", "2:4", "head", "neuron", "layer")


@dataclass(frozen=True)
class Layout:
    """Which entries of a weight share a score: `width` features next to each other along `dim`.

    `dim=None` is one score a weight. Dimensions are counted from the last, -1: in front there may be one of a batch.
    With `experts` the first dimension of the weight is that of experts, each of which has scores of its own.
    """

    dim: int | None = None
    width: int = 1
    experts: bool = False

    def sizes(self, weight: Tensor) -> Tensor:
        """Mean magnitude of the entries of each score, in float32 or wider."""
        size = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
        if self.dim is None:
            return size
        if self.experts:
            return size.movedim(self.dim, 1).flatten(2).mean(2)
        return size.movedim(self.dim, 0).reshape(weight.shape[self.dim] // self.width, -1).mean(1)

    def spread(self, mask: Tensor, weight: Tensor, rows: Rows | None = None) -> Tensor:
        """The mask in a shape that multiplies the weight, or those rows of it that `weight` is."""
        if self.dim is None:
            return mask
        before = [1] * (weight.dim() + self.dim - mask.dim() + 1)
        mask = mask.repeat_interleave(self.width, -1)
        if rows is not None and (self.experts or self.dim == -weight.dim()):
            mask = mask[rows[0] : rows[0] + len(weight)]
        return mask.reshape(*mask.shape[:-1], *before, mask.shape[-1], *[1] * (-self.dim - 1))

    def gather(self, values: Tensor, like: Tensor, rows: Rows | None = None) -> Tensor:
        """Sums over the entries of each score: the transpose of `spread`, in the shape of the scores `like`."""
        if self.dim is None:
            return values
        if rows is not None and self.dim == -values.dim():
            sums = values.new_zeros(rows[1])
            sums[rows[0] : rows[0] + len(values)] = values.flatten(1).sum(1)
            return sums.reshape(*like.shape, -1).sum(-1)
        moved = values.movedim(self.dim, like.dim() - 1)
        if rows is not None and self.experts:
            sums = values.new_zeros(like.shape)
            sums[rows[0] : rows[0] + len(values)] = moved.flatten(2).sum(2)
            return sums
        return moved.reshape(*like.shape, -1).sum(-1)


def layout_of(granularity: Granularity, target: Target, side: Side | None) -> Layout:
    """The layout of one target's scores.

    Args:
        granularity: Of the method.
        target: The weight.
        side: For heads and neurons, the features of the layer that belong to them.

    Raises:
        ValueError: A 2:4 pattern does not fit the weight.
    """
    dims, experts = target.value.dim(), target.axis("expert")
    if side is not None:
        return Layout(target.axis(side.axis) - dims, side.width)
    if granularity in ("row", "column"):
        return Layout(target.axis("out" if granularity == "row" else "in") - dims, experts=experts is not None)
    if granularity == "2:4":
        matrix = dims == 2 or experts is not None
        if not matrix or target.value.shape[target.axis("in")] % 4:
            raise ValueError(
                f"2:4 sparsity needs matrices with a multiple of 4 input features; exclude '{target.key}'."
            )
    return Layout()


def in_fours(target: Target, scores: Tensor) -> Tensor:
    """A view of shape (..., outputs, inputs / 4, 4) of scores shaped like a weight."""
    return scores.movedim(target.axis("in"), -1).unflatten(-1, (-1, 4))


class SigmoidMask(Stage):
    """w -> sigmoid(temperature * scores) * scale * w, with zero for any sigmoid up to `FLOOR`.

    Scores of plus or minus infinity give exactly one and zero and no gradient: that is the hard mask.
    """

    temperature: Tensor
    may_be_infinite = ("scores",)

    def __init__(
        self, scores: Tensor, temperature: float | Tensor, scale: float = 1.0, layout: Layout | None = None
    ) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.scale = scale
        self.layout = layout or Layout()
        # Masks that share one tensor are all set at once.
        shared = torch.as_tensor(temperature, dtype=scores.dtype, device=scores.device)
        self.register_buffer("temperature", shared)

    def kind(self) -> Layout:
        """Which entries share a score."""
        return self.layout

    def mask(self) -> Tensor:
        """The soft mask, scaled, in the shape of the scores; of scores that are split, that of the piece here."""
        mask = nn.functional.threshold(torch.sigmoid(self.temperature * piece(self.scores)), FLOOR, 0.0)
        return mask if self.scale == 1 else mask * self.scale

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        return weight * self.layout.spread(self.mask(), weight, self.rows).to(weight.dtype)

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """As of `Stage`: c beta m (1 - m) times what the mask multiplies, for a mask c m."""
        mask = self.mask()
        if self.scores.requires_grad:
            slope = self.layout.gather((grad * weight).to(mask.dtype), mask, self.rows)
            share = mask if self.scale == 1 else mask / self.scale
            add_grad(self.scores, slope.mul_(mask * self.temperature).mul_(1 - share))
        return grad * self.layout.spread(mask, weight, self.rows).to(grad.dtype)

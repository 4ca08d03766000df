"""Precisions from limits of perturbation, their average, and integers that meet a budget of bits.

A weight of p bits is displaced by up to sigma = 2^(1 - p) when it is rounded. With sigma = sigmoid(s) that is
p = 1 + log2(1 + e^-s).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_approx.modules.sharded import every, from_piece, piece, piece_of, summed, totals, whole, write
from hf_approx.packing.grid import MAX_BITS

TOLERANCE = 0.02
"""How far the average of the assigned precisions may be from the budget, in bits."""
SAMPLE = 1 << 14
"""Limits that place the average during training; the final assignment counts all of them."""
TRIED, TURNS = 129, 2
"""Shifts of the limits that are tried at once, and how often, each time between the best two of the last."""
MANY = 1 << 16
"""Parts enough to meet any target."""
ALMOST_ONE = 5.0
"""The largest s: 1.01 bits, where its gradient has not vanished yet."""
LEAST_EXTRA = math.log2(1 + math.exp(-ALMOST_ONE))
"""Its precision, above 1."""

MEMORY = 0.9
"""Share of the past in the running means that give the multiplier of the penalty."""


def precision(limits: Tensor) -> Tensor:
    """p(s) = 1 + log2(1 + e^-s), at least 1."""
    return 1 + nn.functional.softplus(-limits) / math.log(2)


def initial_limit(bits: float) -> float:
    """The s of a precision: its inverse, -ln(2^(bits - 1) - 1), but never more than `ALMOST_ONE`."""
    return ALMOST_ONE if bits <= 1 else min(-math.log(2.0 ** (bits - 1) - 1), ALMOST_ONE)


@torch.no_grad()
def steer(
    limits: Sequence[Tensor],
    sizes: Sequence[Tensor],
    target: float,
    least: float,
    most: float,
    stacked: bool = False,
) -> Tensor:
    """Shift all limits by one number so that the average precision is about the target, and clamp them.

    Args:
        limits: Changed in place.
        sizes: How many weights each limit governs, in shapes that broadcast.
        target: Average, each weight counted once.
        least: Smallest precision.
        most: Largest precision.
        stacked: Each tensor holds those of several weights, in its first dimension.

    Returns:
        The shift, a scalar where the limits are, so that no device is waited for; NaN, and nothing is shifted, if a
        limit is not finite.
    """
    stride = (sum(s.numel() for s in limits) // SAMPLE) | 1
    sample = torch.cat([every(s, stride, stacked) for s in limits])
    weight = torch.cat([every(_like(n, s), stride, stacked) for n, s in zip(sizes, limits, strict=True)])
    share = (weight / weight.sum()).to(sample)
    low, high = initial_limit(most), initial_limit(least)
    smallest, largest = sample.aminmax()
    left, right = low - largest, high - smallest
    fractions = torch.linspace(0, 1, TRIED, dtype=sample.dtype, device=sample.device)
    pair = torch.arange(-1, 1, device=sample.device)
    negative, wanted = -sample, (target - 1) * math.log(2)
    for _ in range(TURNS):
        shifts = torch.lerp(left, right, fractions)
        # ln 2 times the average precision above 1, which falls as the shift grows.
        averages = nn.functional.softplus((negative - shifts[:, None]).clamp_(-high, -low)) @ share
        at = (averages > wanted).sum().clamp_(1, TRIED - 1)
        left, right, above, below = torch.cat([values.take(at + pair) for values in (shifts, averages)]).unbind()
    shift = torch.lerp(left, right, ((above - wanted) / (above - below)).nan_to_num_(0.0).clamp_(0, 1))
    move = shift.nan_to_num(0.0, 0.0, 0.0)
    for s in limits:
        piece(s).add_(move).clamp_(low, high)
    return shift


def _like(sizes: Tensor, limits: Tensor) -> Tensor:
    """The sizes of all limits, without memory of their own where all are equal."""
    return sizes.expand(limits.shape)


class Limited(Protocol):
    """A module with noise: its limits, the buffer of their precisions, and that of what `Budget.measure` knows."""

    limits: nn.Parameter
    bits: Tensor
    curvature: Tensor


@dataclass
class Budget:
    """Noises whose precisions share an average.

    `governs` says how many weights each limit governs, in shapes that broadcast; `target` is the average, `allowed`
    are the precisions; `stacked` noises are those of several weights each. `means` are running means of the sum of the
    limits' gradients, and of what the penalty would add to it if lambda were one. They are where the limits are once
    there is something in them.
    """

    noises: Sequence[Limited]
    governs: list[Tensor]
    target: float | None
    allowed: Sequence[int]
    stacked: bool = False
    means: list[Tensor | float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def limits(self) -> list[nn.Parameter]:
        """The limits of all."""
        return [noise.limits for noise in self.noises]

    @property
    def sizes(self) -> list[Tensor]:
        """`governs`, where the limits are."""
        return [n.to(noise.limits.device) for n, noise in zip(self.governs, self.noises, strict=True)]

    def check(self) -> None:
        """Raise `ValueError` if whole parts cannot meet the target."""
        parts = sum(s.numel() for s in self.limits)
        if self.target is None or parts > MANY:
            return
        sizes = torch.cat([_like(n, s).reshape(-1) for s, n in zip(self.limits, self.sizes, strict=True)])
        assigned = assign(torch.full_like(sizes, self.target), sizes, self.allowed, self.target)
        reached = float((assigned * sizes).sum() / sizes.sum())
        if abs(reached - self.target) > TOLERANCE:
            raise ValueError(
                f"SmolConfig: {parts} parts with precisions {tuple(self.allowed)} cannot average {self.target:g} "
                f"bits, only {reached:.3f}; choose a finer granularity or that target."
            )

    @torch.no_grad()
    def choose(self, sizes: Sequence[Tensor]) -> None:
        """Assign precisions, counting these sizes."""
        wanted = torch.cat([precision(whole(s)).reshape(-1).cpu() for s in self.limits])
        counts = torch.cat([_like(n, s).cpu().reshape(-1) for s, n in zip(self.limits, sizes, strict=True)])
        assigned = assign(wanted, counts, self.allowed, self.target)
        for noise, part in zip(self.noises, assigned.split([s.numel() for s in self.limits]), strict=True):
            write(noise.bits, part.reshape(noise.bits.shape).to(noise.bits.device))

    @property
    def multiplier(self) -> Tensor:
        """The lambda for which gradients and penalty together leave the average where it is."""
        pull, weight = self.means
        return (torch.as_tensor(pull, dtype=torch.float64) / weight).nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0)

    @torch.no_grad()
    def balance(self, scale: float = 1.0) -> None:
        """Add the gradient of the penalty to that of the limits, with the multiplier solved for.

        Without it Adam, which makes all gradients equally large, would lower precisions that should rise. The
        gradients are `scale` times what they are.
        """
        limits = self.limits
        if any(s.grad is None for s in limits):
            return
        grads = [piece(cast(Tensor, s.grad)) for s in limits]
        slopes = [
            piece_of(n, s) * torch.sigmoid(-piece(s)) / math.log(2) for s, n in zip(limits, self.sizes, strict=True)
        ]
        pull = totals([grad.sum(dtype=torch.float64) for grad in grads], limits).sum() / scale
        weight = totals([slope.sum(dtype=torch.float64) for slope in slopes], limits).sum()
        good = pull.isfinite()
        for i, found in enumerate((pull, weight)):
            self.means[i] = torch.where(good, MEMORY * self.means[i] + (1 - MEMORY) * found, self.means[i])
        factor = torch.where(good, self.multiplier * scale, 0.0)
        for grad, slope in zip(grads, slopes, strict=True):
            grad.sub_(slope * factor)

    @torch.no_grad()
    def measure(self, scale: float = 1.0) -> None:
        """Add to what is known of how sensitive the loss is to each limit: the mean squared gradient of its weights.

        The gradients are `scale` times what they are.

        The gradient of a limit is a sum over its weights of gradient times independent noise, so its square says it.
        """
        for noise, n in zip(self.noises, self.sizes, strict=True):
            grad = noise.limits.grad
            if grad is not None:
                s = piece(noise.limits)
                size = torch.sigmoid(s) * torch.sigmoid(-s)
                found = (piece(grad) / (size * scale)).square_().nan_to_num(0.0, 0.0, 0.0)
                found = found / piece_of(n, noise.limits)
                if isinstance(noise.limits, DTensor):
                    found = from_piece(found, noise.limits)
                    found = found if isinstance(noise.curvature, DTensor) else whole(found)
                noise.curvature.add_(found)

    @torch.no_grad()
    def spread(self) -> None:
        """Move precisions apart by half the logarithm of the curvature: where they would come to rest.

        The stationary point of one weight under noise and penalty is p = 1 + log2(H ln 2 / (3 lambda)) / 2, here with
        the squared gradient for H.
        """
        curvature = [whole(noise.curvature) for noise in self.noises]
        logs = [torch.log2(total.clamp_min(torch.finfo(total.dtype).tiny)) / 2 for total in curvature]
        known = torch.cat([log[total > 0] for log, total in zip(logs, curvature, strict=True)])
        if known.numel() == 0:
            return
        middle = known.median()
        for s, log in zip(self.limits, logs, strict=True):
            bits = precision(whole(s)) + (log - middle).clamp(-MAX_BITS, MAX_BITS)
            write(s, -torch.log(torch.exp2(bits.clamp(1 + LEAST_EXTRA, MAX_BITS) - 1) - 1))

    def average(self) -> float:
        """Average precision the limits stand for."""
        with torch.no_grad():
            pairs = zip(self.limits, self.sizes, strict=True)
            bits = totals([(precision(piece(s)) * piece_of(n, s)).sum() for s, n in pairs], self.limits)
        return sum(bits.double().tolist()) / self.total

    @property
    def total(self) -> float:
        """How many weights all limits govern."""
        return sum(float(n.expand(s.shape).sum()) for s, n in zip(self.limits, self.sizes, strict=True))

    def penalty(self) -> Tensor:
        """Sum of (p - 1) over all weights, differentiable."""
        pairs = zip(self.limits, self.sizes, strict=True)
        terms = [(nn.functional.softplus(-piece(s)) * piece_of(n, s)).sum() / math.log(2) for s, n in pairs]
        return summed(terms, self.limits)


def round_precision(wanted: Tensor, allowed: Sequence[int]) -> Tensor:
    """The nearest allowed precision of each, as positions in `allowed`."""
    levels = torch.tensor(allowed, dtype=wanted.dtype, device=wanted.device)
    return torch.bucketize(wanted, (levels[1:] + levels[:-1]) / 2)


def assign(wanted: Tensor, sizes: Tensor, allowed: Sequence[int], target: float | None) -> Tensor:
    """Integer precisions near the wanted ones whose weighted average meets the target as nearly as it can.

    All are shifted by one number and rounded to the nearest; those on the edge then go up one by one, and at last a
    few single parts or pairs move to close what large parts leave open.

    Args:
        wanted: Real precisions, one dimension.
        sizes: How many weights each governs; those that govern none do not count.
        allowed: Precisions in rising order.
        target: Average, each weight counted once; None rounds each to the nearest.

    Returns:
        uint8, like `wanted`.
    """
    levels = torch.tensor(allowed, dtype=torch.float64, device=wanted.device)
    if target is None:
        return levels[round_precision(wanted.double(), allowed)].to(torch.uint8)
    wanted, sizes = wanted.double(), sizes.double()
    budget = target * float(sizes.sum())

    def spent(choice: Tensor) -> float:
        return float((levels[choice] * sizes).sum())

    span = float(levels[-1] - levels[0]) + float(wanted.max() - wanted.min()) + 1
    center = float(levels[0]) - float(wanted.min())
    left, right = center - span, center + span
    for _ in range(50):
        middle = (left + right) / 2
        if spent(round_precision(wanted + middle, allowed)) <= budget:
            left = middle
        else:
            right = middle
    choice, higher = (round_precision(wanted + shift, allowed) for shift in (left, right))
    edge = (higher > choice).nonzero().reshape(-1)
    if len(edge):
        costs = (levels[higher[edge]] - levels[choice[edge]]) * sizes[edge]
        affordable = costs.cumsum(0) <= budget - spent(choice) + 1e-9
        choice[edge[affordable]] = higher[edge[affordable]]
    _close(choice, sizes, levels, budget - spent(choice), TOLERANCE / 2 * float(sizes.sum()))
    return levels[choice].to(torch.uint8)


PARTS = 512
"""Parts that are tried together, taken evenly over all sizes."""


def _close(choice: Tensor, sizes: Tensor, levels: Tensor, left: float, enough: float) -> None:
    """Move parts by a level while that brings what is left of the budget nearer to zero.

    Single parts, two at once, or one and as many others the other way as make up for it.
    """
    some = sizes.argsort()[:: max(len(sizes) // PARTS, 1)]
    for _ in range(64):
        if abs(left) <= enough:
            return
        infinite = torch.full_like(sizes, torch.inf)
        counted = sizes > 0
        up, down = counted & (choice < len(levels) - 1), counted & (choice > 0)
        more = torch.where(up, (levels[(choice + 1).clamp(max=len(levels) - 1)] - levels[choice]) * sizes, infinite)
        less = torch.where(down, (levels[choice] - levels[(choice - 1).clamp(min=0)]) * sizes, infinite)
        gain, loss = (left - more).abs(), (left + less).abs()
        moves: list[tuple[float, list[tuple[int, int]]]] = [
            (float(gain.min()), [(int(gain.argmin()), 1)]),
            (float(loss.min()), [(int(loss.argmin()), -1)]),
        ]
        both = (left - more[some][:, None] + less[some][None, :]).nan_to_num(torch.inf).abs()
        both.fill_diagonal_(torch.inf)
        at = int(both.argmin())
        pair = [(int(some[at // len(some)]), 1), (int(some[at % len(some)]), -1)]
        moves.append((float(both.reshape(-1)[at]), pair))
        if min(moves)[0] > enough:
            moves += [
                _balanced(some, more[some], less[some], -left, 1),
                _balanced(some, less[some], more[some], left, -1),
            ]
        best, changes = min(moves)
        if best >= abs(left):
            return
        before = float((levels[choice] * sizes).sum())
        for part, change in changes:
            choice[part] += change
        left -= float((levels[choice] * sizes).sum()) - before


def _balanced(
    parts: Tensor, costs: Tensor, others: Tensor, missing: float, change: int
) -> tuple[float, list[tuple[int, int]]]:
    """Change one of the parts, which costs so much more than is there, and others the other way, the largest first.

    Returns:
        What is missing then, and the changes.
    """
    rest = missing + costs
    taken = torch.zeros(len(parts), len(parts), dtype=torch.bool, device=costs.device)
    for i in [i for i in others.argsort(descending=True).tolist() if others[i] < torch.inf]:
        taken[:, i] = others[i] <= rest
        taken[i, i] = False
        rest = torch.where(taken[:, i], rest - others[i], rest)
    best = int(rest.abs().argmin())
    changes = [(int(parts[best]), change), *((int(part), -change) for part in parts[taken[best]])]
    return float(rest[best].abs()), changes


def map_entropy(bits: Tensor) -> float:
    """Bits that no code of the precision map, part by part, can go below."""
    counts = torch.bincount(bits.reshape(-1).long()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum()) * bits.numel()

"""Noise of a trainable size in place of rounding: what SMOL trains with before precisions are fixed."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_approx.methods.latent import add_grad
from hf_approx.methods.precision import initial_limit
from hf_approx.methods.rounding import GridWeight, at_least_float, joint_product, reduce
from hf_approx.modules.sharded import whole
from hf_approx.packing.grid import spread

NoiseLaw = Literal["uniform", "rademacher"]

SPREAD = 0x9E3779B9 - (1 << 32)
"""Neighbouring positions are this far apart before they are mixed: 2^32 over the golden ratio."""
ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))
"""Shifts and factors of a 32-bit mixing function (C. Wellons, "Prospecting for Hash Functions", 2018)."""
PIECE = 1 << 22
"""Numbers that a CPU mixes at a time, so that they stay in its cache."""


def noise_key(seed: int, step: int, index: int) -> int:
    """32 bits, as a signed number, from a method's seed, the step, and which tensor the noise is for."""
    state = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % (1 << 64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor % (1 << 64)
    return (state >> 32) - (1 << 31)


def noise_keys(seed: int, step: int, indices: Sequence[int], like: Tensor) -> Tensor:
    """A key for each of several tensors, shape (tensors,), where `like` is."""
    keys = torch.tensor([noise_key(seed, step, index) for index in indices], dtype=torch.int32)
    return keys.to(like.device, non_blocking=True)


def draw(shape: torch.Size, keys: Tensor, law: NoiseLaw, first: int = 0) -> Tensor:
    """Independent float32 noise in [-1, 1].

    Every number is a function of its tensor's key and its position in it: the same on every process, device and piece.

    Args:
        shape: Of the noise. With several keys its first dimension is that of the tensors.
        keys: Shape (tensors,), from `noise_keys`.
        law: How it is distributed.
        first: Position of the first number, for a piece of a tensor.
    """
    tensors = keys.numel()
    count = math.prod(shape) // tensors
    positions = torch.arange(first, first + count, dtype=torch.int32, device=keys.device).mul_(SPREAD)
    run = max(PIECE // tensors, 1)
    if run >= count or keys.device.type != "cpu" or torch.compiler.is_compiling():
        return _mixed(positions, keys[:, None], law).reshape(shape)
    noise = torch.empty(tensors, count)
    for start in range(0, count, run):
        noise[:, start : start + run] = _mixed(positions[start : start + run], keys[:, None], law)
    return noise.reshape(shape)


def _mixed(positions: Tensor, key: Tensor, law: NoiseLaw) -> Tensor:
    number = positions + key
    for shift, factor in ROUNDS:
        # Shifts of signed numbers copy the sign, which has no place here.
        number.bitwise_xor_((number >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor).add_(key)
    if law == "rademacher":
        return torch.where(number < 0, -1.0, 1.0)
    return number.to(torch.float32).mul_(2.0**-31)


class NoisyWeight(GridWeight):
    """w -> clip(w) + scale * sigma(s) * noise until precisions are fixed; then what `GridWeight` does.

    The clip range is scale * (2 - sigma(s)). There is no noise in eval mode, nor where the weight is exactly zero. The
    gradient of s counts the noise, which is sigma(s) times something constant.

    The buffer `curvature` is the method's to use.

    Args:
        parts: Shape of s; see `Grid`.
        scale: Initial scale of every part, positive.
        train_scale: Whether the scale is trained.
        initial_bits: Precision every s starts at.
        law: How the noise is distributed.
        seed: Of the noise.
        dtype: Of the weight.
    """

    curvature: Tensor

    def __init__(
        self,
        parts: list[int],
        scale: Tensor,
        train_scale: bool,
        initial_bits: float,
        law: NoiseLaw,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        bits = torch.full(parts, round(initial_bits), dtype=torch.uint8, device=scale.device)
        super().__init__(bits, scale, train_scale, dtype)
        self.limits = nn.Parameter(torch.full(parts, initial_limit(initial_bits), device=scale.device))
        self.register_buffer("curvature", torch.zeros(parts, device=scale.device))
        self.law: NoiseLaw = law
        self.seed, self.indices, self.step = seed, [0], 0
        self.frozen = False
        self.kept: tuple[Tensor, Tensor, Tensor] | None = None
        self.fresh = False

    def bound(self) -> Tensor:
        """The largest weight that is not clipped, in the finest parts that limits and scale have together."""
        if self.frozen:
            return super().bound()
        return joint_product(2 - torch.sigmoid(whole(self.limits.detach())), self.scale)

    def noise(self, shape: torch.Size) -> Tensor:
        """That of this step, in [-1, 1]."""
        first = 0 if self.rows is None else self.rows[0] * math.prod(shape[1:])
        return draw(shape, noise_keys(self.seed, self.step, self.indices, self.limits), self.law, first)

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        if self.frozen:
            return self.rounded(weight)
        bound, sigma, scale = clip = self.kept if self.fresh and self.kept is not None else self._clip(weight)
        if self.keeps:
            self.kept, self.fresh = clip, False
        value = weight.clamp(-bound, bound)
        if self.training:
            size = spread(joint_product(sigma, scale), weight.shape)
            noise = self.noise(weight.shape).mul_(size).masked_fill_(weight == 0, 0)
            value.add_(noise.to(weight.dtype))
        return value

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """As of `Stage`."""
        if self.frozen:
            return super().pull(grad, weight, value)
        bound, sigma, _ = self.kept if self.keeps and self.kept is not None else self._clip(weight)
        clipped = weight.clamp(-bound, bound)
        if self.limits.requires_grad:
            error = at_least_float(torch.sub(value, clipped).mul_(grad))
            add_grad(self.limits, reduce(error, self.limits.shape) * (1 - sigma))
        return self.straight(grad, weight, value, clipped)

    def confine(self, weight: Tensor) -> None:
        """As of `Stage`: to the range that is not clipped."""
        if self.frozen:
            bound = spread(self.bound().to(weight.dtype), weight.shape)
        else:
            bound, *_ = clip = self._clip(weight)
            if self.keeps:
                self.kept, self.fresh = clip, True
        weight.clamp_(-bound, bound)

    def _clip(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The largest weights that are not clipped, sigma(s), and the scale."""
        sigma, scale = torch.sigmoid(whole(self.limits.detach())), self.scale
        return spread(joint_product(2 - sigma, scale).to(weight.dtype), weight.shape), sigma, scale

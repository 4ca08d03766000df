"""Noise of a trainable size in place of rounding: what SMOL trains with before precisions are fixed."""

from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from hf_approx.methods.precision import initial_limit
from hf_approx.methods.rounding import GridWeight, StraightThrough, joint_product
from hf_approx.modules.sharded import whole
from hf_approx.packing.grid import expand

NoiseLaw = Literal["uniform", "rademacher"]
Key = tuple[int, int, int]
"""What noise is drawn from: the method's seed, the step, and which module."""


def draw(shape: torch.Size, key: Key, law: NoiseLaw, device: torch.device) -> Tensor:
    """Independent float32 noise in [-1, 1], the same whenever the key is: on every rank, and when recomputed."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
    return noise if law == "uniform" else noise.sign_()


class NoisyWeight(GridWeight):
    """w -> clip(w) + scale * sigma(s) * noise until precisions are fixed; then what `GridWeight` does.

    The clip range is scale * (2 - sigma(s)). There is no noise in eval mode, nor where the weight is exactly zero.

    The noise of a whole weight is drawn wherever the weight is: processes that share out the model, or its batches,
    draw the same and need not send it.

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
    noisy = True

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
        self.seed, self.index, self.step = seed, 0, 0
        self.frozen = False

    def bound(self) -> Tensor:
        """The largest weight that is not clipped, in the finest parts that limits and scale have together."""
        if self.frozen:
            return super().bound()
        return joint_product(2 - torch.sigmoid(whole(self.limits.detach())), self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        if self.frozen:
            with torch.no_grad():
                # Adam sees zeros for s instead of nothing, which distributed training would wait for.
                value, bound = self.rounded(weight), self.bound().to(weight.dtype)
            return cast(Tensor, StraightThrough.apply(weight, value, bound, self.log_scale, self.limits, False))
        with torch.no_grad():
            bound = self.bound().to(weight.dtype)
            wide = expand(bound, weight.shape)
            value = weight.clamp(-wide, wide)
            if self.training:
                size = joint_product(torch.sigmoid(self.limits), self.scale)
                noise = draw(weight.shape, (self.seed, self.step, self.index), self.law, weight.device).mul_(expand(size, weight.shape)).masked_fill_(weight == 0, 0)
                value.add_(noise.to(weight.dtype))
        return cast(Tensor, StraightThrough.apply(weight, value, bound, self.log_scale, self.limits, True))

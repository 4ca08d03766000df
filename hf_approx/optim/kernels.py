"""The arithmetic of AvaGrad on a batch of tensors that share hyper-parameters and step count.

Each operation is one `torch._foreach_*` call. A batch of a single tensor is the single-tensor
implementation: the same formulas in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CPU_ELEMENTS = 1 << 18
"""Elements of a batch on a CPU: its tensors stay in the cache from the first operation to the last."""

ACCELERATOR_ELEMENTS = 1 << 27
"""Elements of a batch elsewhere: enough to fill the device, few enough to bound the temporary memory."""


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """Sum of squares over all tensors, added up in float64 where there is one; reduced over a mesh."""
    # One float32 sum over many millions of numbers would lose digits; over a piece it does not.
    wide = torch.float64 if tensors[0].device.type == "cpu" and tensors[0].numel() > CPU_ELEMENTS else None
    norms = torch._foreach_norm(tensors, 2.0, wide)
    whole = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])
    return whole.to(torch.float32 if whole.device.type == "mps" else torch.float64).square().sum()


def pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Equal parts of tensors of one shape, small enough for a CPU batch; the tensors themselves elsewhere."""
    splits = tensors[0].device.type == "cpu" and tensors[0].numel() > CPU_ELEMENTS
    if splits and all(type(t) is not DTensor and t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(CPU_ELEMENTS) for t in tensors), strict=True)
    else:
        yield tensors


@dataclass
class Batch:
    """Parameters of one group at one step count, with their gradients and moments."""

    group: dict[str, Any]
    step: int
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    square: list[Tensor] = field(default_factory=list)
    numel: int = 0

    def append(self, param: Tensor, grad: Tensor, mean: Tensor, square: Tensor) -> None:
        """Add one parameter, or a part of it; `numel` counts weights over all shards."""
        self.params.append(param)
        self.grads.append(grad)
        self.mean.append(mean)
        self.square.append(square)
        self.numel += param.numel()

    @property
    def is_full(self) -> bool:
        """Whether the next tensor should start a new batch."""
        return self.numel >= (CPU_ELEMENTS if self.params[0].device.type == "cpu" else ACCELERATOR_ELEMENTS)

    def decayed_gradients(self) -> list[Tensor]:
        """Gradients in the dtype of the moments, negated to maximize, with L2 if that is the decay."""
        grads = [g.to(m.dtype) for g, m in zip(self.grads, self.mean, strict=True)]
        if self.group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if self.group["weight_decay"] and not self.group["decoupled_weight_decay"]:
            weights = [p.to(g.dtype) for p, g in zip(self.params, grads, strict=True)]
            grads = list(torch._foreach_add(grads, weights, alpha=self.group["weight_decay"]))
        return grads

    def rates(self, correction_step: int | None) -> list[Tensor]:
        """eta = 1 / (sqrt(v / (1 - beta2^t)) + eps); no correction if `correction_step` is None."""
        root = list(torch._foreach_sqrt(self.square))
        if correction_step is not None:
            torch._foreach_div_(root, (1 - self.group["betas"][1] ** correction_step) ** 0.5)
        torch._foreach_add_(root, self.group["eps"])
        torch._foreach_reciprocal_(root)
        return root

    def update_mean(self, grads: list[Tensor]) -> None:
        """m <- beta1 m + (1 - beta1) g."""
        torch._foreach_lerp_(self.mean, grads, 1 - self.group["betas"][0])

    def update_square(self, grads: list[Tensor]) -> None:
        """v <- beta2 v + (1 - beta2) g^2."""
        beta = self.group["betas"][1]
        torch._foreach_mul_(self.square, beta)
        torch._foreach_addcmul_(self.square, grads, grads, 1 - beta)

    def move(self, rates: list[Tensor], gamma: Tensor | float, mean_correction: float) -> None:
        """w <- (1 - lr wd) w - lr / correction * gamma * eta * m. Overwrites the rates."""
        lr, decay = self.group["lr"], self.group["weight_decay"]
        size = -1.0 if isinstance(lr, Tensor) else -lr
        if isinstance(gamma, Tensor):
            # Kept a tensor on the parameters' device, gamma costs an accelerator no synchronisation.
            gamma = gamma.to(device=rates[0].device, dtype=rates[0].dtype)
        if isinstance(lr, Tensor):
            lr = lr.detach().reshape(()).to(device=rates[0].device, dtype=rates[0].dtype)
            gamma = gamma * lr
        if decay and self.group["decoupled_weight_decay"]:
            shrink = 1 - lr * decay
            if isinstance(shrink, Tensor):
                for param in self.params:
                    param.mul_(shrink)
            else:
                torch._foreach_mul_(self.params, shrink)
        for rate in rates:
            rate.mul_(gamma)
        if rates[0].dtype == self.params[0].dtype:
            torch._foreach_addcmul_(self.params, rates, self.mean, size / mean_correction)
        else:
            torch._foreach_mul_(rates, self.mean)
            update = [rate.to(p.dtype) for rate, p in zip(rates, self.params, strict=True)]
            torch._foreach_add_(self.params, update, alpha=size / mean_correction)

"""The arithmetic of AvaGrad on a batch of tensors that share hyper-parameters and step count.

Each operation is one `torch._foreach_*` call. A batch of a single tensor is the single-tensor
implementation: the same formulas in the same order.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def squared_norm(tensors: list[Tensor] | None) -> Tensor:
    """Sum of squares over all tensors as a float64 scalar, reduced over the mesh of sharded ones."""
    norms = torch._foreach_norm(tensors or [], 2.0, torch.float64)
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack(whole).square().sum()


@dataclass
class Batch:
    """Parameters of one group at one step count, with their moments and, once computed, their rates."""

    group: dict[str, Any]
    step: int
    params: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    square: list[Tensor] = field(default_factory=list)
    rates: list[Tensor] | None = None

    @property
    def numel(self) -> int:
        """Number of weights, over all shards."""
        return sum(param.numel() for param in self.params)

    def append(self, param: Tensor, mean: Tensor, square: Tensor) -> None:
        """Add one parameter and its two moments."""
        self.params.append(param)
        self.mean.append(mean)
        self.square.append(square)

    def decayed_gradients(self) -> list[Tensor]:
        """Gradients in the dtype of the moments, negated to maximize, with L2 if that is the decay."""
        grads = [p.grad.to(m.dtype) for p, m in zip(self.params, self.mean, strict=True) if p.grad is not None]
        if self.group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if self.group["weight_decay"] and not self.group["decoupled_weight_decay"]:
            weights = [p.to(g.dtype) for p, g in zip(self.params, grads, strict=True)]
            grads = list(torch._foreach_add(grads, weights, alpha=self.group["weight_decay"]))
        return grads

    def compute_rates(self, correction_step: int | None) -> None:
        """eta = 1 / (sqrt(v / (1 - beta2^t)) + eps); no correction if `correction_step` is None."""
        root = torch._foreach_sqrt(self.square)
        if correction_step is not None:
            torch._foreach_div_(root, (1 - self.group["betas"][1] ** correction_step) ** 0.5)
        torch._foreach_add_(root, self.group["eps"])
        torch._foreach_reciprocal_(root)
        self.rates = list(root)

    def update_mean(self, grads: list[Tensor]) -> None:
        """m <- beta1 m + (1 - beta1) g."""
        beta = self.group["betas"][0]
        torch._foreach_mul_(self.mean, beta)
        torch._foreach_add_(self.mean, grads, alpha=1 - beta)

    def update_square(self, grads: list[Tensor]) -> None:
        """v <- beta2 v + (1 - beta2) g^2."""
        beta = self.group["betas"][1]
        torch._foreach_mul_(self.square, beta)
        torch._foreach_addcmul_(self.square, grads, grads, 1 - beta)

    def move(self, gamma: Tensor | float, mean_correction: float) -> None:
        """w <- (1 - lr wd) w - lr / correction * gamma * eta * m. Uses up the rates."""
        assert self.rates is not None
        lr = self.group["lr"]
        if self.group["weight_decay"] and self.group["decoupled_weight_decay"]:
            torch._foreach_mul_(self.params, 1 - lr * self.group["weight_decay"])
        update, self.rates = self.rates, None
        torch._foreach_mul_(update, self.mean)
        # Kept a tensor on the parameters' device, gamma costs an accelerator no synchronisation.
        scale = gamma * (-lr / mean_correction)
        if isinstance(scale, Tensor):
            scale = scale.to(device=self.params[0].device, dtype=update[0].dtype)
        for tensor in update:
            tensor.mul_(scale)
        if update[0].dtype != self.params[0].dtype:
            update = [u.to(p.dtype) for u, p in zip(update, self.params, strict=True)]
        torch._foreach_add_(self.params, update)

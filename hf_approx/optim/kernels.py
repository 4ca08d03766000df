"""The arithmetic of AvaGrad on a batch of tensors that share hyper-parameters and step count.

What a step does to a batch is a `Rule`. This file has the form that runs everywhere, `torch._foreach_*` calls on
parts small enough for a cache; `native.py` and `triton_step.py` do the same in one pass over memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

CPU_ELEMENTS = 1 << 18
"""Elements of a part on a CPU: its tensors stay in the cache from the first operation to the last."""

ACCELERATOR_ELEMENTS = 1 << 24
"""Elements of a part elsewhere: enough to fill the device, few enough to bound the temporary memory."""

Quad = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one parameter, or a part of it: weights, gradients, means and squares."""


_PLAIN = {Tensor, torch.nn.Parameter}


@dataclass(frozen=True)
class Rule:
    """One step of one batch; see the formulas in `AvaGrad`.

    Attributes:
        lr: A number, or a tensor of one element that is read where it is.
        l2: Times the weights is added to the gradients.
        decay: `1 - lr * decay` multiplies the weights.
        root: Square root of the bias correction of the second moment that the rates are made of.
        correction: Bias correction of the mean.
        moves: Whether weights move; a first call may only fill the state.
        norm_root: As `root`, for the rates whose squares the step adds up.
        norm_of_old: Whether those are rates of the second moment before the update, not after it.
    """

    beta1: float
    beta2: float
    eps: float
    lr: float | Tensor
    l2: float
    decay: float
    maximize: bool
    root: float
    correction: float
    moves: bool
    norm_root: float
    norm_of_old: bool


@dataclass
class Batch:
    """Parameters of one group at one step count, with their gradients and moments.

    Attributes:
        group: Number of the parameter group.
        foreach: Whether several tensors may be taken in one call.
        dense: Whether every quad is four contiguous tensors of their own memory: no subclasses.
        mesh: Of DTensors: the mesh, and for each of its dimensions whether the tensors are split along it.
        quads: What this process holds of each parameter.
        states: The second moments as the optimizer keeps them.
        numel: Weights, counted over all processes.
    """

    group: int
    rule: Rule
    foreach: bool
    dense: bool
    mesh: tuple[Any, tuple[bool, ...]] | None
    quads: list[Quad] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    numel: int = 0

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.quads[0][0].device

    @property
    def local_numel(self) -> int:
        """Weights this process holds."""
        return sum(quad[0].numel() for quad in self.quads)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weights, gradients, means and squares."""
        return tuple(tensor.dtype for tensor in self.quads[0])

    def parts(self) -> Iterator[list[list[Tensor]]]:
        """Lists of weights, gradients, means and squares, each together about as large as a part should be."""
        limit = CPU_ELEMENTS if self.device.type == "cpu" else ACCELERATOR_ELEMENTS
        part: list[Quad] = []
        size = 0
        for quad in self.quads:
            for piece in _pieces(quad, limit):
                part.append(piece)
                size += piece[0].numel()
                if size >= limit or not self.foreach:
                    yield [list(tensors) for tensors in zip(*part, strict=True)]
                    part, size = [], 0
        if part:
            yield [list(tensors) for tensors in zip(*part, strict=True)]


def local_quad(quad: Quad) -> tuple[Quad, bool]:
    """What this process holds of four tensors of one shape, as real numbers, and whether it is dense: see `Batch`.

    Tensors that lie without gaps in the same order of dimensions are contiguous in that order.
    """
    param, grad, mean, square = quad
    if isinstance(param, DTensor):
        if isinstance(grad, DTensor) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        param, grad, mean, square = (
            t.to_local() if isinstance(t, DTensor) else t for t in (param, grad, mean, square)
        )
    if param.is_complex():
        param, grad, mean, square = map(torch.view_as_real, (param, grad, mean, square))
    # Written out: this runs for every parameter in every step, while an accelerator may be waiting.
    plain = type(param) in _PLAIN and type(grad) in _PLAIN and type(mean) in _PLAIN and type(square) in _PLAIN
    if param.is_contiguous() and grad.is_contiguous() and mean.is_contiguous() and square.is_contiguous():
        return (param, grad, mean, square), plain
    strides = param.stride()
    if strides == grad.stride() == mean.stride() == square.stride():
        order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        if param.permute(order).is_contiguous():
            return (param.permute(order), grad.permute(order), mean.permute(order), square.permute(order)), plain
    return (param, grad, mean, square), False


def _pieces(quad: Quad, limit: int) -> Iterator[Quad]:
    """Equal parts of four tensors, of at most `limit` elements if they are contiguous, of few rows if not."""
    if quad[0].numel() <= limit:
        yield quad
    elif all(tensor.is_contiguous() for tensor in quad):
        yield from zip(*(tensor.view(-1).split(limit) for tensor in quad), strict=True)
    else:
        rows = max(1, limit * quad[0].shape[0] // quad[0].numel())
        yield from zip(*(tensor.split(rows) for tensor in quad), strict=True)


def reduced(batches: list[Batch], sums: list[Tensor]) -> list[Tensor]:
    """Sums over all processes; one reduction for each mesh, whatever the number of parameters and groups."""
    sums = list(sums)
    meshes: dict[Any, list[int]] = {}
    for i, batch in enumerate(batches):
        if batch.mesh is not None and any(batch.mesh[1]):
            meshes.setdefault(batch.mesh, []).append(i)
    for (mesh, split), indices in meshes.items():
        placements = [Partial() if along else Replicate() for along in split]
        parts = torch.stack([sums[i] for i in indices])
        whole = DTensor.from_local(parts, mesh, placements, run_check=False).full_tensor()
        for i, total in zip(indices, whole.unbind(), strict=True):
            sums[i] = total
    return sums


def step(batch: Batch, gamma: Tensor | None) -> Tensor:
    """Take the step; returns the sum of squared rates for the next gamma: no dimensions, float64, on the device."""
    rule = batch.rule
    sums = []
    for params, given, means, squares in batch.parts():
        dtype = means[0].dtype
        # Half-precision weights are rounded once, at the end.
        weights = [param.to(dtype) for param in params]
        grads = [grad.to(dtype) for grad in given]
        if rule.maximize:
            grads = list(torch._foreach_neg(grads))
        if rule.l2:
            grads = list(torch._foreach_add(grads, weights, alpha=rule.l2))
        torch._foreach_lerp_(means, grads, 1 - rule.beta1)
        if rule.norm_of_old:
            sums.append(_sum_of_squares(_rates(squares, rule.norm_root, rule.eps)))
        if rule.moves:
            assert gamma is not None
            _move(rule, gamma, weights, means, _rates(squares, rule.root, rule.eps))
            if dtype != params[0].dtype:
                torch._foreach_copy_(params, weights)
        torch._foreach_mul_(squares, rule.beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - rule.beta2)
        if not rule.norm_of_old:
            sums.append(_sum_of_squares(_rates(squares, rule.norm_root, rule.eps)))
    return torch.stack(sums).sum() if sums else torch.zeros((), device=batch.device)


def norm(batch: Batch) -> Tensor:
    """The sum of squares of the rates of this step, as `step` would have left it."""
    rule = batch.rule
    return torch.stack(
        [_sum_of_squares(_rates(squares, rule.root, rule.eps)) for _, _, _, squares in batch.parts()]
    ).sum()


def _rates(squares: list[Tensor], root: float, eps: float) -> list[Tensor]:
    """eta = 1 / (sqrt(v) / root + eps)."""
    rates = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(rates, root)
    torch._foreach_add_(rates, eps)
    torch._foreach_reciprocal_(rates)
    return rates


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    # One float32 sum over many millions of numbers would lose digits; over a part it does not.
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.to(torch.float32 if norms.device.type == "mps" else torch.float64).square().sum()


def _move(rule: Rule, gamma: Tensor, weights: list[Tensor], means: list[Tensor], rates: list[Tensor]) -> None:
    """w <- (1 - lr decay) w - lr / correction * gamma * eta * m. Overwrites the rates."""
    lr, size, like = rule.lr, -1 / rule.correction, rates[0]
    # Kept a tensor on the parameters' device, gamma costs an accelerator no synchronisation.
    factor = gamma.to(device=like.device, dtype=like.dtype)
    if isinstance(lr, Tensor):
        lr = lr.detach().reshape(()).to(device=like.device, dtype=like.dtype, non_blocking=True)
        factor = factor * lr
    else:
        size *= lr
    if rule.decay:
        torch._foreach_mul_(weights, 1 - lr * rule.decay)
    torch._foreach_mul_(rates, factor)
    torch._foreach_addcmul_(weights, rates, means, size)

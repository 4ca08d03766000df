"""Targets of one shape computed together: one operation where there would be one a target.

Tensors of latents and stages become views of one tensor that stacks them in a dimension of its own. A batched stage
is a stage like any other, whose tensors are the stacked ones.
"""

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_approx.methods.latent import Latent, Partials, Stage, add_grad, forward, pull

MOST = 1 << 26
"""Weights in a batch: what one holds for a moment beside the model is as large."""
MOST_ON_CPU = 1 << 20
"""The same where operations cost nothing to start, and what they make should stay near the cores."""


class Batch:
    """Latents that are computed together.

    Args:
        latents: Of equal shape, dtype and device, with equal stages.
    """

    def __init__(self, latents: Sequence[Latent]) -> None:
        self.latents = list(latents)
        self.weight = nn.Parameter(stacked([latent.weight for latent in latents]), latents[0].weight.requires_grad)
        self.stages = [
            batched(cast(Sequence[Stage], each)) for each in zip(*(latent.stages for latent in latents), strict=True)
        ]

    @torch.no_grad()
    def write(self, bare: bool = False, confine: bool = False) -> None:
        """As of `Latent`."""
        self._tell()
        if confine and self.latents[0].weight.requires_grad:
            for stage in self.stages:
                stage.confine(self.weight)
        made = forward(self.weight, () if bare else self.stages)
        torch._foreach_copy_([latent.effective for latent in self.latents], made.unbind())

    @torch.no_grad()
    def pull(self) -> Partials:
        """Turn gradients of effective weights into those of what is trained, adding to what they have."""
        pairs = self._pairs()
        for batch, params in pairs:
            take_back(batch, params)
        effective = [latent.effective for latent in self.latents]
        grads = [param.grad for param in effective]
        if any(grad is None for grad in grads):
            return [part for latent in self.latents for part in latent.pull()]
        for param in effective:
            param.grad = None
        self._tell()
        grad = together(cast(list[Tensor], grads))
        del grads
        value = together(effective) if self.stages[-1].asks_value else grad
        self.weight.requires_grad_(self.latents[0].weight.requires_grad)
        add_grad(self.weight, pull(grad, self.weight, value, self.stages))
        self.hand_out()
        return []

    def hand_out(self) -> None:
        """Let all that is stacked have its part of the gradients."""
        for batch, params in self._pairs():
            if batch.grad is not None and (
                params[0].grad is None or params[0].grad.data_ptr() != batch.grad.data_ptr()
            ):
                hand_out(batch, params)

    def zero_grad(self) -> None:
        """Forget all gradients of what is stacked."""
        for batch, _ in self._pairs():
            batch.grad = None

    def _pairs(self) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Everything trained, stacked and one by one."""
        pairs = [(self.weight, [latent.weight for latent in self.latents])]
        for i, stage in enumerate(self.stages):
            for name, param in stage.named_parameters():
                pairs.append((param, [latent.stages[i].get_parameter(name) for latent in self.latents]))
        return pairs

    def _tell(self) -> None:
        """Bring what is no tensor up to date: where a stage is in training."""
        for stage, first in zip(self.stages, self.latents[0].stages, strict=True):
            vars(stage).update({name: value for name, value in vars(first).items() if isinstance(value, (bool, int))})


def together(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in a dimension of their own; a single one is not copied."""
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack(list(tensors))


def stacked(tensors: Sequence[Tensor], dims: int = 0) -> Tensor:
    """One tensor, of which the given ones become views.

    Args:
        tensors: Of equal shape.
        dims: How many dimensions those without any get.
    """
    shape = tensors[0].shape or (1,) * dims
    if len(tensors) == 1:
        return tensors[0].data.reshape(1, *shape)
    base = torch.stack([tensor.data.reshape(shape) for tensor in tensors])
    for tensor, view in zip(tensors, base, strict=True):
        tensor.data = view.reshape(tensor.shape)
    return base


def batched(stages: Sequence[Stage]) -> Stage:
    """A stage for stacked weights whose tensors are those of the given ones, stacked."""
    first = stages[0]
    made: Any = object.__new__(type(first))
    vars(made).update(vars(first))
    made._parameters, made._buffers = {}, {}
    made.indices = [index for stage in stages for index in getattr(stage, "indices", ())]
    made.keeps = True
    dims = max((tensor.dim() for tensor in (*first.parameters(), *first.buffers())), default=0)
    for name, param in first._parameters.items():
        params = [stage.get_parameter(name) for stage in stages]
        made._parameters[name] = nn.Parameter(stacked(params, dims), cast(nn.Parameter, param).requires_grad)
    for name, buffer in first._buffers.items():
        assert buffer is not None
        buffers = [stage.get_buffer(name) for stage in stages]
        # What all have in common, such as a temperature, stays one number.
        common = not buffer.dim() and all(each is buffer for each in buffers)
        made._buffers[name] = buffer if common else stacked(buffers, dims)
    return made


def hand_out(batch: nn.Parameter, params: Sequence[nn.Parameter]) -> None:
    """Let the gradient of each parameter be its part of the batch's."""
    for param, grad in zip(params, cast(Tensor, batch.grad).unbind(), strict=True):
        param.grad = grad if grad.shape == param.shape else grad.reshape(param.shape)


def take_back(batch: nn.Parameter, params: Sequence[nn.Parameter]) -> None:
    """Undo that: the batch has the gradients that its parameters have now, which may be none."""
    grads = [param.grad for param in params]
    if batch.grad is None and all(grad is None for grad in grads):
        return
    if batch.grad is not None and grads[0] is not None and grads[0].data_ptr() == batch.grad.data_ptr():
        return
    known = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]
    batch.grad = None if all(grad is None for grad in grads) else torch.stack(known).reshape(batch.shape)


def batches_of(latents: Sequence[Latent], groups: Sequence[Hashable]) -> list[Batch]:
    """The latents in batches.

    Args:
        latents: Any.
        groups: Of each, what those must have in common that are computed together.
    """
    found: dict[Any, list[Latent]] = {}
    for latent, group in zip(latents, groups, strict=True):
        weight = latent.weight
        key = (group, weight.shape, weight.dtype, weight.device, weight.requires_grad)
        stages = tuple(signature(stage) for stage in latent.stages)
        found.setdefault((key, stages), []).append(latent)
    batches = []
    for same in found.values():
        limit = MOST_ON_CPU if same[0].weight.device.type == "cpu" else MOST
        most = max(limit // max(same[0].weight.numel(), 1), 1)
        batches += [Batch(same[i : i + most]) for i in range(0, len(same), most)]
    return batches


def signature(stage: Stage) -> Hashable:
    """What stages have in common that are computed together."""
    tensors = [
        (name, tensor.shape, tensor.dtype) for name, tensor in (*stage.named_parameters(), *stage.named_buffers())
    ]
    plain = [(name, value) for name, value in vars(stage).items() if isinstance(value, (bool, float, str))]
    return type(stage), tuple(tensors), tuple(plain), stage.kind()

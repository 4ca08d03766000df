"""What is trained in the place of a weight.

A model in training holds *effective* weights: ordinary parameters that are masked, noisy or rounded already, so that
its forward and backward passes are those of any other model. A `Latent` ties one of them to the weight that the
optimizer trains and to the stages between the two, one for each method that works on it. Twice a step something is
computed here: before the optimizer's step gradients go from the effective weight to what is trained, after it the
effective weight is made anew.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_approx.checkpoint.zeros import hold_zeros, holds_zeros, move_zeros
from hf_approx.finite import Named
from hf_approx.modules.sharded import from_piece, hand_back, on_rows, piece, split, split_alike
from hf_approx.targets import LATENTS, Target

Partials = list[tuple[Tensor, Tensor, DTensor]]
"""Parameters that are whole on every process, what this one found of their gradients, and in rows of which weight."""
Rows = tuple[int, int]
"""The first row here of a weight that is split over processes, and how many it has in all."""


class Stage(nn.Module):
    """One method's step from the trained weight towards the effective one.

    `forward` takes a weight and returns one of the same shape and dtype; only where it makes noise do train and eval
    mode differ. Both functions also take several weights at once, stacked in a dimension before their own, if their
    tensors are stacked likewise: see `hf_approx.methods.batch`.

    Attributes:
        method: Name of the method.
        keeps: Whether `forward` keeps what `pull`, which comes after it, can use.
        asks_value: Whether `pull` looks at what `forward` returned.
        may_be_infinite: Names of those of its tensors that may be, such as scores of masks that are fixed.
        rows: Of one that works on the rows that a process holds of a weight: which those are.
    """

    method = ""
    keeps = False
    asks_value = False
    may_be_infinite: tuple[str, ...] = ()
    rows: Rows | None = None

    def kind(self) -> Hashable:
        """What else stages must have in common to be stacked: all their tensors' shapes and plain numbers are."""
        return None

    def confine(self, weight: Tensor) -> None:
        """Keep a trained weight, in place, where the stage can make use of it; `forward` comes next."""

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """The gradient of the weight; adds those of the stage's own parameters to what they have.

        By default autograd through `forward`; most stages know a shorter way.

        Args:
            grad: Of what `forward` returned.
            weight: That it was given.
            value: What it returned.
        """
        leaf = weight.detach().requires_grad_()
        own = [param for param in self.parameters() if param.requires_grad]
        with torch.enable_grad():
            made = self(leaf)
        of_weight, *others = torch.autograd.grad(made, [leaf, *own], grad, allow_unused=True)
        for param, found in zip(own, others, strict=True):
            if found is not None:
                add_grad(param, found)
        return torch.zeros_like(grad) if of_weight is None else of_weight


def add_grad(param: nn.Parameter, grad: Tensor) -> None:
    """Add to the gradient of a parameter, if it is trained."""
    if param.requires_grad:
        grad = grad.to(param.dtype)
        param.grad = grad if param.grad is None else param.grad + grad


def forward(weight: Tensor, stages: Sequence[Stage]) -> Tensor:
    """The effective weight."""
    for stage in stages:
        weight = stage(weight)
    return weight


def pull(grad: Tensor, weight: Tensor, value: Tensor, stages: Sequence[Stage]) -> Tensor:
    """The gradient of the trained weight; the stages' own are added to what they have.

    Args:
        grad: Of the effective weight.
        weight: The trained weight.
        value: The effective weight; anything if the last stage does not ask for it.
        stages: Between the two.
    """
    given = [weight]
    for stage in stages[:-1]:
        given.append(stage(given[-1]))
    for stage, incoming in zip(reversed(stages), reversed(given), strict=True):
        grad, value = stage.pull(grad, incoming, value), incoming
    return grad


class Latent:
    """The trained weight of a target, and its stages in the order in which they work.

    Args:
        target: Its parameter becomes the effective weight.
    """

    is_split = False
    """Whether what is trained was split over processes, as the effective weight is."""
    mixes = False
    """Whether the effective weight is made of other parameters of the model, which must be written before it."""

    def __init__(self, target: Target) -> None:
        effective = target.value
        self.target = target
        self.trained = effective.requires_grad
        self.weight = self.start()
        self.stages: list[Stage] = []
        self._held = effective
        self._has_zeros = holds_zeros(effective)
        if self._has_zeros:
            self._take_zeros(effective)

    def start(self) -> nn.Parameter:
        """What is trained, as training begins."""
        value = self.target.value
        return nn.Parameter(value.detach().clone(), value.requires_grad)

    def _take_zeros(self, effective: nn.Parameter) -> None:
        """Keep the zeros of a packed model, which are those of what is trained now."""
        move_zeros(effective, self.weight)

    @property
    def effective(self) -> nn.Parameter:
        """The parameter that the model computes with."""
        found = self.target.module._parameters.get(self.target.parameter)
        # A parametrization of the model's own, such as a spectral norm, moves the parameter elsewhere; and a forward
        # pass of a sharded model has a whole one in its place.
        if found is None or (self.is_split and not isinstance(found, DTensor)):
            return self._held
        self._held = found
        return found

    def add(self, stage: Stage) -> None:
        """Let a stage work on what those before it make."""
        self.stages.append(stage)
        self.effective.requires_grad_(True)

    def remove(self, stage: Stage) -> None:
        """Take a stage out; without any the trained weight is the model's again."""
        self.stages.remove(stage)
        if not self.stages:
            self.release(self.weight)

    @torch.no_grad()
    def release(self, value: Tensor) -> None:
        """Leave a value in the model and forget the rest."""
        effective = self.effective
        effective.copy_(value)
        effective.requires_grad_(self.trained)
        effective.grad = None
        if self._has_zeros:
            hold_zeros(effective)
        held = vars(self.target.module)[LATENTS]
        del held[self.target.parameter]
        if not held:
            delattr(self.target.module, LATENTS)

    def before(self, stage: Stage | None = None) -> Tensor:
        """What a stage is given, or without one what the model computes with; differentiable, split if that is."""
        effective = self.effective
        value = self.local(stage)
        return from_piece(value, effective) if isinstance(effective, DTensor) else value

    def local(self, stage: Stage | None = None) -> Tensor:
        """The same, of the rows that this process holds: of a model that is not split all."""
        effective, value = self.effective, piece(self.weight)
        for each in self.stages:
            if each is stage:
                break
            value = (on_rows(each, effective) if isinstance(effective, DTensor) else each)(value)
        return value

    @torch.no_grad()
    def write(self, bare: bool = False, confine: bool = False) -> None:
        """Make the effective weight anew.

        Args:
            bare: From the trained weight alone, as if there were no stages.
            confine: Keep the trained weight in the range that the stages make use of.
        """
        self.follow()
        effective, rows = self.effective, piece(self.weight)
        if confine and self.weight.requires_grad:
            for stage in self.stages:
                (on_rows(stage, effective) if isinstance(effective, DTensor) else stage).confine(rows)
        piece(effective).copy_(rows if bare else self.local())

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.effective.grad = self.weight.grad = None
        for stage in self.stages:
            stage.zero_grad()

    @torch.no_grad()
    def pull(self) -> Partials:
        """Turn the gradient of the effective weight into those of what is trained, adding to what they have.

        Returns:
            Of a weight that is split: what is still to be added up over the processes; see `add_totals`.
        """
        effective = self.effective
        grad, effective.grad = effective.grad, None
        if grad is None:
            return []
        self.follow()
        if not isinstance(effective, DTensor):
            add_grad(self.weight, pull(grad, self.weight, effective.detach(), self.stages))
            return []
        stages = [on_rows(stage, effective) for stage in self.stages]
        rows = pull(piece(grad), piece(self.weight), piece(effective), stages)
        add_grad(self.weight, from_piece(rows, effective))
        return [part for pair in zip(stages, self.stages, strict=True) for part in hand_back(*pair, effective)]

    @property
    def moved(self) -> bool:
        """Whether the model went to another device."""
        return self.weight.device != self.effective.device

    @property
    def is_sharded(self) -> bool:
        """Whether the weight is split over processes."""
        return isinstance(self.effective, DTensor)

    def follow(self) -> None:
        """Go where the model went, to another device or apart over processes."""
        effective = self.effective
        if isinstance(effective, DTensor):
            if not self.is_split:
                self.split(effective)
                self.is_split = True
        elif self.moved:
            for tensor in (
                self.weight,
                *(t for stage in self.stages for t in (*stage.parameters(), *stage.buffers())),
            ):
                tensor.data = tensor.data.to(effective.device)

    def split(self, effective: DTensor) -> None:
        """Keep this process's rows of what has a number for each weight.

        Raises:
            ValueError: The weight has zeros to keep.
        """
        if self._has_zeros:
            raise ValueError(
                f"fully_shard would lose the zeros that '{self.target.name}' was loaded with; train this sparse model "
                "without FSDP."
            )
        # accelerate widens the weights of a model that computes in bf16.
        self.weight.data = self.weight.data.to(torch.promote_types(self.weight.dtype, effective.dtype))
        self.weight = cast(nn.Parameter, split(self.weight, effective))
        for stage in self.stages:
            split_alike(stage, effective)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained or kept beside it, by names that begin with the parameter's."""
        yield self.target.name, self.weight
        for i, stage in enumerate(self.stages):
            for name, tensor in stage.state_dict(keep_vars=True).items():
                yield f"{self.target.name}.{i}.{name}", tensor

    def finite_parts(self) -> Iterator[Named]:
        """The trained weight and what stages train or keep, by names a user knows, and whether it may be infinite."""
        yield self.target.name, self.weight, False
        for stage in self.stages:
            for name, tensor in stage.state_dict(keep_vars=True).items():
                yield f"{self.target.name.removesuffix('.weight')}.{name}", tensor, name in stage.may_be_infinite


class _Held(dict[str, Latent]):
    """The latents of a module, by parameter. A copy of the module is an ordinary module and has none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return _Held()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Held, ()


def latent_of(target: Target) -> Latent | None:
    """What is trained in the place of a target; None if it is the target itself."""
    held: dict[str, Latent] = vars(target.module).get(LATENTS) or {}
    return held.get(target.parameter)


def latent_for(target: Target) -> Latent:
    """The same; a new one if there is none."""
    return latent_of(target) or hold(Latent(target))


def hold(latent: Latent) -> Latent:
    """Let the target's module have what is trained in its place."""
    target = latent.target
    held = cast(dict[str, Latent], vars(target.module).setdefault(LATENTS, _Held()))
    held[target.parameter] = latent
    return latent


@torch.no_grad()
def value_of(target: Target) -> Tensor:
    """What the model computes with, without noise: a view of the parameter where no method works on it."""
    latent = latent_of(target)
    if latent is None:
        return target.value.detach()
    modes = [stage.training for stage in latent.stages]
    for stage in latent.stages:
        stage.eval()
    value = latent.before()
    for stage, mode in zip(latent.stages, modes, strict=True):
        stage.train(mode)
    return value.detach()

"""What is trained in the place of a weight.

A model in training holds *effective* weights: ordinary parameters that are masked, noisy or rounded already, so that
its forward and backward passes are those of any other model. A `Latent` ties one of them to the weight that the
optimizer trains and to the stages between the two, one for each method that works on it. Twice a step something is
computed here: before the optimizer's step gradients go from the effective weight to what is trained, after it the
effective weight is made anew.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_approx.finite import Named
from hf_approx.targets import LATENTS, Target


class Stage(nn.Module):
    """One method's step from the trained weight towards the effective one.

    `forward` is the plain formula: it takes a weight and returns one of the same shape and dtype, differentiable in
    the weight and in the stage's own parameters. Only where it makes noise do train and eval mode differ.

    Attributes:
        method: Name of the method.
        noisy: Whether it may draw noise.
        may_be_infinite: Names of those of its tensors that may be, such as scores of masks that are fixed.
    """

    method = ""
    noisy = False
    may_be_infinite: tuple[str, ...] = ()


class Latent:
    """The trained weight of a target, and its stages in the order in which they work.

    Args:
        target: Its parameter becomes the effective weight.
    """

    mixes = False
    """Whether the effective weight is made of other parameters of the model, which must be written before it."""

    def __init__(self, target: Target) -> None:
        effective = target.value
        self.target = target
        self.trained = effective.requires_grad
        self.weight = self.start()
        self.stages: list[Stage] = []
        self._held = effective

    def start(self) -> nn.Parameter:
        """What is trained, as training begins."""
        value = self.target.value
        return nn.Parameter(value.detach().clone(), value.requires_grad)

    @property
    def effective(self) -> nn.Parameter:
        """The parameter that the model computes with."""
        found = self.target.module._parameters.get(self.target.parameter)
        # A parametrization of the model's own, such as a spectral norm, moves the parameter elsewhere.
        return self._held if found is None else found

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
        held = vars(self.target.module)[LATENTS]
        del held[self.target.parameter]
        if not held:
            delattr(self.target.module, LATENTS)

    def before(self, stage: Stage | None = None) -> Tensor:
        """What a stage is given, or without one what the model computes with; differentiable."""
        value: Tensor = self.weight
        for each in self.stages:
            if each is stage:
                break
            value = each(value)
        return value

    @property
    def shown(self) -> nn.Parameter | None:
        """What an optimizer finds under the parameter's name."""
        return self.weight

    @torch.no_grad()
    def write(self, bare: bool = False) -> None:
        """Make the effective weight anew.

        Args:
            bare: From the trained weight alone, as if there were no stages.
        """
        self.follow()
        self.effective.copy_(self.weight if bare else self.before())

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.effective.grad = self.weight.grad = None
        for stage in self.stages:
            stage.zero_grad()

    def pull(self) -> None:
        """Turn the gradient of the effective weight into those of what is trained, adding to what they have."""
        effective = self.effective
        grad, effective.grad = effective.grad, None
        if grad is None:
            return
        self.follow()
        with torch.enable_grad():
            value = self.before()
        if value.requires_grad:
            torch.autograd.backward(value, grad)

    def follow(self) -> None:
        """Go where the model went."""
        device = self.effective.device
        if self.weight.device != device:
            self.weight.data = self.weight.data.to(device)
            for stage in self.stages:
                stage.to(device)

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


def every_latent(model: nn.Module) -> Iterator[Latent]:
    """What is trained in the place of a model's parameters, in the model's order."""
    for module in model.modules():
        yield from (vars(module).get(LATENTS) or {}).values()


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

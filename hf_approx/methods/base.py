"""What every method is: a config that builds it, and an object that attaches, steps and finalizes."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_approx.targets import Patterns, select_modules

HISTOGRAM_BINS = 20


@dataclass
class MethodConfig(ABC):
    """Fields every method has."""

    target_modules: Patterns = field(
        default=None,
        metadata={"help": "Regular expression or list of name endings; default: layers in the blocks."},
    )
    exclude: Patterns = field(default=None, metadata={"help": "Modules to leave alone, in the same notation."})

    @abstractmethod
    def build(self) -> "Method":
        """The method object this config describes."""


class Method(ABC):
    """A method at work on one model. It knows no trainer: any loop can drive it.

    Call `attach`, then before optimizer step k of K `on_step(k / (K - 1))`, add `penalty()` to the loss, and
    after the last step `finalize`.
    """

    name: str

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.parametrizations: dict[str, nn.Module] = {}
        self.removed = 0

    def attach(self, model: nn.Module) -> None:
        """Parametrize the target weights. The model is unchanged if this raises."""
        selected = self.select(model)
        taken = [name for name, module in selected.items() if parametrize.is_parametrized(module, "weight")]
        if taken:
            raise ValueError(f"'{taken[0]}' is already parametrized by another method.")
        self.check(list(selected))
        self.parametrizations = {name: self.parametrization(name, module) for name, module in selected.items()}
        for name, module in selected.items():
            parametrize.register_parametrization(module, "weight", self.parametrizations[name])
        self.modules = selected

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to work on, by name."""
        return select_modules(model, self.config.target_modules, self.config.exclude)

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless the config fits the selected modules."""

    @property
    @abstractmethod
    def config(self) -> MethodConfig:
        """The config that built this object."""

    @abstractmethod
    def parametrization(self, name: str, module: nn.Module) -> nn.Module:
        """The module that turns the trained weight of a target into the weight it computes with."""

    @abstractmethod
    def on_step(self, progress: float) -> None:
        """Advance every schedule to `progress`, from 0 at the first step of training to 1 at the last."""

    def penalty(self) -> Tensor | None:
        """Scalar to add to the loss of a batch, or None."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters of the method's own, with their `lr`; trained by Adam without weight decay."""
        return []

    @property
    @abstractmethod
    def is_final(self) -> bool:
        """Whether the compressed structure is settled: a model is only "best" from here on."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Numbers for the training log."""

    @abstractmethod
    def settle(self) -> None:
        """Fix the compressed structure now, whatever the schedule says."""

    def detach(self) -> None:
        """Take the method off again: every weight is what the optimizer trained, unmasked."""
        for module in self.modules.values():
            weight = trained_weight(module).clone()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.get_parameter("weight").data.copy_(weight)
        self.modules, self.parametrizations = {}, {}

    def finalize(self) -> list[str]:
        """Bake the method into plain weights; returns the names of the parameters it compressed.

        `removed` then says how many more weights are gone altogether. Where several methods work on a model, all
        must `bake` before any does `remove`.
        """
        names = self.bake()
        self.remove()
        return names

    def remove(self) -> None:
        """Cut out of the model what baking left without use, if the method removes anything."""

    def bake(self) -> list[str]:
        """Leave plain weights in the place of the parametrized ones; returns the names of those compressed."""
        if not self.is_final:
            self.settle()
        for module in self.modules.values():
            with torch.no_grad():
                weight = effective_weight(module).clone()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            # A pruned weight is +0.0, never -0.0, so that packing loses no bit.
            module.get_parameter("weight").data.copy_(torch.where(weight == 0, torch.zeros_like(weight), weight))
        return [f"{name}.weight" for name in self.modules]

    def histogram(self) -> list[int] | None:
        """Counts of the mask values in `HISTOGRAM_BINS` bins from 0 to 1, for methods with soft masks."""
        return None

    def report(self) -> dict[str, Any]:
        """What was asked for and what was done, for the end of training and the model card."""
        requested = {name: value for name, value in asdict(self.config).items() if name.startswith("target_")}
        requested.pop("target_modules")
        return {"method": self.name, **requested, **self.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """State that is not in the model: JSON types only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def effective_weight(module: nn.Module) -> Tensor:
    """The weight the layer computes with, parametrizations applied."""
    return cast(Tensor, module.weight).detach()


def trained_weight(module: nn.Module) -> Tensor:
    """The weight the optimizer trains, before any parametrization."""
    return module.get_parameter("parametrizations.weight.original").detach()

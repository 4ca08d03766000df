"""Banks of templates: weights that several layers mix theirs from (Savarese and Maire, ICLR 2019).

The bank is one module, owned by the model (or, in a model with a head, by its base model) under `BANKS`. Layers refer
to it without owning it, so it is once in `state_dict`, `parameters` and everything built on them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from hf_approx.axes import AXES, Axes, axes_of
from hf_approx.modules.sharded import piece, whole
from hf_approx.targets import LATENTS, Target

BANKS = "hf_approx_banks"


class Template(nn.Module):
    """One weight of a bank; a module of its own, so that another method can mask or quantize it."""

    def __init__(self, weight: Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad)

    def forward(self) -> Tensor:
        """The weight. To be called, so that hooks run, such as those of accelerate that bring offloaded weights."""
        return cast(Tensor, self.weight)


class TemplateBank(nn.ModuleList):
    """Templates of equal shape.

    Args:
        templates: Their weights, at least one.
        requires_grad: Whether they are trained.

    Attributes:
        at_work: Whether a method mixes weights from it between steps of training; no layer refers to it then.
    """

    at_work = False

    def __init__(self, templates: Iterable[Tensor], requires_grad: bool = True) -> None:
        super().__init__(Template(weight, requires_grad) for weight in templates)

    @property
    def weights(self) -> list[Tensor]:
        """The templates, with whatever parametrization they have."""
        return [cast(Tensor, template.weight) for template in self]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each template and of every weight mixed from them."""
        return tuple(self.weights[0].shape)

    def lie_as(self, axes: Axes) -> None:
        """Note which dimensions the layers have that are mixed from the templates."""
        for template in self:
            setattr(template, AXES, axes)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of the templates, without the bank itself.

        Its name ends with that of the layers it is for, which PEFT's `modules_to_save` would take for one of them.
        """
        found = super().named_modules(memo, prefix, remove_duplicate)
        return ((name, module) for name, module in found if module is not self)

    def mix(self, coefficients: Tensor) -> Tensor:
        """sum_k coefficients[k] * templates[k], always added in this order: the same bits everywhere.

        Args:
            coefficients: Shape (templates,).

        Returns:
            Of templates that are split over processes the rows that this one holds.
        """
        device = coefficients.device
        factors, weights = coefficients.unbind(), [piece(template()) for template in self]
        mixed = factors[0] * weights[0].to(device)
        for factor, weight in zip(factors[1:], weights[1:], strict=True):
            mixed = torch.addcmul(mixed, factor, weight.to(device))
        return mixed


class Banks(nn.ModuleDict):
    """The banks of a model, by name. A copy of a model at work is an ordinary model, without those at work."""

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: bank for name, bank in self._modules.items() if not cast(TemplateBank, bank).at_work}
        return {**vars(self), "_modules": kept}


class SharedWeight(nn.Module):
    """The parametrization of a layer that shares: its trained tensor is the coefficients."""

    def __init__(self, bank: TemplateBank) -> None:
        super().__init__()
        self.use(bank)

    def use(self, bank: TemplateBank) -> None:
        """Mix from another bank from now on."""
        # In a tuple the bank is no submodule of the layer; deepcopy still follows it.
        self._bank = (bank,)

    @property
    def bank(self) -> TemplateBank:
        """Where the templates are."""
        return self._bank[0]

    def forward(self, coefficients: Tensor) -> Tensor:
        """(templates,) -> a weight."""
        return self.bank.mix(coefficients)


@dataclass
class SharedLayers:
    """A bank and who uses it.

    Attributes:
        bank: The templates.
        targets: What is mixed from them, by key, in the model's order.
    """

    bank: TemplateBank
    targets: dict[str, Target] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules that hold them."""
        return {key: target.module for key, target in self.targets.items()}

    @property
    def coefficients(self) -> Tensor:
        """Of every layer: shape (layers, templates)."""
        rows = [whole(coefficients_of(t.module, t.parameter)) for t in self.targets.values()]
        return torch.stack([row.to(rows[0].device) for row in rows])


class Sharing(Protocol):
    """How the weight of a layer is mixed: in its forward pass, or in training once a step."""

    @property
    def bank(self) -> TemplateBank:
        """Where the templates are."""
        ...


def sharing_of(module: nn.Module, parameter: str = "weight") -> Sharing | None:
    """How a parameter of a module is mixed, or None if the module has it as its own."""
    latent = (vars(module).get(LATENTS) or {}).get(parameter)
    if hasattr(latent, "bank"):
        return cast(Sharing, latent)
    if not parametrize.is_parametrized(module, parameter):
        return None
    first = cast(nn.ModuleDict, module.parametrizations)[parameter][0]  # type: ignore[index]
    return first if isinstance(first, SharedWeight) else None


def shared_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that are mixed."""
    names = [*(vars(module).get(LATENTS) or ())]
    if parametrize.is_parametrized(module):
        names += cast(nn.ModuleDict, module.parametrizations)
    return [name for name in names if sharing_of(module, name) is not None]


def coefficients_of(module: nn.Module, parameter: str = "weight") -> nn.Parameter:
    """The coefficients of a parameter that is mixed, of shape (templates,)."""
    latent = (vars(module).get(LATENTS) or {}).get(parameter)
    if hasattr(latent, "bank"):
        return cast(nn.Parameter, cast(Any, latent).weight)
    return module.get_parameter(f"parametrizations.{parameter}.original")


def name_of_coefficients(target: Target) -> str:
    """What a model whose weights are mixed in the forward pass calls the coefficients of one of them."""
    return f"{target.path}.parametrizations.{target.parameter}.original".lstrip(".")


def share(
    module: nn.Module,
    bank: TemplateBank,
    coefficients: Tensor,
    requires_grad: bool = True,
    parameter: str = "weight",
) -> None:
    """Give up a module's parameter, or its earlier coefficients, for a mix of the bank's templates."""
    own = nn.Parameter(coefficients.clone(memory_format=torch.contiguous_format), requires_grad)
    bank.lie_as(axes_of(module, parameter, len(bank.shape)))
    sharing = sharing_of(module, parameter)
    if isinstance(sharing, SharedWeight):
        sharing.use(bank)
        module.get_submodule(f"parametrizations.{parameter}").register_parameter("original", own)
        return
    first = not parametrize.is_parametrized(module)
    module.register_parameter(parameter, own)
    # "unsafe" skips the test that coefficients and weight have one shape; nothing else.
    parametrize.register_parametrization(module, parameter, SharedWeight(bank), unsafe=True)
    if first:
        _allow_copies(module)


def _allow_copies(module: nn.Module) -> None:
    """Let a module be pickled, which torch refuses if it is parametrized, and be copied without its bank."""
    made = cast(Any, type(module))  # torch makes a class for every module that it parametrizes
    copied = made.__deepcopy__

    def copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        alone = not memo
        for sharing in (sharing_of(self, name) for name in shared_parameters(self)):
            if alone and sharing is not None:
                # The layer alone is copied, as PEFT does: the copy mixes from the bank that the model has.
                memo[id(sharing.bank)] = sharing.bank
        return cast(nn.Module, copied(self, memo))

    made.__deepcopy__ = copy
    made.__reduce_ex__ = _reduce


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    names = tuple(cast(nn.ModuleDict, module.parametrizations))
    return _parametrized, (parametrize.type_before_parametrizations(module), names), module.__dict__


def _parametrized(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of that class with the named tensors parametrized, for unpickling to fill."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    _allow_copies(module)
    return module


def unshare(module: nn.Module, weight: Tensor | None = None, parameter: str = "weight") -> None:
    """Give the module a plain parameter of its own again: `weight`, by default what it mixes now."""
    dense = cast(Tensor, getattr(module, parameter)).detach().clone() if weight is None else weight
    others = [name for name in shared_parameters(module) if name != parameter]
    if len(cast(nn.ModuleDict, module.parametrizations)) > 1 + len(others):
        parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
    else:
        kept = [(cast(Sharing, sharing_of(module, n)).bank, coefficients_of(module, n), n) for n in others]
        # A copy of the model has the same class, from which remove_parametrizations would take the weight.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for bank, coefficients, name in kept:
            share(module, bank, coefficients.detach(), coefficients.requires_grad, name)
    module.register_parameter(parameter, nn.Parameter(dense))


def owner_of_banks(model: nn.Module) -> nn.Module:
    """Where a model keeps its banks: the base model, so that they are saved with it."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


def banks_of(model: nn.Module) -> dict[str, TemplateBank]:
    """The banks of a model, by name; adding to the result does not add to the model."""
    banks = getattr(owner_of_banks(model), BANKS, None)
    return {} if banks is None else dict(banks.items())


def set_banks(model: nn.Module, banks: dict[str, TemplateBank]) -> None:
    """Replace the banks of a model."""
    owner = owner_of_banks(model)
    if hasattr(owner, BANKS):
        delattr(owner, BANKS)
    if banks:
        owner.add_module(BANKS, Banks(banks))


def bank_prefix(model: nn.Module) -> str:
    """What the names of a model's banks start with, among its modules."""
    owner = owner_of_banks(model)
    name = next(name for name, module in model.named_modules() if module is owner)
    return f"{name}.{BANKS}." if name else f"{BANKS}."


def template_names(model: nn.Module) -> list[str]:
    """Names of the templates' weights, as parameters of the model; not of those mixed from other templates."""
    prefix = bank_prefix(model)
    return [
        f"{prefix}{name}.{k}.weight"
        for name, bank in banks_of(model).items()
        for k, template in enumerate(bank)
        if sharing_of(template) is None
    ]


def shared_layers(model: nn.Module) -> dict[str, SharedLayers]:
    """Every bank of a model with the layers that use it, by the bank's name."""
    found = {name: SharedLayers(bank) for name, bank in banks_of(model).items()}
    by_bank = {id(entry.bank): entry for entry in found.values()}
    for name, module in model.named_modules():
        for parameter in shared_parameters(module):
            target, sharing = Target(name, module, parameter), cast(Sharing, sharing_of(module, parameter))
            if id(sharing.bank) in by_bank:
                by_bank[id(sharing.bank)].targets[target.key] = target
    return found


def saved_weights(model: nn.Module) -> int:
    """How many weights fewer the banks have than the layers that are mixed from them."""
    return sum(
        (len(entry.targets) - len(entry.bank)) * entry.bank.weights[0].numel()
        for entry in shared_layers(model).values()
    )


def share_of(model: nn.Module, names: Iterable[str], removed: int = 0) -> float:
    """Which share of the weights and biases that a model had was compressed.

    Args:
        model: What is left.
        names: Parameters that were compressed; those that are mixed from templates now count as such.
        removed: How many weights more are gone altogether, beside those that are mixed from templates.
    """
    gone = removed + saved_weights(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    compressed = {id(params[name]): params[name].numel() for name in names if name in params}
    return (sum(compressed.values()) + gone) / max(sum(p.numel() for p in model.parameters()) + gone, 1)

"""Which modules a method works on, chosen by the conventions of PEFT."""

import re
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_approx.logs import get_logger

Patterns = str | Sequence[str] | None

DEFAULT_TYPES = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)
LATENTS = "hf_approx_latents"
"""Attribute of a module: what is trained in the place of its parameters, by parameter, while methods work on it."""
NOTABLE = 0.05
"""Share of the weights in blocks that may stay out of the default targets without a word."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A parameter that a method works on.

    Attributes:
        path: Name of the module in the model.
        module: That holds it.
        parameter: Its name there.
    """

    path: str
    module: nn.Module
    parameter: str = "weight"

    @property
    def name(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def value(self) -> nn.Parameter:
        """The parameter, as the model has it."""
        return self.module.get_parameter(self.parameter)


def matches(name: str, patterns: Patterns) -> bool:
    """A string is a regular expression for the whole name; a list holds whole names or their last parts."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def own_name(name: str, prefix: str, existing: Container[str]) -> str | None:
    """`name` as a model has it, or None: a base model lacks the prefix that a model with a head has."""
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in existing), None)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is one of PEFT, or has its adapters in it."""
    peft, tuners = sys.modules.get("peft"), sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or tuners is None:
        return False
    return any(isinstance(module, (peft.PeftModel, tuners.BaseTunerLayer)) for module in model.modules())


def refuse_adapters(model: nn.Module) -> None:
    """Raise `ValueError` for a model with adapters.

    Masks on adapters mean nothing, and what is learned about base weights that stay as they are would be lost: PEFT
    saves the adapters alone.
    """
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has PEFT adapters, and methods compress whole models: compress first and add "
            "adapters to the result, or compress what merge_and_unload() returns."
        )


def never_saved(model: nn.Module) -> set[str]:
    """Parameters that `save_pretrained` leaves out and a loaded model computes anew, such as tables of sines."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def select_modules(
    model: nn.Module, target_modules: Patterns = None, exclude: Patterns = None
) -> dict[str, nn.Module]:
    """The modules whose `weight` a method compresses, by name, in the model's order.

    Args:
        model: Any model.
        target_modules: A regular expression matched against the whole module name, or a list of names or
            name endings. Default: every linear and convolution layer inside the repeated blocks of the
            base model, so no embedding, norm, bias or output head. Of these, what cannot be a target is left out
            with a warning.
        exclude: Modules to leave out, in the same notation.

    Raises:
        ValueError: Nothing matches, or a matched module has no weight of two or more dimensions, or one that is
            empty, tied to another module's, computed from other parameters, or never saved.
    """
    computed = never_saved(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    users: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            users[id(param)] = users.get(id(param), 0) + 1

    selected, unfit = {}, {}
    for name, module in model.named_modules():
        if target_modules is None:
            default = isinstance(module, DEFAULT_TYPES) and module is not head and _in_block(model, name)
            chosen = default and f"{name}.weight" not in computed
        else:
            chosen = matches(name, target_modules)
        # A method's own modules are no targets of the next one.
        if not chosen or matches(name, exclude) or "parametrizations" in name.split("."):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.is_floating_point():
            if isinstance(target_modules, str) and next(module.children(), None) is not None:
                continue
            raise ValueError(f"'{name}' ({type(module).__name__}) has no weight of two or more dimensions.")
        problem = None
        if weight.numel() == 0:
            problem = f"The weight of '{name}' is empty; add '{name}' to exclude."
        elif _computes(module):
            problem = (
                f"'{name}' computes its weight from other parameters, as weight normalization does; add '{name}' to "
                "exclude, or remove that parametrization first."
            )
        elif users.get(id(weight), 1) > 1:
            problem = f"The weight of '{name}' is tied to another module's; add '{name}' to exclude, or untie it."
        elif f"{name}.weight" in computed:
            problem = (
                f"{type(model).__name__} computes the weight of '{name}', and transformers never saves it; add "
                f"'{name}' to exclude."
            )
        if problem is None:
            selected[name] = module
        elif target_modules is None:
            unfit[name] = problem
        else:
            raise ValueError(problem)
    if not selected:
        if unfit:
            raise ValueError(f"No layer of {type(model).__name__} can be compressed. {next(iter(unfit.values()))}")
        raise ValueError(
            f"No module of {type(model).__name__} matches target_modules={target_modules!r}; "
            "print(model) shows the names."
        )
    if target_modules is None:
        _tell_of_others(model, selected)
    if unfit:
        more = f" So are {len(unfit) - 1} others that cannot be targets." if len(unfit) > 1 else ""
        logger.warning("%s It is left as it is.%s", next(iter(unfit.values())), more)
    return selected


def select_targets(model: nn.Module, target_modules: Patterns = None, exclude: Patterns = None) -> dict[str, Target]:
    """The weights of `select_modules`, by the names of the modules."""
    return {name: Target(name, module) for name, module in select_modules(model, target_modules, exclude).items()}


def _computes(module: nn.Module) -> bool:
    """Whether the weight is computed by something that is not of this package: the model's own parametrization."""
    if "weight" in module._parameters:
        return False
    if not parametrize.is_parametrized(module, "weight"):
        return True
    parts = cast(nn.ModuleList, cast(nn.ModuleDict, module.parametrizations)["weight"])
    return any(not type(part).__module__.startswith(f"{__package__}.") for part in parts)


def _tell_of_others(model: nn.Module, selected: dict[str, nn.Module]) -> None:
    """Warn if much of the repeated blocks is in modules of other types, such as experts that share one parameter."""
    others: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, DEFAULT_TYPES) or "parametrizations" in name.split(".") or not _in_block(model, name):
            continue
        params = {key: param for key, param in module._parameters.items() if param is not None and param.dim() > 1}
        others.update({f"{name}.{key}": param.numel() for key, param in params.items()})
    chosen = sum(cast(Tensor, module.weight).numel() for module in selected.values())
    share = sum(others.values()) / max(sum(others.values()) + chosen, 1)
    if share > NOTABLE:
        logger.warning(
            "%.0f %% of the weights in the blocks of %s are in no linear or convolution layer and are not compressed, "
            "'%s' first.",
            100 * share,
            type(model).__name__,
            max(others, key=lambda name: others[name]),
        )


def _in_block(model: nn.Module, name: str) -> bool:
    """Inside the base model, under a numbered child of a list of layers."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        if not name.startswith(f"{prefix}."):
            return False
        name = name.removeprefix(f"{prefix}.")
    return any(part.isdigit() for part in name.split("."))

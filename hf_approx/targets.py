"""Which parameters a method works on, chosen by the conventions of PEFT."""

import re
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, cast, overload

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_approx.axes import Axes, Axis, axes_of, expert_parameters, is_router
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

    @staticmethod
    def of(model: nn.Module, name: str) -> "Target":
        """The parameter of that name in a model."""
        path, _, parameter = name.rpartition(".")
        return Target(path, model.get_submodule(path), parameter)

    @property
    def name(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def key(self) -> str:
        """What methods know it by: the name of the module if it is its `weight`, else that of the parameter."""
        return self.path if self.parameter == "weight" else self.name

    @property
    def called(self) -> str:
        """What begins a sentence about it."""
        return f"The weight of '{self.path}'" if self.parameter == "weight" else f"Parameter '{self.name}'"

    def is_one_of(self, modules: Patterns, parameters: Patterns) -> bool:
        """Whether its module or its own name matches."""
        return matches(self.path, modules) or matches(self.name, parameters)

    @property
    def value(self) -> nn.Parameter:
        """The parameter, as the model has it."""
        return self.module.get_parameter(self.parameter)

    @property
    def axes(self) -> Axes:
        """Its dimensions of outputs, inputs and experts."""
        return axes_of(self.module, self.parameter, getattr(self.module, self.parameter).dim())

    @overload
    def axis(self, kind: Literal["in", "out"]) -> int: ...

    @overload
    def axis(self, kind: Axis) -> int | None: ...

    def axis(self, kind: Axis) -> int | None:
        """The dimension that inputs, outputs or experts lie along; None: each entry is of all experts, or of none."""
        return dict(zip(("out", "in", "expert"), self.axes, strict=True))[kind]


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


def select_targets(
    model: nn.Module, target_modules: Patterns = None, exclude: Patterns = None, target_parameters: Patterns = None
) -> dict[str, Target]:
    """The parameters that a method compresses, by their keys, in the model's order.

    Args:
        model: Any model.
        target_modules: A regular expression matched against the whole module name, or a list of names or
            name endings: the `weight` of these modules, or what they hold of all experts. Default, without
            `target_parameters`: every linear and convolution layer and all experts inside the repeated blocks of
            the base model, so no embedding, norm, bias, router or output head. Of these, what cannot be a target
            is left out with a warning.
        exclude: Modules or parameters to leave out, in the same notation.
        target_parameters: Parameters, in the same notation; beside the modules, or without them alone.

    Raises:
        ValueError: Nothing matches, or what does has less than two dimensions, or is empty, tied to another
            parameter, computed from others, or never saved.
    """
    computed = never_saved(model)
    users: dict[int, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            users[id(param)] = users.get(id(param), 0) + 1

    default = target_modules is None and target_parameters is None
    if default:
        chosen = _defaults(model, computed)
    else:
        chosen = [*_of_modules(model, target_modules), *_of_names(model, target_parameters)]
    selected, unfit = {}, {}
    for target in chosen:
        if target.is_one_of(exclude, exclude):
            continue
        weight = getattr(target.module, target.parameter, None)
        if not _is_matrix(weight):
            what = f"'{target.path}' ({type(target.module).__name__}) has no weight"
            what = what if target.parameter == "weight" else f"'{target.name}' is no parameter"
            raise ValueError(f"{what} of two or more dimensions.")
        called, problem = target.called, None
        if weight.numel() == 0:
            problem = f"{called} is empty; add '{target.key}' to exclude."
        elif _computes(target):
            problem = (
                f"'{target.path}' computes its {target.parameter} from other parameters, as weight normalization "
                f"does; add '{target.key}' to exclude, or remove that parametrization first."
            )
        elif users.get(id(weight), 1) > 1:
            problem = f"{called} is tied to another module's; add '{target.key}' to exclude, or untie it."
        elif target.name in computed:
            problem = (
                f"{type(model).__name__} computes {called[0].lower()}{called[1:]}, and transformers never saves it; "
                f"add '{target.key}' to exclude."
            )
        if problem is None:
            selected[target.key] = target
        elif default:
            unfit[target.key] = problem
        else:
            raise ValueError(problem)
    if not selected:
        if unfit:
            raise ValueError(f"No layer of {type(model).__name__} can be compressed. {next(iter(unfit.values()))}")
        raise ValueError(
            f"No module of {type(model).__name__} matches target_modules={target_modules!r}; "
            "print(model) shows the names."
        )
    if default:
        _tell_of_others(model, selected)
    if unfit:
        more = f" So are {len(unfit) - 1} others that cannot be targets." if len(unfit) > 1 else ""
        logger.warning("%s It is left as it is.%s", next(iter(unfit.values())), more)
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(selected.items(), key=lambda item: places[item[1].path]))


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those of the model itself: a method's own modules are no targets of the next one."""
    return [(name, module) for name, module in model.named_modules() if "parametrizations" not in name.split(".")]


def _defaults(model: nn.Module, computed: Container[str]) -> list[Target]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    modules = dict(model.named_modules())
    found = []
    for path, module in _modules(model):
        if not _in_block(model, path):
            continue
        layer = isinstance(module, DEFAULT_TYPES) and module is not head and not is_router(path, modules)
        own = [Target(path, module, name) for name in (["weight"] if layer else expert_parameters(module))]
        found += [target for target in own if target.name not in computed]
    return found


def _of_modules(model: nn.Module, patterns: Patterns) -> list[Target]:
    found = []
    for path, module in _modules(model):
        if not matches(path, patterns):
            continue
        names = expert_parameters(module) or ["weight"]
        # A regular expression that is for what modules hold may well match those that hold it.
        holder = isinstance(patterns, str) and next(module.children(), None) is not None
        if not holder or _is_matrix(getattr(module, names[0], None)):
            found += [Target(path, module, name) for name in names]
    return found


def _of_names(model: nn.Module, patterns: Patterns) -> list[Target]:
    """The parameters of these names.

    Raises:
        ValueError: One of the patterns is for none.
    """
    own = [
        Target(path, module, name)
        for path, module in _modules(model)
        for name in (*module._parameters, *_parametrized(module))
    ]
    for pattern in [] if patterns is None else [patterns] if isinstance(patterns, str) else [[p] for p in patterns]:
        if not any(matches(target.name, pattern) for target in own):
            wanted = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(
                f"No parameter of {type(model).__name__} matches '{wanted}' of target_parameters; "
                "[name for name, _ in model.named_parameters()] shows the names."
            )
    return [target for target in own if matches(target.name, patterns)]


def _parametrized(module: nn.Module) -> list[str]:
    """Names of tensors that are computed in the place of parameters."""
    parts = getattr(module, "parametrizations", None)
    return list(parts) if isinstance(parts, nn.ModuleDict) else []


def _is_matrix(weight: object) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.dim() > 1 and weight.is_floating_point()


def _computes(target: Target) -> bool:
    """Whether it is computed by something that is not of this package: the model's own parametrization."""
    module, name = target.module, target.parameter
    if name in module._parameters:
        return False
    if not parametrize.is_parametrized(module, name):
        return True
    parts = cast(nn.ModuleList, cast(nn.ModuleDict, module.parametrizations)[name])
    return any(not type(part).__module__.startswith(f"{__package__}.") for part in parts)


def _tell_of_others(model: nn.Module, selected: Mapping[str, Target]) -> None:
    """Warn if much of the repeated blocks is in modules of other types, such as experts of an unknown kind."""
    others: dict[str, int] = {}
    for path, module in _modules(model):
        if isinstance(module, DEFAULT_TYPES) or not _in_block(model, path):
            continue
        for name, param in module._parameters.items():
            target = Target(path, module, name)
            if param is not None and param.dim() > 1 and target.key not in selected:
                others[target.name] = param.numel()
    # A weight that is mixed from templates is no parameter.
    chosen = sum(cast(Tensor, getattr(t.module, t.parameter)).numel() for t in selected.values())
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

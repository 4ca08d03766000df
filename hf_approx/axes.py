"""Which dimensions of a parameter are inputs, outputs and experts, and where a mixture has its experts and routers."""

from collections.abc import Mapping
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

Axis = Literal["in", "out", "expert"]
Axes = tuple[int, int, int | None]
"""Dimensions of outputs, of inputs, and of experts if there are any."""

AXES = "hf_approx_axes"
"""Attribute of a module whose one parameter is none of its own kind: the dimensions."""

EXPERTS = "Experts"
"""How the names of the classes end that hold the weights of all experts as one parameter."""
TRANSPOSED = ("Llama4TextExperts",)
"""Those of (experts, inputs, outputs); of others that are, transformers' decorator says so."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of what chooses among experts, beside them."""


def feature_dim(layer: nn.Module, axis: str) -> int:
    """The dimension of a layer's weight that its output or input features lie along.

    A lookup table's rows count as outputs.
    """
    return int((axis == "in") != isinstance(layer, (Conv1D, nn.modules.conv._ConvTransposeNd)))


def axes_of(module: nn.Module, parameter: str, dims: int) -> Axes:
    """The dimensions of a parameter.

    A `weight` is what it is in the layers of torch. Any other parameter, and what classes of experts hold, is one
    matrix (outputs, inputs) or one for each expert.

    Args:
        module: That holds it.
        parameter: Its name there.
        dims: How many dimensions it has.
    """
    said: Axes | None = getattr(module, AXES, None)
    if said is not None:
        return said
    experts = type(module).__name__.endswith(EXPERTS)
    if dims < 3 or (parameter == "weight" and not experts):
        own = parameter == "weight"
        return (feature_dim(module, "out"), feature_dim(module, "in"), None) if own else (0, 1, None)
    out, inputs = dims - 2, dims - 1
    if getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED):
        out, inputs = inputs, out
    return out, inputs, 0 if dims == 3 else None


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters of a module that hold matrices of all experts."""
    if not type(module).__name__.endswith(EXPERTS):
        return []
    own = module._parameters.items()
    return [name for name, param in own if param is not None and param.dim() == 3 and param.is_floating_point()]


def is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is what chooses among experts, or part of it.

    Args:
        name: Of the module.
        modules: Of the model, by name.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in ROUTERS:
            beside = modules[".".join(parts[:i])].named_children()
            if any("expert" in key or type(child).__name__.endswith(EXPERTS) for key, child in beside):
                return True
    return False

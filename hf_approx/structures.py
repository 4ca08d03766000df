"""Attention heads and feed-forward neurons: which weights of a transformers model stand or fall together."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_approx.axes import feature_dim
from hf_approx.packing import is_name, shown
from hf_approx.targets import Patterns, matches, own_name

Kind = Literal["head", "neuron"]

ATTENTION = (
    # producers with one section a head, producers shared by a group of heads, consumer, sections fused in one layer
    (("self.query",), ("self.key", "self.value"), "output.dense", 1),
    (("q_proj",), ("k_proj", "v_proj"), "o_proj", 1),
    (("q_proj",), ("k_proj", "v_proj"), "out_proj", 1),
    (("q_lin",), ("k_lin", "v_lin"), "out_lin", 1),
    (("c_attn",), (), "c_proj", 3),
)
FEED_FORWARD = (
    # producers, consumer, sections fused in one producer
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("intermediate.dense",), "output.dense", 1),
    (("fc1",), "fc2", 1),
    (("c_fc",), "c_proj", 1),
    (("lin1",), "lin2", 1),
    (("wi_0", "wi_1"), "wo", 1),
    (("wi",), "wo", 1),
)
HEAD_SIZE_NAMES = ("head_dim", "attention_head_size")
COUNT_NAMES = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "all_head_size", "split_size")
"""Attributes of attention modules that are proportional to the number of heads."""

OPTIONS: dict[Kind, tuple[str, ...]] = {
    "head": ("num_attention_heads", "num_key_value_heads"),
    "neuron": (
        "intermediate_size",
        "d_ff",
        "n_inner",
        "ffn_dim",
        "hidden_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
    ),
}
"""Options of a config for the number of units; transformers maps the first to an architecture's own name."""

WITH_HEADS = frozenset(
    ["bart", "bert", "distilbert", "gemma", "gpt2", "llama", "mistral", "opt", "qwen2", "qwen3", "roberta", "vit"]
)
ARCHITECTURES: dict[Kind, frozenset[str]] = {"head": WITH_HEADS, "neuron": WITH_HEADS | {"phi3", "t5"}}
"""Model types whose units are known to be where this module looks: the same layer names may hide another layout."""


@dataclass(frozen=True)
class Side:
    """The features of one layer that belong to the units of a structure.

    Attributes:
        module: Name of the layer.
        axis: `"out"`: features it computes; `"in"`: features it reads.
        width: Features a unit, next to each other.
        sections: How many times the sequence of units repeats, in layers that fuse several.
    """

    module: str
    axis: Literal["out", "in"]
    width: int
    sections: int = 1

    def kept(self, keep: Tensor) -> Tensor:
        """Positions of the features that belong to kept units; `keep` is a mask of shape (units,)."""
        return keep.repeat_interleave(self.width).repeat(self.sections).nonzero().reshape(-1)


@dataclass(frozen=True)
class Structure:
    """Units that can be removed one by one: the heads of an attention layer, or the neurons of a block.

    With grouped-query attention a unit is a key-value head with all its query heads.

    Attributes:
        kind: `"head"` or `"neuron"`.
        name: The module that holds the layers.
        units: How many there are.
        consumer: The layer that reads what the units compute; masking its input features turns units off.
        producers: The layers that compute it.
    """

    kind: Kind
    name: str
    units: int
    consumer: Side
    producers: tuple[Side, ...]

    @property
    def sides(self) -> tuple[Side, ...]:
        """All layers, producers first."""
        return (*self.producers, self.consumer)


def find_structures(
    model: nn.Module, kind: Kind, target_modules: Patterns = None, exclude: Patterns = None
) -> list[Structure]:
    """The heads or neurons of a model, in its order.

    Args:
        model: A transformers model of one of the `ARCHITECTURES`.
        kind: `"head"` or `"neuron"`.
        target_modules: Keep those whose name matches, in the notation of `select_targets`; the name is that
            of the attention module or of the module that holds the feed-forward layers.
        exclude: Leave out those whose name matches.

    Raises:
        ValueError: The architecture is another, or nothing matches.
    """
    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if model_type not in ARCHITECTURES[kind]:
        known_types = ", ".join(sorted(ARCHITECTURES[kind]))
        raise ValueError(f"hf_approx cannot remove {kind}s from '{model_type}' models, only from {known_types}.")
    found, known = [], []
    for name, module in model.named_modules():
        structure = _attention(name, module) if kind == "head" else _feed_forward(name, module)
        if structure is None:
            continue
        known.append(name)
        if (target_modules is None or matches(name, target_modules)) and not matches(name, exclude):
            found.append(structure)
    if not found:
        raise ValueError(
            f"No {kind}s of {type(model).__name__} match target_modules={target_modules!r}; they are in "
            f"{', '.join(known[:3])} and so on."
        )
    return found


def _layers(module: nn.Module, names: Sequence[str]) -> list[nn.Module] | None:
    """The named descendants, if all of them are there and linear."""
    layers: list[nn.Module] = []
    for name in names:
        layer: Any = module
        for part in name.split("."):
            layer = getattr(layer, part, None)
        if not isinstance(layer, (nn.Linear, Conv1D)):
            return None
        layers.append(layer)
    return layers


def _features(layer: nn.Module, axis: str) -> int:
    return cast(Tensor, layer.weight).shape[feature_dim(layer, axis)]


def _attention(name: str, module: nn.Module) -> Structure | None:
    size = _head_size(module)
    for queries, shared, consumer, sections in ATTENTION:
        layers = _layers(module, (*queries, *shared, consumer))
        if layers is None or size is None or hasattr(module, "q_attn"):
            continue
        # Heads that share keys and values go together, so the units are those of the layers with the fewest.
        units = min(_features(layer, "out") for layer in layers[:-1]) // (size * sections)
        path = f"{name}." if name else ""
        producers = tuple(
            Side(path + part, "out", _features(layer, "out") // (units * sections), sections)
            for part, layer in zip((*queries, *shared), layers[:-1], strict=True)
        )
        return Structure(
            "head", name, units, Side(path + consumer, "in", _features(layers[-1], "in") // units), producers
        )
    return None


def _head_size(module: nn.Module) -> int | None:
    for holder in (module, getattr(module, "self", None)):
        for name in HEAD_SIZE_NAMES:
            size = getattr(holder, name, None)
            if isinstance(size, int):
                return size
    return None


def _feed_forward(name: str, module: nn.Module) -> Structure | None:
    for producers, consumer, sections in FEED_FORWARD:
        layers = _layers(module, (*producers, consumer))
        if layers is None:
            continue
        units = _features(layers[-1], "in")
        if all(_features(layer, "out") == units * sections for layer in layers[:-1]):
            path = f"{name}." if name else ""
            sides = tuple(Side(path + part, "out", 1, sections) for part in producers)
            return Structure("neuron", name, units, Side(path + consumer, "in", 1), sides)
    return None


def remove_units(model: nn.Module, structure: Structure, keep: Tensor) -> int:
    """Cut the other units' features out of every layer: the model computes what it did if they were off.

    Args:
        model: The model `find_structures` was called on.
        structure: One of its results.
        keep: Mask of shape (units,), with at least one kept.

    Returns:
        How many weights and biases are gone.

    Raises:
        ValueError: Nothing would be left.
    """
    keep = keep.to(torch.bool)
    if not bool(keep.any()):
        raise ValueError(f"'{structure.name}' would lose all its units; keep at least one.")
    removed = sum(_cut(model.get_submodule(side.module), side.axis, side.kept(keep)) for side in structure.sides)
    if structure.kind == "head":
        for path, counts in _head_counts(model, structure).items():
            for name, count in counts.items():
                setattr(model.get_submodule(path), name, count * int(keep.sum()) // structure.units)
    return removed


def _head_counts(model: nn.Module, structure: Structure) -> dict[str, dict[str, int]]:
    """The attributes of the attention module that are proportional to the number of heads, by module."""
    found: dict[str, dict[str, int]] = {}
    module = model.get_submodule(structure.name)
    holders = {structure.name: module, f"{structure.name}.self".lstrip("."): getattr(module, "self", None)}
    for path, holder in holders.items():
        counts = {name: getattr(holder, name, None) for name in COUNT_NAMES}
        found[path] = {name: count for name, count in counts.items() if isinstance(count, int)}
    return {path: counts for path, counts in found.items() if counts}


def _cut(layer: nn.Module, axis: str, kept: Tensor) -> int:
    before = sum(param.numel() for param in layer.parameters())
    weight = layer.get_parameter("weight")
    resize(layer, {axis: len(kept)}, weight.detach().index_select(feature_dim(layer, axis), kept.to(weight.device)))
    bias = layer._parameters.get("bias")
    if axis == "out" and bias is not None:
        cut = bias.detach().index_select(0, kept.to(bias.device))
        layer.register_parameter("bias", nn.Parameter(cut, bias.requires_grad))
    return before - sum(param.numel() for param in layer.parameters())


def resize(layer: nn.Module, features: dict[str, int], weight: Tensor) -> None:
    """Give a linear layer a weight with other numbers of features."""
    layer.register_parameter("weight", nn.Parameter(weight, layer.get_parameter("weight").requires_grad))
    names = {"out": "nf", "in": "nx"} if isinstance(layer, Conv1D) else {"out": "out_features", "in": "in_features"}
    for axis, count in features.items():
        setattr(layer, names[axis], count)


def express_in_config(model: PreTrainedModel, structures: Sequence[Structure], kept: Sequence[int]) -> bool:
    """Change the model's config to describe what is left, if it can.

    It can where every layer keeps as many units as the others and the architecture has an option for their number
    that does not change the size of a head. Whether it does is not guessed: a model is built from the new config,
    without memory, and its shapes compared.

    Returns:
        Whether the config was changed.
    """
    shares = {(count, structure.units) for count, structure in zip(kept, structures, strict=True)}
    if len(shares) != 1:
        return False
    count, units = shares.pop()
    options = OPTIONS[structures[0].kind]
    try:
        changed = type(model.config).from_dict(model.config.to_dict())
        for option in options:
            value = getattr(changed, option, None)
            if isinstance(value, int):
                setattr(changed, option, value * count // units)
            elif option == "n_inner" and hasattr(changed, option):
                changed.n_inner = count
        changed = type(model.config).from_dict(changed.to_dict())  # what a config says is checked when it is read
        with torch.device("meta"):
            rebuilt = type(model)(changed)
    except Exception:  # whatever an architecture raises, it says that it has no such model
        return False
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if mine != {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}:
        return False
    for option in options:
        if hasattr(changed, option):
            setattr(model.config, option, getattr(changed, option))
    return True


def own_description(
    model: nn.Module, data: dict[str, Any], find: Callable[[str, Container[str]], str | None] | None = None
) -> dict[str, Any]:
    """The description under the names of this model. Names it does not have stay as they are.

    Args:
        model: Any model.
        data: As `describe` returns it.
        find: Gets a name and the names of the modules, returns which of these it means; default: `own_name`.

    Raises:
        ValueError: Two of its names are those of one layer.
    """
    names = {name for name, _ in model.named_modules()}
    count = len(data["shapes"]), len(data["attributes"])

    def own(name: str) -> str:
        found = find(name, names) if find else own_name(name, getattr(model, "base_model_prefix", ""), names)
        return found or name

    shapes = {}
    for name, shape in data["shapes"].items():
        layer, _, kind = name.rpartition(".")
        shapes[f"{own(layer)}.{kind}"] = shape
    attributes = {own(name): counts for name, counts in data["attributes"].items()}
    if (len(shapes), len(attributes)) != count:
        raise ValueError("The sizes of the layers (structure) in config.json name a layer twice.")
    return {"shapes": shapes, "attributes": attributes}


def current_description(model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    """The description of the layers that a model still has, with the sizes they have now; see `own_description`."""
    data = own_description(model, data)
    modules, params = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    return {
        "shapes": {name: list(params[name].shape) for name in data["shapes"] if name in params},
        "attributes": {
            name: {count: getattr(modules[name], count) for count in counts}
            for name, counts in data["attributes"].items()
            if name in modules
        },
    }


def describe(model: nn.Module, structures: Sequence[Structure]) -> dict[str, Any]:
    """What `apply_description` needs to give a new model of the same class the sizes of this one."""
    shapes, attributes = {}, {}
    for structure in structures:
        for side in structure.sides:
            layer = model.get_submodule(side.module)
            shapes.update({f"{side.module}.{name}": list(param.shape) for name, param in layer.named_parameters()})
        if structure.kind == "head":
            attributes.update(_head_counts(model, structure))
    return {"shapes": shapes, "attributes": attributes}


def check_description(data: Any) -> None:
    """Raise `ValueError` unless `data` could be a result of `describe`."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    good = isinstance(data, dict) and set(data) == {"shapes", "attributes"}
    good = good and all(isinstance(part, dict) and all(map(is_name, part)) for part in data.values())
    good = good and all(isinstance(s, list) and 0 < len(s) < 3 and all(map(whole, s)) for s in data["shapes"].values())
    for counts in data["attributes"].values() if good else ():
        good = (
            good and isinstance(counts, dict) and set(counts) <= set(COUNT_NAMES) and all(map(whole, counts.values()))
        )
    if not good:
        raise ValueError("The sizes of the layers (structure) in config.json are damaged.")


def apply_description(model: nn.Module, data: dict[str, Any]) -> None:
    """Give the layers of a model without data (on the meta device) the sizes of another's.

    Raises:
        ValueError: The description names a layer the model does not have, or one that would have to grow, or says
            more heads than it has.
    """
    modules = dict(model.named_modules())
    for name, shape in data["shapes"].items():
        path, _, kind = name.rpartition(".")
        layer = modules.get(path)
        old = layer._parameters.get(kind) if isinstance(layer, (nn.Linear, Conv1D)) else None
        if layer is None or old is None or len(shape) != old.dim():
            raise ValueError(f"The file describes the size of '{name}', which {type(model).__name__} does not have.")
        if any(new > size for new, size in zip(shape, old.shape, strict=True)):
            raise ValueError(f"The file says '{name}' has shape {shown(shape)}, larger than its {list(old.shape)}.")
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        if kind == "weight":
            resize(layer, {axis: shape[feature_dim(layer, axis)] for axis in ("out", "in")}, new)
        else:
            layer.register_parameter(kind, nn.Parameter(new, old.requires_grad))
    for path, counts in data["attributes"].items():
        for name, count in counts.items():
            old_count = getattr(modules.get(path), name, None)
            if not isinstance(old_count, int):
                raise ValueError(f"The file sets '{name}' of '{path}', which {type(model).__name__} does not have.")
            if count > old_count:
                raise ValueError(f"The file says that '{path}' has {name} = {shown(count)}, more than {old_count}.")
            setattr(modules[path], name, count)


NOTE = "_approx_structure"


def note_sizes(model: nn.Module, structures: Sequence[Structure]) -> None:
    """Leave the sizes of layers that the config cannot express on the model, for whoever saves it."""
    old = sizes_of(model) or {"shapes": {}, "attributes": {}}
    new = describe(model, structures)
    set_sizes(model, {key: {**old[key], **new[key]} for key in new})


def set_sizes(model: nn.Module, description: dict[str, Any]) -> None:
    """As `note_sizes`, for a description that was read."""
    setattr(model, NOTE, description)


def sizes_of(model: nn.Module) -> dict[str, Any] | None:
    """What `note_sizes` left, if anything."""
    return getattr(model, NOTE, None)

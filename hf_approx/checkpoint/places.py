"""Where the tensors of a packed file belong in the model that loads it, whatever class saved it."""

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_converters, apply_renamings

from hf_approx.modules.bank import BANKS, bank_prefix
from hf_approx.packing import PackedFormatError
from hf_approx.targets import own_name


class Names:
    """The names that a model has for what a file calls otherwise.

    A packed file uses the names of the class that saved it. Other classes of the architecture have the same names,
    have them with or without the base model's prefix, or have those that transformers' own renaming makes of them.

    If that leaves the base model without some of its parameters, and all of them are in the file below one module, and
    below no other, then it is that part of the model that was saved.

    Args:
        model: The model that loads the file.
        stored: Names of the tensors in the file.
    """

    def __init__(self, model: PreTrainedModel, stored: Collection[str]) -> None:
        self._model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        self._converters = [t for t in mapping if isinstance(t, WeightConverter)]
        self._part: tuple[str, str] | None = None
        existing = model.state_dict()
        found = {self.find(name, existing) for name in stored}
        if missing(model, existing, found - {None}):
            self._part = _part(model, existing, stored)

    def find(self, name: str, existing: Container[str]) -> str | None:
        """The name of the same parameter or module in the model, or None if it has no such part.

        Args:
            name: A name in the file.
            existing: Names in the model.
        """
        renamed = apply_renamings(name, self._renamings)
        prefix = self._model.base_model_prefix
        own = own_name(name, prefix, existing) or own_name(renamed, prefix, existing)
        if self._part is not None:
            front, inner = self._part
            if name.startswith(front):
                own = own if (own := inner + name.removeprefix(front)) in existing else None
            elif own is not None and own.startswith(inner):
                own = None  # of another part
        _, bank, rest = f".{name}".partition(f".{BANKS}.")
        if own is None and bank and bank_prefix(self._model) + rest in existing:
            own = bank_prefix(self._model) + rest
        return own

    def joined(self, name: str, existing: Container[str]) -> str | None:
        """The parameter that transformers makes of this tensor and others, such as those of other experts, or None."""
        made, pattern = apply_converters(apply_renamings(name, self._renamings), self._converters)
        return None if pattern is None else own_name(made, self._model.base_model_prefix, existing)


def base_prefix(model: PreTrainedModel) -> str:
    """What the names of the base model's parameters start with."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def missing(model: PreTrainedModel, existing: Iterable[str], filled: Container[str | None]) -> list[str]:
    """The parameters and buffers of the base model that would start random."""
    tied, prefix = model.all_tied_weights_keys, base_prefix(model)
    return [n for n in existing if n.startswith(prefix) and n not in filled and tied.get(n) not in filled]


def _part(model: PreTrainedModel, existing: Collection[str], stored: Collection[str]) -> tuple[str, str] | None:
    """What the file has in front of all names of the base model, and what the model has there; None if it is unclear.

    Not every class names its base model by its prefix: then it is the only model within it.
    """
    tied = model.all_tied_weights_keys
    within = [f"{name}." for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    for inner in (base_prefix(model), *(within if len(within) == 1 else ())):
        bare = [name.removeprefix(inner) for name in existing if name.startswith(inner) and name not in tied]
        fronts = [name.removesuffix(bare[0]) for name in stored if bare and f".{name}".endswith(f".{bare[0]}")]
        fronts = [front for front in fronts if all(front + name in stored for name in bare)]
        if len(fronts) == 1:
            return fronts[0], inner
    return None


def places(stored: Collection[str], packed: Container[str], model: PreTrainedModel, names: Names) -> dict[str, str]:
    """The parameter or buffer that each tensor of the files is for; those for parts the model lacks are left out.

    Args:
        stored: Names of their tensors.
        packed: Names of the tensors that are packed. If such a weight is tied, its parameter is the one that
            transformers writes.
        model: The model that loads the file, with its banks.
        names: Of this model.

    Raises:
        PackedFormatError: A packed tensor has no place although this class saved it, or parameters would start random
            because neither hf_approx nor transformers knows what the file calls them.
    """
    existing = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    own = {name: found for name in stored if (found := names.find(name, existing)) is not None}
    own = {name: tied.get(found, found) if name in packed else found for name, found in own.items()}
    unplaced = sorted(set(stored) - set(own))
    lost = [name for name in unplaced if name in packed]
    if lost and type(model).__name__ in (model.config.architectures or ()):
        raise PackedFormatError(f"Packed weight '{lost[0]}' does not exist in {type(model).__name__}.")
    homes: dict[str, str] = {}
    for name in sorted(name for name in own if name in packed):
        other = homes.setdefault(own[name], name)
        if other != name:
            raise PackedFormatError(f"Packed weights '{other}' and '{name}' are both '{own[name]}'.")
    _refuse_lost(model, existing, unplaced, set(own.values()))
    return own


def _refuse_lost(
    model: PreTrainedModel, existing: Mapping[str, Any], unplaced: Collection[str], filled: Collection[str]
) -> None:
    """Raise unless all that found no place is of parts the model does not have.

    New heads and parts of their own are what loading with another class is for. But a file with blocks that the model
    does not have and a base model with blocks that the file does not have are the same blocks under two names, and so
    are a tensor and a parameter whose names differ by what is in front.
    """
    prefix = base_prefix(model)
    ends = {name[i:]: name for name in unplaced for i in range(len(name)) if i == 0 or name[i - 1] == "."}
    block = next((name for name in unplaced if _in_block(name)), None)
    for own in missing(model, existing, filled):
        name = ends.get(own.removeprefix(prefix), block if _in_block(own) else None)
        if name is not None:
            raise PackedFormatError(
                f"{type(model).__name__} has '{own}', the file has '{name}', and nothing says where they belong. Load "
                f"{', '.join(model.config.architectures or ['the class that was saved'])} and take the part you need "
                "from it."
            )


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


class Placing(WeightRenaming):
    """The renaming that transformers applies to the names in a packed file.

    Args:
        to: Names in the model by name in the file; others stay.
    """

    def __init__(self, to: Mapping[str, str]) -> None:
        super().__init__("", "")
        self._to = to

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in the model, and no pattern: nothing is undone when the model is saved."""
        return self._to.get(source_key, source_key), None

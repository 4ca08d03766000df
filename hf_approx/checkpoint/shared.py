"""Shared weights in a checkpoint: coefficients under the weight's own name, templates under the bank's."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_approx.checkpoint.places import Names
from hf_approx.modules.bank import (
    BANKS,
    TemplateBank,
    bank_prefix,
    banks_of,
    coefficients_of,
    name_of_coefficients,
    set_banks,
    share,
    shared_layers,
    unshare,
)
from hf_approx.packing import PackedFormatError, SharedSpec, TensorSpec, pack_shared, unpack_shared
from hf_approx.targets import Target


def install_banks(model: PreTrainedModel, tensors: Mapping[str, TensorSpec], names: Names) -> None:
    """Give the model the empty banks that its own layers need, for transformers to load the templates into.

    Args:
        model: A model before its weights are loaded.
        tensors: The entries of a config. Banks that only layers of another class use (a decoder's) are left out.
        names: Of this model.

    Raises:
        PackedFormatError: Entries of one bank contradict each other.
    """
    entries = {name: spec for name, spec in tensors.items() if isinstance(spec, SharedSpec)}
    banks: dict[str, SharedSpec] = {}
    for name, spec in entries.items():
        first = banks.setdefault(spec.bank, spec)
        if (first.shape, first.templates) != (spec.shape, spec.templates):
            raise PackedFormatError(f"Packed weight '{name}' does not fit the other layers of bank '{spec.bank}'.")
    params = dict(model.named_parameters(remove_duplicate=False))
    # A template can itself be mixed from another bank: those who use a bank are known once it is.
    dtypes: dict[str, torch.dtype] = {}
    known = -1
    while known < len(dtypes):
        known = len(dtypes)
        for name, spec in entries.items():
            own, holder = names.find(name, params), _bank_of_template(name)
            if own is not None:
                dtypes.setdefault(spec.bank, params[own].dtype)
            elif holder in dtypes:
                dtypes.setdefault(spec.bank, dtypes[holder])
    set_banks(
        model,
        {
            bank: TemplateBank(
                torch.empty(spec.shape, dtype=dtypes[bank], device="meta") for _ in range(spec.templates)
            )
            for bank, spec in banks.items()
            if bank in dtypes
        },
    )


def _bank_of_template(name: str) -> str | None:
    """The bank whose template the parameter is, if it is one."""
    _, found, rest = f".{name}".partition(f".{BANKS}.")
    return rest.split(".")[0] if found else None


def install_shared(model: PreTrainedModel, name: str, spec: SharedSpec, packed: Tensor, dtype: torch.dtype) -> None:
    """Mix the named weight from its bank, with the coefficients in the row of bytes.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    target = Target.of(model, name)
    coefficients = unpack_shared(packed, spec, dtype)
    share(target.module, banks_of(model)[spec.bank], coefficients, parameter=target.parameter)


def pack_sharing(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, tuple[str, Tensor, SharedSpec]]:
    """How to store every shared weight of a model.

    Args:
        model: Any model.
        dtype: Of the stored coefficients, or None for their own.

    Returns:
        By the name that the coefficients have in `state_dict`: the name of the weight, its bytes, and their spec.
    """
    packed = {}
    for bank, entry in shared_layers(model).items():
        for target in entry.targets.values():
            coefficients = coefficients_of(target.module, target.parameter)
            row, spec = pack_shared(coefficients, entry.bank.shape, bank, dtype)
            packed[name_of_coefficients(target)] = (target.name, row, spec)
    return packed


def materialize_shared(model: PreTrainedModel) -> None:
    """Give every layer a plain weight of its own, equal to the one it mixed, and remove the banks."""
    prefix = bank_prefix(model)
    for entry in shared_layers(model).values():
        for target in entry.targets.values():
            if not target.name.startswith(prefix):
                unshare(target.module, parameter=target.parameter)
    set_banks(model, {})

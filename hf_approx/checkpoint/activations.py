"""Quantized inputs of layers: what `config.json` says about them, and how a loaded model gets them back."""

from collections.abc import Container
from typing import Any

from transformers import PreTrainedModel

from hf_approx.checkpoint.places import Names
from hf_approx.modules.activation import ActivationQuantizer, install
from hf_approx.packing import PackedFormatError

MAX_CHANNELS = 1 << 24


def activations_of(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The arguments of every quantizer of a layer's input, by the name of the layer."""
    return {
        name.removesuffix(".input_quantizer"): {"channels": module.channels, "signed": module.signed}
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def check_activations(data: Any) -> None:
    """Raise `PackedFormatError` unless the data is of the form that `activations_of` returns."""
    if not isinstance(data, dict):
        raise PackedFormatError("ApproxConfig: activations must map module names to entries.")
    for name, entry in data.items():
        if not isinstance(entry, dict) or set(entry) != {"channels", "signed"}:
            raise PackedFormatError(f"Activations of '{name}': the entry must have the fields channels, signed.")
        channels, signed = entry["channels"], entry["signed"]
        if type(channels) is not int or not 1 <= channels <= MAX_CHANNELS or type(signed) is not bool:
            raise PackedFormatError(
                f"Activations of '{name}': channels is {channels!r} and signed is {signed!r}, expected a positive "
                "integer and true or false."
            )


def check_buffers(data: dict[str, dict[str, Any]], stored: Container[str]) -> None:
    """Raise `PackedFormatError` unless bits and limits of every entry are among the stored tensors."""
    for name in data:
        for buffer in ("bits", "limit"):
            if f"{name}.input_quantizer.{buffer}" not in stored:
                raise PackedFormatError(f"The {buffer} of the activations of '{name}' are in no weight file.")


def install_activations(model: PreTrainedModel, data: dict[str, dict[str, Any]], names: Names) -> None:
    """Give the layers their quantizers; their numbers are loaded like any other tensors.

    Entries for layers that a model of another class than the saved one does not have are left out.

    Raises:
        PackedFormatError: The model has no such layer.
    """
    modules = dict(model.named_modules())
    for name, entry in data.items():
        found = names.find(name, modules)
        if found is not None:
            install(modules[found], ActivationQuantizer(entry["channels"], entry["signed"]))
        elif type(model).__name__ in (model.config.architectures or ()):
            raise PackedFormatError(f"Activations of '{name}': {type(model).__name__} has no such module.")


def check_loaded(model: PreTrainedModel) -> None:
    """Raise `PackedFormatError` if a number of bits or a limit that was read is negative or not finite."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            for values in (module.bits, module.limit):
                if not bool((values.isfinite() & (values >= 0)).all()):
                    raise PackedFormatError(f"'{name}' has bits or limits that are negative or not finite.")

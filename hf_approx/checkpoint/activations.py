"""Quantized inputs of layers: what `config.json` says about them, and how a loaded model gets them back."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_approx.checkpoint.places import Names
from hf_approx.modules.activation import NAME, ActivationQuantizer, input_channels, install
from hf_approx.packing import PackedFormatError, check_name, shown

MAX_CHANNELS = 1 << 24
FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of numbers, in the notation of safetensors."""


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
        check_name(name)
        if not isinstance(entry, dict) or set(entry) != {"channels", "signed"}:
            raise PackedFormatError(f"Activations of '{name}': the entry must have the fields channels, signed.")
        channels, signed = entry["channels"], entry["signed"]
        if type(channels) is not int or not 1 <= channels <= MAX_CHANNELS or type(signed) is not bool:
            raise PackedFormatError(
                f"Activations of '{name}': channels is {shown(channels)} and signed is {shown(signed)}, expected a "
                "positive integer and true or false."
            )


def check_buffers(data: dict[str, dict[str, Any]], stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `PackedFormatError` unless bits and limits of every entry are among the stored tensors.

    Args:
        data: As `activations_of` returns it.
        stored: Dtype (in safetensors' notation) and shape of every stored tensor, by name.
    """
    for name, entry in data.items():
        for buffer in ("bits", "limit"):
            dtype, shape = stored.get(f"{name}.input_quantizer.{buffer}", (None, ()))
            if dtype is None:
                raise PackedFormatError(f"The {buffer} of the activations of '{name}' are in no weight file.")
            if dtype not in FLOATS or shape != (entry["channels"],):
                raise PackedFormatError(
                    f"The {buffer} of the activations of '{name}' should be {entry['channels']} numbers, the file "
                    f"holds {dtype} {list(shape)}."
                )


def install_activations(model: PreTrainedModel, data: dict[str, dict[str, Any]], names: Names) -> None:
    """Give the layers their quantizers; their numbers are loaded like any other tensors.

    Entries for layers that a model of another class than the saved one does not have are left out.

    Raises:
        PackedFormatError: The model has no such layer, or it has other channels; or a layer has two entries.
    """
    modules = dict(model.named_modules())
    for name, entry in data.items():
        found = names.find(name, modules)
        if found is not None:
            channels = input_channels(modules[found])
            if channels is None:
                raise PackedFormatError(
                    f"Activations of '{name}': it is a {type(modules[found]).__name__}, whose input is not quantized."
                )
            if entry["channels"] not in (1, channels):
                raise PackedFormatError(
                    f"Activations of '{name}': the file says {entry['channels']} channels, the layer has {channels}."
                )
            if hasattr(modules[found], NAME):
                raise PackedFormatError(f"Activations of '{name}': the layer has two entries.")
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

"""Checksums of a packed checkpoint: of every packed weight with its entry, of every other tensor, and of the config.

They find damage, and files that do not belong together; they are no signature.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

FIELD = "checksum"
"""Name of the config's own checksum."""


def checksum(data: Any) -> int:
    """CRC-32 of JSON data: of its shortest form, with sorted keys."""
    return zlib.crc32(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def config_checksum(data: Mapping[str, Any]) -> int:
    """Of the whole packing part of a config but its own checksum."""
    return checksum({name: value for name, value in data.items() if name != FIELD})


def entry_checksum(name: str, entry: Mapping[str, Any], of_bytes: int) -> int:
    """Of a packed weight: of its bytes, its name and all fields of its entry.

    Exclusive or takes the part of name and fields out again, so the same function gives the checksum of the bytes
    back.

    Args:
        name: The weight's.
        entry: As in the config; its own `crc32` does not count.
        of_bytes: CRC-32 of the bytes.
    """
    return of_bytes ^ checksum([name, {field: value for field, value in entry.items() if field != "crc32"}])


def tensor_checksum(name: str, tensor: Tensor) -> int:
    """Of a tensor that is stored as it is: of its bytes, name, dtype and shape."""
    data = tensor.detach().contiguous().to("cpu").reshape(-1)
    of_bytes = zlib.crc32(data.view(torch.uint8).numpy().data) if data.numel() else 0
    return of_bytes ^ checksum([name, str(tensor.dtype), list(tensor.shape)])


def seal(
    model: PreTrainedModel, state: dict[str, Tensor], packed: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What `save_pretrained` will write of a state, and the checksums of its plain tensors.

    Args:
        model: The model that is saved.
        state: All its tensors as they are to be stored.
        packed: The names of the packed ones.

    Returns:
        The state without what transformers never writes: further names of tied tensors, and tensors the model
        computes anew; and the checksums by name.
    """
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return state, {name: tensor_checksum(name, tensor) for name, tensor in state.items() if name not in packed}

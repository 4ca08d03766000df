"""Transformer blocks: where a transformers model lists them, and how to take some out of it for good."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.structures import set_sizes, sizes_of
from hf_approx.targets import Patterns, matches

LISTS: dict[str, dict[str, str]] = {
    "bart": {"encoder.layers": "encoder_layers", "decoder.layers": "decoder_layers"},
    "bert": {"encoder.layer": "num_hidden_layers"},
    "distilbert": {"transformer.layer": "num_hidden_layers"},
    "gemma": {"layers": "num_hidden_layers"},
    "gpt2": {"h": "num_hidden_layers"},
    "llama": {"layers": "num_hidden_layers"},
    "mistral": {"layers": "num_hidden_layers"},
    "opt": {"decoder.layers": "num_hidden_layers"},
    "qwen2": {"layers": "num_hidden_layers"},
    "qwen3": {"layers": "num_hidden_layers"},
    "roberta": {"encoder.layer": "num_hidden_layers"},
    "vit": {"layers": "num_hidden_layers", "encoder.layer": "num_hidden_layers"},
}
"""By model type, the lists a base model may hold its blocks in, and the option of the config that counts them.

Every block of these takes hidden states and returns hidden states of the same shape, and none needs another. That is
not so everywhere: T5's first block computes the position bias of all the others.
"""

PER_BLOCK_OPTIONS = ("layer_types",)
"""Options of a config that hold one entry a block."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks of a model.

    Attributes:
        name: The `ModuleList`.
        units: How many there are.
        option: The option of the config that says so.
    """

    name: str
    units: int
    option: str


def find_blocks(model: nn.Module, target_modules: Patterns = None, exclude: Patterns = None) -> list[Blocks]:
    """The lists of blocks of a model, encoder first.

    Args:
        model: A transformers model of one of the types in `LISTS`.
        target_modules: Keep the lists whose name matches, in the notation of `select_targets`.
        exclude: Leave out those whose name matches.

    Raises:
        ValueError: The architecture is another or its blocks depend on their position, or nothing matches.
    """
    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if not isinstance(model, PreTrainedModel) or model_type not in LISTS:
        raise ValueError(
            f"hf_approx cannot remove layers from '{model_type}' models, only from {', '.join(sorted(LISTS))}."
        )
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(
            "Layers of a model with scale_attn_by_inverse_layer_idx cannot be removed: the others would change place."
        )
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    known = []
    for path, option in LISTS[model_type].items():
        layers = modules.get(base + path)
        if isinstance(layers, nn.ModuleList) and len(layers) == getattr(model.config, option):
            known.append(Blocks(base + path, len(layers), option))
    chosen = [b for b in known if target_modules is None or matches(b.name, target_modules)]
    found = [b for b in chosen if not matches(b.name, exclude)]
    if not found:
        raise ValueError(
            f"No list of layers of {type(model).__name__} matches target_modules={target_modules!r}; "
            f"it has {' and '.join(b.name for b in known) or 'none'}."
        )
    return found


def weights_of(model: nn.Module, blocks: Blocks) -> list[str]:
    """Names of the matrices in the blocks."""
    modules = model.get_submodule(blocks.name).named_modules(prefix=blocks.name)
    weights = {f"{path}.weight": getattr(module, "weight", None) for path, module in modules}
    return [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() > 1]


def block_sizes(blocks: nn.ModuleList) -> Tensor:
    """Mean magnitude of the parameters of each block, shape (blocks,), in float32 or wider, where the first one is."""
    like = next(blocks.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    vectors = [nn.utils.parameters_to_vector(block.parameters()).detach() for block in blocks]
    return torch.stack([vector.abs().mean(dtype=dtype) for vector in vectors]).to(like.device)


Moves = Mapping[str, str | None]
"""The new name of each block, by its old one; None: it is gone."""


def remove_blocks(model: PreTrainedModel, blocks: Blocks, keep: Sequence[bool]) -> tuple[int, Moves]:
    """Take the other blocks out: what is left is what the model's class builds from the config this changes.

    The rest moves up: attention layers get the number under which they find their part of the cache, options with
    an entry a block lose those of the removed ones, and sizes noted on the model go by the new names.

    Args:
        model: The model `find_blocks` was called on.
        blocks: One of its results.
        keep: Which blocks stay, at least one.

    Returns:
        How many weights and biases are gone, and where the blocks are now.

    Raises:
        ValueError: Nothing would be left.
    """
    if not any(keep):
        raise ValueError(f"'{blocks.name}' would lose all its layers; keep at least one.")
    layers = model.get_submodule(blocks.name)
    assert isinstance(layers, nn.ModuleList)
    kept = [i for i in range(blocks.units) if keep[i]]
    gone = [i for i in range(blocks.units) if not keep[i]]
    removed = sum(param.numel() for i in gone for param in layers[i].parameters())
    for i in reversed(gone):
        del layers[i]
    for i, block in enumerate(layers):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # type: ignore[assignment]
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for config in {id(part.config): part.config for part in parts}.values():
        setattr(config, blocks.option, len(kept))
        for name in PER_BLOCK_OPTIONS:
            entries = getattr(config, name, None)
            if isinstance(entries, list) and len(entries) == blocks.units:
                setattr(config, name, [entries[i] for i in kept])
    moves: dict[str, str | None] = {f"{blocks.name}.{i}": None for i in gone}
    moves |= {f"{blocks.name}.{old}": f"{blocks.name}.{new}" for new, old in enumerate(kept)}
    sizes = sizes_of(model)
    if sizes is not None:
        renamed = {
            part: {new: value for old, value in entries.items() if (new := moved(old, moves)) is not None}
            for part, entries in sizes.items()
        }
        set_sizes(model, renamed)
    return removed, moves


def moved(name: str, moves: Moves) -> str | None:
    """The name of a module or parameter after the moves, or None if it is gone."""
    for old, new in moves.items():
        if name == old or name.startswith(f"{old}."):
            return None if new is None else new + name.removeprefix(old)
    return name

"""Making a model in memory one that saves packed."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.checkpoint.activations import activations_of
from hf_approx.checkpoint.changes import warn_of_changes
from hf_approx.checkpoint.config import QUANT_METHOD, ApproxConfig
from hf_approx.checkpoint.quantizer import ApproxQuantizer
from hf_approx.checkpoint.shared import pack_sharing
from hf_approx.checkpoint.stored import is_rounded, overflowing
from hf_approx.checkpoint.zeros import keep_zeros
from hf_approx.finite import refuse_not_finite
from hf_approx.packing import (
    Grid,
    SharedSpec,
    TensorSpec,
    check_grid,
    dtype_from_name,
    expand,
    may_gain,
    pack,
    pack_quantized,
    round_to_grid,
)
from hf_approx.structures import current_description, sizes_of
from hf_approx.targets import never_saved, refuse_adapters


def attach_packing(
    model: PreTrainedModel,
    names: Iterable[str],
    store_dtype: str | None = "float16",
    grids: Mapping[str, Grid] | None = None,
) -> dict[str, TensorSpec]:
    """Make `model.save_pretrained` write the named weights packed; the model in memory equals what is saved.

    Weights with a grid are rounded to it, every other floating-point parameter to `store_dtype`, in place (their own
    dtype stays), so the loaded model computes bit for bit what this one does. Weights with a grid are always packed,
    others if they get smaller; if none is, and the model's config says the sizes of all its layers, the model is left
    alone and saves plain. Quantized activations and shared weights the model has are saved with it, and what was
    packed or quantized stays so, but for weights that left their grids since (see `hf_approx.checkpoint.changes`).

    Args:
        model: A model whose weights are final.
        names: Names of the parameters to pack, as in `named_parameters()`.
        store_dtype: `"float16"`, `"bfloat16"`, `"float32"` or None to keep each parameter's own.
        grids: The grids of quantized weights, by parameter name; these weights need not be in `names`.

    Returns:
        How each packed weight is stored.

    Raises:
        ValueError: The model is no `PreTrainedModel`, a name is no parameter, a value overflows the stored dtype, a
            grid does not fit its weight, a weight is NaN or infinite, or the model has PEFT adapters. The model is
            unchanged.
    """
    refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"attach_packing: {type(model).__name__} is no PreTrainedModel; pass the transformers model whose "
            "save_pretrained is to write packed weights."
        )
    params = dict(model.named_parameters(remove_duplicate=False))
    quantizer = getattr(model, "hf_quantizer", None)
    kept: dict[str, Grid] = {}
    others: list[str] = []
    if isinstance(quantizer, ApproxQuantizer):
        packed = quantizer.quantization_config.tensors
        names = [*names, *(n for n, spec in packed.items() if n in params and not isinstance(spec, SharedSpec))]
        kept, left = quantizer.sort_grids(model)
        kept = {name: grid for name, grid in kept.items() if name not in (grids or {})}
        others = [name for name in left if name not in (grids or {})]
        grids = {**kept, **(grids or {})}
    names = [*names, *(grids or {})]
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(f"attach_packing: {type(model).__name__} has no parameter '{unknown[0]}'.")
    other = [name for name in names if not is_rounded(params[name])]
    if other:
        kind = str(params[other[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"attach_packing: '{other[0]}' is {kind}, which is not packed; leave it out, and it is stored as it is."
        )
    computed = never_saved(model)
    lost = [name for name in names if name in computed]
    if lost:
        raise ValueError(
            f"attach_packing: transformers never saves '{lost[0]}', {type(model).__name__} computes it; leave it out."
        )
    refuse_not_finite("attach_packing", model)
    dtype = dtype_from_name(store_dtype) if store_dtype else None
    tied = model.all_tied_weights_keys
    own_grids = {tied.get(name, name): Grid(g.bits.cpu(), g.scale.cpu()) for name, g in (grids or {}).items()}
    if len(own_grids) < len(grids or {}):
        raise ValueError("attach_packing: two names of one tied weight have a grid each; pass one of them.")
    on_grids = {id(params[name]) for name in own_grids}
    rest = {n: p for n, p in params.items() if id(p) not in on_grids and is_rounded(p) and n not in computed}
    large = None if dtype is None else overflowing(rest, dtype)
    if large is not None:
        raise ValueError(
            f"attach_packing: '{large}' has a value that does not fit {store_dtype}; pass store_dtype='bfloat16', or "
            "None to store every weight in its own dtype."
        )
    # All values are known before any is written, in the dtype they are stored in and only if they are others.
    new: dict[int, tuple[nn.Parameter, Tensor]] = {}
    seen: set[int] = set()
    specs: dict[str, TensorSpec] = {}
    wanted = list(dict.fromkeys(tied.get(name, name) for name in names))
    for name in dict.fromkeys([*own_grids, *wanted, *params]):
        param = params[name]
        if id(param) in seen or not is_rounded(param) or name in computed:
            continue
        seen.add(id(param))
        if name in own_grids:
            value = _on_grid(name, param.detach(), own_grids[name])
            specs[name] = pack_quantized(value, own_grids[name], dtype)[1]
        else:
            value = param.detach() if dtype is None else param.detach().to(dtype)
            value = value.masked_fill(value == 0, 0)
            if name in wanted and may_gain(value, dtype):
                spec = pack(value, dtype)[1]
                if spec.nbytes < spec.dense_bytes:
                    specs[name] = spec
        if not _same_bits(value, param.detach()):
            new[id(param)] = (param, value)
    specs = {name: specs[name] for name in wanted if name in specs}
    specs.update((name, spec) for name, _, spec in pack_sharing(model, dtype).values())
    structure, activations = sizes_of(model), activations_of(model)
    structure = None if structure is None else current_description(model, structure)
    if not specs and structure is None and not activations:
        return {}
    config = ApproxConfig(tensors=specs, store_dtype=store_dtype, structure=structure, activations=activations)
    moved = [
        name for name in kept if id(params[name]) in new and not torch.equal(params[name], new[id(params[name])][1])
    ]
    warn_of_changes([], moved, others)
    with torch.no_grad():
        for param, value in new.values():
            param.copy_(value)
    model.config.quantization_config = config
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    ApproxQuantizer(config, own_grids, pre_quantized=True).settle(model)
    keep_zeros(model)
    return specs


def _same_bits(value: Tensor, param: Tensor) -> bool:
    """Whether values, maybe in a narrower dtype, are those of a parameter, to the sign of a zero."""
    zeros = (param == 0) & param.signbit()
    return not bool(zeros.any()) and torch.equal(value.to(param.dtype), param)


def _on_grid(name: str, weight: Tensor, grid: Grid) -> Tensor:
    """The weight rounded to its grid; raises `ValueError` if its dtype cannot hold the grid's values."""
    try:
        check_grid(weight, grid)
    except ValueError as error:
        raise ValueError(f"attach_packing: '{name}': {error}") from None
    there = grid.to(weight.device)
    value = round_to_grid(weight, there)
    value = torch.where(value == 0, torch.zeros_like(value), value)
    lost = (value == 0) & (weight != 0) & (expand(there.bits, weight.shape) > 0)
    if bool(lost.any()) or not bool(value.isfinite().all()) or not torch.equal(round_to_grid(value, there), value):
        raise ValueError(f"attach_packing: a scale of '{name}' is too large or too small for {weight.dtype}.")
    return value

"""Making a model in memory one that saves packed."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from hf_approx.checkpoint.config import QUANT_METHOD, ApproxConfig
from hf_approx.checkpoint.quantizer import ApproxQuantizer, rounded
from hf_approx.checkpoint.zeros import keep_zeros
from hf_approx.packing import TensorSpec, dtype_from_name, pack
from hf_approx.packing.grid import Grid, round_to_grid
from hf_approx.structures import sizes_of


def attach_packing(
    model: PreTrainedModel,
    names: Iterable[str],
    store_dtype: str | None = "float16",
    grids: Mapping[str, Grid] | None = None,
) -> dict[str, TensorSpec]:
    """Make `model.save_pretrained` write the named weights packed; the model in memory equals what is saved.

    Every floating-point parameter is rounded to `store_dtype` in place (its own dtype stays), so the loaded
    model computes bit for bit what this one does. Weights that would not get smaller stay as they are; if none
    would, and the model's config says the sizes of all its layers, the model is left alone and saves plain.

    Args:
        model: A model whose weights are final.
        names: Names of the parameters to pack, as in `named_parameters()`.
        store_dtype: `"float16"`, `"bfloat16"`, `"float32"` or None to keep each parameter's own.
        grids: Grids that named weights are rounded to.

    Returns:
        How each packed weight is stored.

    Raises:
        ValueError: A name is no parameter, or a value overflows the stored dtype. The model is unchanged.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    names = list(names)
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(f"attach_packing: {type(model).__name__} has no parameter '{unknown[0]}'.")
    grids = grids or {}
    dtype = dtype_from_name(store_dtype) if store_dtype else None
    new = {}
    for name, param in params.items():
        if id(param) not in new and param.is_floating_point():
            value = round_to_grid(param.detach(), grids[name]) if name in grids else param.detach()
            if dtype is not None and name not in grids:
                value = rounded(name, value, dtype).to(param.dtype)
            new[id(param)] = (param, torch.where(value == 0, torch.zeros_like(value), value))
    specs = {}
    for name in dict.fromkeys(model.all_tied_weights_keys.get(name, name) for name in names):
        value = new[id(params[name])][1]
        spec = pack(value, dtype)[1]
        if spec.nbytes < value.numel() * (dtype or value.dtype).itemsize:
            specs[name] = spec
    structure = sizes_of(model)
    if not specs and structure is None:
        return {}
    with torch.no_grad():
        for param, value in new.values():
            param.copy_(value)
    config = ApproxConfig(tensors=specs, store_dtype=store_dtype, structure=structure)
    model.config.quantization_config = config
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    ApproxQuantizer(config, pre_quantized=True).settle(model)
    keep_zeros(model)
    return specs

"""Quantized linear layers in the format of the package compressed-tensors, which vLLM and transformers read.

A weight of p bits is scale * m * 2^(1 - p) with an odd m between -2^p and 2^p, see `hf_approx.packing.grid`. That is
m * 2^(P - p) steps of scale * 2^(1 - P), where P is the largest p of the weight: a whole number of P + 1 bits,
whatever p is from part to part, and 0 for a weight that is zero. So integers with a symmetric scale are exact.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.checkpoint import ApproxConfig, ApproxQuantizer
from hf_approx.exports.folders import Export, exported_report, write_model
from hf_approx.packing import Grid, QuantizedSpec, SharedSpec, TensorSpec, dtype_name, expand
from hf_approx.text import one_line

WIDTHS = (4, 8)
"""Bits of an integer. Others exist, but few engines have kernels for them and their layout has changed."""

GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale in the kernels of vLLM."""

MERGED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Layers of one module that engines merge into one, which is then packed or dense as a whole."""

NO_SPARSE = "compressed-tensors after 0.14 stores no sparse weights, 2:4 or other, unless they are quantized"


def export_compressed(model: PreTrainedModel, source: Path, output: Path) -> Export:
    """Write quantized linear layers as integers of 4 or 8 bits, everything else dense; see `export_model`.

    All layers have the same width, that of the widest, and the same kind of scale (a row or a group each): engines
    that merge layers, or decode while loading, read only one. transformers has loaded what is written.

    Raises:
        ModuleNotFoundError: The package compressed-tensors is not installed.
        ValueError: There is no layer to write so, the model cannot be made plain, or transformers cannot load models
            of its class from this format.
    """
    try:
        import compressed_tensors.compressors  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Exporting to compressed-tensors needs that package: pip install 'hf-approx[export]'."
        ) from None
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, ApproxQuantizer)
    config: ApproxConfig = quantizer.quantization_config
    grids = dict(quantizer.grids)
    model.dequantize()
    dense = _unfit(model, config.tensors, grids)
    fit = {name: grids[name] for name in config.tensors if name in grids and name not in dense}
    state = model.state_dict()
    _drop_odd(state, fit, dense)
    _drop_apart(model, fit, dense)
    packed: dict[str, dict[str, Tensor]] = {}
    if fit:
        scheme = _scheme(state, fit)
        for name, grid in fit.items():
            tensors = _integers(state[name], grid, scheme)
            if tensors is None:
                dense[name] = f"its scales do not fit the model's {dtype_name(state[name].dtype)}"
            else:
                packed[name] = tensors
    _drop_apart(model, packed, dense)
    if not packed:
        first = next((f"'{name}': {reason}" for name, reason in dense.items()), "none is packed")
        raise ValueError(f"compressed-tensors can hold no weight of '{source}' ({first}). Choose the format dense.")
    if sum(t.nbytes for tensors in packed.values() for t in tensors.values()) >= sum(state[n].nbytes for n in packed):
        raise ValueError(
            f"'{source}' would be no smaller in compressed-tensors, with a scale for every "
            f"{scheme.weights.group_size} inputs. Choose the format dense."
        )
    for name, tensors in packed.items():
        del state[name]
        state.update({f"{name.removesuffix('weight')}{key}": tensor for key, tensor in tensors.items()})

    def finish(folder: Path) -> None:
        _write_config(model, folder, scheme, list(packed))
        _load(type(model), folder)

    written = write_model(model, source, output, state, exported_report(source), finish)
    weights = scheme.weights
    return Export(output, written, tuple(packed), weights.num_bits, weights.group_size or 0, dense)


def _unfit(model: PreTrainedModel, specs: Mapping[str, TensorSpec], grids: Mapping[str, Grid]) -> dict[str, str]:
    """The packed weights that the format cannot hold, and why."""
    modules = model.named_modules(remove_duplicate=False)
    users = Counter(id(param) for _, module in modules for param in module._parameters.values())
    params = dict(model.named_parameters(remove_duplicate=False))
    unfit = {}
    for name, spec in specs.items():
        if name not in params:  # a template that other weights were mixed from
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(spec, SharedSpec):
            unfit[name] = "it is mixed from shared templates"
        elif not isinstance(spec, QuantizedSpec):
            unfit[name] = NO_SPARSE
        elif not isinstance(module, nn.Linear):
            unfit[name] = f"only linear layers can be packed, and this is {type(module).__name__}"
        elif users[id(params[name])] > 1:
            unfit[name] = "it is tied to another weight"
        elif int(grids[name].bits.max()) >= WIDTHS[-1]:
            unfit[name] = "some of its weights have 8 bits, which would need integers of 9"
    return unfit


def _drop_odd(state: Mapping[str, Tensor], packed: dict[str, Grid], dense: dict[str, str]) -> None:
    """Move weights from `packed` to `dense` whose scales cover no groups, if those of others do.

    All have groups of one size, which would have to be as small as the one that fits these.
    """
    sizes = {name: state[name].shape[1] for name in packed}
    runs = {name: -(-sizes[name] // grid.scale.shape[1]) for name, grid in packed.items()}
    odd = {name for name, size in sizes.items() if math.gcd(size, runs[name]) % GROUP_SIZES[0]}
    if runs == sizes or len(odd) == len(packed):
        return
    for name in odd:
        del packed[name]
        dense[name] = f"a scale for {runs[name]} of {sizes[name]} inputs fits no groups of {GROUP_SIZES[0]} or more"


def _drop_apart(model: nn.Module, packed: dict[str, Any], dense: dict[str, str]) -> None:
    """Move weights from `packed` to `dense` that engines merge with one that is not packed."""
    for name in list(packed):
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        for beside in next((layers for layers in MERGED if layer in layers), ()):
            other = f"{parent}.{beside}.weight"
            if other not in packed and isinstance(getattr(model.get_submodule(parent), beside, None), nn.Linear):
                del packed[name]
                dense[name] = f"engines merge it with '{beside}' beside it, which is dense"
                break


def _scheme(weights: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> Any:
    """The one `QuantizationScheme` that all these weights fit."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    widest = max(int(grid.bits.max()) for grid in grids.values())
    width = next(width for width in WIDTHS if width > widest)
    # Every run of weights under one scale has to be whole groups: so have a shorter last run and rows of one scale.
    sizes = [weights[name].shape[1] for name in grids]
    runs = [-(-size // grid.scale.shape[1]) for size, grid in zip(sizes, grids.values(), strict=True)]
    channel = runs == sizes
    common = math.gcd(*sizes, *runs)
    group = next((size for size in reversed(GROUP_SIZES) if common % size == 0), common)
    args = QuantizationArgs(
        num_bits=width, strategy="channel" if channel else "group", group_size=None if channel else group
    )
    return QuantizationScheme(
        targets=[name.removesuffix(".weight") for name in grids], weights=args, format="pack-quantized"
    )


def _integers(weight: Tensor, grid: Grid, scheme: Any) -> dict[str, Tensor] | None:
    """What is stored of a weight; None if that would decode to another weight."""
    from compressed_tensors.compressors import PackedQuantizationCompressor

    step = grid.scale.to(torch.float32) * 2.0 ** (1 - int(grid.bits.max()))
    scale = expand(step, weight.shape)[:, :: scheme.weights.group_size or weight.shape[1]].contiguous()
    # In float32, because the ratio of weight and scale would not round to the right integer in bfloat16.
    stored = PackedQuantizationCompressor.compress({"weight": weight.float(), "weight_scale": scale}, scheme)
    stored["weight_scale"] = scale.to(weight.dtype)
    decoded = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    return stored if torch.equal(decoded, weight) else None


def _load(cls: type[PreTrainedModel], folder: Path) -> None:
    """Raise `ValueError` unless transformers loads the model that was written."""
    options: dict[str, Any] = {"output_loading_info": True}
    report: Mapping[str, set[str]]
    try:
        _, report = cls.from_pretrained(folder, **options)  # type: ignore[misc]
    except Exception as error:  # of the initialization that each class has for weights it misses
        cause = f"{type(error).__name__}: {one_line(str(error))}"
    else:
        missing = sorted(report["missing_keys"] | report["unexpected_keys"])
        if not missing:
            return
        cause = f"it does not find '{missing[0]}'"
    raise ValueError(
        f"transformers cannot load a {cls.__name__} from compressed-tensors ({cause}). Choose the format dense."
    )


def _write_config(model: PreTrainedModel, folder: Path, scheme: Any, packed: list[str]) -> None:
    """Say in `config.json` which layers are packed, and how."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    targets = [name.removesuffix(".weight") for name in packed]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = QuantizationConfig(
        config_groups={"group_0": scheme.model_copy(update={"targets": targets})},
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        # Engines want every linear layer named, here or there.
        ignore=[name for name in linear if name not in targets],
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))

"""What a training reports: numbers of its methods over time, and what became of every layer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_approx.methods import MethodStack
from hf_approx.modules.bank import BANKS
from hf_approx.packing import Grid, expand


def kind_of(name: str) -> str:
    """What a layer is within its block: the name after the last number, without `weight`; of a template its bank.

    Of a layer that is a block by itself it is the name of the list.
    """
    _, in_bank, rest = f".{name}".partition(f".{BANKS}.")
    if in_bank:
        return rest.split(".")[0]
    layer = name.removesuffix(".weight")
    return re.sub(r"^.*\.\d+\.", "", layer) if re.search(r"\.\d+\.", layer) else re.sub(r"(.)\.\d+$", r"\1", layer)


class Recorder:
    """Keeps what the methods said at each log.

    Attributes:
        history: For every log, `step`, the metrics as `method/metric`, and under `masks` the histogram of each method
            that has soft masks; JSON types only.
    """

    def __init__(self, stack: MethodStack) -> None:
        self.methods = stack.labelled()
        self.history: list[dict[str, Any]] = []

    def record(self, step: int) -> dict[str, float]:
        """Ask every method; returns the metrics, for the log."""
        metrics = {f"{label}/{k}": v for label, method in self.methods.items() for k, v in method.metrics().items()}
        masks = {label: method.histogram() for label, method in self.methods.items()}
        self.history.append({"step": step, **metrics, "masks": {k: v for k, v in masks.items() if v is not None}})
        return metrics


def average_bits(params: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> float:
    """Bits a weight that is not zero, over all weights that have a grid."""
    kept = {name: params[name].detach() != 0 for name in grids}
    bits = sum(int(expand(grids[name].bits.to(mask.device), mask.shape)[mask].sum()) for name, mask in kept.items())
    return bits / max(sum(int(mask.sum()) for mask in kept.values()), 1)


def describe_layers(
    params: Mapping[str, Tensor], names: Sequence[str], grids: Mapping[str, Grid] | None = None
) -> dict[str, Any]:
    """Sparsity and bits of every compressed weight, and of each kind of layer.

    Args:
        params: Final weights, by name.
        names: Those that were compressed.
        grids: Of those that were quantized.

    Returns:
        `layers`: `name`, `kind`, `shape` and `sparsity` of each; `kinds`: `weights` and `sparsity` of each. Both have
        `bits`, the average over weights that are not zero, where a weight is quantized.
    """
    layers = []
    kinds: dict[str, tuple[int, int]] = {}
    for name in names:
        weight, kind = params[name], kind_of(name)
        zeros = weight.numel() - int(weight.count_nonzero())
        layers.append(
            {
                "name": name,
                "kind": kind,
                "shape": list(weight.shape),
                "sparsity": zeros / weight.numel(),
                **_bits(params, [name], grids or {}),
            }
        )
        total, gone = kinds.get(kind, (0, 0))
        kinds[kind] = (total + weight.numel(), gone + zeros)
    return {
        "layers": layers,
        "kinds": {
            kind: {
                "weights": total,
                "sparsity": gone / total,
                **_bits(params, [name for name in names if kind_of(name) == kind], grids or {}),
            }
            for kind, (total, gone) in kinds.items()
        },
    }


def _bits(params: Mapping[str, Tensor], names: Sequence[str], grids: Mapping[str, Grid]) -> dict[str, float]:
    own = {name: grids[name] for name in names if name in grids}
    return {"bits": average_bits(params, own)} if own else {}

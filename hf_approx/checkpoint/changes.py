"""What became of packed weights since they were packed: of their zeros, and of their grids."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_approx.logs import get_logger
from hf_approx.packing import Grid, expand, round_to_grid
from hf_approx.targets import own_name

logger = get_logger(__name__)

FAR = 0.5 / math.sqrt(12)
"""Distance to the nearest value of a grid, in its steps, from which a weight is taken for another one.

A weight that has nothing to do with a grid is anywhere between its values: the root mean square of its distances is
1 / sqrt(12) = 0.29 steps, more where it is beyond the last value. One that a little training moved stays close to the
values it came from, and up to half of 0.29 nearly every entry (99.9 %, if moves are normally distributed) is still
next to its own: rounding takes back what moved, and changes nothing else.
"""
PRIOR = 8
"""Entries without a distance that are counted with every row, so that no row of few entries is judged by chance."""


def left_grid(weight: Tensor, grid: Grid) -> bool:
    """Whether a weight, or one of its rows, is so far from its grid that rounding would make another weight of it.

    Rows are those of the first dimension: an output channel or the embedding of a token can be replaced alone.

    Args:
        weight: Of a shape that fits the grid.
        grid: What the weight was rounded to once.
    """
    grid = grid.to(weight.device)
    nearest = round_to_grid(weight, grid)
    if torch.equal(nearest, weight):
        return False
    bits = expand(grid.bits, weight.shape).float()
    step = expand(grid.scale, weight.shape).float() * torch.exp2(2 - bits)
    distance = (weight.float() - nearest.float()) / step
    for dtype in (torch.float16, torch.bfloat16):  # of a model that was in half precision for a while
        distance = distance.masked_fill(nearest.to(dtype).to(weight.dtype) == weight, 0)
    # Parts without bits have no values but zero, so that no distance from it is small.
    distance = distance.masked_fill((bits == 0) & (weight != 0), math.inf).reshape(len(weight), -1)
    squares, counts = distance.square().sum(1), (weight != 0).reshape(len(weight), -1).sum(1)
    rows = squares / (counts + PRIOR)
    whole = squares.sum() / counts.sum().clamp_min(1)
    return bool((rows > FAR**2).any() or whole > FAR**2)


def sort_grids(
    model: PreTrainedModel, grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Grid], dict[str, str]]:
    """The grids of a model's weights that are still those which were quantized, and the names of the others.

    A new layer under an old name, the weights of another model or a merged adapter have nothing to do with the grid
    that a weight once had.

    Args:
        model: That which was quantized, or its base model.
        grids: By name, see `hf_approx.targets.own_name`.
        shapes: Of the weights they are of, by the same names.

    Returns:
        Grids by name of the parameter; and for the names of the others, those they have in `grids`.
    """
    params, tied = dict(model.named_parameters(remove_duplicate=False)), model.all_tied_weights_keys
    own, others = {}, {}
    for key, grid in grids.items():
        found = own_name(key, model.base_model_prefix, params)
        if found is not None:
            weight, name = params[found].detach(), tied.get(found, found)
            if weight.shape == shapes.get(key, weight.shape) and not left_grid(weight, grid):
                own[name] = grid
            else:
                others[name] = key
    return own, others


def warn_of_changes(filled: list[str], moved: list[str], others: list[str], held: bool = True) -> None:
    """Say what becomes of weights that are no longer as they were packed.

    Args:
        filled: Names of those that lost zeros.
        moved: Those that left their grid by so little that they are rounded to it.
        others: Those that are other weights now, without a grid.
        held: Whether optimizers keep the zeros of all in `filled`.
    """
    if filled:
        cause = (
            "Optimizers keep them, but they were written to in another way, as merging adapters does: keep "
            "adapters in files of their own, or save the model dense, after model.dequantize()."
            if held
            else "A copy of a model does not keep them, and a new layer has none: call hf_approx.keep_zeros on a copy "
            "before it is trained."
        )
        logger.warning("%s had more zeros when it was loaded. %s", _several(filled), cause)
    if moved:
        logger.warning(
            "'%s' is no longer on the grid it was quantized to%s. It is saved rounded to it, so the saved model "
            "differs from the one in memory; model.dequantize() first saves it as it is, dense.",
            moved[0],
            f", nor are {len(moved) - 1} others on theirs" if moved[1:] else "",
        )
    if others:
        logger.warning(
            "%s is not the weight that was quantized: it is a new one, or was changed by far more than rounding "
            "changes it (a merged adapter, long training without FixedPrecisionConfig). It is kept as it is, and no "
            "longer quantized.",
            _several(others),
        )


def _several(names: list[str]) -> str:
    return f"'{names[0]}'" + (f" (and {len(names) - 1} others)" if names[1:] else "")

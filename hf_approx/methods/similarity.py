"""How alike the layers of a bank are: the layer similarity matrix (Savarese and Maire, ICLR 2019)."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from hf_approx.methods.base import Method
from hf_approx.modules.bank import SharedLayers, TemplateBank, shared_layers

Space = Literal["coefficients", "weights"]


def cosines(coefficients: Tensor, metric: Tensor | None = None) -> Tensor:
    """|cos| between all pairs of rows; differentiable.

    Args:
        coefficients: Shape (layers, templates).
        metric: Inner products of the templates, of shape (templates, templates); default: orthonormal templates.

    Returns:
        Shape (layers, layers), values from 0 to 1; a row of zeros is like no other.
    """
    other = coefficients if metric is None else coefficients @ metric
    inner = other @ coefficients.T
    norms = inner.diagonal().clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    return (inner / norms[:, None] / norms).abs().clamp(max=1.0)


@torch.no_grad()
def gram(bank: TemplateBank) -> Tensor:
    """Inner products of the templates as vectors: shape (templates, templates), float64."""
    flat = [weight.detach().reshape(-1).float() for weight in bank.weights]
    result = torch.empty(len(flat), len(flat), dtype=torch.float64)
    for i, a in enumerate(flat):
        for j, b in enumerate(flat[: i + 1]):
            result[i, j] = result[j, i] = torch.dot(a, b).item()
    return result


@torch.no_grad()
def similarity_of(layers: SharedLayers, space: Space) -> Tensor:
    """The similarity matrix of one bank: shape (layers, layers), float64, on the CPU, its diagonal exactly 1."""
    coefficients = layers.coefficients.detach().double().cpu()
    matrix = cosines(coefficients, gram(layers.bank) if space == "weights" else None)
    return ((matrix + matrix.T) / 2).fill_diagonal_(1.0)


def layer_similarity(model: nn.Module | Method, space: Space = "coefficients") -> dict[str, Tensor]:
    """How alike the layers of every bank are: |cos| of their coefficients, or of their weights.

    Sign and scale do not count. The two differ where templates are correlated; the weights' is then the right one.

    Args:
        model: A model with shared weights (training, finalized or loaded), or the method at work on it.
        space: `"coefficients"` or `"weights"`.

    Returns:
        For each bank a symmetric matrix of shape (layers, layers), in the model's order of layers: float64, values
        from 0 to 1, 1 on the diagonal.

    Raises:
        ValueError: The model shares no weights, or the space is unknown.
    """
    banks = {name: layers for name, layers in _shared(model).items() if layers.layers}
    if space not in ("coefficients", "weights"):
        raise ValueError(f"layer_similarity: space must be 'coefficients' or 'weights', got {space!r}.")
    return {name: similarity_of(layers, space) for name, layers in banks.items()}


def block_similarity(model: nn.Module | Method, space: Space = "coefficients") -> dict[str, Tensor]:
    """How alike the blocks of every stack of layers are: the mean over the banks that two blocks have in common.

    Args:
        model: As for `layer_similarity`.
        space: As for `layer_similarity`.

    Returns:
        For each stack (`encoder.layer`, say) a matrix of shape (blocks, blocks); 0 for blocks that share no bank.

    Raises:
        ValueError: As for `layer_similarity`.
    """
    matrices, banks = layer_similarity(model, space), _shared(model)
    places = locate({name: list(banks[name].layers) for name in matrices})
    stacks: dict[str, set[int]] = {}
    for place in (place for bank in places.values() for place in bank):
        stacks.setdefault(place.stack, set()).add(place.block)
    result = {}
    for stack, numbers in stacks.items():
        index = {number: i for i, number in enumerate(sorted(numbers))}
        total = torch.zeros(len(index), len(index), dtype=torch.float64)
        count = torch.zeros_like(total)
        for name, matrix in matrices.items():
            for i, a in enumerate(places[name]):
                for j, b in enumerate(places[name]):
                    if a.stack == b.stack == stack and a.rest == b.rest:
                        total[index[a.block], index[b.block]] += matrix[i, j]
                        count[index[a.block], index[b.block]] += 1
        result[stack] = total / count.clamp_min(1)
    return result


def mean_similarity(matrices: dict[str, Tensor]) -> float:
    """The mean over all pairs of different layers of a bank, then over the banks; 1 if there is no pair."""
    means = [_off_diagonal(matrix).mean() for matrix in matrices.values() if len(matrix) > 1]
    return float(torch.stack(means).mean()) if means else 1.0


def dissimilarity(coefficients: Tensor) -> Tensor:
    """Mean over pairs of different layers of 1 - |cos|: the recurrence regulariser of one bank, a scalar.

    Args:
        coefficients: Shape (layers, templates), at least two layers.
    """
    return 1 - _off_diagonal(cosines(coefficients)).mean()


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


@dataclass(frozen=True)
class Place:
    """Where a layer is: in `stack`, in block number `block`, under the name `rest` in it."""

    stack: str
    block: int
    rest: str


def locate(banks: Mapping[str, Sequence[str]]) -> dict[str, list[Place]]:
    """Where the layers of every bank are: the block is the outermost number in which layers of the bank differ.

    Where there is none (a bank of one layer), the block is that of another bank's layers beside it, or else the
    outermost number.

    Args:
        banks: Names of the layers of each.
    """
    places = {bank: [_by_difference(name, names) for name in names] for bank, names in banks.items()}
    stacks = {place.stack for found in places.values() for place in found if place is not None}
    return {
        bank: [place or _beside(name, stacks) for place, name in zip(places[bank], names, strict=True)]
        for bank, names in banks.items()
    }


def _by_difference(name: str, names: Sequence[str]) -> Place | None:
    parts, split = name.split("."), [other.split(".") for other in names]
    for i, part in enumerate(parts):
        if part.isdigit() and len({p[i] for p in split if p[:i] == parts[:i] and len(p) > i}) > 1:
            return Place(".".join(parts[:i]), int(part), ".".join(parts[i + 1 :]))
    return None


def _beside(name: str, stacks: Container[str]) -> Place:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in [*(i for i in numbers if ".".join(parts[:i]) in stacks), *numbers]:
        return Place(".".join(parts[:i]), int(parts[i]), ".".join(parts[i + 1 :]))
    return Place(name, 0, "")


def _shared(model: nn.Module | Method) -> dict[str, SharedLayers]:
    banks = shared_layers(model if isinstance(model, nn.Module) else cast(nn.Module, getattr(model, "model", None)))
    if not banks:
        raise ValueError(f"{type(model).__name__} shares no weights: train it with SharingConfig first.")
    return banks

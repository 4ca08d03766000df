"""Folding: layers whose weights have become alike are given one weight, which makes loops of repeated blocks."""

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.checkpoint import ApproxConfig, attach_packing
from hf_approx.checkpoint.saving import at_work
from hf_approx.finite import refuse_not_finite
from hf_approx.methods.similarity import Space, gram, locate, similarity_of
from hf_approx.modules.bank import (
    SharedLayers,
    TemplateBank,
    bank_prefix,
    banks_of,
    coefficients_of,
    set_banks,
    share,
    shared_layers,
)
from hf_approx.packing import SharedSpec

TOLERANCE = 1e-4
"""Largest difference, relative to a weight's largest entry, between a folded weight and the one it stands for."""


@dataclass(frozen=True)
class Loop:
    """Consecutive blocks that repeat; `count` is 1 where nothing does."""

    body: tuple[str, ...]
    count: int

    def __str__(self) -> str:
        return f"[{' '.join(self.body)}] x {self.count}" if self.count > 1 else " ".join(self.body)


@dataclass
class Folding:
    """What `fold` did.

    Attributes:
        clusters: For every bank that was folded, the groups of layers that now have one weight, up to their scalars.
        scalars: The signed scalar of every folded layer.
        loops: For every stack of blocks (`encoder.layer`, say), its loops, in order. Blocks with equal letters have
            the same shared weights; norms, biases and layers that are not shared stay their own.
        parameters_before: Of the whole model.
        parameters_after: Of the whole model.
        weight_error: Largest relative error, in the Frobenius norm, of a layer's weight against the one before.
    """

    clusters: dict[str, list[list[str]]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    loops: dict[str, list[Loop]] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    weight_error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form; each stack's loops also as `text`, such as `"[A B] x 3"`."""
        loops = {
            stack: {"text": ", ".join(map(str, found)), "loops": [asdict(loop) for loop in found]}
            for stack, found in self.loops.items()
        }
        return {**asdict(self), "loops": loops}


@dataclass(frozen=True)
class _Plan:
    """How one bank is folded: for every cluster its layers, the coefficients of their weight, and their scalars."""

    clusters: list[list[int]]
    directions: list[Tensor]
    scalars: Tensor


@torch.no_grad()
def fold(
    model: nn.Module, threshold: float | None = None, layers: int | None = None, space: Space = "weights"
) -> Folding:
    """Give layers that are alike one weight, each with a signed scalar of its own, in place.

    Layers of a bank are clustered by complete linkage, so all pairs in a cluster are alike. The weight of a cluster is
    the leading singular direction of its layers' coefficients. Where that takes no more directions than the bank has
    templates, the bank is replaced by the clusters' weights; else they stay mixes of its templates. Modules stay
    distinct (decoders keep their caches); the model trains on, and saves as other models with shared weights do. The
    new weights are dense and in full precision: zeros and bits of the templates they replace are gone.

    The parameters are new ones, so an optimizer that was made before trains nothing of them.

    Args:
        model: A model with shared weights, finalized or loaded.
        threshold: Smallest similarity of two layers in one cluster; default 0.95.
        layers: Instead of a threshold: how many clusters to leave in each bank.
        space: What similarity is measured on; see `layer_similarity`.

    Returns:
        What became of the layers.

    Raises:
        ValueError: The model shares no weights, a weight is NaN or infinite, a method is at work on it, or an argument
            is out of range. The model is unchanged.
    """
    if threshold is not None and layers is not None:
        raise ValueError("fold: give threshold or layers, not both.")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"fold: threshold must be above 0 and at most 1, got {threshold}.")
    if layers is not None and (type(layers) is not int or layers < 1):
        raise ValueError(f"fold: layers must be a whole number above 0, got {layers!r}.")
    if space not in ("coefficients", "weights"):
        raise ValueError(f"fold: space must be 'coefficients' or 'weights', got {space!r}.")
    found = at_work(model)
    if found is not None:
        raise ValueError(f"fold: {found[0]} is still at work on '{found[1]}'; finalize the training first.")
    refuse_not_finite("fold", model)
    prefix = bank_prefix(model)
    # What is mixed into templates, not layers, was folded before: only its users can be folded on.
    banks = {
        name: entry
        for name, entry in shared_layers(model).items()
        if any(not layer.startswith(prefix) for layer in entry.layers)
    }
    if not banks:
        raise ValueError(f"fold: {type(model).__name__} shares no weights: train it with SharingConfig first.")
    report = Folding(parameters_before=_parameters(model))
    labels: dict[str, list[int]] = {}
    plans: dict[str, _Plan] = {}
    for name, entry in banks.items():
        similarity = similarity_of(entry, space)
        clusters = complete_linkage(similarity, None if layers else threshold or 0.95, layers or 1)
        labels[name] = [next(c for c, members in enumerate(clusters) if i in members) for i in range(len(similarity))]
        unchanged = len(clusters) == len(similarity) or len(clusters) == len(entry.bank) == 1
        if not unchanged:
            plans[name] = _represent(entry, clusters, space)
            report.weight_error = max(report.weight_error, _check(name, entry, plans[name]))
    for name, plan in plans.items():
        names = list(banks[name].layers)
        _apply(model, name, banks[name], plan)
        report.clusters[name] = [[names[i] for i in members] for members in plan.clusters]
        report.scalars.update(zip(names, plan.scalars.tolist(), strict=True))
    report.loops = _loops({name: list(entry.layers) for name, entry in banks.items()}, labels)
    _round_as_stored(model)
    report.parameters_after = _parameters(model)
    return report


def complete_linkage(similarity: Tensor, threshold: float | None, count: int = 1) -> list[list[int]]:
    """Clusters in which every pair is alike, merged from the most alike on.

    Args:
        similarity: Symmetric, of shape (n, n).
        threshold: Merge no clusters with a pair below this; None: merge until `count` are left.
        count: Stop at so many clusters.

    Returns:
        Clusters of indices, sorted, by their first index.
    """
    rows = similarity.tolist()
    clusters = [[i] for i in range(len(rows))]
    while len(clusters) > count:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        links = [min(rows[i][j] for i in clusters[a] for j in clusters[b]) for a, b in pairs]
        best = max(range(len(pairs)), key=links.__getitem__)
        # Rounding must not part layers that are equal.
        if threshold is not None and links[best] < threshold - 1e-9:
            break
        a, b = pairs[best]
        clusters[b] = sorted(clusters[a] + clusters[b])
        del clusters[a]
    return sorted(clusters)


def find_loops(sequence: Sequence[str]) -> list[Loop]:
    """Split a sequence into the repetitions that cover most of it at each point, shortest body first.

    `A B A B A B C` is `[A B] x 3, C`; what repeats nowhere is gathered in loops of count 1.
    """
    loops: list[Loop] = []
    start = 0
    while start < len(sequence):
        best = Loop((sequence[start],), 1)
        for period in range(1, (len(sequence) - start) // 2 + 1):
            body = tuple(sequence[start : start + period])
            count = 1
            while tuple(sequence[start + count * period : start + (count + 1) * period]) == body:
                count += 1
            if count > 1 and period * count > len(best.body) * best.count:
                best = Loop(body, count)
        if best.count == 1 and loops and loops[-1].count == 1:
            loops[-1] = Loop(loops[-1].body + best.body, 1)
        else:
            loops.append(best)
        start += len(best.body) * best.count
    return loops


def _represent(entry: SharedLayers, clusters: list[list[int]], space: Space) -> _Plan:
    """The best single direction for each cluster, in the metric of the space, and the layers' projections on it."""
    alphas = entry.coefficients.detach().double().cpu()
    metric = gram(entry.bank) if space == "weights" else torch.eye(alphas.shape[1], dtype=torch.float64)
    directions, scalars = [], torch.zeros(len(alphas), dtype=torch.float64)
    for members in clusters:
        rows = alphas[members]
        units = rows / (rows @ metric * rows).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        units = units * torch.where(units @ metric @ units[0] < 0, -1.0, 1.0)[:, None]
        # The leading left singular vector of the units is this combination of them.
        direction = torch.linalg.eigh(units @ metric @ units.T).eigenvectors[:, -1] @ units
        projections = rows @ metric @ direction / (direction @ metric @ direction).clamp_min(1e-300)
        # The template then has the size of its layers' weights, and the first layer's sign.
        size = projections.abs().mean() * torch.where(projections[0] < 0, -1.0, 1.0)
        if size == 0:
            size = torch.ones_like(size)
        directions.append(direction * size)
        scalars[members] = projections / size
    return _Plan(clusters, directions, scalars)


def _check(name: str, entry: SharedLayers, plan: _Plan) -> float:
    """Compare the folded weights with mixes of the substituted coefficients, c_i times the cluster's.

    Returns:
        The largest relative error of a folded weight against the layer's present one.

    Raises:
        RuntimeError: A folded weight is not the substituted one.
    """
    bank, error = entry.bank, 0.0
    coefficients = [coefficients_of(t.module, t.parameter) for t in entry.targets.values()]
    for members, direction in zip(plan.clusters, plan.directions, strict=True):
        weight = bank.mix(direction.to(coefficients[0]))
        for i in members:
            folded = plan.scalars[i].to(weight) * weight
            substituted = bank.mix((direction * plan.scalars[i]).to(weight))
            difference = float((folded - substituted).abs().max() / substituted.abs().max().clamp_min(1e-30))
            if difference > max(TOLERANCE, 8 * torch.finfo(weight.dtype).eps):
                raise RuntimeError(f"fold: a weight of bank '{name}' is off by {difference:.3g}.")
            before = bank.mix(coefficients[i])
            error = max(error, float((folded - before).norm() / before.norm().clamp_min(1e-30)))
    return error


def _apply(model: nn.Module, name: str, entry: SharedLayers, plan: _Plan) -> None:
    """Replace the bank by one bank a cluster."""
    bank, targets = entry.bank, list(entry.targets.values())
    banks = banks_of(model)
    smaller = len(plan.clusters) <= len(bank)
    for c, (members, direction) in enumerate(zip(plan.clusters, plan.directions, strict=True)):
        alphas = [coefficients_of(targets[i].module, targets[i].parameter) for i in members]
        trained = bank.weights[0].requires_grad
        own = TemplateBank([bank.mix(direction.to(alphas[0]))], trained)
        own.lie_as(targets[0].axes)
        if not smaller:
            share(own[0], bank, direction.to(alphas[0]), trained)
        for i, alpha in zip(members, alphas, strict=True):
            scalar = plan.scalars[i].reshape(1).to(alpha)
            share(targets[i].module, own, scalar, alpha.requires_grad, targets[i].parameter)
        banks[f"{name}-{_letter(c)}"] = own
    if smaller:
        del banks[name]
    set_banks(model, banks)


def _loops(banks: dict[str, list[str]], labels: dict[str, list[int]]) -> dict[str, list[Loop]]:
    """The loops of every stack, from the cluster of every layer."""
    stacks: dict[str, dict[int, set[tuple[str, str, int]]]] = {}
    for name, places in locate(banks).items():
        for place, label in zip(places, labels[name], strict=True):
            stacks.setdefault(place.stack, {}).setdefault(place.block, set()).add((name, place.rest, label))
    loops = {}
    for stack, blocks in stacks.items():
        kinds: dict[frozenset[tuple[str, str, int]], str] = {}
        letters = [kinds.setdefault(frozenset(blocks[number]), _letter(len(kinds))) for number in sorted(blocks)]
        loops[stack] = find_loops(letters)
    return loops


def _letter(index: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    turn, place = divmod(index, 26)
    return string.ascii_uppercase[place] + (str(turn) if turn else "")


def _parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _round_as_stored(model: nn.Module) -> None:
    """A model that saves packed equals what it saves: its new parameters are rounded too."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(model, PreTrainedModel) and isinstance(config, ApproxConfig):
        existing = dict(model.named_parameters(remove_duplicate=False))
        names = [n for n, spec in config.tensors.items() if not isinstance(spec, SharedSpec) and n in existing]
        attach_packing(model, names, config.store_dtype)

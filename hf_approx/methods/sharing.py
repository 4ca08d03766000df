"""Soft parameter sharing (Savarese and Maire, ICLR 2019).

Layers of the same kind mix their weights from a bank of templates: W_i = sum_k alpha_ik T_k. A model becomes smaller
by having fewer templates than layers; layers whose coefficients come to point in one direction are loops.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_approx.finite import refuse_not_finite
from hf_approx.methods.base import Method, MethodConfig
from hf_approx.methods.latent import Stage, hold, latent_of
from hf_approx.methods.mixing import Mixing
from hf_approx.methods.similarity import Space, dissimilarity, mean_similarity, similarity_of
from hf_approx.modules.bank import (
    SharedLayers,
    TemplateBank,
    bank_prefix,
    banks_of,
    coefficients_of,
    owner_of_banks,
    set_banks,
    share,
    shared_layers,
    sharing_of,
    template_names,
)
from hf_approx.packing import is_bank_name
from hf_approx.targets import Patterns, Target, matches, refuse_adapters, select_targets

DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model where `DistributedDataParallel` looks for names of parameters that are none of its business."""


@dataclass
class SharingConfig(MethodConfig):
    """Soft parameter sharing: layers of one kind mix their weights from a bank of templates.

    Biases and norms stay with their layers. A bank's templates are trained by the task's optimizer, the coefficients
    by Adam without weight decay.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    templates: int | float = field(
        default=0.5,
        metadata={"help": "Templates in each bank: a number, or (with a decimal point) a share of its layers."},
    )
    groups: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Banks by name, each with its modules in the notation of target_modules. Default: a bank for each "
            "kind of weight, that is for equal names after the block's number and equal shapes; encoder and decoder "
            "have banks of their own."
        },
    )
    init: Literal["pretrained", "layers", "random"] = field(
        default="pretrained",
        metadata={
            "help": "'pretrained': the best approximation of the layers' weights with so many templates. 'layers': "
            "the weights of evenly spaced layers, which stay exact, and the best approximation of the others by "
            "them; where layers have little in common it keeps more of the model. 'random': Kaiming normal templates, "
            "orthogonal coefficients, for training from scratch."
        },
    )
    coefficients: Literal["trained", "fixed"] = field(
        default="trained",
        metadata={
            "help": "'fixed': hard tying, as in ALBERT: each template is the weight of a run of neighbouring layers, "
            "and the coefficients are ones and zeros."
        },
    )
    coefficient_lr: float = field(default=1e-3, metadata={"help": "Adam's learning rate for the coefficients."})
    recurrence: float = field(
        default=0.0,
        metadata={"help": "Weight of the penalty that makes layers alike: the mean of 1 - similarity over pairs."},
    )
    recurrence_warmup: float = field(
        default=0.1, metadata={"help": "Part of training in which that weight rises from zero."}
    )

    def __post_init__(self) -> None:
        where = "SharingConfig"
        k = self.templates
        if isinstance(k, bool) or not ((isinstance(k, int) and k >= 1) or (isinstance(k, float) and 0 < k <= 1)):
            raise ValueError(f"{where}: templates must be a whole number or a share from 0.0 to 1.0, got {k!r}.")
        if self.init not in ("pretrained", "layers", "random"):
            raise ValueError(f"{where}: init must be 'pretrained', 'layers' or 'random', got {self.init!r}.")
        if self.coefficients not in ("trained", "fixed"):
            raise ValueError(f"{where}: coefficients must be 'trained' or 'fixed', got {self.coefficients!r}.")
        for name in ("coefficient_lr", "recurrence"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value}.")
        if not 0 <= self.recurrence_warmup <= 1:
            raise ValueError(f"{where}: recurrence_warmup must be from 0 to 1, got {self.recurrence_warmup}.")
        if self.coefficients == "fixed" and self.recurrence:
            raise ValueError(f"{where}: recurrence acts on coefficients, which are fixed: set recurrence=0.")
        if self.coefficients == "fixed" and self.init == "layers":
            raise ValueError(f"{where}: fixed coefficients make templates means of layers: leave out init='layers'.")
        if self.groups is not None:
            if not isinstance(self.groups, dict) or not self.groups:
                raise ValueError(f"{where}: groups must map names of banks to patterns, got {self.groups!r}.")
            wrong = [name for name in self.groups if not is_bank_name(name)]
            if wrong:
                raise ValueError(
                    f"{where}: a bank's name must be letters, digits, '_' and '-', and not an attribute of "
                    f"modules, got {wrong[0]!r}."
                )
            for given in ("target_modules", "target_parameters"):
                if getattr(self, given) is not None:
                    raise ValueError(f"{where}: groups name their modules themselves: leave out {given}.")

    def build(self) -> "SoftSharing":
        """The method this config describes."""
        return SoftSharing(self)


class SoftSharing(Method):
    """See [`SharingConfig`].

    Attributes:
        model: The model it is attached to.
        banks: Names of the layers of every bank, by the bank's name.
    """

    name = "sharing"
    shares = True

    def __init__(self, config: SharingConfig) -> None:
        super().__init__()
        self._config = config
        self.banks: dict[str, list[str]] = {}
        self._dense: dict[str, Tensor] = {}
        self._strength = 0.0

    @property
    def config(self) -> SharingConfig:
        """The config that built this object."""
        return self._config

    def attach(self, model: nn.Module, earlier: Sequence[Method] = ()) -> None:
        """Move the target weights into banks. The model is unchanged if this raises."""
        self._check_company(model, earlier)
        refuse_adapters(model)
        banks, sizes = self._plan(model)
        targets = _in_order(model, banks)
        refuse_not_finite(self.name, ((target.name, target.value) for target in targets.values()))
        self.model = self.root = model
        self.banks = {name: list(members) for name, members in banks.items()}
        self.targets = targets
        new = {}
        for name, members in banks.items():
            weights = [target.value for target in members.values()]
            templates, coefficients = self._start(list(members.values()), sizes[name])
            trained = any(weight.requires_grad for weight in weights)
            new[name] = TemplateBank(templates, trained)
            new[name].at_work = True
            new[name].lie_as(next(iter(members.values())).axes)
            for layer, weight, row in zip(members, weights, coefficients, strict=True):
                # Kept until training starts: `detach` can then undo the approximation.
                self._dense[layer] = weight.detach().clone()
                row = nn.Parameter(row.to(weight).contiguous(), trained and self._config.coefficients == "trained")
                self.stages[layer] = hold(Mixing(self.targets[layer], new[name], row)).stages[0]
        set_banks(model, {**banks_of(model), **new})
        # The forward pass goes by them, so no gradient of theirs is there to be waited for.
        ignored = (f"{bank_prefix(model)}{name}.{k}.weight" for name, bank in new.items() for k in range(len(bank)))
        vars(model)[DDP_IGNORES] = [*vars(model).get(DDP_IGNORES, ()), *ignored]

    def stage(self, name: str, target: Target) -> Stage:
        """The mix of the templates of its bank."""
        return self.stages[name]

    def _plan(self, model: nn.Module) -> tuple[dict[str, dict[str, Target]], dict[str, int]]:
        """The targets and the number of templates of every bank; raises `ValueError` for what cannot be shared."""
        config = self._config
        if isinstance(owner_of_banks(model), nn.Sequential):
            raise ValueError(
                "SharingConfig: a Sequential runs all it holds, and would run the templates too; put it into a module "
                "whose forward calls it."
            )
        if config.groups is None:
            selected = self.select(model)
            _refuse_taken(selected)
            banks = group_by_kind(model, selected)
            if not banks:
                raise ValueError("SharingConfig: no two target modules are of one kind, so there is nothing to share.")
        else:
            banks = {name: _of_group(model, p, config.exclude) for name, p in config.groups.items()}
            taken: dict[str, str] = {}
            for name, members in banks.items():
                _refuse_taken(members)
                _check_group(name, members)
                for layer in members:
                    if layer in taken:
                        raise ValueError(f"SharingConfig: '{layer}' is in groups '{taken[layer]}' and '{name}'.")
                    taken[layer] = name
        double = set(banks) & set(banks_of(model))
        if double:
            raise ValueError(f"SharingConfig: the model has a bank '{min(double)}' already.")
        k = config.templates
        sizes = {b: k if isinstance(k, int) else max(1, round(k * len(layers))) for b, layers in banks.items()}
        for bank, size in sizes.items():
            if size > len(banks[bank]):
                raise ValueError(
                    f"SharingConfig: templates={size} is more than the {len(banks[bank])} layers of bank '{bank}'."
                )
        return banks, sizes

    @torch.no_grad()
    def _start(self, targets: Sequence[Target], size: int) -> tuple[list[Tensor], Tensor]:
        """Templates, and coefficients of shape (layers, templates)."""
        weights = [target.value.detach() for target in targets]
        fixed = self._config.coefficients == "fixed"
        runs = tied_runs(len(weights), size) if fixed else torch.empty(0)
        if self._config.init == "random":
            templates = [torch.empty_like(weights[0]) for _ in range(size)]
            # GPT-2's Conv1D keeps its weight as (in, out).
            out, inputs, experts = targets[0].axes
            turned = isinstance(targets[0].module, Conv1D) or (experts is not None and inputs < out)
            mode: Literal["fan_in", "fan_out"] = "fan_out" if turned else "fan_in"
            for template in templates:
                for matrix in [template] if experts is None else template.unbind(experts):
                    nn.init.kaiming_normal_(matrix, mode=mode, nonlinearity="relu")
            return templates, runs if fixed else nn.init.orthogonal_(torch.empty(len(weights), size))
        if fixed:
            return [combine(run / run.sum(), weights) for run in runs.T], runs
        return (evenly_spaced if self._config.init == "layers" else best_approximation)(weights, size)

    def param_groups(self) -> list[dict[str, Any]]:
        """The coefficients, at their learning rate."""
        self.release()
        rows = (coefficients_of(target.module, target.parameter) for target in self.targets.values())
        own = [row for row in rows if row.requires_grad]
        return [{"params": own, "lr": self._config.coefficient_lr}] if own else []

    def release(self) -> None:
        """Forget the weights that layers had."""
        self._dense = {}

    def state_dict(self) -> dict[str, Any]:
        """The weight of the recurrence penalty."""
        return {"strength": self._strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._strength = state["strength"]

    def on_step(self, progress: float) -> None:
        """Raise the weight of the recurrence penalty."""
        self.release()
        warmup = self._config.recurrence_warmup
        self._strength = self._config.recurrence * (min(progress / warmup, 1.0) if warmup else 1.0)

    def penalty(self) -> Tensor | None:
        """lambda * mean over banks and over pairs of their layers of 1 - similarity, in coefficients; None if off."""
        if not self._config.recurrence:
            return None
        banks = [entry.coefficients.float() for entry in self._own.values() if len(entry.layers) > 1]
        if not banks:
            return None
        terms = [dissimilarity(coefficients) for coefficients in banks]
        return self._strength * torch.stack([term.to(terms[0].device) for term in terms]).mean()

    @property
    def is_final(self) -> bool:
        """Always: what is shared is settled from the start."""
        return True

    def settle(self) -> None:
        """Nothing to do: what is shared is settled from the start."""

    def metrics(self) -> dict[str, float]:
        """Mean similarity of different layers of a bank, in coefficients, and the penalty in the loss."""
        with torch.no_grad():
            penalty = self.penalty()
        return {
            "similarity": mean_similarity(self._matrices("coefficients")),
            "penalty": 0.0 if penalty is None else float(penalty),
        }

    def report(self) -> dict[str, Any]:
        """Also, for every bank, layers, templates, numbers of weights, and both similarity matrices."""
        spaces: tuple[Space, ...] = ("coefficients", "weights")
        matrices = {space: self._matrices(space) for space in spaces}
        banks = {}
        for name, entry in self._own.items():
            layers, templates, numel = list(entry.layers), len(entry.bank), math.prod(entry.bank.shape)
            banks[name] = {
                "layers": layers,
                "templates": templates,
                "weights_before": len(layers) * numel,
                "weights_after": templates * numel + len(layers) * templates,
                "similarity": {space: matrix[name].tolist() for space, matrix in matrices.items()},
            }
        return {**super().report(), "banks": banks}

    @property
    def _own(self) -> dict[str, SharedLayers]:
        """The banks that its layers use now: folding may have replaced the ones it made."""
        return {n: e for n, e in shared_layers(self.model).items() if not self.targets.keys().isdisjoint(e.layers)}

    def _matrices(self, space: Space) -> dict[str, Tensor]:
        return {name: similarity_of(entry, space) for name, entry in self._own.items()}

    def detach(self) -> None:
        """Give every layer a weight of its own: the one it had if training has not started, else the mix."""
        for name, target in self.targets.items():
            latent = latent_of(target)
            if latent is not None:
                latent.release(self._dense[name] if name in self._dense else latent.before())
        set_banks(self.model, {name: b for name, b in banks_of(self.model).items() if name not in self.banks})
        vars(self.model).pop(DDP_IGNORES, None)
        self.targets, self.stages, self.banks, self._dense = {}, {}, {}, {}

    def bake(self) -> list[str]:
        """Leave the weights shared; returns the names of the templates."""
        self.refuse_diverged()
        self._dense = {}
        vars(self.model).pop(DDP_IGNORES, None)
        for target in self.targets.values():
            latent = latent_of(target)
            if isinstance(latent, Mixing):
                latent.bank.at_work = False
                latent.release(target.value)
                row = latent.weight
                share(target.module, latent.bank, row.detach(), row.requires_grad, target.parameter)
        return template_names(self.model)


def best_approximation(weights: Sequence[Tensor], size: int) -> tuple[list[Tensor], Tensor]:
    """The best approximation, in the sum of squares, of weights by combinations of so many templates.

    The leading singular vectors of the stacked weights, from their L x L Gram matrix: no matrix of the weights' size
    is decomposed. With as many templates as weights it is exact.

    Args:
        weights: L tensors of equal shape.
        size: Number of templates, at most L.

    Returns:
        The templates, and the coefficients of shape (L, size), whose columns are orthonormal.
    """
    products = _products(weights)
    vectors = torch.linalg.eigh(products).eigenvectors.flip(1)[:, :size]
    # The sign of an eigenvector is arbitrary: its largest entry is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return [combine(column, weights) for column in vectors.T], vectors


def tied_runs(layers: int, templates: int) -> Tensor:
    """Coefficients that tie neighbours, as ALBERT's groups: of shape (layers, templates), one 1 in each row."""
    return torch.eye(templates)[torch.arange(layers) * templates // layers]


def evenly_spaced(weights: Sequence[Tensor], size: int) -> tuple[list[Tensor], Tensor]:
    """As `best_approximation`, but the templates are weights of evenly spaced layers, the first among them.

    The coefficients of these layers are ones and zeros, those of the others least squares.
    """
    kept = [k * len(weights) // size for k in range(size)]
    products = _products(weights)
    coefficients = torch.linalg.lstsq(products[kept][:, kept], products[kept], driver="gelsd").solution.T
    coefficients[kept] = torch.eye(size, dtype=torch.float64)
    return [weights[i].clone() for i in kept], coefficients


def _products(weights: Sequence[Tensor]) -> Tensor:
    """The Gram matrix of the weights, in float64."""
    flat = [weight.reshape(-1).float() for weight in weights]
    return torch.tensor([[torch.dot(a, b).item() for b in flat] for a in flat], dtype=torch.float64)


def combine(factors: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """sum_i factors[i] * weights[i], summed in float64; in the dtype of the weights."""
    total = torch.zeros_like(weights[0], dtype=torch.float64)
    for factor, weight in zip(factors.tolist(), weights, strict=True):
        total.add_(weight.double(), alpha=factor)
    return total.to(weights[0].dtype)


def group_by_kind(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, dict[str, Target]]:
    """Targets whose names differ in one block number only and that have equal shapes, by a name for the kind.

    The block number is the outermost one for which there are two such targets; where there are none, the target is
    left out.
    """
    prefix = f"{model.base_model_prefix}." if isinstance(model, PreTrainedModel) else ""
    rest = dict(targets)
    banks: dict[str, dict[str, Target]] = {}
    for depth in range(max(name.count(".") for name in targets) + 1):
        groups: dict[tuple[str, tuple[int, ...]], dict[str, Target]] = {}
        for name, target in rest.items():
            parts = name.split(".")
            if depth < len(parts) and parts[depth].isdigit():
                kind = ".".join(parts[:depth] + parts[depth + 1 :]).removeprefix(prefix)
                groups.setdefault((kind, tuple(target.value.shape)), {})[name] = target
        for (kind, _), group in groups.items():
            if len(group) > 1:
                label = re.sub(r"[^\w-]", "-", kind)[:100] or "layers"
                names = itertools.chain([label], (f"{label}-{i}" for i in itertools.count(2)))
                banks[next(name for name in names if name not in banks and is_bank_name(name))] = group
                rest = {name: target for name, target in rest.items() if name not in group}
    return banks


def _of_group(model: nn.Module, patterns: str | Sequence[str], exclude: Patterns) -> dict[str, Target]:
    """The modules that match or, where none does, parameters."""
    modules = [name for name, _ in model.named_modules()]
    params = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if isinstance(patterns, str):
        own = not _any(modules, patterns) and _any(params, patterns)
        return select_targets(model, None if own else patterns, exclude, patterns if own else None)
    named = [pattern for pattern in patterns if not _any(modules, [pattern]) and _any(params, [pattern])]
    others = [pattern for pattern in patterns if pattern not in named]
    return select_targets(model, others if others or not named else None, exclude, named or None)


def _any(names: Sequence[str], patterns: Patterns) -> bool:
    return any(matches(name, patterns) for name in names)


def _check_group(name: str, targets: Mapping[str, Target]) -> None:
    """Raise `ValueError` unless there are two layers and all have one shape."""
    if len(targets) < 2:
        raise ValueError(f"SharingConfig: group '{name}' has one layer, '{min(targets)}': it needs two.")
    shapes = {layer: list(target.value.shape) for layer, target in targets.items()}
    first = next(iter(shapes))
    for layer, shape in shapes.items():
        if shape != shapes[first]:
            raise ValueError(
                f"SharingConfig: group '{name}' has weights of different shapes: '{first}' {shapes[first]} and "
                f"'{layer}' {shape}."
            )


def _in_order(model: nn.Module, banks: Mapping[str, Mapping[str, Target]]) -> dict[str, Target]:
    places = {name: i for i, (name, _) in enumerate(model.named_modules())}
    chosen = [item for members in banks.values() for item in members.items()]
    return dict(sorted(chosen, key=lambda item: places[item[1].path]))


def _refuse_taken(targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if latent_of(target) is not None or sharing_of(target.module, target.parameter) is not None:
            raise ValueError(f"Another method works on '{name}' already, or it shares its weight; add it to exclude.")

"""Continuous Sparsification (Savarese, Silva and Maire, NeurIPS 2020).

Each weight has a score s and is multiplied by sigmoid(beta s). The temperature beta grows during training,
so the mask goes from soft to the hard mask 1[s > 0] without ever sampling.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.methods.base import Method, MethodConfig
from hf_approx.methods.budget import (
    Group,
    Scope,
    Target,
    check_fraction,
    check_target,
    cubic_ramp,
    global_top_k,
    plan,
    threshold,
    top_masks,
)
from hf_approx.methods.masks import GRANULARITIES, Granularity, SigmoidMask, in_fours, layout_of
from hf_approx.structures import Kind, Structure, express_in_config, find_structures, note_sizes, remove_units

PRESETS: dict[str, dict[str, Any]] = {
    # Starts close to the pretrained function: no rescaling, masks near one for all but the smallest weights.
    "pretrained": {
        "initial_score": 0.5,
        "score_init": "magnitude",
        "scale_mask": False,
        "initial_temperature": 5.0,
        "soft_fraction": 0.75,
        "mask_lr": 2e-3,
    },
    # The authors' settings: masks start at exactly one through the scale 1 / sigmoid(s0).
    "paper": {
        "initial_score": 0.0,
        "score_init": "constant",
        "scale_mask": True,
        "initial_temperature": 1.0,
        "soft_fraction": 0.5,
        "mask_lr": 1e-2,
    },
}


@dataclass(frozen=True)
class Settings:
    """What a preset decides."""

    initial_score: float
    score_init: str
    scale_mask: bool
    initial_temperature: float
    soft_fraction: float
    mask_lr: float


@dataclass
class SparsificationConfig(MethodConfig):
    """Continuous Sparsification in one run: soft masks, hardening, fine-tuning with the fixed mask.

    Fields left at None take the preset's value.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    target_sparsity: Target | None = field(
        default=0.9,
        metadata={
            "help": "Fraction removed, over all targets or by pattern: the scores are lowered together along a "
            "cubic ramp, and hardening keeps the top ones. None: plain CS, steered by the penalty and s0 alone."
        },
    )
    granularity: Granularity = field(
        default="weight",
        metadata={
            "help": "What has a score of its own: a 'weight' ('2:4': of every four inputs two stay), a 'row' or "
            "'column' of a weight, an attention 'head' or feed-forward 'neuron'. Heads and neurons are removed at "
            "the end: the model is smaller and faster anywhere."
        },
    )
    scope: Scope | None = field(
        default=None,
        metadata={"help": "Rank over all layers or in each. Default: in each for heads and neurons, else over all."},
    )
    preset: Literal["pretrained", "paper"] = field(
        default="pretrained", metadata={"help": "Where the fields left at None come from."}
    )
    initial_score: float | None = field(default=None, metadata={"help": "s0, the (mean) score at the start."})
    score_init: Literal["constant", "magnitude"] | None = field(
        default=None,
        metadata={"help": "'constant': s0 everywhere. 'magnitude': s0 |w| / mean |w|, in each layer."},
    )
    scale_mask: bool | None = field(
        default=None, metadata={"help": "Multiply soft and hard mask by 1 / sigmoid(s0), folded at the end."}
    )
    initial_temperature: float | None = field(default=None, metadata={"help": "beta at the first step."})
    final_temperature: float = field(default=200.0, metadata={"help": "beta when the soft phase ends."})
    soft_fraction: float | None = field(
        default=None, metadata={"help": "Part of training with soft masks; the rest fine-tunes."}
    )
    mask_lr: float | None = field(default=None, metadata={"help": "Adam's learning rate for the scores."})
    penalty: float = field(default=1e-8, metadata={"help": "lambda, per unit of mask; without a target sparsity."})

    def __post_init__(self) -> None:
        where = "SparsificationConfig"
        if self.preset not in PRESETS:
            raise ValueError(f"{where}: preset must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        settings = self.settings()
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"{where}: granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}."
            )
        if self.scope not in (None, "global", "layer"):
            raise ValueError(f"{where}: scope must be 'global' or 'layer', got {self.scope!r}.")
        if self.granularity == "2:4" and self.target_sparsity != 0.5:
            raise ValueError(f"{where}: granularity '2:4' removes half: set target_sparsity=0.5.")
        if self.target_sparsity is not None:
            check_target(where, self.target_sparsity)
        check_fraction(where, "soft_fraction", settings.soft_fraction)
        if not 0 < settings.initial_temperature <= self.final_temperature < math.inf:
            raise ValueError(
                f"{where}: needs 0 < initial_temperature <= final_temperature, got "
                f"{settings.initial_temperature} and {self.final_temperature}."
            )
        for name, value in (("mask_lr", settings.mask_lr), ("penalty", self.penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value}.")
        if not math.isfinite(settings.initial_score):
            raise ValueError(f"{where}: initial_score must be finite, got {settings.initial_score}.")
        if settings.score_init not in ("constant", "magnitude"):
            raise ValueError(f"{where}: score_init must be 'constant' or 'magnitude', got {settings.score_init!r}.")
        if settings.score_init == "magnitude" and (settings.scale_mask or settings.initial_score <= 0):
            raise ValueError(
                f"{where}: score_init='magnitude' needs initial_score > 0 and scale_mask=False, since 1/sigmoid(s0) "
                "makes the mask one only where every score is s0."
            )

    def settings(self) -> "Settings":
        """The preset's values, with the fields that were given in their place."""
        given = {name: getattr(self, name) for name in PRESETS[self.preset]}
        return Settings(**{name: PRESETS[self.preset][name] if v is None else v for name, v in given.items()})

    @property
    def structured(self) -> Kind | None:
        """The kind of structure that is removed, if it is one."""
        return self.granularity if self.granularity in ("head", "neuron") else None

    def build(self) -> "ContinuousSparsification":
        """The method this config describes."""
        return ContinuousSparsification(self)


class ContinuousSparsification(Method):
    """See [`SparsificationConfig`]."""

    name = "sparsification"

    def __init__(self, config: SparsificationConfig) -> None:
        super().__init__()
        self._config = config
        self._settings = config.settings()
        self.structures: dict[str, Structure] = {}
        self._settled = False
        self._learned_sparsity: float | None = None
        self._force = 0.0

    @property
    def config(self) -> SparsificationConfig:
        """The config that built this object."""
        return self._config

    @property
    def masks(self) -> list[SigmoidMask]:
        """The mask of every target, in the model's order."""
        return [cast(SigmoidMask, p) for p in self.parametrizations.values()]

    def select(self, model: nn.Module) -> dict[str, nn.Module]:
        """The targets or, for heads and neurons, the layers that read them."""
        kind = self._config.structured
        if kind is None:
            return super().select(model)
        structures = find_structures(model, kind, self._config.target_modules, self._config.exclude)
        self._model = model
        self.structures = {structure.consumer.module: structure for structure in structures}
        return {name: model.get_submodule(name) for name in self.structures}

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless every module has a target."""
        if self._config.target_sparsity is not None:
            plan(self._target_names(names), self._config.target_sparsity, "global")

    def _target_names(self, names: list[str]) -> list[str]:
        """What patterns are matched against: the modules or, for heads and neurons, those that hold them."""
        return [self.structures[name].name if name in self.structures else name for name in names]

    def parametrization(self, name: str, module: nn.Module) -> SigmoidMask:
        """A mask whose scores start as the config says."""
        settings = self._settings
        side = self.structures[name].consumer if name in self.structures else None
        layout = layout_of(self._config.granularity, name, module, side)
        s0, size = settings.initial_score, layout.sizes(module.get_parameter("weight"))
        if settings.score_init == "magnitude":
            scores = s0 * size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        else:
            scores = torch.full_like(size, s0)
        scale = 1 + math.exp(-s0) if settings.scale_mask else 1.0
        return SigmoidMask(scores, settings.initial_temperature, scale, layout)

    def param_groups(self) -> list[dict[str, Any]]:
        """The scores, at the mask learning rate."""
        return [{"params": [mask.scores for mask in self.masks], "lr": self._settings.mask_lr}]

    def on_step(self, progress: float) -> None:
        """Set the temperature, beta_0 (beta_T / beta_0)^x, and steer the scores; harden after the soft phase."""
        if self._settled:
            return
        config, soft = self._config, self._settings.soft_fraction
        if progress >= soft:
            self.settle()
            return
        start = self._settings.initial_temperature
        beta = start * (config.final_temperature / start) ** (progress / soft)
        for mask in self.masks:
            mask.temperature.fill_(beta)
        if config.target_sparsity is not None:
            self._steer(progress / soft)

    def on_round_step(self, round_: int, rounds: int, progress: float) -> None:
        """As `on_step` for ticket search: the temperature rises in each round, the sparsity over all of them.

        Args:
            round_: Which round, from 0.
            rounds: How many there are.
            progress: From 0 at the first step of the round to less than 1 at its last.
        """
        start = self._settings.initial_temperature
        for mask in self.masks:
            mask.temperature.fill_(start * (self._config.final_temperature / start) ** progress)
        if self._config.target_sparsity is not None:
            self._steer((round_ + progress) / rounds)

    @torch.no_grad()
    def next_round(self, legacy: bool = False) -> None:
        """Reset scores and temperature for another round: s <- min(beta_T s, s0), beta <- beta_0.

        What was removed stays removed, what was kept returns to the start. `legacy=True` is the published
        script's min(s, s0), which lets removed weights come back half on.
        """
        factor = 1.0 if legacy else self._config.final_temperature
        for mask in self.masks:
            mask.scores.copy_((mask.scores * factor).clamp(max=self._settings.initial_score))
            mask.temperature.fill_(self._settings.initial_temperature)

    @torch.no_grad()
    def _steer(self, fraction: float) -> None:
        """Lower the scores that are ranked together by one number, so that the wanted share is below zero.

        The number is what a penalty on the mask would have to reach: a force equal on all scores, whose
        multiplier is solved for instead of tuned.
        """
        masks = self.masks
        if self._config.granularity == "2:4":
            for module, mask in zip(self.modules.values(), masks, strict=True):
                fours = in_fours(module, mask.scores)
                middle = fours.sort(dim=-1).values[..., 1:3].mean(-1, keepdim=True)
                fours.sub_(middle * cubic_ramp(fraction, 1.0))
                self._force = float(middle.mean())
            return
        for group in self._groups():
            wanted = cubic_ramp(fraction, group.target)
            if wanted > 0:
                force = threshold([masks[i].scores for i in group.members], wanted)
                for i in group.members:
                    masks[i].scores.sub_(force)
                self._force = float(force)

    def _groups(self) -> list[Group]:
        target = self._config.target_sparsity
        scope: Scope = self._config.scope or ("layer" if self._config.structured else "global")
        return [] if target is None else plan(self._target_names(list(self.modules)), target, scope)

    @torch.no_grad()
    def _soft_sparsity(self) -> float:
        masks = self.masks
        total = sum((mask.mask().sum(dtype=torch.float64) / mask.scale for mask in masks), torch.zeros(()))
        return 1 - float(total) / self._numel

    @property
    def _numel(self) -> int:
        return sum(mask.scores.numel() for mask in self.masks)

    def penalty(self) -> Tensor | None:
        """lambda * sum of masks, scale included; None with a target or once the mask is fixed."""
        if self._settled or self._config.target_sparsity is not None:
            return None
        return self._config.penalty * torch.stack([mask.mask().sum() for mask in self.masks]).sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Harden: keep scores above zero or, with a target, the top scores over all layers."""
        masks = self.masks
        kept = [mask.scores > 0 for mask in masks]
        self._learned_sparsity = 1 - sum(int(k.sum()) for k in kept) / self._numel
        if self._config.granularity == "2:4":
            pairs = zip(self.modules.values(), masks, strict=True)
            kept = [self._best_two(module, mask.scores) for module, mask in pairs]
        elif self._config.target_sparsity is not None:
            kept = top_masks([mask.scores for mask in masks], self._groups())
        if self.structures:
            # A layer without any unit could not be built: its best one stays.
            kept = [k if bool(k.any()) else global_top_k([m.scores], 1)[0] for k, m in zip(kept, masks, strict=True)]
        for mask, keep in zip(masks, kept, strict=True):
            mask.scores.copy_(torch.where(keep, math.inf, -math.inf))
        self._force = 0.0
        self._settled = True

    @staticmethod
    def _best_two(module: nn.Module, scores: Tensor) -> Tensor:
        """The mask of the best two of every four inputs."""
        keep = torch.zeros_like(scores, dtype=torch.bool)
        in_fours(module, keep).scatter_(-1, in_fours(module, scores).topk(2, dim=-1).indices, True)
        return keep

    def bake(self) -> list[str]:
        """Leave masked weights; for heads and neurons, returns the weights of every layer they are part of."""
        if not self._settled:
            self.settle()
        self._kept = {name: mask.scores.detach() > 0 for name, mask in zip(self.modules, self.masks, strict=True)}
        names = super().bake()
        sides = [side for structure in self.structures.values() for side in structure.sides]
        return [f"{side.module}.weight" for side in sides] or names

    def remove(self) -> None:
        """Cut heads and neurons that are off out of the model, and say so in its config, or else on the model."""
        structures = list(self.structures.values())
        if not structures:
            return
        kept = [self._kept[structure.consumer.module] for structure in structures]
        self.removed = sum(remove_units(self._model, s, keep) for s, keep in zip(structures, kept, strict=True))
        counts = [int(keep.sum()) for keep in kept]
        if not (isinstance(self._model, PreTrainedModel) and express_in_config(self._model, structures, counts)):
            note_sizes(self._model, structures)

    @property
    def is_final(self) -> bool:
        """Whether the mask is hard."""
        return self._settled

    @property
    def resizes(self) -> bool:
        """Whether heads or neurons are cut out."""
        return self._config.structured is not None

    @property
    def settles_at(self) -> float:
        """The end of the soft phase."""
        return self._settings.soft_fraction

    def metrics(self) -> dict[str, float]:
        """Sparsity of the hard and the soft mask, temperature, and penalty.

        The penalty is the term in the loss or, with a target, what was taken off every score in the last step.
        """
        kept = sum(int((mask.scores > 0).sum()) for mask in self.masks)
        with torch.no_grad():
            penalty = self.penalty()
        return {
            "sparsity": 1 - kept / self._numel,
            "soft_sparsity": self._soft_sparsity(),
            "temperature": float(self.masks[0].temperature),
            "penalty": self._force if penalty is None else float(penalty),
        }

    def report(self) -> dict[str, Any]:
        """Also the sparsity the scores had learned before the correction to the target."""
        learned = self._learned_sparsity
        return {**super().report(), **({} if learned is None else {"learned_sparsity": learned})}

    def state_dict(self) -> dict[str, Any]:
        """The phase; scores and temperature are in the model."""
        return {"settled": self._settled, "learned_sparsity": self._learned_sparsity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._settled = state["settled"]
        self._learned_sparsity = state["learned_sparsity"]

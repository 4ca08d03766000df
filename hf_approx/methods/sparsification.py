"""Continuous Sparsification (Savarese, Silva and Maire, NeurIPS 2020).

Each weight has a score s and is multiplied by sigmoid(beta s). The temperature beta grows during training,
so the mask goes from soft to the hard mask 1[s > 0] without ever sampling.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.blocks import Blocks, block_sizes, find_blocks, moved, remove_blocks, weights_of
from hf_approx.checkpoint.saving import METHOD
from hf_approx.finite import refuse_not_finite
from hf_approx.methods.base import HISTOGRAM_BINS, Inserted, Method
from hf_approx.methods.budget import Group, Scope, global_top_k, plan, top_masks
from hf_approx.methods.latent import latent_of
from hf_approx.methods.layers import BlockMask, is_masked
from hf_approx.methods.masks import Layout, SigmoidMask, layout_of
from hf_approx.methods.sparsification_config import SparsificationConfig
from hf_approx.methods.steering import best_two, lower, lower_fours, resting_level
from hf_approx.modules.sharded import piece, piece_of, summed, total, totals, whole
from hf_approx.structures import Structure, express_in_config, find_structures, note_sizes, remove_units
from hf_approx.targets import Target

Mask = TypeVar("Mask", bound=SigmoidMask)


class ContinuousSparsification(Method):
    """See [`SparsificationConfig`]."""

    name = "sparsification"

    def __init__(self, config: SparsificationConfig) -> None:
        super().__init__()
        self._config = config
        self._settings = config.settings()
        self.structures: dict[str, Structure] = {}
        self.blocks: dict[str, Blocks] = {}
        self.block_masks: dict[str, BlockMask] = {}
        self._temperatures: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._frozen: list[nn.Parameter] = []
        self._settled = False
        self._learned_sparsity: float | None = None
        self._force: Tensor | float = 0.0

    @property
    def config(self) -> SparsificationConfig:
        """The config that built this object."""
        return self._config

    @property
    def masks(self) -> list[SigmoidMask]:
        """The mask of every target, in the model's order."""
        return [*self.block_masks.values(), *(cast(SigmoidMask, stage) for stage in self.stages.values())]

    @property
    def inserted(self) -> list[Inserted]:
        """The masks on layers."""
        return list(self.block_masks.values())

    @property
    def target_names(self) -> list[str]:
        """Names of what each mask is of: targets, layers that read what is removed, or lists of layers."""
        return [*self.blocks, *self.targets]

    def select(self, model: nn.Module) -> dict[str, Target]:
        """The targets; for heads and neurons, the layers that read them; none for layers, which have no one weight."""
        kind, patterns = self._config.structured, (self._config.target_modules, self._config.exclude)
        if kind is None:
            return super().select(model)
        if self._config.target_parameters is not None:
            raise ValueError(f"SparsificationConfig: {kind}s are no parameters; leave out target_parameters.")
        self._model = model
        if kind == "layer":
            self.blocks = {blocks.name: blocks for blocks in find_blocks(model, *patterns)}
            masked = [name for name in self.blocks if is_masked(model, name)]
            if masked:
                raise ValueError(f"Another method works on '{masked[0]}' already; add it to exclude.")
            return {}
        self.structures = {s.consumer.module: s for s in find_structures(model, kind, *patterns)}
        sides = [side.module for structure in self.structures.values() for side in structure.sides]
        taken = [name for name in sides if latent_of(Target(name, model.get_submodule(name))) is not None]
        if taken:
            raise ValueError(
                f"'{taken[0]}' is part of the {kind}s to remove, and another method works on it: exclude it there."
            )
        return {name: Target(name, model.get_submodule(name)) for name in self.structures}

    def attach(self, model: nn.Module, earlier: Sequence[Method] = ()) -> None:
        """Mask the targets, and freeze what is not to be trained. The model is unchanged if this raises."""
        super().attach(model, earlier)
        if not self._config.train_weights:
            self._freeze(model)
        for name, blocks in self.blocks.items():
            self.block_masks[name] = self.block_mask(blocks)
            setattr(self.block_masks[name], METHOD, self.name)
            self.block_masks[name].install(model, blocks)

    def detach(self) -> None:
        """Take the method off again: every weight is what the optimizer trained, unmasked, and can be trained."""
        self._uninstall()
        self.block_masks, self.blocks = {}, {}
        super().detach()
        self._thaw()

    def _uninstall(self) -> None:
        for mask in self.block_masks.values():
            mask.uninstall()

    def _freeze(self, model: nn.Module) -> None:
        sides = [side.module for structure in self.structures.values() for side in structure.sides]
        for target in [Target(name, model.get_submodule(name)) for name in sides] or self.targets.values():
            latent = latent_of(target)
            weight = target.value if latent is None else latent.weight
            if weight.requires_grad:
                weight.requires_grad_(False)
                self._frozen.append(weight)

    def _thaw(self) -> None:
        for weight in self._frozen:
            weight.requires_grad_(True)
        self._frozen = []

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless every module has a target."""
        if self._config.target_sparsity is not None:
            plan(self._patterned([*self.blocks, *names]), self._config.target_sparsity, "global")

    def _patterned(self, names: list[str]) -> list[str]:
        """What patterns are matched against: the modules or, for structures, those that hold them."""
        return [self.structures[name].name if name in self.structures else name for name in names]

    def stage(self, name: str, target: Target) -> SigmoidMask:
        """A mask whose scores start as the config says."""
        side = self.structures[name].consumer if name in self.structures else None
        layout = layout_of(self._config.granularity, target, side)
        return self._start(SigmoidMask, layout.sizes(target.value), layout)

    def block_mask(self, blocks: Blocks) -> BlockMask:
        """A mask on layers, likewise."""
        layers = cast(nn.ModuleList, self._model.get_submodule(blocks.name))
        return self._start(BlockMask, block_sizes(layers), Layout())

    def _start(self, kind: type[Mask], size: Tensor, layout: Layout) -> Mask:
        """A mask of what is so large."""
        settings = self._settings
        s0 = settings.initial_score
        if settings.score_init == "magnitude":
            scores = s0 * size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        else:
            scores = torch.full_like(size, s0)
        scale = 1 + math.exp(-s0) if settings.scale_mask else 1.0
        where = (scores.device, scores.dtype)
        if where not in self._temperatures:
            self._temperatures[where] = torch.tensor(settings.initial_temperature, dtype=scores.dtype).to(where[0])
        return kind(scores, self._temperatures[where], scale, layout)

    def param_groups(self) -> list[dict[str, Any]]:
        """The scores, at the mask learning rate."""
        return [{"params": [mask.scores for mask in self.masks], "lr": self._settings.mask_lr}]

    def on_step(self, progress: float) -> None:
        """Set the temperature, beta_0 (beta_T / beta_0)^x, and steer the scores; harden after the soft phase."""
        if self._settled:
            return
        self.reshard()
        config, soft = self._config, self._settings.soft_fraction
        if progress >= soft:
            self.settle()
            return
        start = self._settings.initial_temperature
        beta = start * (config.final_temperature / start) ** (progress / soft)
        self._set_temperature(beta)
        if config.target_sparsity is not None:
            self._steer(progress / soft, progress / soft)

    def on_round_step(self, round_: int, rounds: int, progress: float) -> None:
        """The temperature rises in each round, the sparsity over all of them."""
        start = self._settings.initial_temperature
        self._set_temperature(start * (self._config.final_temperature / start) ** progress)
        if self._config.target_sparsity is not None:
            self._steer((round_ + progress) / rounds, progress)

    @torch.no_grad()
    def end_round(self, round_: int, rounds: int, legacy: bool = False) -> bool:
        """Reset scores and temperature for another round: s <- min(beta_T s, s0), beta <- beta_0.

        What was removed stays removed, what was kept returns to the start. `legacy=True` is the published
        script's min(s, s0), which lets removed weights come back half on. The weights go on.
        """
        if round_ + 1 == rounds:
            return False
        factor = 1.0 if legacy else self._config.final_temperature
        for mask in self.masks:
            mask.scores.copy_((mask.scores * factor).clamp(max=self._settings.initial_score))
        self._set_temperature(self._settings.initial_temperature)
        return False

    def _set_temperature(self, beta: float) -> None:
        for temperature in self._temperatures.values():
            temperature.fill_(beta)

    def _steer(self, fraction: float, progress: float) -> None:
        """Keep the sparsity on its ramp, at `fraction`; `progress` is the position in the soft phase or round."""
        level = resting_level(self._settings, progress)
        if self._config.granularity == "2:4":
            self._force = lower_fours(list(self.targets.values()), self.masks, fraction, level)
        else:
            groups = self._groups()
            members: list[list[Tensor]] = [[] for _ in groups]
            for part in self.parts:
                members[cast(int, part.group)].append(cast(SigmoidMask, part.stage).scores)
            for i, mask in enumerate(self.block_masks.values()):
                members[next(g for g, group in enumerate(groups) if i in group.members)].append(mask.scores)
            targets = [group.target for group in groups]
            self._force = lower(members, targets, fraction, level, stacked=self.stacked is not None)

    def group(self, name: str) -> int | None:
        """Which of those that are ranked together a target belongs to."""
        at = self.target_names.index(name)
        return next((i for i, group in enumerate(self._groups()) if at in group.members), None)

    def _refuse_scores(self) -> None:
        """Raise `NotFiniteError` if a score is NaN or infinite, before the mask is fixed."""
        scores = (mask.scores for mask in self.masks)
        refuse_not_finite(self.name, zip((f"{name}.scores" for name in self.target_names), scores, strict=True))

    def _groups(self) -> list[Group]:
        target = self._config.target_sparsity
        scope: Scope = self._config.scope or ("layer" if self._config.structured else "global")
        return [] if target is None else plan(self._patterned(self.target_names), target, scope)

    @torch.no_grad()
    def _soft_sparsity(self) -> float:
        masks = self.masks
        sums = [mask.mask().sum(dtype=torch.float64) / mask.scale for mask in masks]
        return 1 - float(totals(sums, [mask.scores for mask in masks]).sum()) / self._numel

    @property
    def _numel(self) -> int:
        return sum(mask.scores.numel() for mask in self.masks)

    def _count(self) -> int:
        """How many scores are above zero."""
        scores = [mask.scores.detach() for mask in self.masks]
        return int(totals([(piece(s) > 0).sum() for s in scores], scores).sum())

    def penalty(self) -> Tensor | None:
        """lambda * sum of masks, scale included; None with a target or once the mask is fixed."""
        if self._settled or self._config.target_sparsity is not None:
            return None
        masks = self.masks
        return self._config.penalty * summed([mask.mask().sum() for mask in masks], [mask.scores for mask in masks])

    @torch.no_grad()
    def settle(self) -> None:
        """Harden: keep scores above zero or, with a target, the top scores over all layers."""
        self.reshard()
        if not self._settled:
            self._refuse_scores()
        masks = self.masks
        scores = [mask.scores for mask in masks]
        kept = [piece(s) > 0 for s in scores]
        self._learned_sparsity = 1 - self._count() / self._numel
        if self._config.granularity == "2:4":
            pairs = zip(self.targets.values(), masks, strict=True)
            kept = [piece_of(best_two(target, whole(m.scores)), m.scores) for target, m in pairs]
        elif self._config.target_sparsity is not None:
            kept = top_masks(scores, self._groups())
        if self._config.structured:
            # A layer without any unit could not be built, nor a model without any layer: the best one stays.
            some = totals([k.sum() for k in kept], scores) > 0
            kept = [k if any_ else global_top_k([s], 1)[0] for k, s, any_ in zip(kept, scores, some, strict=True)]
        for mask, keep in zip(masks, kept, strict=True):
            piece(mask.scores).copy_(torch.where(keep, math.inf, -math.inf))
        self._force = 0.0
        self._settled = True

    def bake(self) -> list[str]:
        """Leave masked weights; for structures, returns the weights of every layer they are part of or hold."""
        self.refuse_diverged()
        if not self._settled:
            self.settle()
        self._kept = {name: mask.scores.detach() > 0 for name, mask in zip(self.target_names, self.masks, strict=True)}
        self._uninstall()
        names = super().bake()
        self._thaw()
        sides = [side for structure in self.structures.values() for side in structure.sides]
        inside = [name for blocks in self.blocks.values() for name in weights_of(self._model, blocks)]
        return [f"{side.module}.weight" for side in sides] or inside or names

    @property
    def renames(self) -> bool:
        """Whether it removes layers: those after them move up."""
        return bool(self.blocks)

    def remove(self, names: list[str]) -> list[str]:
        """Cut what is off out of the model, and say so in its config, or else on the model."""
        for name, blocks in self.blocks.items():
            removed, moves = remove_blocks(cast(PreTrainedModel, self._model), blocks, self._kept[name].tolist())
            self.removed += removed
            names = [new for old in names if (new := moved(old, moves)) is not None]
        structures = list(self.structures.values())
        if not structures:
            return names
        kept = [self._kept[structure.consumer.module] for structure in structures]
        self.removed = sum(remove_units(self._model, s, keep) for s, keep in zip(structures, kept, strict=True))
        counts = [int(keep.sum()) for keep in kept]
        if not (isinstance(self._model, PreTrainedModel) and express_in_config(self._model, structures, counts)):
            note_sizes(self._model, structures)
        return names

    @property
    def is_final(self) -> bool:
        """Whether the mask is hard."""
        return self._settled

    @property
    def resizes(self) -> bool:
        """Whether heads or neurons are cut out."""
        return self._config.structured is not None

    @property
    def sharding_problem(self) -> str | None:
        """Masks on layers act outside the layer that holds them."""
        if self._config.structured != "layer":
            return None
        return f"{self.name} masks whole layers, and those masks cannot be sharded; train without FSDP."

    @property
    def settles_at(self) -> float:
        """The end of the soft phase."""
        return self._settings.soft_fraction

    def metrics(self) -> dict[str, float]:
        """Sparsity of the hard and the soft mask, temperature, and penalty.

        The penalty is the term in the loss or, with a target, what was taken off every score in the last step.
        """
        with torch.no_grad():
            penalty = self.penalty()
        return {
            "sparsity": 1 - self._count() / self._numel,
            "soft_sparsity": self._soft_sparsity(),
            "temperature": float(self.masks[0].temperature),
            "penalty": float(self._force if penalty is None else penalty),
        }

    def histogram(self) -> list[int]:
        """Counts of the soft masks, unscaled, in `HISTOGRAM_BINS` equal bins from 0 to 1."""
        counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.float64)
        for mask in self.masks:
            values = (mask.mask().detach() / mask.scale).float()
            found = torch.histc(values, HISTOGRAM_BINS, 0.0, 1.0).double()
            counts += total(found, mask.scores).cpu()
        return [int(count) for count in counts]

    def report(self) -> dict[str, Any]:
        """Also the sparsity that was asked for, the one the scores had learned, and the correction between them."""
        report, learned = super().report(), self._learned_sparsity
        if learned is not None:
            report.update(learned_sparsity=learned, last_correction=report["sparsity"] - learned)
        return report

    def state_dict(self) -> dict[str, Any]:
        """The phase; scores and temperature are in the model."""
        return {"settled": self._settled, "learned_sparsity": self._learned_sparsity, "force": float(self._force)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._settled = state["settled"]
        self._learned_sparsity, self._force = state["learned_sparsity"], state["force"]

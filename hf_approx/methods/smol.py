"""SMOL (Savarese, Yuan, Li and Maire, "Not All Bits have Equal Value", NeurIPS 2022): learned precisions.

Each part of a weight has a limit s, and noise of size sigmoid(s) is added to it in training. A part that tolerates
more noise needs fewer bits: after the noisy phase its limit becomes a precision, and rounded weights train on.

Where the text of the paper could not be read, the equations are this project's reconstruction: the law of the noise,
the scale of each output channel, and the quantization of activations. Meeting a budget of bits is an extension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_approx.finite import refuse_not_finite
from hf_approx.logs import get_logger
from hf_approx.methods.activations import NoisyActivation, install_noise
from hf_approx.methods.base import Inserted, Method, Part, incoming
from hf_approx.methods.budget import cubic_ramp, plan
from hf_approx.methods.grids import GridMethod
from hf_approx.methods.latent import value_of
from hf_approx.methods.noise import NoisyWeight
from hf_approx.methods.precision import TOLERANCE, Budget, map_entropy, precision, steer
from hf_approx.methods.rounding import (
    SCALE_DTYPE,
    fit_scale,
    governed,
    parts_shape,
    reduce,
)
from hf_approx.methods.smol_config import SmolConfig
from hf_approx.modules.activation import install, uninstall
from hf_approx.modules.sharded import whole, write
from hf_approx.packing.grid import MAX_BITS
from hf_approx.targets import Target, matches

logger = get_logger(__name__)

NOISE_FRACTION = 0.5
"""Default share of training with noise."""
MEASURED = 0.25
"""Share of the noise after which limits are moved apart by curvature."""


class Smol(GridMethod):
    """See [`SmolConfig`].

    Args:
        config: Says how.
        trains: False: precisions are settled right after `attach`, so that no scales are fitted to start from.
    """

    name = "smol"

    def __init__(self, config: SmolConfig, trains: bool = True) -> None:
        super().__init__()
        self._config = config
        self._trains = trains
        self._until = config.noise_fraction or 0.0
        self._settled = False
        self._step = 0
        self._spread = False
        self._first = 0
        self.activations: dict[str, NoisyActivation] = {}
        self.budgets: list[Budget] = []
        self._stacked_budgets: tuple[list[Part], list[Budget]] | None = None
        self._frozen: list[nn.Parameter] = []

    @property
    def config(self) -> SmolConfig:
        """The config that built this object."""
        return self._config

    @property
    def noises(self) -> list[NoisyWeight]:
        """The noise of every target, in the model's order."""
        return [cast(NoisyWeight, stage) for stage in self.stages.values()]

    @property
    def inserted(self) -> list[Inserted]:
        """What makes noise of the inputs."""
        return list(self.activations.values())

    def attach(self, model: nn.Module, earlier: Sequence[Method] = ()) -> None:
        """As of `Method`; also quantizes the inputs of the targets, if the config says so."""
        config = self._config
        slowest = max(earlier, key=lambda method: method.settles_at, default=None)
        boundary = 0.0 if slowest is None else slowest.settles_at
        if slowest is not None and config.noise_fraction is not None and config.noise_fraction < boundary:
            raise ValueError(
                f"SmolConfig: noise_fraction={config.noise_fraction} is over before the mask of {slowest.name} is "
                f"fixed, at {boundary}; leave noise_fraction out, or raise it to that."
            )
        given = config.noise_fraction
        self._until = max(NOISE_FRACTION, boundary) if given is None else given
        # Noise of its own beside that of another SMOL in the run.
        self._first = sum(
            len(method.noises) + len(method.activations) for method in earlier if isinstance(method, Smol)
        )
        super().attach(model, earlier)
        try:
            if config.activations:
                self.activations = install_noise(
                    self._with_inputs(),
                    per_channel=config.activation_granularity == "channel",
                    unsigned=config.unsigned_activations,
                    initial_bits=config.initial_bits,
                    law=config.noise,
                    seed=config.seed,
                )
            self._plan()
        except ValueError:
            self.detach()
            raise
        if not config.train_weights:
            self._frozen = [latent.weight for latent in self.latents if latent.weight.requires_grad]
            for weight in self._frozen:
                weight.requires_grad_(False)

    def _with_inputs(self) -> dict[str, nn.Module]:
        """The layers among what holds the targets: what else holds any sees to its inputs itself."""
        others = [n for n, t in self.targets.items() if t.parameter != "weight" or t.axis("expert") is not None]
        if others:
            logger.warning(
                "SmolConfig: the inputs of %d targets, '%s' first, are not those of a layer and stay as they are.",
                len(others),
                others[0],
            )
        return {name: module for name, module in self.modules.items() if name not in others}

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless every module has a target."""
        if self._config.target_bits is not None:
            plan(names, self._config.target_bits, "global", "target_bits")

    def stage(self, name: str, target: Target) -> NoisyWeight:
        """Noise at the initial precision, with scales that fit the final one."""
        config, weight = self._config, value_of(target)
        parts = parts_shape(target, config.granularity, config.group_size)
        scales = parts_shape(target, config.scale_granularity, config.group_size)
        wanted = self._wanted(name)
        initial = config.initial_bits if wanted is None else max(config.initial_bits, wanted)
        bits = torch.full([1] * weight.dim(), round(wanted or initial), dtype=torch.uint8, device=weight.device)
        scale = fit_scale(weight, bits, scales) if self._trains else torch.ones(scales, device=weight.device)
        return NoisyWeight(parts, scale, config.train_scale, initial, config.noise, config.seed, weight.dtype)

    def _wanted(self, name: str) -> float | None:
        target = self._config.target_bits
        if isinstance(target, Mapping):
            return next(bits for pattern, bits in target.items() if matches(name, [pattern]))
        return target

    def _plan(self) -> None:
        """Group the limits by their targets; raises `ValueError` for targets that whole parts cannot meet."""
        config, noises = self._config, self.noises
        makers: list[NoisyWeight | NoisyActivation] = [*noises, *self.activations.values()]
        for index, maker in enumerate(makers, self._first):
            maker.indices = [index]
        shapes = [target.value.shape for target in self.targets.values()]
        sizes = [governed(shape, p.bits.shape) for shape, p in zip(shapes, noises, strict=True)]
        for members, target in self._groups():
            budget = Budget([noises[i] for i in members], [sizes[i] for i in members], target, config.bits)
            self.budgets.append(budget)
        if self.activations:
            quantizers = list(self.activations.values())
            sizes = [torch.full((1,), q.governs) for q in quantizers]
            allowed = range(1, MAX_BITS + 1)
            self.budgets.append(Budget(quantizers, sizes, config.activation_bits, allowed))
        for budget in self.budgets:
            budget.check()

    def _groups(self) -> list[tuple[Sequence[int], float | None]]:
        """Which modules share a target, and that target."""
        target = self._config.target_bits
        if target is None:
            return [(range(len(self.targets)), None)]
        return [(g.members, g.target) for g in plan(list(self.targets), target, "global", "target_bits")]

    def detach(self) -> None:
        """As of `Method`; also leaves the inputs alone, and weights that were frozen can be trained."""
        for name in self.activations:
            uninstall(self.modules[name])
        self.activations, self.budgets = {}, []
        super().detach()
        self._thaw()

    def _thaw(self) -> None:
        for weight in self._frozen:
            weight.requires_grad_(True)
        self._frozen = []

    def param_groups(self) -> list[dict[str, Any]]:
        """The limits and, if they are trained, the scales; and the largest values of activations."""
        # Those of activations are parameters of the model, which `fully_shard` splits: no group mixes both kinds.
        config, quantizers = self._config, list(self.activations.values())
        groups = [
            {"params": [noise.limits for noise in self.noises], "lr": config.lr},
            {"params": [q.limits for q in quantizers], "lr": config.lr},
            {"params": [p.log_scale for p in self.noises] if config.train_scale else [], "lr": config.scale_lr},
            {"params": [q.log_limit for q in quantizers], "lr": config.scale_lr},
        ]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def on_step(self, progress: float) -> None:
        """Draw new noise and steer the precisions, or fix them."""
        self.reshard()
        if not self._settled:
            if self._step == 1:
                for quantizer in self.activations.values():
                    quantizer.start()
            if progress >= self._until:
                self.settle()
            else:
                self._steer(progress / self._until)
            self._step += 1
            self._tell()

    def group(self, name: str) -> int:
        """Which targets it shares a budget with."""
        at = list(self.targets).index(name)
        return next(i for i, (members, _) in enumerate(self._groups()) if at in members)

    def _at_work(self) -> list[Budget]:
        """The budgets, of what is stacked where something is."""
        if self.stacked is None:
            return self.budgets
        if self._stacked_budgets is None or self._stacked_budgets[0] is not self.stacked:
            made = []
            for i, budget in enumerate(self.budgets):
                own = [(cast(NoisyWeight, p.stage), p.weight.shape[1:]) for p in self.stacked if p.group == i]
                sizes = [governed(shape, noise.bits.shape[1:])[None] for noise, shape in own]
                made.append(
                    replace(budget, noises=[noise for noise, _ in own], governs=sizes, stacked=True) if own else budget
                )
            self._stacked_budgets = (self.stacked, made)
        return self._stacked_budgets[1]

    def _tell(self) -> None:
        """Hand the position in training to whatever makes noise."""
        stacked = [cast(NoisyWeight, part.stage) for part in self.stacked or ()]
        for noise in [*self.noises, *stacked]:
            noise.step, noise.frozen = self._step, self._settled
        for quantizer in self.activations.values():
            quantizer.tell(self._step, observing=self._step <= 1, frozen=self._settled)

    def _steer(self, fraction: float) -> None:
        if fraction >= MEASURED and not self._spread:
            self._spread = True
            for budget in self.budgets:
                if budget.target is not None and self._config.limit_init == "curvature":
                    budget.spread()
        for budget in self._at_work():
            if budget.target is not None:
                start = max(self._config.initial_bits, budget.target)
                wanted = start + (budget.target - start) * cubic_ramp(fraction, 1.0)
                steer(budget.limits, budget.sizes, wanted, budget.allowed[0], budget.allowed[-1], budget.stacked)

    def on_gradients(self, scale: float = 1.0) -> None:
        """Add the gradient of a penalty whose multiplier keeps the average precision where it is."""
        if self._settled:
            return
        for budget in self._at_work():
            if budget.target is not None:
                if self._config.limit_init == "curvature" and not self._spread:
                    budget.measure(scale)
                budget.balance(scale)

    def penalty(self) -> Tensor | None:
        """lambda * sum over weights of (p - 1), for what has no target; None once precisions are fixed."""
        free = [budget.penalty() for budget in self._at_work() if budget.target is None]
        if self._settled or not free:
            return None
        return self._config.penalty * torch.stack(free).sum()

    @torch.no_grad()
    def settle(self) -> None:
        """Assign precisions, within the budget if there is one, and fit the scales to them."""
        if self._settled:
            return
        self.reshard()
        self._refuse_learned()
        targets = list(zip(self.targets.values(), self.noises, strict=True))
        kept = [reduce((incoming(t, noise) != 0).float(), noise.bits.shape) for t, noise in targets]
        for budget, (members, _) in zip(self.budgets, self._groups(), strict=False):
            budget.choose([kept[i] for i in members])
        for target, noise in targets:
            weight = incoming(target, noise)
            write(noise.log_scale, fit_scale(weight, whole(noise.bits), noise.log_scale.shape).log())
        if self.activations:
            self.budgets[-1].choose(self.budgets[-1].sizes)
        self._settled = True
        self._tell()
        self._compare_budgets(kept)

    def _refuse_learned(self) -> None:
        """Raise `NotFiniteError` if a weight, or a number that is learned about one, is NaN or infinite."""
        tensors = [(latent.target.name, latent.weight) for latent in self.latents]
        for kind in ("limits", "log_scale"):
            tensors += [(f"{n}.{kind}", getattr(p, kind)) for n, p in zip(self.targets, self.noises, strict=True)]
        for kind in ("limits", "log_limit"):
            tensors += [(f"{n}.input.{kind}", getattr(q, kind)) for n, q in self.activations.items()]
        refuse_not_finite(self.name, tensors)

    def _compare_budgets(self, kept: Sequence[Tensor]) -> None:
        """Warn of targets that the parts were too coarse to meet, counting these weights of every part."""
        for members, target in self._groups():
            total = sum(float(kept[i].sum()) for i in members)
            spent = sum(float((kept[i] * whole(self.noises[i].bits)).sum()) for i in members)
            if target is not None and total and abs(spent / total - target) > TOLERANCE:
                logger.warning(
                    "SmolConfig: the precisions of %d parts average %.3f bits instead of %g; choose a finer "
                    "granularity than '%s' or that target.",
                    sum(self.noises[i].bits.numel() for i in members),
                    spent / total,
                    target,
                    self._config.granularity,
                )

    def bake(self) -> list[str]:
        """Leave weights on their grids, which are then in `grids`, and quantizers of the inputs in the layers."""
        names = super().bake()
        self._thaw()
        for name, quantizer in self.activations.items():
            install(self.modules[name], quantizer.inference().train(self.modules[name].training))
        return names

    @property
    def is_final(self) -> bool:
        """Whether the precisions are fixed."""
        return self._settled

    @property
    def settles_at(self) -> float:
        """The end of the noise."""
        return self._until

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Average precision, and lambda: given, or with a target the one solved for in the last step."""
        weights = self.budgets[: len(self.budgets) - bool(self.activations)]
        if self._settled:
            sizes, bits = self._kept()
            average = float((sizes * bits).sum() / sizes.sum().clamp_min(1))
        else:
            average = sum(b.average() * b.total for b in weights) / sum(b.total for b in weights)
        solved = weights[0].target is not None
        numbers = {"bits": average, "penalty": float(weights[0].multiplier) if solved else self._config.penalty}
        if self.activations:
            quantizers = self.activations.values()
            total = sum(q.governs * q.channels for q in quantizers)
            used = [q.bits if self._settled else precision(whole(q.limits)) for q in quantizers]
            spent = sum(q.governs * float(bits.sum()) for q, bits in zip(quantizers, used, strict=True))
            numbers["activation_bits"] = spent / total
        return numbers

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Weights that are not zero in every part, and its bits; all in one dimension."""
        kept, bits = [], []
        for target, noise in zip(self.targets.values(), self.noises, strict=True):
            weight = incoming(target, noise)
            kept.append(reduce((weight != 0).float(), noise.bits.shape).reshape(-1).double().cpu())
            bits.append(whole(noise.bits).reshape(-1).cpu())
        return torch.cat(kept), torch.cat(bits)

    def report(self) -> dict[str, Any]:
        """Also the share of weights of each precision, and the bits with the map of precisions and the scales."""
        if not self._settled:
            return super().report()
        sizes, bits = self._kept()
        total = max(float(sizes.sum()), 1.0)
        shares = {str(p): float(sizes[bits == p].sum()) / total for p in self._config.bits}
        scales = sum(noise.log_scale.numel() for noise in self.noises) * torch.finfo(SCALE_DTYPE).bits
        extra = (map_entropy(bits) + scales) / total
        report = super().report()
        return {**report, "bits_with_metadata": report["bits"] + extra, "shares": shares}

    def state_dict(self) -> dict[str, Any]:
        """The phase, the step, and the running means; limits, scales and precisions are in the model."""
        means = [[float(mean) for mean in budget.means] for budget in self.budgets]
        return {"settled": self._settled, "spread": self._spread, "step": self._step, "means": means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._settled, self._spread, self._step = state["settled"], state["spread"], state["step"]
        for budget, (pull, weight) in zip(self.budgets, state["means"], strict=True):
            budget.means[:] = pull, weight
        self._tell()

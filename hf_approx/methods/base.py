"""What every method is: a config that builds it, and an object that attaches, steps and finalizes."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from hf_approx.finite import Named, refuse_not_finite
from hf_approx.methods.latent import Latent, Stage, latent_for, latent_of, value_of
from hf_approx.modules.bank import sharing_of
from hf_approx.modules.sharded import is_sharded, reshard, whole
from hf_approx.packing.grid import Grid
from hf_approx.targets import Patterns, Target, refuse_adapters, select_targets

HISTOGRAM_BINS = 20


@dataclass(kw_only=True)
class MethodConfig(ABC):
    """Fields every method has."""

    target_modules: Patterns = field(
        default=None,
        metadata={"help": "Regular expression or list of name endings; default: layers and experts in the blocks."},
    )
    exclude: Patterns = field(
        default=None, metadata={"help": "Modules or parameters to leave alone, in the same notation."}
    )
    target_parameters: Patterns = field(
        default=None,
        metadata={
            "help": "Parameters of two or more dimensions, in the same notation: beside target_modules, or alone."
        },
    )

    @abstractmethod
    def build(self) -> "Method":
        """The method object this config describes."""

    def check_rounds(self) -> None:
        """Raise `ValueError` unless the method can work in the rounds of a ticket search; by default none can.

        One that can overrides this, and `on_round_step` and `end_round` of its `Method`.
        """
        raise ValueError(
            f"{type(self).__name__}: this method does not work in the rounds of a ticket search; choose one that "
            "does, such as SparsificationConfig."
        )


def method_configs(approx: Any, where: str) -> list[MethodConfig]:
    """The configs of an argument `approx`, which is one, several or None.

    Raises:
        ValueError: It holds something else; the message begins with `where`.
    """
    if isinstance(approx, MethodConfig):
        return [approx]
    several = isinstance(approx, Iterable) and not isinstance(approx, (str, Mapping))
    configs = [] if approx is None else list(approx) if several else [approx]
    for config in configs:
        if not isinstance(config, MethodConfig):
            raise ValueError(
                f"{where}: approx takes a method config, such as SparsificationConfig(target_sparsity=0.9), or a list "
                f"of them, got {config!r}."
            )
    return configs


class Inserted(Protocol):
    """A module that a method puts into a model.

    Attributes:
        bypassed: Whether the model is to compute as if it was not there.
    """

    bypassed: bool

    def train(self, mode: bool = True) -> Any:
        """As of any module."""


class Part(NamedTuple):
    """A stage, the trained weight it is for (both of one target, or stacked of several), and their group."""

    stage: Stage
    weight: nn.Parameter
    group: Hashable


class Method(ABC):
    """A method at work on one model. `MethodStack` attaches it, drives it and bakes it.

    Methods stack: each works on the weight that those attached before it make, one at most of which sparsifies and
    the last of which may quantize. They bake in reverse order: the last bakes its whole stack, so all must be settled.

    Between `attach` and the first step the model may be sharded by `torch.distributed.fsdp.fully_shard`; it is then
    baked in a copy: see `hf_approx.methods.unsharding.Unsharded`.

    Attributes:
        targets: What it works on, by key: the name without `.weight`.
        stages: Its step on the way from trained to effective weights, by the same names.
    """

    name: str
    quantizes = False
    """Whether the method puts weights on a grid; the others remove some, or share them."""
    shares = False
    """Whether the method computes weights from templates, which are what others may work on."""

    def __init__(self) -> None:
        self.targets: dict[str, Target] = {}
        self.stages: dict[str, Stage] = {}
        self.stacked: list[Part] | None = None
        self.root: nn.Module | None = None
        self.removed = 0
        self.grids: dict[str, Grid] = {}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that hold the targets, by the names of the targets."""
        return {name: target.module for name, target in self.targets.items()}

    @property
    def target_names(self) -> list[str]:
        """Names of what it works on, as a checkpoint must have them to go on from."""
        return list(self.targets)

    @property
    def inserted(self) -> list[Inserted]:
        """Modules of its own that it put into the model: what it does to anything but weights."""
        return []

    @property
    def latents(self) -> list[Latent]:
        """What is trained in the place of the targets, in the model's order."""
        return [latent for target in self.targets.values() if (latent := latent_of(target)) is not None]

    @property
    def parts(self) -> list[Part]:
        """What a schedule changes at every step: stages and trained weights, stacked where they can be."""
        if self.stacked is not None:
            return self.stacked
        pairs = zip(self.targets, self.latents, strict=True)
        return [Part(self.stages[name], latent.weight, self.group(name)) for name, latent in pairs]

    def group(self, name: str) -> Hashable:
        """What targets must have in common whose stages are stacked, beside their shape."""
        return None

    def attach(self, model: nn.Module, earlier: Sequence["Method"] = ()) -> None:
        """Start to work on the targets. The model is unchanged if this raises.

        Args:
            model: To work on.
            earlier: Methods that were attached to the model before, in their order.

        Raises:
            ValueError: The config does not fit the model, the methods do not stack, or a target weight is not finite.
        """
        self._check_company(model, earlier)
        refuse_adapters(model)
        selected = self.select(model)
        refuse_not_finite(self.name, ((target.name, value_of(target)) for target in selected.values()))
        for name, target in selected.items():
            self._check_stack(name, target, earlier)
        self.check(list(selected))
        stages = {name: self.stage(name, target) for name, target in selected.items()}
        for name, target in selected.items():
            stages[name].method = self.name
            latent_for(target).add(stages[name])
        self.targets, self.stages, self.root = selected, stages, model

    def select(self, model: nn.Module) -> dict[str, Target]:
        """The parameters to work on, by key."""
        config = self.config
        return select_targets(model, config.target_modules, config.exclude, config.target_parameters)

    def _check_company(self, model: nn.Module, earlier: Sequence["Method"]) -> None:
        """Raise `ValueError` if the model is sharded, or the methods of a run do not go together."""
        if is_sharded(model):
            raise ValueError(f"{self.name}: the model is sharded already; attach methods before fully_shard.")
        several = [*earlier, self]
        resizing = [method.name for method in several if method.resizes]
        if resizing and any(method.quantizes for method in several):
            raise ValueError(
                f"{resizing[0]} removes whole units at the end; quantize the smaller model in another run."
            )
        if resizing and any(method.shares for method in several):
            raise ValueError(f"{resizing[0]} removes whole units at the end; share weights in another run.")

    def _check_stack(self, name: str, target: Target, earlier: Sequence["Method"]) -> None:
        if sharing_of(target.module, target.parameter) is not None:
            raise ValueError(f"'{name}' is mixed from templates; target those, in hf_approx_banks, instead.")
        latent = latent_of(target)
        if latent is None:
            return
        below = [method for method in earlier if method.stages.get(name) in latent.stages]
        if len(below) != len(latent.stages):
            raise ValueError(f"Another method works on '{name}' already; add it to exclude.")
        if below[-1].quantizes:
            raise ValueError(f"'{name}' is already quantized by {below[-1].name}; quantize once, as the last method.")
        if not self.quantizes:
            raise ValueError(
                f"'{name}' is already sparsified by {below[-1].name}; give each method targets of its own."
            )

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless the config fits the selected modules."""

    @property
    @abstractmethod
    def config(self) -> MethodConfig:
        """The config that built this object."""

    @abstractmethod
    def stage(self, name: str, target: Target) -> Stage:
        """The step from what a target is now to what it is to be."""

    @abstractmethod
    def on_step(self, progress: float) -> None:
        """Advance every schedule to `progress`, from 0 at the first step of training to 1 at the last."""

    def on_round_step(self, round_: int, rounds: int, progress: float) -> None:
        """As `on_step`, in a round of a ticket search.

        Args:
            round_: Which round, from 0.
            rounds: How many there are.
            progress: From 0 at the first step of the round to less than 1 at its last.
        """

    def end_round(self, round_: int, rounds: int, legacy: bool = False) -> bool:
        """Make ready for the next round of a ticket search or, after the last, for `settle`.

        Args:
            round_: The round that ended, from 0.
            rounds: How many there are.
            legacy: Follow the published script where it departs from the paper.

        Returns:
            Whether the next round starts from the early weights again.
        """
        return False

    def on_gradients(self, scale: float = 1.0) -> None:
        """Complete the gradients of a step, before the optimizer uses them.

        Args:
            scale: What all gradients are multiplied by, as a GradScaler does.
        """

    def penalty(self) -> Tensor | None:
        """Scalar, differentiable in what the method trains, that is added to the loss of a step; None for none."""
        return None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters of the method's own, with their `lr`; trained by Adam without weight decay."""
        return []

    @property
    @abstractmethod
    def is_final(self) -> bool:
        """Whether the compressed structure is settled: a model is only "best" from here on.

        Unless the method works `after_training`: then any model is as good a start as another.
        """

    @property
    def after_training(self) -> bool:
        """Whether all the method does is done by `settle` after the last step."""
        return False

    @property
    def resizes(self) -> bool:
        """Whether `remove` changes the shapes of weights."""
        return False

    @property
    def sharding_problem(self) -> str | None:
        """Why the method cannot work on a sharded model, and what to do instead; None if it can."""
        return None

    @property
    def settles_at(self) -> float:
        """The progress at which the compressed structure is settled."""
        return 0.0

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Numbers for the training log."""

    def reshard(self) -> None:
        """Let what is written to the parameters of a sharded model reach them; the first thing a schedule does."""
        if self.root is not None:
            reshard(self.root)

    def release(self) -> None:
        """Forget what only `detach` needs: training starts."""

    @abstractmethod
    def settle(self) -> None:
        """Fix the compressed structure now, whatever the schedule says."""

    def detach(self) -> None:
        """Take the method off again; without any other, every weight is what the optimizer trained, unmasked."""
        for name, target in self.targets.items():
            latent = latent_of(target)
            if latent is not None:
                latent.remove(self.stages[name])
        self.targets, self.stages, self.stacked = {}, {}, None

    def finalize(self) -> list[str]:
        """Bake the method into plain weights; returns the names of the parameters it compressed.

        `removed` then says how many more weights are gone altogether. Where several methods work on a model, all
        must `bake` before any does `remove`, and those that rename modules come last.

        Raises:
            NotFiniteError: A weight of the model, or a number the method has learned, is NaN or infinite: training
                diverged. Nothing is baked then.
        """
        return self.remove(self.bake())

    @property
    def renames(self) -> bool:
        """Whether `remove` gives modules other names."""
        return False

    def remove(self, names: list[str]) -> list[str]:
        """Cut out of the model what baking left without use, if the method removes anything.

        Args:
            names: Names of parameters, of this method or of any other.

        Returns:
            The names that those have afterwards which are still there.
        """
        return names

    def bake(self) -> list[str]:
        """Leave weights that need no method any more; returns the names of those compressed."""
        self.refuse_diverged()
        if not self.is_final:
            self.settle()
        values = ((target.name, value_of(target)) for target in self.targets.values())
        refuse_not_finite(self.name, values)
        for target in self.targets.values():
            latent = latent_of(target)
            if latent is not None:  # else a later method of the stack has baked it
                weight = value_of(target)
                # A pruned weight is +0.0, never -0.0, so that packing loses no bit.
                latent.release(torch.where(weight == 0, torch.zeros_like(weight), weight))
        return [target.name for target in self.targets.values()]

    def refuse_diverged(self) -> None:
        """Raise `NotFiniteError` if anything in the model is NaN, or infinite where it must not be."""
        if self.root is not None:
            refuse_not_finite(self.name, self.root)
        refuse_not_finite(self.name, self.learned())

    def learned(self) -> Iterator[Named]:
        """What is trained in the place of the targets, and whether it may be infinite."""
        for latent in self.latents:
            yield from latent.finite_parts()

    def histogram(self) -> list[int] | None:
        """Counts of the mask values in `HISTOGRAM_BINS` bins from 0 to 1, for methods with soft masks."""
        return None

    def report(self) -> dict[str, Any]:
        """What was asked for and what was done, for the end of training and the model card."""
        requested = {name: value for name, value in asdict(self.config).items() if name.startswith("target_")}
        del requested["target_modules"], requested["target_parameters"]
        return {"method": self.name, **requested, **self.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """State that is not in the model: JSON types only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def incoming(target: Target, stage: Stage) -> Tensor:
    """The weight that a stage is given; whole, of a sharded model too."""
    latent = cast(Latent, latent_of(target))
    with torch.no_grad():
        return whole(latent.before(stage))

"""The order of a ticket search: rounds, rewinding, the ticket's training. How to train is left to its subclasses.

By Continuous Sparsification (Savarese, Silva and Maire, NeurIPS 2020), whose rounds go on from each other's weights,
or by iterative magnitude pruning (Frankle et al., 2020), which rewinds after each.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_approx.loops.states import MARK, saved_states
from hf_approx.methods import MethodConfig, MethodStack, SparsificationConfig

STATE_VERSION = 2
"""Of the states that searches go on from; those of others do not fit."""


@dataclass
class TicketConfig:
    """How to search.

    Raises:
        ValueError: A value is out of range, two contradict each other, or the method does not work in rounds.
    """

    method: MethodConfig = field(
        default_factory=lambda: SparsificationConfig(preset="paper", soft_fraction=1.0, target_sparsity=None),
        metadata={"help": "What decides which weights stay; its soft or ramp phase is a whole round."},
    )
    rounds: int = field(default=3, metadata={"help": "Rounds of the search; one more training follows."})
    epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs of each round, and of the ticket's training. `TicketTrainer` takes them from its "
            "`TrainingArguments` instead."
        },
    )
    rewind_step: int | None = field(
        default=None,
        metadata={"help": "Step of the first round, from 0, at whose start the weights are those of the ticket."},
    )
    rewind_epoch: int | None = field(
        default=None,
        metadata={"help": "The same in epochs; the paper's is 2. With neither, the ticket starts untrained."},
    )
    reset: Literal["paper", "legacy"] = field(
        default="paper",
        metadata={
            "help": "Scores between rounds: 'paper' min(beta_T s, s0), which keeps removed weights removed; 'legacy' "
            "min(s, s0), as the published script does."
        },
    )
    mask_optimizer: Literal["adam", "sgd"] = field(
        default="adam", metadata={"help": "For the scores; 'sgd' has Nesterov momentum 0.9, as published."}
    )

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("epochs", 1), ("rewind_step", 0), ("rewind_epoch", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and (value is not None or name == "rounds"):
                raise ValueError(f"TicketConfig: {name} must be an integer >= {least}, got {value!r}.")
        if self.rewind_step is not None and self.rewind_epoch is not None:
            raise ValueError("TicketConfig: give rewind_step or rewind_epoch, not both.")
        if self.epochs is not None and (self.rewind_epoch or 0) >= self.epochs:
            raise ValueError(
                f"TicketConfig: rewind_epoch {self.rewind_epoch} lies beyond a round of {self.epochs} epochs."
            )
        if self.reset not in ("paper", "legacy"):
            raise ValueError(f"TicketConfig: reset must be 'paper' or 'legacy', got {self.reset!r}.")
        if self.mask_optimizer not in ("adam", "sgd"):
            raise ValueError(f"TicketConfig: mask_optimizer must be 'adam' or 'sgd', got {self.mask_optimizer!r}.")
        if not isinstance(self.method, MethodConfig):
            raise ValueError(f"TicketConfig: method must be the config of a method, got {self.method!r}.")
        self.method.check_rounds()


@dataclass(frozen=True)
class Ticket:
    """What a search found.

    Attributes:
        sparsity: Share of the target weights that are gone.
        supermask: The metric of the ticket at its early weights, untrained.
        metric: The metric of the ticket after training.
        names: Parameters with zeros, for `attach_packing`.
        history: One entry a training, with its sparsity, metric and loss at the end.
    """

    sparsity: float
    supermask: float
    metric: float
    names: list[str]
    history: list[dict[str, float]]


class Rounds(ABC):
    """Where a search stands, and what happens between its trainings.

    A subclass trains, evaluates, saves and finalizes. At the start of every training it calls `start_training`, before
    every step `before_step` and, once the optimizers have made theirs, the stack's `after_step`.

    Args:
        stack: The method of the config, at work on the model to search in.
        config: How to search.
    """

    def __init__(self, stack: MethodStack, config: TicketConfig) -> None:
        self.stack, self.config = stack, config
        (self.method,) = stack.methods
        self.plain = stack.model
        groups = stack.param_groups()
        self.mask_optimizer: Optimizer | None = None
        if groups and config.mask_optimizer == "sgd":
            self.mask_optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        elif groups:
            self.mask_optimizer = torch.optim.Adam(groups)
        self.round = 0
        self.history: list[dict[str, float]] = []
        self.early: dict[str, Tensor] = {}

    @abstractmethod
    def _train(self, name: str) -> float:
        """One training, with a fresh optimizer and schedule; returns its loss."""

    @abstractmethod
    def _evaluate(self) -> float:
        """The metric of the model, larger is better."""

    @abstractmethod
    def _save(self) -> None:
        """Write the state after a round."""

    @abstractmethod
    def _finalize(self) -> list[str]:
        """Leave real zeros in the model; returns the names of the parameters that have them."""

    def _note(self, numbers: dict[str, float]) -> None:
        """Keep what a training came to."""
        self.history.append(numbers)

    @property
    def searching(self) -> bool:
        """Whether there are rounds to come; the ticket's own training is none."""
        return self.round < self.config.rounds

    def run(self) -> Ticket:
        """Search, rewind, train the ticket."""
        rounds = self.config.rounds
        while self.searching:
            loss = self._whole(f"round {self.round + 1} of {rounds}")
            if not self.early:
                raise ValueError("The first round ended before the step whose weights the ticket starts from.")
            self._note({**self.method.metrics(), "metric": self._evaluate(), "loss": loss})
            if self.stack.end_round(self.round, rounds, legacy=self.config.reset == "legacy"):
                self._rewind()
            self.round += 1
            self._save()
        self.stack.settle()
        self._rewind()
        supermask = metric = self._evaluate()
        if trains := bool(self.weights()):
            loss = self._whole("ticket")
            numbers = self.method.metrics()
        names = self._finalize()
        if trains:
            metric = self._evaluate()
            self._note({**numbers, "metric": metric, "loss": loss})
        params = dict(self.plain.named_parameters())
        kept = sum(int(params[name].count_nonzero()) for name in names)
        sparsity = 1 - kept / sum(params[name].numel() for name in names)
        return Ticket(sparsity, supermask, metric, names, self.history)

    def _whole(self, name: str) -> float:
        """One training, after which every weight is finite; the state of the round before stays the last one else."""
        loss = self._train(name)
        self.stack.refuse_diverged(f"Ticket search, {name}")
        return loss

    def weights(self) -> list[nn.Parameter]:
        """What a task's optimizer trains: neither scores nor frozen weights."""
        return self.stack.parameters()

    def start_training(self, epoch_steps: int, steps: int) -> None:
        """Say how long the training is.

        Args:
            epoch_steps: Optimizer steps of an epoch.
            steps: Optimizer steps of the whole training.

        Raises:
            ValueError: The early weights would lie beyond it.
        """
        config = self.config
        self._steps, self._early_step = steps, config.rewind_step or (config.rewind_epoch or 0) * epoch_steps
        if self._early_step >= steps:
            option = "rewind_epoch" if config.rewind_step is None else "rewind_step"
            raise ValueError(f"TicketConfig: {option} {getattr(config, option)} lies beyond a round of {steps} steps.")

    def before_step(self, step: int) -> None:
        """Advance the masks, and copy the early weights when it is time.

        Args:
            step: Of this training, from 0.
        """
        if not self.searching:
            return
        if self.round == 0 and step == self._early_step:
            self._remember()
        self.stack.advance_round(self.round, self.config.rounds, step / self._steps)

    def _remember(self) -> None:
        """Copy the weights that are trained and buffers (normalisation statistics too), but not the masks."""
        with self.stack.exposed():
            self.early = {name: tensor.detach().clone() for name, tensor in self.plain.state_dict().items()}

    @torch.no_grad()
    def _rewind(self) -> None:
        with self.stack.exposed():
            state = self.plain.state_dict()
        for name, tensor in self.early.items():
            state[name].copy_(tensor)
        self.stack.write()

    def saved(self, folder: Path) -> Path | None:
        """The newest state in a folder that was written to its end.

        Raises:
            ValueError: It is the state of another search.
        """
        states = saved_states(folder, "round")
        if not states:
            return None
        there, here = json.loads((states[-1] / MARK).read_text(encoding="utf-8")), json.loads(self._identity())
        if there.get("version", 1) != STATE_VERSION:
            raise ValueError(
                f"{folder} holds a search of another version of hf_approx, which this one cannot go on with; give "
                "this search a folder of its own."
            )
        if there != here:
            raise ValueError(
                f"{folder} holds a search with another config or other modules; give this one a folder of its own, or "
                "go on with the config it was started with."
            )
        return states[-1]

    def _identity(self) -> str:
        """What a state must have in common with the search that goes on from it."""
        modules = self.method.target_names
        identity = {"method": self.method.name, "config": asdict(self.config), "modules": modules}
        return json.dumps({**identity, "version": STATE_VERSION}, sort_keys=True)

    def state_dict(self) -> dict[str, Any]:
        """The state that is not in the model's own."""
        optimizer = self.mask_optimizer
        return {
            "round": self.round,
            "history": self.history,
            "early": self.early,
            "stack": self.stack.state_dict(),
            "mask_optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.round, self.history, self.early = state["round"], state["history"], state["early"]
        self.stack.load_state_dict(state["stack"])
        if self.mask_optimizer is not None:
            self.mask_optimizer.load_state_dict(state["mask_optimizer"])

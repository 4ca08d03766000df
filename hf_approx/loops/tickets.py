"""Search for winning tickets: sparse networks that train well from their early weights.

By Continuous Sparsification (Savarese, Silva and Maire, NeurIPS 2020), whose rounds go on from each other's weights,
or by iterative magnitude pruning (Frankle et al., 2020), which rewinds after each.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hf_approx.methods import (
    ContinuousSparsification,
    MagnitudePruning,
    MagnitudePruningConfig,
    SparsificationConfig,
)
from hf_approx.methods.base import Method

Loss = Callable[[nn.Module, Any], Tensor]
Optimizers = Callable[[Iterable[nn.Parameter]], tuple[Optimizer, LRScheduler | None]]
Metric = Callable[[nn.Module], float]


@dataclass
class TicketConfig:
    """How to search.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    method: SparsificationConfig | MagnitudePruningConfig = field(
        default_factory=lambda: SparsificationConfig(preset="paper", soft_fraction=1.0, target_sparsity=None),
        metadata={"help": "What decides which weights stay; its soft or ramp phase is a whole round."},
    )
    rounds: int = field(default=3, metadata={"help": "Rounds of the search; one more training follows."})
    epochs: int = field(default=10, metadata={"help": "Epochs of each round, and of the training of the ticket."})
    rewind_step: int = field(
        default=0, metadata={"help": "Step of the first round whose weights the ticket starts from; 0: untrained."}
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
        for name, least in (("rounds", 1), ("epochs", 1), ("rewind_step", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"TicketConfig: {name} must be an integer >= {least}, got {value!r}.")
        if self.reset not in ("paper", "legacy"):
            raise ValueError(f"TicketConfig: reset must be 'paper' or 'legacy', got {self.reset!r}.")
        if self.mask_optimizer not in ("adam", "sgd"):
            raise ValueError(f"TicketConfig: mask_optimizer must be 'adam' or 'sgd', got {self.mask_optimizer!r}.")
        if isinstance(self.method, SparsificationConfig):
            if self.method.structured:
                raise ValueError("TicketConfig: heads and neurons cannot be rewound; use another granularity.")
            if self.method.settings().soft_fraction != 1.0:
                raise ValueError("TicketConfig: the masks are soft for a whole round; set soft_fraction=1.0.")


@dataclass(frozen=True)
class Ticket:
    """What a search found.

    Attributes:
        sparsity: Share of the target weights that are gone.
        supermask: The metric of the ticket at its early weights, untrained.
        metric: The metric of the ticket after training.
        names: Parameters with zeros, for `attach_packing`.
        history: One entry a training, with its sparsity and metric at the end.
    """

    sparsity: float
    supermask: float
    metric: float
    names: list[str]
    history: list[dict[str, float]]


class TicketSearch:
    """Runs the rounds, rewinds, and trains the ticket; after `run` the model holds it, with real zeros.

    Each training, the ticket's too, has a fresh optimizer and schedule and takes `epochs` from its first step.

    Args:
        model: To search in; its weights change.
        config: How to search.
        dataloader: Batches of the training data.
        loss: `(model, batch) -> scalar`, differentiable.
        optimizers: Makes a fresh optimizer, and its scheduler or None, for the weights; called for each training.
        metric: `(model) -> number`, larger is better; called after each training, with the model in eval mode.
        accelerator: Default: a new one.
        checkpoint: Folder to save the state in after each round; a search started again there goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TicketConfig,
        dataloader: DataLoader[Any],
        loss: Loss,
        optimizers: Optimizers,
        metric: Metric,
        accelerator: Accelerator | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.config, self.loss, self.optimizers, self.metric = config, loss, optimizers, metric
        self.accelerator = accelerator or Accelerator()
        if self.accelerator.mixed_precision == "fp16" or self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError("TicketSearch: use bf16 or no mixed precision, and no gradient accumulation.")
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.method: Method = config.method.build()
        self.method.attach(model)
        self.plain = model
        self.model, self.dataloader = self.accelerator.prepare(model, dataloader)
        self._scores = [p for group in self.method.param_groups() for p in group["params"]]
        self.mask_optimizer = self._mask_optimizer()
        self.round = 0
        self.history: list[dict[str, float]] = []
        self.early: dict[str, Tensor] = {}
        self.accelerator.register_for_checkpointing(self)
        saved = self._saved()
        if saved:
            self.accelerator.load_state(str(saved[-1]))

    def _mask_optimizer(self) -> Optimizer | None:
        groups = self.method.param_groups()
        if not groups:
            return None
        if self.config.mask_optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        return torch.optim.Adam(groups)

    def run(self) -> Ticket:
        """Search, rewind, train the ticket."""
        while self.round < self.config.rounds:
            self._train(f"round {self.round + 1} of {self.config.rounds}", searching=True)
            self._end_round()
            self._save()
        self.method.settle()
        self._rewind()
        supermask = self._evaluate()
        if len(self.history) == self.config.rounds:
            self._train("ticket", searching=False)
        names = self.method.finalize()
        params = dict(self.plain.named_parameters())
        kept = sum(int(params[name].count_nonzero()) for name in names)
        sparsity = 1 - kept / sum(params[name].numel() for name in names)
        return Ticket(sparsity, supermask, self.history[-1]["metric"], names, self.history)

    def _train(self, name: str, searching: bool) -> None:
        scores = {id(p) for p in self._scores}
        optimizer, scheduler = self.optimizers([p for p in self.plain.parameters() if id(p) not in scores])
        optimizer = self.accelerator.prepare(optimizer)
        total = len(self.dataloader) * self.config.epochs
        if self.config.rewind_step >= total:
            raise ValueError(
                f"TicketConfig: rewind_step {self.config.rewind_step} lies beyond a round of {total} steps."
            )
        bar = tqdm(total=total, desc=name, disable=not self.accelerator.is_local_main_process)
        step = 0
        for _ in range(self.config.epochs):
            self.model.train()
            for batch in self.dataloader:
                if searching:
                    if self.round == 0 and step == self.config.rewind_step:
                        self._remember()
                    self._advance(step / total)
                loss = self.loss(self.model, batch)
                penalty = self.method.penalty() if searching else None
                self.accelerator.backward(loss if penalty is None else loss + penalty)
                for each in (optimizer, self.mask_optimizer if searching else None):
                    if each is not None:
                        each.step()
                        each.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                step += 1
                bar.update()
        bar.close()
        entry = {**self.method.metrics(), "metric": self._evaluate(), "loss": float(loss.detach())}
        self.history.append(entry)

    def _advance(self, progress: float) -> None:
        # Magnitude pruning happens between rounds only.
        if isinstance(self.method, ContinuousSparsification):
            self.method.on_round_step(self.round, self.config.rounds, progress)

    def _end_round(self) -> None:
        self.round += 1
        if isinstance(self.method, MagnitudePruning):
            self.method.prune_round(self.round, self.config.rounds)
            self._rewind()
        elif isinstance(self.method, ContinuousSparsification) and self.round < self.config.rounds:
            self.method.next_round(legacy=self.config.reset == "legacy")

    def _mask_names(self) -> set[str]:
        return {
            f"{module}.parametrizations.weight.0.{name}"
            for module, mask in self.method.parametrizations.items()
            for name in mask.state_dict()
        }

    def _remember(self) -> None:
        """Copy weights and buffers (normalisation statistics too), but not the masks."""
        masks = self._mask_names()
        self.early = {n: t.detach().clone() for n, t in self.plain.state_dict().items() if n not in masks}

    @torch.no_grad()
    def _rewind(self) -> None:
        state = self.plain.state_dict()
        for name, tensor in self.early.items():
            state[name].copy_(tensor)

    @torch.no_grad()
    def _evaluate(self) -> float:
        self.model.eval()
        return float(self.metric(self.model))

    def _saved(self) -> list[Path]:
        """The states that were written to their end, oldest first."""
        if self.checkpoint is None:
            return []
        marks = self.checkpoint.glob("round-*/complete")
        return sorted((mark.parent for mark in marks), key=lambda folder: int(folder.name.removeprefix("round-")))

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        older, folder = self._saved(), self.checkpoint / f"round-{self.round}"
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (folder / "complete").touch()
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> str:
        """What a state must have in common with the search that goes on from it."""
        return json.dumps({"config": asdict(self.config), "modules": list(self.method.modules)}, sort_keys=True)

    def state_dict(self) -> dict[str, Any]:
        """What accelerate saves beside the model."""
        optimizer = self.mask_optimizer
        return {
            "identity": self._identity(),
            "round": self.round,
            "history": self.history,
            "early": self.early,
            "method": self.method.state_dict(),
            "mask_optimizer": None if optimizer is None else optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: It is the state of another search.
        """
        if state["identity"] != self._identity():
            raise ValueError(
                f"TicketSearch: {self.checkpoint} holds a search with another config or other modules; give this one "
                "a folder of its own, or go on with the config it was started with."
            )
        self.round, self.history, self.early = state["round"], state["history"], state["early"]
        self.method.load_state_dict(state["method"])
        if self.mask_optimizer is not None:
            self.mask_optimizer.load_state_dict(state["mask_optimizer"])


def pareto_front(tickets: Sequence[Ticket]) -> list[Ticket]:
    """The tickets that no other beats in both sparsity and metric, sparsest last."""
    front = [
        t
        for t in tickets
        if not any(
            o.sparsity >= t.sparsity and o.metric >= t.metric and (o.sparsity, o.metric) != (t.sparsity, t.metric)
            for o in tickets
        )
    ]
    return sorted(front, key=lambda t: t.sparsity)


def search_in_parallel(search: Callable[[float], Ticket], initial_scores: Sequence[float]) -> list[Ticket]:
    """Independent searches from several initial scores, shared out over the processes of the launch.

    Args:
        search: Runs one search on this process alone: a fresh model, and a `TicketSearch` whose config has the
            given initial score.
        initial_scores: Lower scores give sparser tickets.

    Returns:
        On every process, the tickets of all searches that no other beats.
    """
    accelerator = Accelerator()
    with accelerator.split_between_processes(list(initial_scores)) as mine:
        found = [search(score) for score in mine]
    return pareto_front(gather_object(found))

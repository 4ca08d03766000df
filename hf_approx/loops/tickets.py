"""Ticket search as a loop on accelerate, for any model, data and optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object, tqdm
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hf_approx.files import torch_writes
from hf_approx.loops.rounds import Rounds, Ticket, TicketConfig
from hf_approx.loops.states import begin_state, end_state
from hf_approx.methods import MethodStack

Loss = Callable[[nn.Module, Any], Tensor]
Optimizers = Callable[[Iterable[nn.Parameter]], tuple[Optimizer, LRScheduler | None]]
Metric = Callable[[nn.Module], float]


class TicketSearch(Rounds):
    """Runs the rounds, rewinds, and trains the ticket; after `run` the model holds it, with real zeros.

    Each training, the ticket's too, has a fresh optimizer and schedule and takes `epochs` from its first step.

    Args:
        model: To search in; its weights change.
        config: How to search; `epochs` must be given.
        dataloader: Batches of the training data.
        loss: `(model, batch) -> scalar`, differentiable.
        optimizers: Makes a fresh optimizer, and its scheduler or None, for the weights; called for each training.
        metric: `(model) -> number`, larger is better; called after each training, with the model in eval mode.
        accelerator: Default: a new one. Its states hold all it has prepared: give each search one of its own. Its
            trackers get the numbers of every training, the first as step 1.
        checkpoint: Folder to save the state in after each round; a search started again there goes on.

    Raises:
        ValueError: The config or the accelerator does not fit, or the folder holds another search. The model is then
            unchanged.
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
        self.loss, self.optimizers, self.metric = loss, optimizers, metric
        self.accelerator = accelerator or Accelerator()
        if self.accelerator.mixed_precision == "fp16" or self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError("TicketSearch: use bf16 or no mixed precision, and no gradient accumulation.")
        if config.epochs is None:
            raise ValueError("TicketSearch: TicketConfig.epochs must be given.")
        self.epochs = config.epochs
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        stack = MethodStack(model, config.method)
        self.model, self.dataloader = self.accelerator.prepare(model, dataloader)
        stack.begin()
        super().__init__(stack, config)
        self.accelerator.register_for_checkpointing(self)
        if self.checkpoint is not None:
            try:
                saved = self.saved(self.checkpoint)
            except ValueError:
                stack.detach()
                raise
            if saved is not None:
                self.accelerator.load_state(str(saved))

    def _train(self, name: str) -> float:
        weights = self.weights()
        optimizer, scheduler = self._fresh(weights) if weights else (None, None)
        if optimizer is not None:
            optimizer = self.accelerator.prepare(optimizer)
        total = len(self.dataloader) * self.epochs
        self.start_training(len(self.dataloader), total)
        bar = tqdm(total=total, desc=name, disable=not self.accelerator.is_local_main_process)
        step = 0
        for _ in range(self.epochs):
            self.model.train()
            for batch in self.dataloader:
                self.before_step(step)
                loss = self.loss(self.model, batch)
                self.accelerator.backward(loss)
                self.stack.before_step()
                for each in (optimizer, self.mask_optimizer if self.searching else None):
                    if each is not None:
                        each.step()
                        each.zero_grad()
                self.stack.after_step()
                if scheduler is not None:
                    scheduler.step()
                step += 1
                bar.update()
        bar.close()
        return float(loss.detach())

    @torch.no_grad()
    def _evaluate(self) -> float:
        self.model.eval()
        return float(self.metric(self.model))

    def _fresh(self, weights: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler | None]:
        made: Any = self.optimizers(weights)
        pair = isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], Optimizer)
        if not pair or not (made[1] is None or hasattr(made[1], "step")):
            # The model can be searched again, by a search with another function.
            self.stack.detach()
            raise ValueError(
                "TicketSearch: optimizers must return (optimizer, scheduler), or (optimizer, None) without one, "
                f"got {type(made).__name__}."
            )
        return made[0], made[1]

    def _note(self, numbers: dict[str, float]) -> None:
        super()._note(numbers)
        self.accelerator.log({f"ticket/{name}": value for name, value in numbers.items()}, step=len(self.history))

    def _finalize(self) -> list[str]:
        return self.stack.bake()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        folder = self.checkpoint / f"round-{self.round}"
        if self.accelerator.is_main_process:
            begin_state(folder)
        self.accelerator.wait_for_everyone()
        with torch_writes(folder):
            self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            end_state(folder, self._identity())
        self.accelerator.wait_for_everyone()


def pareto_front(tickets: Sequence[Ticket]) -> list[Ticket]:
    """The tickets that no other beats in both sparsity and metric, sparsest last; none whose metric is NaN."""
    tickets = [ticket for ticket in tickets if not math.isnan(ticket.metric)]
    front = [
        t
        for t in tickets
        if not any(
            o.sparsity >= t.sparsity and o.metric >= t.metric and (o.sparsity, o.metric) != (t.sparsity, t.metric)
            for o in tickets
        )
    ]
    return sorted(front, key=lambda t: t.sparsity)


def search_in_parallel(
    search: Callable[[float], Ticket], initial_scores: Sequence[float], accelerator: Accelerator | None = None
) -> dict[float, Ticket]:
    """Independent searches from several initial scores, shared out over the processes of the launch.

    Args:
        search: Runs one search: a fresh model, and a `TicketSearch` whose config has the given initial score. While
            it runs, accelerate sees a single process, on its own device.
        initial_scores: Lower scores give sparser tickets.
        accelerator: Default: a new one.

    Returns:
        On every process, by initial score, the tickets of all searches that no other beats; sparsest last.
    """
    accelerator = accelerator or Accelerator()
    mine = initial_scores[accelerator.process_index :: accelerator.num_processes]
    with _alone():
        found = [(score, search(score)) for score in mine]
    everywhere = gather_object(found)
    front = pareto_front([ticket for _, ticket in everywhere])
    return {score: best for best in front for score, ticket in everywhere if ticket is best}


@contextmanager
def _alone() -> Iterator[None]:
    """Within, accelerate neither shards data nor averages gradients: other processes search for something else."""
    states = [PartialState(), AcceleratorState()]
    before = [dict(vars(state)) for state in states]
    for state in states:
        vars(state).update(
            distributed_type=DistributedType.NO, num_processes=1, process_index=0, local_process_index=0
        )
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            vars(state).update(values)

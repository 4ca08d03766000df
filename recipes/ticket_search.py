"""Search for winning tickets in a ResNet-20 on 8 x 8 digits, and compare them with the dense network.

accelerate launch recipes/ticket_search.py --config recipes/configs/tickets_digits.yaml
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from common import command_line, console, overrides, say_saved, write_json
from config_files import read_yaml
from digits import digits
from hf_approx import MagnitudePruningConfig, SparsificationConfig, TicketConfig
from hf_approx.loops import Ticket, TicketSearch, search_in_parallel
from resnet20 import ResNet20

SMOKE = ("rounds=2", "epochs=1", "rewind_epoch=0", "batch_size=256")


@dataclass
class TicketRecipe:
    """One YAML file.

    Attributes:
        methods: "continuous" sparsification, "magnitude" pruning, or both.
        rounds: Rounds of the search.
        epochs: Epochs of each round, of the ticket's training, and of the dense network's.
        rewind_epoch: At whose start the weights are those of the ticket.
        batch_size: Images in a batch.
        lr: SGD's learning rate for the weights.
        mask_lr: Adam's learning rate for the scores.
        weight_decay: Of the weights.
        seed: Of everything but the split.
        sparsity: Of the 3 x 3 convolutions; None with initial scores.
        initial_scores: One search of continuous sparsification for each, without a target sparsity.
        penalty: Per unit of mask; used with initial scores.
    """

    methods: list[str]
    rounds: int
    epochs: int
    rewind_epoch: int
    batch_size: int
    lr: float
    mask_lr: float
    weight_decay: float
    seed: int
    sparsity: float | None = None
    initial_scores: list[float] = field(default_factory=list)
    penalty: float = 1e-8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}.")
        for name in ("lr", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number >= 0, got {getattr(self, name)!r}.")
        if not set(self.methods) <= {"continuous", "magnitude"}:
            raise ValueError(f"methods must be continuous or magnitude, got {self.methods}.")
        if (self.sparsity is None) == (not self.initial_scores):
            raise ValueError("give sparsity or initial_scores, and not both.")
        if self.initial_scores and self.methods != ["continuous"]:
            raise ValueError("initial_scores are those of the method continuous alone.")
        for method in self.methods:
            for score in self.initial_scores or [0.0]:
                self.search(method, score)

    def search(self, method: str, initial_score: float) -> TicketConfig:
        """How to search by one method."""
        target: dict[str, Any] = {"target_sparsity": self.sparsity, "target_modules": ResNet20.masked}
        continuous = SparsificationConfig(
            preset="paper",
            soft_fraction=1.0,
            mask_lr=self.mask_lr,
            penalty=self.penalty,
            initial_score=initial_score,
            **target,
        )
        return TicketConfig(
            method=continuous if method == "continuous" else MagnitudePruningConfig(**target),
            rounds=self.rounds,
            epochs=self.epochs,
            rewind_epoch=self.rewind_epoch,
        )


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Cross entropy of a batch."""
    images, labels = batch
    return cross_entropy(model(images), labels)


class Experiment:
    """The data and the training settings that every competitor shares."""

    def __init__(self, config: TicketRecipe, output_dir: Path | None) -> None:
        self.config, self.output_dir = config, output_dir
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.train_data, self.held_out = digits(self.accelerator.device)

    def loader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return DataLoader(self.train_data, self.config.batch_size, shuffle=True)

    def optimizers(self, params: Iterable[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        """SGD with Nesterov momentum, and a learning rate that falls to zero along a cosine."""
        config = self.config
        optimizer = torch.optim.SGD(
            params, lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(self.loader()) * config.epochs)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the held-out digits."""
        images, labels = self.held_out.tensors
        return float((model(images).argmax(1) == labels).float().mean())

    def dense(self) -> dict[str, float]:
        """Train the whole network once."""
        set_seed(self.config.seed)
        model = self.accelerator.prepare(ResNet20(channels=1))
        optimizer, scheduler = self.optimizers(model.parameters())
        for _ in range(self.config.epochs):
            model.train()
            for batch in self.loader():
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        return {"sparsity": 0.0, "accuracy": self.accuracy(model.eval())}

    def ticket(self, method: str, initial_score: float = 0.0) -> Ticket:
        """Search for a ticket and train it; with a folder, go on from where a crash left off."""
        config = self.config
        set_seed(config.seed)
        search = config.search(method, initial_score)
        name = f"{method}-{config.seed}" + (f"-{initial_score}" if config.initial_scores else "")
        folder = None if self.output_dir is None else self.output_dir / name
        model = ResNet20(channels=1)
        run = TicketSearch(model, search, self.loader(), loss, self.optimizers, self.accuracy, checkpoint=folder)
        return run.run()

    def rows(self) -> dict[str, dict[str, float]]:
        """The dense network, then a ticket of each method or the best of all initial scores."""
        rows, config = {"dense": self.dense()}, self.config
        if config.initial_scores:
            front = search_in_parallel(
                lambda score: self.ticket("continuous", score), config.initial_scores, self.accelerator
            )
            tickets = {f"continuous, s0 = {score}": ticket for score, ticket in front.items()}
        else:
            tickets = {method: self.ticket(method) for method in config.methods}
        for name, found in tickets.items():
            rows[name] = {"sparsity": found.sparsity, "supermask": found.supermask, "accuracy": found.metric}
        return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    table = Table("network", "sparsity", "before training", "accuracy", title="Winning tickets")
    for name, row in rows.items():
        before = f"{row['supermask']:.4f}" if "supermask" in row else "-"
        table.add_row(name, f"{row['sparsity']:.2%}", before, f"{row['accuracy']:.4f}")
    console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    # A search goes on from what is in its folder, so only a folder that was asked for is used.
    options = command_line(__doc__, None, SMOKE).parse_args(argv)
    folder = None if options.output_dir is None else Path(options.output_dir)
    try:
        experiment = Experiment(read_yaml(TicketRecipe, options.config, overrides(options)), folder)
        rows = experiment.rows()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if experiment.accelerator.is_main_process:
        if folder is not None:
            write_json(folder / f"results-{experiment.config.seed}.json", rows)
        show(rows)
        if folder is not None:
            say_saved(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

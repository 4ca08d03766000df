"""Search for winning tickets in a ResNet-20 on 8 x 8 digits, and compare them with the dense network.

accelerate launch recipes/ticket_search.py --sparsity 0.8 --rounds 3 --epochs 15
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from common import write_json
from hf_approx import MagnitudePruningConfig, SparsificationConfig
from hf_approx.loops import TicketConfig, TicketSearch
from resnet20 import ResNet20

VALIDATION = 360
"""Of the 1,797 digits; the split is the same for every seed."""


def digits(device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """The digits of scikit-learn as images in [-1, 1], to train and to validate."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("error: the digits come with scikit-learn: pip install 'hf-approx[bench]'") from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    labels = torch.tensor(data.target, device=device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    train, held_out = order[VALIDATION:], order[:VALIDATION]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Cross entropy of a batch."""
    images, labels = batch
    return cross_entropy(model(images), labels)


class Experiment:
    """The data and the training settings that every competitor shares."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.accelerator = Accelerator()
        self.train_data, self.held_out = digits(self.accelerator.device)

    def loader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return DataLoader(self.train_data, self.options.batch_size, shuffle=True)

    def optimizers(self, params: Iterable[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        """SGD with Nesterov momentum, and a learning rate that falls to zero along a cosine."""
        optimizer = torch.optim.SGD(
            params, lr=self.options.lr, momentum=0.9, nesterov=True, weight_decay=self.options.weight_decay
        )
        steps = len(self.loader()) * self.options.epochs
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """On the held-out digits."""
        images, labels = self.held_out.tensors
        return float((model(images).argmax(1) == labels).float().mean())

    def dense(self) -> dict[str, float]:
        """Train the whole network once."""
        model = self.accelerator.prepare(ResNet20(channels=1))
        optimizer, scheduler = self.optimizers(model.parameters())
        for _ in range(self.options.epochs):
            model.train()
            for batch in self.loader():
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        return {"sparsity": 0.0, "accuracy": self.accuracy(model.eval())}

    def ticket(self, name: str) -> dict[str, float]:
        """Search for a ticket and train it."""
        target = {"target_sparsity": self.options.sparsity, "target_modules": ResNet20.masked}
        method: Any = MagnitudePruningConfig(**target)
        if name == "continuous":
            method = SparsificationConfig(preset="paper", soft_fraction=1.0, mask_lr=self.options.mask_lr, **target)
        loader = self.loader()
        config = TicketConfig(
            method=method,
            rounds=self.options.rounds,
            epochs=self.options.epochs,
            rewind_step=self.options.rewind_epoch * len(loader),
        )
        folder = None
        if self.options.output_dir is not None:
            folder = self.options.output_dir / f"{name}-{self.options.seed}"
        model = ResNet20(channels=1)
        search = TicketSearch(
            model, config, loader, loss, self.optimizers, self.accuracy, self.accelerator, checkpoint=folder
        )
        found = search.run()
        return {"sparsity": found.sparsity, "supermask": found.supermask, "accuracy": found.metric}


def show(rows: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    table = Table("network", "sparsity", "before training", "accuracy", title="Winning tickets")
    for name, row in rows.items():
        before = f"{row['supermask']:.4f}" if "supermask" in row else "-"
        table.add_row(name, f"{row['sparsity']:.2%}", before, f"{row['accuracy']:.4f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the search")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of each round, and of the ticket's training")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the 3 x 3 convolutions")
    parser.add_argument("--rewind_epoch", type=int, default=2, help="whose weights the ticket starts from")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--mask_lr", type=float, default=1e-2, help="Adam's learning rate for the scores")
    parser.add_argument("--weight_decay", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--methods", nargs="+", default=["continuous", "magnitude"], choices=["continuous", "magnitude"]
    )
    parser.add_argument("--output_dir", type=Path, help="results, and states to go on from after a crash")
    options = parser.parse_args(argv)
    try:
        experiment = Experiment(options)
        rows = {}
        for name in ["dense", *options.methods]:
            set_seed(options.seed)
            rows[name] = experiment.dense() if name == "dense" else experiment.ticket(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if experiment.accelerator.is_main_process:
        if options.output_dir is not None:
            write_json(options.output_dir / f"results-{options.seed}.json", rows)
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

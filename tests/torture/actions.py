"""What may be cut short: by a kill or a full disk. Afterwards the old or the new state is there, whole."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertTokenizerFast

from helpers import arguments, make_trainer
from hf_approx import (
    ApproxTrainer,
    AvaGradConfig,
    MagnitudePruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    TicketConfig,
    attach_packing,
)
from hf_approx.cards import CARD_FILE
from hf_approx.cli import main
from hf_approx.loops import TicketSearch
from hf_approx.packing import Grid
from hf_approx.ticket_trainer import TicketTrainer
from models import build, dataset
from torture.engine import LONGEST, LostError, RefusedError, WrongError, in_child, problem
from torture.folders import Files, bert, grids, llama, read, write, zero
from torture.folders import good as good_folder

MODEL = "model"
"""What an action writes, in the folder it is given."""
NOT_COMPARED = ("training_args.json",)
"""Has the path of the folder in it, which is another in every case."""


@dataclass
class Action:
    """Something that writes.

    Attributes:
        prepare: Puts into a folder what was there before.
        act: Writes; what it writes is the same whenever it is run.
        again: What a user does after it was cut short; by default the same.
        atomic: Whether the old or the new state must be there, whole, at every moment. Of a training only the end
            counts, whatever it was interrupted by.
        old: What is in the folder before.
        new: What is in it afterwards; both are found by `measure`.
        seconds: How long it takes, counted.
        places: Of every place in the code that reads or writes files, which calls of all are made there.
        bytes: That it writes.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    again: Callable[[Path], None] | None = None
    atomic: bool = True
    old: Files = field(default_factory=dict)
    new: Files = field(default_factory=dict)
    seconds: float = 0.0
    places: list[list[int]] = field(default_factory=list)
    bytes: int = 0

    @property
    def kind(self) -> str:
        """Its first word."""
        return self.name.replace("_", " ").replace(",", " ").partition(" ")[0]

    def state(self, folder: Path) -> Files:
        """What counts of what is in the folder."""
        files = read(folder)
        own = {n: d for n, d in files.items() if self.atomic or n.startswith(f"{MODEL}/")}
        return {name: data for name, data in own.items() if Path(name).name not in NOT_COMPARED}

    def verify(self, folder: Path) -> None:
        """After it was cut short: old or new, and doing it again gives the new, with nothing left behind."""
        now = self.state(folder)
        if self.atomic and now not in (self.old, self.new):
            kind = LostError if self._is_gone(now) else WrongError
            raise kind(f"neither the old nor the new state: {self.describe(now)}")
        if self.atomic and now == self.new:
            return
        ended = in_child(partial(self.again or self.act, folder))
        if ended.error is not None:
            raise LostError(f"doing it again: {ended.error}")
        now = self.state(folder)
        if now != self.new:
            raise WrongError(f"done again it is something else: {self.describe(now)}")
        left = [name for name in read(folder, hidden=True) if "/." in f"/{name}"]
        if left:
            raise WrongError(f"left behind: {left[0]}")

    def _is_gone(self, now: Files) -> bool:
        """Whether what was there cannot be loaded any more: not all of its weights and config are there."""
        parts = [
            {n: d for n, d in s.items() if Path(n).name != CARD_FILE and not n.endswith((".png", "report.json"))}
            for s in (self.old, self.new, now)
        ]
        return parts[2] not in parts[:2]

    def describe(self, now: Files) -> str:
        """Which of its files are the old, the new, or neither."""

        def which(name: str) -> str:
            data = now.get(name)
            if data is None:
                return "missing"
            return next(
                (s for s, f in (("old", self.old), ("new", self.new)) if f.get(name) == data), f"{len(data)} bytes"
            )

        names = sorted({*self.old, *self.new, *now})
        changed = [n for n in names if self.old.get(n) != self.new.get(n) or n not in {*self.old, *self.new}]
        return ", ".join(f"{name} {which(name)}" for name in changed)


def cli(*arguments: object) -> None:
    """Run the command line in this process; if it refuses, in one line, raises `RefusedError` with that line."""
    errors = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(errors):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
    # Warnings may come before it.
    *before, last = errors.getvalue().splitlines() or [""]
    if not code:
        return
    if not last.startswith("error: ") or any(line.startswith(("Traceback", "error: ")) for line in before):
        raise WrongError(f"`{' '.join(map(str, arguments))}` ends with {code} and {errors.getvalue()[-LONGEST:]!r}")
    if (found := problem(RefusedError(last))) is not None:
        raise WrongError(found)
    raise RefusedError(last)


def _trained(folder: Path, seed: int, **options: Any) -> ApproxTrainer:
    trainer = make_trainer(
        "bert", folder, model=build("bert", seed), max_steps=4, logging_steps=1, seed=seed, **options
    )
    trainer.train()
    return trainer


def add_tokenizer(folder: Path) -> None:
    """Put a small one into a folder."""
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    vocabulary.unlink()


def saves(root: Path) -> list[Action]:
    """Saving over a good folder, and over one with more or fewer files."""
    a = _trained(root / "a", 0, approx=SmolConfig(target_bits=3))
    b = _trained(root / "b", 1, approx=SparsificationConfig(target_sparsity=0.8))
    a.save_model(str(root / "a"))
    a.model.save_pretrained(root / "shards", max_shard_size="5KB")
    before, shards = read(root / "a"), read(root / "shards")

    def put(files: Files, folder: Path) -> None:
        write(files, folder / MODEL)

    return [
        Action("save_model", partial(put, before), lambda folder: b.save_model(str(folder / MODEL))),
        Action("save_pretrained", partial(put, before), lambda folder: b.model.save_pretrained(folder / MODEL)),
        Action("save_pretrained over shards", partial(put, shards), lambda f: b.model.save_pretrained(f / MODEL)),
        Action(
            "save_pretrained in shards",
            partial(put, before),
            lambda folder: b.model.save_pretrained(folder / MODEL, max_shard_size="5KB"),
        ),
    ]


def commands(root: Path) -> list[Action]:
    """compress, export and card."""
    torch.manual_seed(0)
    dense = bert(layers=2)
    zero(dense, 0.8)
    for name in ("dense", "packed", "quantized"):
        (root / name).mkdir(parents=True)
    dense.save_pretrained(root / "dense")
    add_tokenizer(root / "dense")
    write(good_folder("sparse", "half").files, root / "packed")
    write(_exportable(), root / "quantized")
    card = good_folder("quantized", "group").files

    def nothing(folder: Path) -> None:
        pass

    def put(extra: Files, folder: Path) -> None:
        write({**card, **extra}, folder / MODEL)

    def written(name: str, source: str, *options: str, command: str) -> Action:
        return Action(name, nothing, lambda folder: cli(command, root / source, folder / MODEL, *options))

    write(card, root / "old")
    cli("card", root / "old")
    stale = (root / "old" / CARD_FILE).read_bytes() + b"\nOf an earlier time.\n"
    return [
        written("compress", "dense", command="compress"),
        written("compress --bits", "dense", "--bits", "3", command="compress"),
        written("export", "packed", command="export"),
        written("export compressed-tensors", "quantized", "--format", "compressed-tensors", command="export"),
        Action("card", partial(put, {}), lambda folder: cli("card", folder / MODEL)),
        Action("card over a card", partial(put, {CARD_FILE: stale}), lambda folder: cli("card", folder / MODEL)),
    ]


def _exportable() -> Files:
    """A model that compressed-tensors can hold: few bits, groups that engines read."""
    torch.manual_seed(0)
    model = llama()
    made = {name: Grid(torch.full_like(grid.bits, 3), grid.scale) for name, grid in grids(model, "channel").items()}
    attach_packing(model, [], grids=made)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read(Path(folder))


RUNS: dict[str, dict[str, Any]] = {
    "sparsification": {"approx": SparsificationConfig(target_sparsity=0.7), "lr_scheduler_type": "constant"},
    "smol": {"approx": SmolConfig(target_bits=3)},
    "sharing and masks": {
        "approx": [
            SharingConfig(),
            SparsificationConfig(target_sparsity=0.5, target_modules=r".*hf_approx_banks\..*"),
        ]
    },
    "magnitude, avagrad": {
        "approx": MagnitudePruningConfig(target_sparsity=0.7),
        "optimizer": AvaGradConfig(lr=0.1, eps=1e-3),
    },
}


def trainings() -> list[Action]:
    """Trainings that save as they go; after a kill they go on, and end as if nothing had been."""

    def make(options: dict[str, Any], folder: Path) -> ApproxTrainer:
        saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 6}
        model = build("bert")
        # The first forward pass would say so, and there is none after a kill that comes after the last.
        model.config.problem_type = "single_label_classification"
        return make_trainer("bert", folder / "run", model=model, **saving, logging_steps=1, **options)

    return [
        Action(f"train {name}", lambda folder: None, *_resumable(partial(make, options)), atomic=False)
        for name, options in RUNS.items()
    ]


def tickets() -> list[Action]:
    """Ticket searches, by a `Trainer` and in a loop."""
    method = SparsificationConfig(preset="paper", soft_fraction=1.0, target_sparsity=0.8)

    def make(folder: Path) -> TicketTrainer:
        data = dataset("bert")
        return TicketTrainer(
            model=build("bert"),
            args=arguments(folder / "run", save_strategy="steps", max_steps=3, logging_steps=1),
            train_dataset=data,
            eval_dataset=data,
            search=TicketConfig(method=method, rounds=3, rewind_step=1),
        )

    def search(folder: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        x = torch.randn(32, 8)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
        own = SparsificationConfig(
            preset="paper", soft_fraction=1.0, target_sparsity=0.7, target_modules=["0", "2"], mask_lr=0.05
        )
        found = TicketSearch(
            model,
            TicketConfig(method=own, rounds=4, epochs=2, rewind_step=1),
            loader,
            lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            lambda params: (torch.optim.SGD(params, lr=0.05), None),
            lambda model: float((model(x).argmax(1) == x[:, :3].argmax(1)).float().mean()),
            checkpoint=folder / "search",
        ).run()
        (folder / MODEL).mkdir(exist_ok=True)
        save_file(model.state_dict(), folder / MODEL / "ticket.safetensors")
        (folder / MODEL / "ticket.json").write_text(json.dumps([found.sparsity, found.supermask, found.history]))

    return [
        Action("tickets, trainer", lambda folder: None, *_resumable(make), atomic=False),
        Action("tickets, loop", lambda folder: None, search, atomic=False),
    ]


def _resumable(make: Callable[[Path], ApproxTrainer]) -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """What trains and saves, and what goes on after that was cut short."""

    def save(trainer: ApproxTrainer, folder: Path) -> None:
        # Without pictures, which would take longer than the training.
        trainer.model.save_pretrained(folder / MODEL)
        (folder / MODEL / "report.json").write_text(json.dumps(trainer.approx_report))

    def act(folder: Path) -> None:
        trainer = make(folder)
        trainer.train()
        save(trainer, folder)

    def again(folder: Path) -> None:
        trainer = make(folder)
        try:
            trainer.train(resume_from_checkpoint=True)
        except ValueError as error:
            if "no checkpoint" not in str(error) and "no finished round" not in str(error):
                raise
            trainer.train()
        save(trainer, folder)

    return act, again

"""Dense and compressed in one run: train both, save both, load both back, and print one table."""

import importlib
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, set_seed

from common import (
    FoldConfig,
    RunConfig,
    command_line,
    console,
    last_checkpoint,
    load_metric,
    load_seconds,
    overrides,
    same_logits,
    say_saved,
    weight_bytes,
    write_json,
)
from config_files import ConfigError, read_yaml
from hf_approx import ApproxTrainer, fold
from hf_approx.inspection import inspect_checkpoint
from loading import quiet

COMPARISONS = ("text_classification", "language_modeling", "image_classification", "translation")
"""The recipes that are made of this."""


class Comparison(ABC):
    """One config at work: data are prepared once, models are trained on demand.

    Attributes:
        auto: The `AutoModelFor...` that loads what was saved.
        config_class: What its YAML file is read into.
        smoke: Overrides that make it end in seconds.
        trainer_class: What trains it.
        scores: Names of the numbers that say how good a model is.
    """

    auto: ClassVar[Any]
    config_class: ClassVar[type[RunConfig]]
    smoke: ClassVar[Sequence[str]]
    trainer_class: ClassVar[Any] = ApproxTrainer
    scores: Sequence[str]

    def __init__(self, config: RunConfig, output_dir: str) -> None:
        self.config = config
        self.output_dir = Path(output_dir)

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """A fresh model."""

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What a trainer needs beside the model: data sets, tokenizer, collator."""

    def scored(self, measured: dict[str, float]) -> dict[str, float]:
        """The scores, from what `Trainer.evaluate` returned."""
        return {name: measured[name] for name in self.scores}

    def sample(self, trainer: ApproxTrainer) -> dict[str, Tensor]:
        """A few inputs of the model, to compare logits on: the first of the validation split, eight at most."""
        data: Any = trainer.eval_dataset
        batch = trainer.data_collator([data[i] for i in range(min(8, len(data)))])
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """A trainer of the given model or a fresh one, dense or compressed; `training` overrides the config's."""
        config = self.config
        # Memory is pinned for an accelerator; without one torch warns of it in every loader.
        defaults = {"report_to": [], "save_strategy": "no", "dataloader_pin_memory": torch.accelerator.is_available()}
        try:
            args = config.arguments(
                output_dir=str(self.output_dir / f"{name}-checkpoints"), **{**defaults, **config.training, **training}
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training: {error}") from None
        set_seed(args.seed)
        model = self.model() if model is None else model
        if args.mixed_precision == "fp16" and any(param.dtype == torch.float16 for param in model.parameters()):
            raise ConfigError("dtype: fp16 scales the gradients of float32 weights; set dtype: float32.")
        try:
            trainer = self.trainer_class(
                model=model,
                args=args,
                approx=config.methods() if compressed else [],
                optimizer=config.avagrad(),
                store_dtype=config.store_dtype,
                **self.parts(),
            )
        except RuntimeError as error:
            # So say the trackers that `report_to` names.
            if "to be installed" not in str(error):
                raise
            raise ConfigError(f"training: {error}") from None
        trainer.about.update({"dataset_split": config.eval_split, **config.card})
        return trainer

    def train(self, name: str, trainer: ApproxTrainer, checkpoint: str | None) -> dict[str, Any]:
        """Train, save under `name`, and measure."""
        trainer.train(resume_from_checkpoint=checkpoint)
        return self.measure(name, trainer)

    def fold(self, trainer: ApproxTrainer) -> dict[str, dict[str, Any]]:
        """Fold the trained model and measure it and, if the config says so, what more training makes of it."""
        options = asdict(self.config.folding() or FoldConfig())
        epochs = options.pop("num_train_epochs")
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        folding = fold(model, **options)
        loops = "; ".join(f"{stack}: {', '.join(map(str, found))}" for stack, found in folding.loops.items())
        sizes = f"{folding.parameters_before:,} to {folding.parameters_after:,} parameters"
        trainer.accelerator.print(f"Folded {sizes}; weights moved by at most {folding.weight_error:.2%}. {loops}")
        trainer.forget_evaluation()
        rows = {"folded": self.measure("folded", trainer)}
        if epochs:
            tuned = self.trainer("folded-tuned", False, model, num_train_epochs=epochs)
            rows["folded-tuned"] = self.train("folded-tuned", tuned, None)
        return rows

    def measure(self, name: str, trainer: ApproxTrainer) -> dict[str, Any]:
        """Save under `name`: a row of the table, with metric, sparsity, bytes, load time."""
        folder = self.output_dir / name
        measured = trainer.evaluate()
        trainer.save_model(str(folder))
        row: dict[str, Any] = self.scored({name.removeprefix("eval_"): value for name, value in measured.items()})
        totals = trainer.approx_report.get("totals", {})
        row["sparsity"], row["bits"] = totals.get("sparsity", 0.0), totals.get("bits")
        if trainer.is_world_process_zero():
            row["bytes"] = weight_bytes(folder)
            inspection = inspect_checkpoint(folder)
            # Heads, neurons and layers that are gone are in no file: the dense model would hold them too.
            removed = sum(method.removed for method in trainer.methods)
            whole = 1 + removed / sum(math.prod(tensor.shape) for tensor in inspection.rows)
            row["dense_bytes"], row["bound_bytes"] = round(inspection.dense_bytes * whole), inspection.bound_bytes
            row["load_seconds"] = load_seconds(folder, self.auto)
            # Without the autocast that mixed precision leaves around the trained model.
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            row["parameters"] = sum(param.numel() for param in model.parameters())
            row["reloaded_equal"] = same_logits(folder, self.auto, model, self.sample(trainer))
        return row


class Classifier(Comparison):
    """One whose metric is of the likeliest classes.

    Attributes:
        labels: Names of the classes.
        names: The same, as options of a model's config.
    """

    def __init__(self, config: Any, output_dir: str, labels: list[str]) -> None:
        super().__init__(config, output_dir)
        self.labels = labels
        self.names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
            # A pretrained model may come from a regression or from several labels a row.
            "problem_type": "single_label_classification",
        }
        self.metric, self.scores = load_metric(config.metric, [0, 1])

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """What the metric says of logits of shape (N, classes) and class numbers of shape (N,)."""
        return self.metric.compute(
            predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids
        )

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """See `Comparison.trainer`."""
        trainer = super().trainer(name, compressed, model, **training)
        # Classifiers return a mean over their batch, even those that accept `num_items_in_batch` and ignore it.
        trainer.model_accepts_loss_kwargs = False
        return trainer


def show(rows: dict[str, dict[str, Any]], scores: Sequence[str]) -> None:
    """Print the table of dense against compressed."""
    table = Table(title="Dense against compressed")
    headers = ("model", *scores, "sparsity", "bits", "bytes on disk", "dense, same dtype", "load", "reloaded equal")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{row[score]:.4f}" for score in scores),
            f"{row['sparsity']:.2%}",
            "-" if row["bits"] is None else f"{row['bits']:.2f}",
            f"{row['bytes']:,}",
            f"{row['dense_bytes']:,}",
            f"{row['load_seconds']:.2f} s",
            "yes" if row["reloaded_equal"] else "NO",
        )
    console().print(table)


def _fitting(path: str, but: str) -> str:
    """Which other recipes a config would be right for, as the end of a message."""
    found = []
    for name in COMPARISONS:
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and issubclass(cls, Comparison) and cls.__module__ == name != but:
                with suppress(ConfigError):
                    read_yaml(cls.config_class, path)
                    found.append(name)
    return f" It would be right for another recipe: --recipe {' or '.join(found)}." if found else ""


def run(recipe_class: type[Comparison], argv: list[str] | None) -> int:
    """Run a recipe from the command line; its outputs go to a folder named as its file.

    Args:
        recipe_class: What runs; the docstring of its module describes it.
        argv: Arguments; None for those of the process.

    Returns:
        The exit code.
    """
    name, doc = Path(inspect.getfile(recipe_class)).stem, sys.modules[recipe_class.__module__].__doc__
    options = command_line(doc, f"outputs/{name}", recipe_class.smoke, resume=True).parse_args(argv)
    quiet()
    try:
        try:
            config = read_yaml(recipe_class.config_class, options.config, overrides(options))
        except ConfigError as error:
            raise ConfigError(f"{error}{_fitting(options.config, name)}") from None
        recipe = recipe_class(config, options.output_dir)
        names = [name for name, wanted in (("dense", config.baseline), ("compressed", config.approx)) if wanted]
        # Made before the first training starts, so that a mistake in the second is reported at once.
        trainers = {name: recipe.trainer(name, compressed=name == "compressed") for name in names}
        checkpoints = {name: last_checkpoint(trainers[name].args.output_dir) for name in names}
        if options.resume and not any(checkpoints.values()):
            raise ConfigError("--resume: there is no checkpoint; set training.save_strategy to write some.")
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = {}
    for name, trainer in trainers.items():
        set_seed(trainer.args.seed)
        rows[name] = recipe.train(name, trainer, checkpoints[name] if options.resume else None)
    if config.fold is not None:
        rows |= recipe.fold(trainers["compressed"])
    if trainer.is_world_process_zero():
        write_json(recipe.output_dir / "results.json", rows)
        show(rows, recipe.scores)
        say_saved(recipe.output_dir, {name: int(row["bytes"]) for name, row in rows.items()})
    return 0

"""Fine-tune a text classifier dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/text_classification.py --config recipes/configs/words_sparse90.yaml
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from common import (
    ConfigError,
    RecipeConfig,
    last_checkpoint,
    load_data,
    load_seconds,
    metric_path,
    read_config,
    resolve_model,
    same_logits,
    weight_bytes,
    write_json,
)
from hf_approx import ApproxTrainer, fold
from hf_approx.inspection import inspect_checkpoint


class Recipe:
    """One config at work: data, tokenizer and metric are prepared once, models are trained on demand."""

    def __init__(self, config: RecipeConfig, output_dir: str) -> None:
        self.config = config
        self.output_dir = Path(output_dir)
        data = load_data(config)
        self.labels = data["train"].features[config.label_column].names
        self.model_path = resolve_model(config.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.metric = evaluate.load(metric_path(config.metric))
        self.data = data.map(self._tokenize, batched=True, remove_columns=data["train"].column_names)

    def _tokenize(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in self.config.text_columns]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.config.max_length)
        return {**encoded, "labels": batch[self.config.label_column]}

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.metric.compute(
            predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids
        )

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """A trainer of the given model or a fresh one, dense or compressed; `training` overrides the config's."""
        config = self.config
        args = TrainingArguments(
            output_dir=str(self.output_dir / f"{name}-checkpoints"),
            **{"report_to": [], "save_strategy": "no", **config.training, **training},
        )
        set_seed(args.seed)
        if model is None:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.model_path,
                num_labels=len(self.labels),
                id2label=dict(enumerate(self.labels)),
                label2id={label: i for i, label in enumerate(self.labels)},
            )
        trainer = ApproxTrainer(
            model=model,
            args=args,
            train_dataset=self.data["train"],
            eval_dataset=self.data["validation"],
            processing_class=self.tokenizer,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=self._metrics,
            approx=config.methods() if compressed else [],
            optimizer=config.avagrad(),
            store_dtype=config.store_dtype,
        )
        # Classifiers return a mean over their batch, even those that accept `num_items_in_batch` and ignore it.
        trainer.model_accepts_loss_kwargs = False
        trainer.about.update({"dataset_split": config.eval_split, **config.card})
        return trainer

    def train(self, name: str, trainer: ApproxTrainer, checkpoint: str | None) -> dict[str, Any]:
        """Train, save under `name`, and measure."""
        trainer.train(resume_from_checkpoint=checkpoint)
        return self.measure(name, trainer)

    def fold(self, trainer: ApproxTrainer) -> dict[str, dict[str, Any]]:
        """Fold the trained model and measure it and, if the config says so, what more training makes of it."""
        options = dict(self.config.fold or {})
        epochs = options.pop("num_train_epochs", 0)
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
        row: dict[str, Any] = {
            k.removeprefix("eval_"): v for k, v in measured.items() if k.removeprefix("eval_") in self.scores
        }
        totals = trainer.approx_report.get("totals", {})
        row["sparsity"], row["bits"] = totals.get("sparsity", 0.0), totals.get("bits")
        if trainer.is_world_process_zero():
            row["bytes"] = weight_bytes(folder)
            inspection = inspect_checkpoint(folder)
            # Heads, neurons and layers that are gone are in no file: the dense model would hold them too.
            removed = sum(method.removed for method in trainer.methods)
            whole = 1 + removed / sum(math.prod(tensor.shape) for tensor in inspection.rows)
            row["dense_bytes"], row["bound_bytes"] = round(inspection.dense_bytes * whole), inspection.bound_bytes
            row["load_seconds"] = load_seconds(folder)
            batch = trainer.data_collator([self.data["validation"][i] for i in range(8)])
            batch.pop("labels")
            # Without the autocast that mixed precision leaves around the trained model.
            model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            row["parameters"] = sum(param.numel() for param in model.parameters())
            row["reloaded_equal"] = same_logits(folder, model, dict(batch))
        return row

    @property
    def scores(self) -> list[str]:
        """Names of the numbers the metric computes."""
        return list(self.metric.compute(predictions=[0, 1], references=[0, 1]))


def show(rows: dict[str, dict[str, Any]], scores: list[str]) -> None:
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
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", required=True, help="YAML file; see recipes/configs")
    parser.add_argument("--output_dir", default="outputs/text_classification", help="where models are saved")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one option; repeatable")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoints")
    options = parser.parse_args(argv)
    try:
        config = read_config(options.config, options.set)
        recipe = Recipe(config, options.output_dir)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())

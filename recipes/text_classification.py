"""Fine-tune a text classifier dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/text_classification.py --config recipes/configs/words_sparse90.yaml
"""

import sys
from typing import Any, ClassVar

import evaluate
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
)

from common import RecipeConfig, load_data, metric_path, read_config, resolve_model
from comparison import Comparison, run
from hf_approx import ApproxTrainer

SMOKE = ("max_train_samples=256", "max_eval_samples=128", "training.num_train_epochs=1")


class Recipe(Comparison):
    """A classifier on one data set."""

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    config: RecipeConfig

    def __init__(self, config: RecipeConfig, output_dir: str) -> None:
        super().__init__(config, output_dir)
        data = load_data(config)
        self.labels = data["train"].features[config.label_column].names
        self.model_path = resolve_model(config.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.metric = evaluate.load(metric_path(config.metric))
        self.scores = list(self.metric.compute(predictions=[0, 1], references=[0, 1]))
        self.data = data.map(self._tokenize, batched=True, remove_columns=data["train"].column_names)

    def _tokenize(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in self.config.text_columns]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.config.max_length)
        return {**encoded, "labels": batch[self.config.label_column]}

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.metric.compute(
            predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids
        )

    def model(self) -> PreTrainedModel:
        """The pretrained one, with a new head."""
        return self.auto.from_pretrained(
            self.model_path,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
        )

    def parts(self) -> dict[str, Any]:
        """Tokenized data and the metric."""
        return {
            "train_dataset": self.data["train"],
            "eval_dataset": self.data["validation"],
            "processing_class": self.tokenizer,
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "compute_metrics": self._metrics,
        }

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """See `Comparison.trainer`."""
        trainer = super().trainer(name, compressed, model, **training)
        # Classifiers return a mean over their batch, even those that accept `num_items_in_batch` and ignore it.
        trainer.model_accepts_loss_kwargs = False
        return trainer


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return run(
        lambda path, overrides, folder: Recipe(read_config(path, overrides), folder),
        argv,
        "text_classification",
        __doc__,
        SMOKE,
    )


if __name__ == "__main__":
    sys.exit(main())

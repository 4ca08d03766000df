"""Fine-tune a text classifier dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/text_classification.py --config recipes/configs/words_sparse90.yaml
"""

import sys
from typing import Any, ClassVar

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from common import RecipeConfig, fresh_model, load_data
from comparison import Classifier, run
from sources import resolve_model


class Recipe(Classifier):
    """A classifier on one data set."""

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    config_class = RecipeConfig
    smoke = ("max_train_samples=256", "max_eval_samples=128", "training.num_train_epochs=1")
    config: RecipeConfig

    def __init__(self, config: RecipeConfig, output_dir: str) -> None:
        data = load_data(config)
        super().__init__(config, output_dir, data["train"].features[config.label_column].names)
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.model))
        self.data = data.map(self._tokenize, batched=True, remove_columns=data["train"].column_names)

    def _tokenize(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in self.config.text_columns]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.config.max_length)
        return {**encoded, "labels": batch[self.config.label_column]}

    def model(self) -> PreTrainedModel:
        """The pretrained one, with a new head."""
        return fresh_model(self.auto, self.config.model, self.config.dtype, **self.names)

    def parts(self) -> dict[str, Any]:
        """Tokenized data and the metric."""
        return {
            "train_dataset": self.data["train"],
            "eval_dataset": self.data["validation"],
            "processing_class": self.tokenizer,
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "compute_metrics": self.metrics,
        }


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return run(Recipe, argv)


if __name__ == "__main__":
    sys.exit(main())

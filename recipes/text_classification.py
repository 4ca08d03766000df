"""Fine-tune a text classifier dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/text_classification.py --config recipes/configs/words_sparse90.yaml
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common import RecipeConfig, fresh_model
from comparison import Classifier, run
from config_files import ConfigError
from loading import bars
from sources import load_part
from splits import load_data


@dataclass(frozen=True)
class Tokenize:
    """Makes a model's inputs of a batch; what depends on nothing else, `datasets` recognises in the next run.

    Attributes:
        tokenizer: Of the model.
        text_columns: As in `RecipeConfig`, like the others.
    """

    tokenizer: PreTrainedTokenizerBase
    text_columns: list[str]
    label_column: str
    max_length: int

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Tokens and class numbers."""
        texts = [batch[column] for column in self.text_columns]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return {**encoded, "labels": batch[self.label_column]}


class Recipe(Classifier):
    """A classifier on one data set."""

    auto: ClassVar[Any] = AutoModelForSequenceClassification
    config_class = RecipeConfig
    smoke = ("max_train_samples=256", "max_eval_samples=128", "training.num_train_epochs=1")
    config: RecipeConfig

    def __init__(self, config: RecipeConfig, output_dir: str) -> None:
        data = load_data(config)
        super().__init__(config, output_dir, data["train"].features[config.label_column].names)
        self.model_config = load_part(AutoConfig, config.model, **self.names)
        self.tokenizer = load_part(AutoTokenizer, config.model)
        self._choose_padding()
        positions = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        longest = min(config.max_length, self.tokenizer.model_max_length, positions or config.max_length)
        tokenize = Tokenize(self.tokenizer, config.text_columns, config.label_column, longest)
        with bars(len(data["train"])):
            self.data = data.map(tokenize, batched=True, remove_columns=data["train"].column_names)

    def _choose_padding(self) -> None:
        """Language models often have no token to pad with; any does, as padding is masked."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        if self.tokenizer.pad_token is None:
            raise ConfigError(
                f"model: the tokenizer of {self.config.model!r} has no token to pad with, nor one for the end or for "
                "unknown words; give it one with tokenizer.add_special_tokens and save it."
            )
        config = self.model_config.get_text_config()
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.tokenizer.pad_token_id

    def model(self) -> PreTrainedModel:
        """The pretrained one, with a new head."""
        return fresh_model(self.auto, self.config.model, self.config.dtype, new_head=True, config=self.model_config)

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

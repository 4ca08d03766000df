"""Train an encoder-decoder to translate, dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/translation.py --config recipes/configs/gettext_marian_bits4.yaml
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from checks import source
from common import RunConfig, check_scratch, fresh_model, load_metric
from comparison import Comparison, run
from config_files import ConfigError
from hf_approx import ApproxSeq2SeqTrainer, ApproxTrainer
from sources import load_part
from splits import first_samples, load_splits, own_names


@dataclass
class TranslationConfig(RunConfig):
    """The YAML file of a translation model; `training` takes the options of `Seq2SeqTrainingArguments`.

    Attributes:
        model: Hub id, folder or `package:NAME/FOLDER` of a pretrained encoder-decoder; or, for one from scratch,
            `{type: marian, ...}` with the options of that configuration.
        source_column: Column of the texts to translate; `translation.en` is the entry `en` of a column of mappings.
        target_column: Column of their translations, in the same form.
        tokenizer: Hub id or folder. Default: the model's own or, for one from scratch, byte pairs learnt from both
            sides of the training data.
        vocabulary: Tokens that are learnt.
        prefix: Put before every source text, as T5 expects it.
        max_length: Longest source and target in training and longest translation, in tokens.
        metric: A name for `evaluate.load`, or a file beside this one.
    """

    arguments: ClassVar[type[TrainingArguments]] = Seq2SeqTrainingArguments
    positive = (*RunConfig.positive, "vocabulary", "max_length")

    model: str | dict[str, Any]
    source_column: str = "source"
    target_column: str = "target"
    tokenizer: str | None = None
    vocabulary: int = 4000
    prefix: str = ""
    max_length: int = 64
    metric: str = "metrics/bleu.py"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.model, dict):
            check_scratch(self.model, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "marian or t5")


def learn_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte pairs, so that any text can be encoded and comes back as it was; every text ends with `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


class Translation(Comparison):
    """A translation model on one parallel text."""

    auto: ClassVar[Any] = AutoModelForSeq2SeqLM
    config_class = TranslationConfig
    smoke = ("max_train_samples=256", "max_eval_samples=16", "training.max_steps=8", "max_length=16")
    trainer_class: ClassVar[Any] = ApproxSeq2SeqTrainer
    config: TranslationConfig

    def __init__(self, config: TranslationConfig, output_dir: str) -> None:
        super().__init__(config, output_dir)
        self.metric, self.scores = load_metric(config.metric, ["a"])
        columns = (config.source_column, config.target_column)
        data = first_samples(config, load_splits(config, *(column.split(".")[0] for column in columns)))
        texts = {
            split: (self._texts(split, part, config.source_column), self._texts(split, part, config.target_column))
            for split, part in data.items()
        }
        pretrained = None if isinstance(config.model, dict) else config.model
        if config.tokenizer or pretrained:
            self.tokenizer: Any = load_part(
                AutoTokenizer, config.tokenizer or pretrained, "tokenizer" if config.tokenizer else "model"
            )
        else:
            self.tokenizer = learn_tokenizer((text for side in texts["train"] for text in side), config.vocabulary)
        if self.tokenizer.pad_token is None:
            raise ConfigError(f"tokenizer: {config.tokenizer or config.model!r} has no token to pad with.")
        self.model_config = self._model_config(pretrained)
        self.data = {split: self._encode(sides, cut=split == "train") for split, sides in texts.items()}

    def _texts(self, split: str, data: Any, column: str) -> list[str]:
        where = source(self.config.dataset, own_names(self.config)[split])
        name, _, entry = column.partition(".")
        values = list(data[name])
        if not values:
            raise ConfigError(f"{where} has no rows.")
        if entry:
            if not isinstance(values[0], dict) or entry not in values[0]:
                raise ConfigError(f"{where}: the column {name!r} has no entry {entry!r}.")
            values = [value[entry] for value in values]
        bad = [i for i, value in enumerate(values) if not isinstance(value, str) or not value.strip()]
        if bad:
            raise ConfigError(
                f"{where}: {len(bad)} of {len(values)} rows have no text in {column!r}, the first is row "
                f"{bad[0] + 1}, {values[bad[0]]!r}; fill or remove them."
            )
        return values

    def _model_config(self, pretrained: str | None) -> Any:
        if pretrained is not None:
            return load_part(AutoConfig, pretrained)
        assert isinstance(self.config.model, dict)
        options = dict(self.config.model)
        kind = options.pop("type")
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        tokens = {"pad_token_id": pad, "bos_token_id": pad, "eos_token_id": end, "forced_eos_token_id": end}
        own = AutoConfig.for_model(kind)
        tokens = {name: value for name, value in tokens.items() if hasattr(own, name)}
        size = {"vocab_size": len(self.tokenizer), "decoder_start_token_id": pad}
        return AutoConfig.for_model(kind, **{**size, **tokens, **options})

    def _encode(self, sides: tuple[list[str], list[str]], cut: bool) -> Dataset:
        """Tokens; references are never cut, since a translation must not be compared with part of one."""
        longest = self.config.max_length
        sources, targets = sides
        prefixed = [self.config.prefix + source for source in sources]
        encoded = self.tokenizer(prefixed, truncation=True, max_length=longest)
        labels = self.tokenizer(text_target=targets, truncation=cut, max_length=longest if cut else None)
        columns = {**{name: encoded[name] for name in ("input_ids", "attention_mask")}, "labels": labels["input_ids"]}
        return Dataset.from_dict(columns)

    def model(self) -> PreTrainedModel:
        """The pretrained one, or one from scratch."""
        return fresh_model(self.auto, self.config.model, self.config.dtype, self.model_config)

    def parts(self) -> dict[str, Any]:
        """Tokenized pairs and the metric."""
        return {
            "train_dataset": self.data["train"],
            "eval_dataset": self.data["validation"],
            "processing_class": self.tokenizer,
            "data_collator": DataCollatorForSeq2Seq(self.tokenizer),
            "compute_metrics": self._metrics,
        }

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        pad = self.tokenizer.pad_token_id
        predictions, references = (
            self.tokenizer.batch_decode(np.where(tokens == -100, pad, tokens), skip_special_tokens=True)
            for tokens in (prediction.predictions, prediction.label_ids)
        )
        return self.metric.compute(predictions=predictions, references=references)

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """See `Comparison.trainer`."""
        generation = {"predict_with_generate": True, "generation_max_length": self.config.max_length}
        generation |= {key: value for key, value in self.config.training.items() if key in generation}
        trainer = super().trainer(name, compressed, model, **{**generation, **training})
        # With label smoothing the loss is not the model's, and the model needs its decoder's inputs.
        trainer.data_collator.model = trainer.accelerator.unwrap_model(trainer.model)
        return trainer


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return run(Translation, argv)


if __name__ == "__main__":
    sys.exit(main())

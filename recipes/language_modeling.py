"""Train a causal language model dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/language_modeling.py --config recipes/configs/lm_docs_sparse80_bits4.yaml
"""

import math
import sys
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar

import torch
from datasets import IterableDatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from checks import check_texts
from common import RunConfig, check_scratch, fresh_model
from comparison import Comparison, run
from config_files import ConfigError
from hf_approx import ApproxTrainer
from loading import bars
from sources import load_part
from splits import load_splits, own_names

SHUFFLED_TEXTS = 1000
"""Texts a stream is shuffled among."""


@dataclass
class LanguageModelConfig(RunConfig):
    """The YAML file of a language model.

    Attributes:
        model: Hub id, folder or `package:NAME/FOLDER` of a pretrained model; or, for one from scratch,
            `{type: llama, ...}` with the options of that configuration.
        text_column: Column of the texts.
        tokenizer: Hub id or folder; "bytes" for a token a byte. Default: the model's own.
        block_size: Tokens of one example; texts are joined, with an end-of-text token after each, and cut into blocks.
            `max_train_samples` and `max_eval_samples` count blocks.
    """

    positive = (*RunConfig.positive, "block_size")
    streams = True

    model: str | dict[str, Any]
    text_column: str = "text"
    tokenizer: str | None = None
    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.model, dict):
            check_scratch(self.model, MODEL_FOR_CAUSAL_LM_MAPPING, "gpt2 or llama")
            if self.tokenizer is None:
                raise ConfigError("tokenizer must be given for a model from scratch: bytes, a Hub id or a folder.")
        if self.dataset.get("streaming"):
            if self.training.get("max_steps", -1) <= 0:
                raise ConfigError("dataset: a stream has no length; set training.max_steps.")
            if self.max_eval_samples is None:
                raise ConfigError("dataset: a stream has no length; set max_eval_samples.")


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte of UTF-8, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@dataclass(frozen=True)
class Cut:
    """Makes blocks of tokens of a batch of texts; what depends on nothing else, `datasets` recognises in the next run.

    Attributes:
        tokenizer: Of the model.
        text_column: As in `LanguageModelConfig`, like the next.
    """

    tokenizer: PreTrainedTokenizerBase
    text_column: str
    block_size: int

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Whole blocks only."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        # A stream cannot be checked for missing texts before it is read.
        texts = [text or "" for text in batch[self.text_column]]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable([*ids, *end] for ids in encoded))
        size = self.block_size
        blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}


class LanguageModel(Comparison):
    """A causal language model on one text."""

    auto: ClassVar[Any] = AutoModelForCausalLM
    config_class = LanguageModelConfig
    smoke = ("max_train_samples=64", "max_eval_samples=8", "training.max_steps=8")
    config: LanguageModelConfig
    scores = ("loss", "perplexity")

    def __init__(self, config: LanguageModelConfig, output_dir: str) -> None:
        super().__init__(config, output_dir)
        pretrained = None if isinstance(config.model, dict) else config.model
        if config.tokenizer == "bytes":
            self.tokenizer = byte_tokenizer()
        else:
            self.tokenizer = load_part(
                AutoTokenizer, config.tokenizer or pretrained, "tokenizer" if config.tokenizer else "model"
            )
        # Texts are cut into blocks below; their whole length is no mistake to warn of.
        self.tokenizer.model_max_length = sys.maxsize
        self.model_config = self._model_config(pretrained)
        self.data = self._blocks()

    def _model_config(self, pretrained: str | None) -> Any:
        size = self.config.block_size
        if pretrained is not None:
            config = load_part(AutoConfig, pretrained)
            vocabulary = config.get_text_config().vocab_size
            if len(self.tokenizer) > vocabulary:
                raise ConfigError(f"tokenizer: {len(self.tokenizer)} tokens, but the model knows {vocabulary}.")
        else:
            assert isinstance(self.config.model, dict)
            options = {"vocab_size": len(self.tokenizer), **self.config.model}
            end = self.tokenizer.eos_token_id
            config = AutoConfig.for_model(options.pop("type"), bos_token_id=end, eos_token_id=end, **options)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and size > longest:
            raise ConfigError(f"block_size: the model has {longest} positions, got {size}.")
        return config

    def _blocks(self) -> Any:
        """Both splits as blocks of tokens; a stream stays one."""
        config = self.config
        texts = load_splits(config, config.text_column)
        streaming = isinstance(texts, IterableDatasetDict)
        if streaming:
            seed = config.training.get("seed", 42)
            texts["train"] = texts["train"].shuffle(seed=seed, buffer_size=SHUFFLED_TEXTS)
        else:
            check_texts(config.dataset, texts, own_names(config), config.text_column, empty=True)
        cut = Cut(self.tokenizer, config.text_column, config.block_size)
        blocks: dict[str, Any] = {}
        limits = {"train": config.max_train_samples, "validation": config.max_eval_samples}
        for split, limit in limits.items():
            columns = texts[split].column_names or list(next(iter(texts[split])))
            with bars(0 if streaming else len(texts[split])):
                data = texts[split].map(cut, batched=True, remove_columns=columns)
            if streaming:
                blocks[split] = data if limit is None else data.take(limit)
                continue
            if not len(data):
                raise ConfigError(f"dataset: {split} is shorter than one block of {config.block_size} tokens.")
            blocks[split] = data if limit is None else data.select(range(min(limit, len(data))))
        return blocks

    def model(self) -> PreTrainedModel:
        """The pretrained one, or one from scratch."""
        return fresh_model(self.auto, self.config.model, self.config.dtype, self.model_config)

    def parts(self) -> dict[str, Any]:
        """Blocks of tokens; perplexity needs no logits."""
        return {
            "train_dataset": self.data["train"],
            "eval_dataset": self.data["validation"],
            "processing_class": self.tokenizer,
            "data_collator": default_data_collator,
        }

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """See `Comparison.trainer`."""
        return super().trainer(name, compressed, model, **{"prediction_loss_only": True, **training})

    def scored(self, measured: dict[str, float]) -> dict[str, float]:
        """Mean loss of a token in nats, and its exponential."""
        loss = measured["loss"]
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def sample(self, trainer: ApproxTrainer) -> dict[str, Tensor]:
        """The first two blocks of the validation split."""
        return {"input_ids": torch.tensor([block["input_ids"] for block in islice(self.data["validation"], 2)])}


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return run(LanguageModel, argv)


if __name__ == "__main__":
    sys.exit(main())

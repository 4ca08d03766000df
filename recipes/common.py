"""What recipes share: the command line, options, finding models and data, measuring what is on disk."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, get_type_hints

import evaluate
import torch
from rich.console import Console
from transformers import CONFIG_MAPPING, PreTrainedModel, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from config_files import ConfigError, build, describe, did_you_mean, fits
from hf_approx import AvaGradConfig, SharingConfig
from hf_approx.files import write_text
from hf_approx.methods import METHODS, MethodConfig
from hf_approx.packing import PackedFormatError
from hf_approx.text import one_line
from loading import check_loaded, without_reports
from sources import resolve_model

RECIPES = Path(__file__).parent
DTYPES = ("float32", "auto", "bfloat16", "float16")
CARD = (
    *("model_name", "repo_id", "base_model", "license", "language", "tags", "task", "datasets"),
    *("dataset_name", "dataset_type", "dataset_config", "dataset_split", "note"),
)
"""What `ApproxTrainer.about` takes."""


def command_line(
    doc: str | None, output_dir: str | None, smoke: Sequence[str], resume: bool = False
) -> argparse.ArgumentParser:
    """The arguments of every recipe; `overrides` makes of them what `read_yaml` takes.

    Args:
        doc: The recipe's docstring; its first line is shown.
        output_dir: Where outputs go if nothing else is said.
        smoke: Overrides that make it end in seconds.
        resume: Whether it can go on from checkpoints.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file; see recipes/configs")
    folder = "where models, results and pictures are saved"
    parser.add_argument("--output_dir", "--output-dir", default=output_dir, help=folder)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one option; repeatable")
    sizes = ", ".join(smoke).replace("%", "%%")
    parser.add_argument("--smoke", action="store_const", const=smoke, default=(), help=f"end in seconds: {sizes}")
    if resume:
        parser.add_argument("--resume", action="store_true", help="continue from the last checkpoints")
    return parser


def overrides(options: argparse.Namespace) -> list[str]:
    """What `--smoke` and then `--set` change in the config."""
    return [*options.smoke, *(options.set or [])]


def console() -> Console:
    """The standard output, wide enough for a table if it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


@dataclass
class FoldConfig:
    """How shared weights are folded after training.

    Attributes:
        threshold: As in `hf_approx.fold`, like the next two.
        layers: As above.
        space: As above.
        num_train_epochs: Of the training after it; 0: none.

    Raises:
        ValueError: A value is out of range.
    """

    threshold: float | None = None
    layers: int | None = None
    space: str = "weights"
    num_train_epochs: float = 0

    def __post_init__(self) -> None:
        # What `fold` would find too, but only when everything is trained.
        if self.threshold is not None and self.layers is not None:
            raise ValueError("give threshold or layers, not both.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold!r}.")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers must be above 0, got {self.layers!r}.")
        if self.space not in ("coefficients", "weights"):
            raise ValueError(f"space must be coefficients or weights, got {self.space!r}.")
        if self.num_train_epochs < 0:
            raise ValueError(f"num_train_epochs must be >= 0, got {self.num_train_epochs!r}.")


@dataclass(kw_only=True)
class RunConfig:
    """What the YAML file of every recipe with a `Trainer` holds.

    Attributes:
        dataset: Arguments of `datasets.load_dataset`, or `{python: MODULE:FUNCTION, ...}` for a function that
            takes the other entries and returns a `DatasetDict`; the module may be a file beside this one.
        train_split: Split to train on.
        eval_split: Split to measure on.
        max_train_samples: Train on the first so many examples only.
        max_eval_samples: Measure on the first so many examples only.
        training: Arguments of `transformers.TrainingArguments`.
        optimizer: Arguments of `AvaGradConfig`, or nothing for the optimizer `training` names.
        approx: Methods in order: each `{method: NAME, ...fields of its config}`.
        fold: Fold the shared weights afterwards: arguments of `FoldConfig`.
        dtype: Dtype of the weights in training, whatever a pretrained model is stored in; "auto": the model's own.
            Updates smaller than the steps of a half precision are lost: to compute in one, set `training.bf16` or
            `training.fp16` and leave the weights in float32.
        store_dtype: Dtype of the stored weights of a compressed model; None, and a dense model: that of training.
        baseline: Also train the dense model, with the same settings.
        card: What the model card says and no trainer can know; see `ApproxTrainer.about`.

    Raises:
        ConfigError: An option says what can be known to be wrong before anything is loaded.
    """

    arguments: ClassVar[type[TrainingArguments]] = TrainingArguments
    positive: ClassVar[Sequence[str]] = ("max_train_samples", "max_eval_samples")
    """Options that must be above 0, if they are given."""
    streams: ClassVar[bool] = False
    """Whether the data may be a stream."""

    dataset: dict[str, Any]
    train_split: str = "train"
    eval_split: str = "validation"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    approx: list[dict[str, Any]] = field(default_factory=list)
    fold: dict[str, Any] | None = None
    dtype: str = "float32"
    store_dtype: str | None = "float16"
    baseline: bool = True
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hints, known = get_type_hints(self.arguments), {f.name for f in fields(self.arguments)}
        for name, value in self.training.items():
            if name not in known:
                close = did_you_mean(name, sorted(known))
                raise ConfigError(f"training: {self.arguments.__name__} has no option {name!r}{close}.")
            # Options that may be text take more than their annotation says.
            if not fits("", hints[name]) and not fits(value, hints[name]):
                raise ConfigError(f"training: {name} must be {describe(hints[name])}, got {value!r}.")
        for name in self.card:
            if name not in CARD:
                raise ConfigError(
                    f"card: unknown option {name!r}{did_you_mean(name, CARD)}; known: {', '.join(CARD)}."
                )
        tags = self.card.get("tags", [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ConfigError(f"card: tags must be a list of texts, got {tags!r}.")
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if not self.methods() and not self.baseline:
            raise ConfigError("There is nothing to train: approx is empty and baseline is false.")
        optim = self.training.get("optim")
        if self.avagrad() is not None and optim not in (None, self.arguments.optim):
            raise ConfigError(
                f"optimizer: AvaGrad is asked for, and training names the optim {optim!r}; leave one of them out."
            )
        if self.folding() is not None and not any(isinstance(method, SharingConfig) for method in self.methods()):
            raise ConfigError("fold: nothing to fold without the method 'sharing' in approx.")
        if self.dataset.get("streaming") and not self.streams:
            raise ConfigError("dataset: this recipe cannot stream.")

    def methods(self) -> list[MethodConfig]:
        """The method configs; raises `ConfigError` for an unknown method or field."""
        configs = []
        for entry in self.approx:
            options = dict(entry)
            name = options.pop("method", None)
            if not isinstance(name, str) or name not in METHODS:
                raise ConfigError(f"approx: method must be one of {', '.join(METHODS)}, got {name!r}.")
            configs.append(build(METHODS[name], options, f"approx ({name})"))
        return configs

    def avagrad(self) -> AvaGradConfig | None:
        """AvaGrad's settings, if the recipe asks for it."""
        return None if self.optimizer is None else build(AvaGradConfig, self.optimizer, "optimizer")

    def folding(self) -> FoldConfig | None:
        """How to fold, if the recipe asks for it."""
        return None if self.fold is None else build(FoldConfig, self.fold, "fold")


@dataclass
class RecipeConfig(RunConfig):
    """The YAML file of a text classifier.

    Attributes:
        model: Hub id, folder, or `package:NAME/FOLDER` for files inside an installed Python package.
        text_columns: One column, or two for pairs.
        label_column: Column of class numbers or names.
        metric: A name for `evaluate.load`, or a file beside this one.
        max_length: Longest input, in tokens; the model's own limit, if that is lower.
    """

    positive = (*RunConfig.positive, "max_length")

    model: str
    text_columns: list[str] | str
    label_column: str = "label"
    metric: str = "metrics/accuracy_f1.py"
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text_columns, str):
            self.text_columns = [self.text_columns]
        if not 1 <= len(self.text_columns) <= 2:
            raise ConfigError(f"text_columns must be one column or two, got {self.text_columns!r}.")
        if self.label_column in self.text_columns:
            raise ConfigError(f"text_columns: {self.label_column!r} is the label_column, which no text may give away.")


def check_scratch(model: dict[str, Any], known: Any, examples: str) -> None:
    """Raise `ConfigError` unless `{type: NAME, ...}` describes a model from scratch.

    Args:
        model: Its type and options.
        known: Configurations of the models that fit, such as `MODEL_FOR_CAUSAL_LM_MAPPING`.
        examples: Types to name in the message.
    """
    options = dict(model)
    kind = options.pop("type", None)
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in known:
        raise ConfigError(f"model: type must be one transformers knows, such as {examples}, got {kind!r}.")
    if options.keys() & {"dtype", "torch_dtype"}:
        raise ConfigError("model: set the recipe's own option dtype, not one of the model.")
    defaults = CONFIG_MAPPING[kind]()
    for name in options:
        if not hasattr(defaults, name):
            raise ConfigError(f"model: {type(defaults).__name__} has no option {name!r}.")


def fresh_model(
    auto: Any, model: str | dict[str, Any], dtype: str, scratch: Any = None, new_head: bool = False, **options: Any
) -> PreTrainedModel:
    """A pretrained model, or one from scratch.

    Args:
        auto: The `AutoModelFor...` that makes it.
        model: As recipes name it: where it is, or `{type: NAME, ...}`.
        dtype: Of its weights; "auto": the one it is stored in or, from scratch, its config's.
        scratch: Config of the one from scratch.
        new_head: Whether the last layers may be of another task, and are made anew then.
        options: Of `from_pretrained`.

    Raises:
        ConfigError: Other weights have another shape than the config says.
    """
    if isinstance(model, dict):
        return auto.from_config(scratch, **({} if dtype == "auto" else {"dtype": dtype}))
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with without_reports():
            loaded, info = auto.from_pretrained(resolve_model(model), **options)
    except PackedFormatError as error:
        raise ConfigError(
            f"model: {error} If it was packed for other classes, write it dense first: hf-approx decompress {model} "
            "FOLDER."
        ) from None
    check_loaded(str(model), loaded, info, new_head)
    return loaded


def metric_path(name: str) -> str:
    """A metric file beside the recipes, or a name `evaluate` knows."""
    local = RECIPES / name
    return str(local) if local.exists() else name


def load_metric(name: str, example: list[Any]) -> tuple[Any, list[str]]:
    """A metric, and the names of the numbers it computes, from an example of predictions.

    Raises:
        ConfigError: There is none, or what it needs is not installed.
    """
    try:
        metric = evaluate.load(metric_path(name))
    except ImportError as error:
        raise ConfigError(f"metric: {error}") from None
    except (OSError, ValueError) as error:
        own = ", ".join(sorted(f"metrics/{path.name}" for path in (RECIPES / "metrics").glob("*.py")))
        raise ConfigError(
            f"metric: cannot load {name!r}: {one_line(str(error))} Those of the recipes are {own}."
        ) from None
    return metric, list(metric.compute(predictions=example, references=example))


def last_checkpoint(folder: str) -> str | None:
    """The newest checkpoint of a training that wrote to `folder`, if there is one."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a checkpoint folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def load_seconds(folder: str | Path, auto: Any, repeats: int = 3) -> float:
    """Best of several times `from_pretrained` of an `AutoModelFor...` takes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        auto.from_pretrained(folder)
        times.append(time.perf_counter() - start)
    return min(times)


def same_logits(folder: str | Path, auto: Any, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether the checkpoint computes bit for bit what the model in memory does."""
    loaded = auto.from_pretrained(folder).eval()
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        same = torch.equal(loaded(**inputs).logits, model.to("cpu")(**inputs).logits)
    model.to(device)  # it may be measured or trained again
    return same


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=2) + "\n")


def say_saved(folder: Path, models: Mapping[str, int] = MappingProxyType({})) -> None:
    """Print where everything is, and what to do next with the smallest model.

    Args:
        folder: That everything was saved to.
        models: Bytes of the models in it, by the name of their folder; none for recipes that save results only.
    """
    print(f"Saved in {folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")
    for name, size in models.items():
        print(f"  {folder / name}: {size:,} bytes")
    if models:
        # The last of those that are as small: the compressed one.
        best = folder / min(reversed(list(models)), key=lambda name: models[name])
        print(f"Look at a model:  hf-approx inspect {best}")
        print(f"Publish it:       hf-approx push {best} USER/NAME")

"""What recipes share: the command line, reading a config, finding models and data, measuring what is on disk."""

import argparse
import importlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
import yaml
from datasets import ClassLabel, DatasetDict, IterableDatasetDict, Value, load_dataset
from transformers import CONFIG_MAPPING, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_approx import AvaGradConfig, SharingConfig
from hf_approx.methods import METHODS, MethodConfig

RECIPES = Path(__file__).parent

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe's config says something impossible."""


def command_line(doc: str | None, output_dir: str | None, smoke: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments of every recipe; `overrides` makes of them what `read_yaml` takes.

    Args:
        doc: The recipe's docstring; its first line is shown.
        output_dir: Where outputs go if nothing else is said.
        smoke: Overrides that make it end in seconds.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file; see recipes/configs")
    parser.add_argument("--output_dir", default=output_dir, help="where models, results and pictures are saved")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="override one option; repeatable")
    sizes = ", ".join(smoke).replace("%", "%%")
    parser.add_argument("--smoke", action="store_const", const=smoke, default=(), help=f"end in seconds: {sizes}")
    return parser


def overrides(options: argparse.Namespace) -> list[str]:
    """What `--smoke` and then `--set` change in the config."""
    return [*options.smoke, *(options.set or [])]


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
        fold: Fold the shared weights afterwards: arguments of `hf_approx.fold` and, for more training after it,
            `num_train_epochs`.
        store_dtype: Dtype of the stored weights.
        baseline: Also train the dense model, with the same settings.
        card: What the model card says and no trainer can know; see `ApproxTrainer.about`.
    """

    arguments: ClassVar[type[TrainingArguments]] = TrainingArguments

    dataset: dict[str, Any]
    train_split: str = "train"
    eval_split: str = "validation"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    approx: list[dict[str, Any]] = field(default_factory=list)
    fold: dict[str, Any] | None = None
    store_dtype: str | None = "float16"
    baseline: bool = True
    card: dict[str, Any] = field(default_factory=dict)

    def methods(self) -> list[MethodConfig]:
        """The method configs; raises `ConfigError` for an unknown method or field."""
        configs = []
        for entry in self.approx:
            options = dict(entry)
            name = options.pop("method", None)
            if name not in METHODS:
                raise ConfigError(f"approx: method must be one of {', '.join(METHODS)}, got {name!r}.")
            configs.append(build(METHODS[name], options, f"approx ({name})"))
        return configs

    def avagrad(self) -> AvaGradConfig | None:
        """AvaGrad's settings, if the recipe asks for it."""
        return None if self.optimizer is None else build(AvaGradConfig, self.optimizer, "optimizer")

    def check(self, *positive: str) -> None:
        """Raise `ConfigError` for what can be known to be wrong before anything is loaded.

        Args:
            positive: Options of a subclass that must be positive integers.
        """
        for name in self.training:
            if name not in {f.name for f in fields(self.arguments)}:
                raise ConfigError(f"training: {self.arguments.__name__} has no option {name!r}.")
        for name in (*positive, "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and (value is not None or name in positive):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        if not self.methods() and not self.baseline:
            raise ConfigError("There is nothing to train: approx is empty and baseline is false.")
        self.avagrad()
        if self.fold is not None:
            if not any(isinstance(method, SharingConfig) for method in self.methods()):
                raise ConfigError("fold: nothing to fold without the method 'sharing' in approx.")
            for name in self.fold:
                if name not in (known := ("threshold", "layers", "space", "num_train_epochs")):
                    raise ConfigError(f"fold: unknown option {name!r}; known: {', '.join(known)}.")


@dataclass
class RecipeConfig(RunConfig):
    """The YAML file of a text classifier.

    Attributes:
        model: Hub id, folder, or `package:NAME/FOLDER` for files inside an installed Python package.
        text_columns: One column, or two for pairs.
        label_column: Column of class numbers or names.
        metric: A name for `evaluate.load`, or a file beside this one.
        max_length: Longest input, in tokens.
    """

    model: str
    text_columns: list[str]
    label_column: str = "label"
    metric: str = "metrics/accuracy.py"
    max_length: int = 128


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text, for want of a point; here it is the number everyone means."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def build(cls: type[T], options: dict[str, Any], where: str) -> T:
    """A dataclass from its options; `ConfigError`, beginning with `where`, if they do not fit."""
    if not isinstance(options, dict):
        raise ConfigError(f"{where} must be a mapping of options, got {options!r}.")
    known = {f.name: f for f in fields(cast(Any, cls))}
    for name in options:
        if name not in known:
            raise ConfigError(f"{where}: unknown option {name!r}; known: {', '.join(sorted(known))}.")
    missing = [n for n, f in known.items() if f.default is f.default_factory is MISSING and n not in options]
    if missing:
        raise ConfigError(f"{where}: {', '.join(sorted(missing))} must be given.")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def read_yaml(cls: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """Read a YAML file into a dataclass; each override is `KEY=VALUE` or `KEY.SUBKEY=VALUE`, its value YAML.

    Raises:
        ConfigError: The file is missing, no YAML mapping, or has unknown, missing or impossible values.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of options.")
    for override in overrides or []:
        _override(data, override)
    return build(cls, data, str(path))


def read_config(path: str | Path, overrides: list[str] | None = None) -> RecipeConfig:
    """Read the config of a text recipe, as `read_yaml` does, and check what it holds."""
    config = read_yaml(RecipeConfig, path, overrides)
    if isinstance(config.text_columns, str):
        config.text_columns = [config.text_columns]
    config.check("max_length")
    return config


def _override(data: dict[str, Any], override: str) -> None:
    """Set one value of the config in place; numbers in the key are positions in a list."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set needs KEY=VALUE, got {override!r}.")
    *parents, last = key.split(".")
    place: Any = data
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = yaml.load(value, _Loader)
    except (AttributeError, IndexError, TypeError, ValueError, yaml.YAMLError):
        raise ConfigError(f"--set: the config has no place {key!r} for {value!r}.") from None


def resolve_model(name: str) -> str:
    """A Hub id or folder; `package:NAME/FOLDER` becomes the folder inside that package."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    try:
        return str(files(package).joinpath(folder))
    except ModuleNotFoundError:
        raise ConfigError(f"model: the package {package!r} is not installed; install hf-approx[demo].") from None


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
    defaults = CONFIG_MAPPING[kind]()
    for name in options:
        if not hasattr(defaults, name):
            raise ConfigError(f"model: {type(defaults).__name__} has no option {name!r}.")


def fresh_model(auto: Any, model: str | dict[str, Any], scratch: Any) -> Any:
    """A pretrained model, or one from scratch.

    Args:
        auto: The `AutoModelFor...` that makes it.
        model: As recipes name it: where it is, or `{type: NAME, ...}`.
        scratch: Config of the one from scratch.
    """
    return auto.from_config(scratch) if isinstance(model, dict) else auto.from_pretrained(resolve_model(model))


def load_splits(config: RunConfig, *columns: str) -> DatasetDict | IterableDatasetDict:
    """The data set's two splits, as `train` and `validation`; iterable if the config streams.

    Raises:
        ConfigError: A split, or one of the columns, does not exist.
    """
    options = dict(config.dataset)
    if "python" in options:
        source = options.pop("python")
        module, _, function = source.partition(":")
        try:
            data = getattr(importlib.import_module(module), function)(**options)
        except (ImportError, AttributeError, TypeError) as error:
            raise ConfigError(f"dataset: cannot load {source!r}: {error}") from None
    else:
        data = load_dataset(**options)
    if not isinstance(data, DatasetDict | IterableDatasetDict):
        raise ConfigError(
            "dataset: it must have several splits; leave out 'split' and set train_split and eval_split."
        )
    for split in (config.train_split, config.eval_split):
        if split not in data:
            raise ConfigError(f"dataset: no split {split!r}; it has {', '.join(sorted(data))}.")
    there = data[config.train_split].column_names or list(next(iter(data[config.train_split])))
    for column in columns:
        if column not in there:
            raise ConfigError(f"dataset: no column {column!r}; it has {', '.join(there)}.")
    return type(data)({"train": data[config.train_split], "validation": data[config.eval_split]})


def load_data(config: RecipeConfig) -> DatasetDict:
    """The data set of a text classifier; see `load_labelled`."""
    return load_labelled(config, config.label_column, *config.text_columns)


def load_labelled(config: RunConfig, label_column: str, *columns: str) -> DatasetDict:
    """The data set, its labels as class numbers, no longer than the config says.

    Raises:
        ConfigError: A split or column does not exist.
    """
    data = load_splits(config, *columns, label_column)
    if not hasattr(data["train"].features[label_column], "names"):
        # One table of classes for both splits: encoded one by one, the same number could mean two classes.
        classes = sorted(map(str, set(data["train"][label_column])))
        unknown = sorted(set(map(str, data["validation"][label_column])) - set(classes))
        if unknown:
            raise ConfigError(f"dataset: {config.eval_split!r} has the class {unknown[0]!r}, which training lacks.")
        text = data.cast_column(label_column, Value("string"))
        data = text.cast_column(label_column, ClassLabel(names=classes))
    return first_samples(config, data)


def first_samples(config: RunConfig, data: DatasetDict) -> DatasetDict:
    """The splits cut to `max_train_samples` and `max_eval_samples`."""
    for split, limit in (("train", config.max_train_samples), ("validation", config.max_eval_samples)):
        if limit is not None:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    return data


def metric_path(name: str) -> str:
    """A metric file beside the recipes, or a name `evaluate` knows."""
    local = RECIPES / name
    return str(local) if local.exists() else name


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
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

"""Loading the two splits that a recipe trains and measures on, checked before any model is loaded."""

import importlib
import inspect
import re
from typing import Any

from datasets import DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError

from checks import (
    check_columns,
    check_files,
    check_images,
    check_texts,
    fault,
    files_of,
    number_labels,
    reason,
    source,
)
from common import RecipeConfig, RunConfig
from config_files import ConfigError, did_you_mean
from loading import without_traces
from sources import check_data_path

LOADERS = ("csv", "json", "text", "parquet", "imagefolder")
"""What `path` is most often for one's own files."""


def load_splits(config: RunConfig, *columns: str) -> DatasetDict | IterableDatasetDict:
    """The data set's two splits, as `train` and `validation`; iterable if the config streams.

    Raises:
        ConfigError: A split, or one of the columns, does not exist.
    """
    options = dict(config.dataset)
    if "python" in options:
        source = options.pop("python")
        module, _, function = str(source).partition(":")
        try:
            data = getattr(importlib.import_module(module), function)(**options)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"dataset: cannot load {source!r}: {error}") from None
    elif "path" not in options:
        raise ConfigError("dataset: give path, for datasets.load_dataset, or python, for a function.")
    else:
        check_data_path(str(options["path"]), config.train_split, config.eval_split)
        check_files(options)
        try:
            with without_traces():
                data = _load(options)
        except ConfigError:
            raise
        except (TypeError, ValueError, OSError, DatasetsError) as error:
            raise ConfigError(_sentence(options, error)) from None
    if not isinstance(data, DatasetDict | IterableDatasetDict):
        raise ConfigError(
            "dataset: it must have several splits; leave out 'split' and set train_split and eval_split."
        )
    for option in ("train_split", "eval_split"):
        split = getattr(config, option)
        if split not in data:
            files = "" if "python" in config.dataset else ", or give data_files a file for each split"
            if config.dataset.get("path") == "imagefolder":
                files = f", or put the images into folders {config.train_split} and {config.eval_split}"
            raise ConfigError(f"dataset: no split {split!r}; it has {', '.join(sorted(data))}: set {option}{files}.")
    for split in (config.train_split, config.eval_split):
        there = data[split].column_names or list(next(iter(data[split]), {}))
        check_columns(config.dataset, split, there, columns)
    return type(data)({"train": data[config.train_split], "validation": data[config.eval_split]})


def _load(options: dict[str, Any]) -> Any:
    files = files_of(options)
    try:
        return load_dataset(**options)
    except (DatasetGenerationError, ValueError):
        if not files or options.get("split") is not None or options.get("streaming"):
            raise
    # Files that are loaded together must have the same columns, with the same kinds of values. What differs may be of
    # no use here; if it is, a check names it.
    data = {}
    for split in files:
        try:
            data[split] = load_dataset(**{**options, "data_files": {split: files[split]}})[split]
        except (DatasetGenerationError, ValueError) as error:
            why = fault(options, split) or reason(error)
            raise ConfigError(f"{source(options, split)} cannot be read: {why}.") from None
    return DatasetDict(data)


def _sentence(options: dict[str, Any], error: Exception) -> str:
    """What is wrong with a data set that cannot be loaded, as far as its options can tell."""
    path = str(options["path"])
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None:
        close = did_you_mean(unknown[1], inspect.signature(load_dataset).parameters)
        return f"dataset: {path!r} has no option {unknown[1]!r}{close}."
    close = "" if path in LOADERS else did_you_mean(path, LOADERS)
    return f"dataset: cannot load {path!r}{close}: {reason(error)}."


def own_names(config: RunConfig) -> dict[str, str]:
    """What the data set calls `train` and `validation`."""
    return {"train": config.train_split, "validation": config.eval_split}


def load_data(config: RecipeConfig) -> DatasetDict:
    """The data set of a text classifier, every row of it with a text and a class; see `load_labelled`."""
    data = load_splits(config, config.label_column, *config.text_columns)
    check_texts(config.dataset, data, own_names(config), *config.text_columns)
    return first_samples(config, number_labels(config.dataset, data, own_names(config), config.label_column))


def load_labelled(config: RunConfig, label_column: str, image_column: str) -> DatasetDict:
    """A data set of images, its labels as class numbers, no longer than the config says.

    Raises:
        ConfigError: A split or column does not exist, or a row has no class or no image.
    """
    data = load_splits(config, image_column, label_column)
    data = first_samples(config, number_labels(config.dataset, data, own_names(config), label_column))
    check_images(config.dataset, data, own_names(config), image_column)
    return data


def first_samples(config: RunConfig, data: DatasetDict) -> DatasetDict:
    """The splits cut to `max_train_samples` and `max_eval_samples`."""
    for split, limit in (("train", config.max_train_samples), ("validation", config.max_eval_samples)):
        if limit is not None:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    return data

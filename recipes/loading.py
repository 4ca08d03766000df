"""Loading models without what transformers says of it that nobody can act on, and with what one can."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import datasets
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from config_files import ConfigError

LONG = 100_000
"""Of so many rows one waits for what is made."""


@contextmanager
def without_reports() -> Iterator[None]:
    """No table of the weights that a checkpoint lacks: a new head is what was asked for; see `check_loaded`."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def quiet() -> None:
    """No bars of what takes a blink: loading and saving weights, a dozen times a run, and reading files of data."""
    disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def bars(rows: int) -> Iterator[None]:
    """With a bar of `datasets` for what is made of many rows."""
    if rows < LONG:
        yield
        return
    datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()


@contextmanager
def without_traces() -> Iterator[None]:
    """Without what `datasets` logs of an error that it raises too."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def check_loaded(place: str, model: PreTrainedModel, info: dict[str, Any], new_head: bool) -> None:
    """Look at what `from_pretrained` found.

    Args:
        place: Where the model is from.
        model: That was loaded with `ignore_mismatched_sizes`.
        info: From `output_loading_info`.
        new_head: Leave out the weights of the head.

    Raises:
        ConfigError: A weight has another shape in the checkpoint.
    """
    body = f"{model.base_model_prefix}." if new_head else ""
    wrong = sorted(entry[0] for entry in info["mismatched_keys"] if entry[0].startswith(body))
    if wrong:
        raise ConfigError(f"model: {place!r} does not fit its own config: {wrong[0]!r} has another shape there.")
    fresh = sorted(name for name in info["missing_keys"] if name.startswith(body))
    if fresh:
        _say_once(
            f"{len(fresh)} weights are not in {place!r} and start from random numbers: {fresh[0]!r}"
            + (f", {fresh[1]!r} ..." if fresh[1:] else "")
        )


@cache
def _say_once(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)

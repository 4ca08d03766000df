"""Reading a whole model folder and writing another one, whole or not at all."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.checkpoint import QUANT_METHOD
from hf_approx.files import write_bytes, write_text
from hf_approx.finite import refuse_not_finite
from hf_approx.inspection import inspect_checkpoint
from hf_approx.json_files import read_json
from hf_approx.layout import ARGUMENTS_FILE, CARD_FILE, CONFIG_FILE, PICTURES, REPORT_FILE
from hf_approx.links import own_file
from hf_approx.logs import get_logger
from hf_approx.model_folder import model_files
from hf_approx.packing import dtype_from_name, shown
from hf_approx.remote_code import without_code, without_questions
from hf_approx.staging import recover, staged
from hf_approx.text import listed, one_line

logger = get_logger(__name__)

LARGER, SMALL = 10, 1 << 20
"""A config that describes so many times the weights that are in the files, and more than so many, is damaged: heads
that are not there, and layers that were cut, are less."""
MANY_LAYERS = 1000
"""So is one with so many layers, if there are fewer tensors."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: The new checkpoint.
        bytes: Of all its tensors.
        packed: Weights that are stored as integers, by parameter name.
        bits: Of each of those integers; 0 if there are none.
        group_size: How many inputs of a row share a scale; 0 for all.
        dense: Weights that were packed and are dense now, and why, by parameter name; empty if the format is dense.
    """

    folder: Path
    bytes: int
    packed: tuple[str, ...] = ()
    bits: int = 0
    group_size: int = 0
    dense: dict[str, str] = field(default_factory=dict)


def check_output(output: Path) -> None:
    """Raise `ValueError` unless a folder can be written there without replacing anything."""
    recover(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"'{output}' exists and is not an empty folder.")


def load_model(folder: Path, dtype: str | None = None) -> PreTrainedModel:
    """The model in a folder, of the class that its config names.

    Args:
        folder: A saved model.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`; default: the one in its config.

    Raises:
        ValueError: Its config is damaged or names no class that transformers has, another library quantized it, or
            the folder holds another model or less than a whole one, a weight is NaN or infinite, or there is no such
            dtype; or it needs code of its own, which is never run.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype_from_name(dtype)}
    found = inspect_checkpoint(folder)  # before transformers reads what it has no limits for
    with _described(folder):
        _check_layers(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE), len(found.rows))
        config = without_questions(transformers.AutoConfig.from_pretrained, folder)
    for name in model_files(folder).others:
        without_code(folder / name)
    other = getattr(config, "quantization_config", None)
    if isinstance(other, dict) and other.get("quant_method") != QUANT_METHOD:
        method = one_line(str(other.get("quant_method")))
        raise ValueError(f"'{folder}' is quantized already, by {method}: start from a dense model.")
    names = config.architectures or ["AutoModel"]
    name = names[0] if isinstance(names, list) else names
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (name == "AutoModel" or (isinstance(cls, type) and issubclass(cls, PreTrainedModel))):
        raise ValueError(f"transformers has no model class {shown(name)}.")
    with _described(folder), torch.device("meta"):
        empty = transformers.AutoModel.from_config(config) if name == "AutoModel" else cls(config)  # type: ignore[misc]
    wanted, there = sum(p.numel() for p in empty.parameters()), sum(math.prod(row.shape) for row in found.rows)
    if wanted > LARGER * max(there, SMALL):
        raise ValueError(f"{folder / CONFIG_FILE} describes {wanted:,} weights, the weight files have {there:,}.")
    # What transformers raises for other shapes does not say which they are; its report does.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = cls.from_pretrained(folder, trust_remote_code=False, **options)  # type: ignore[union-attr]
    except RuntimeError as error:
        raise ValueError(f"'{folder}' does not hold a {name}: {one_line(str(error))}") from None
    shapes = sorted(report["mismatched_keys"])
    wrong = [f"'{key}' has shape {list(there)} instead of {list(wanted)}" for key, there, wanted in shapes]
    wrong += [f"'{key}' is missing" for key in sorted(report["missing_keys"])]
    if wrong:
        raise ValueError(f"'{folder}' does not hold a complete {name}: {one_line(wrong[0])}.")
    refuse_not_finite(f"'{folder}' is no model to go on from", model)
    unused = sorted(report["unexpected_keys"])
    # Heads of another training and buffers of another release are none of this model's; layers are, and a head may be
    # where the class is only a guess.
    lost = [key for key in unused if not config.architectures or _of_stack(key, model)]
    if lost:
        raise ValueError(f"'{folder}' does not hold a {name}: the class has no '{one_line(lost[0])}'.")
    if unused:
        more = f" and {len(unused) - 1} more" if unused[1:] else ""
        logger.warning("%s has no '%s'%s: left out.", name, one_line(unused[0]), more)
    return model


@contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Say in one sentence what transformers cannot build from a config that says anything."""
    try:
        yield
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        text = str(error)
        if not isinstance(error, StrictDataclassError):  # whose further lines say where in the code of torch it was
            text = f"{type(error).__name__}: {text.partition(chr(10))[0]}"
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {one_line(text)[:300]}") from None


def _check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise `ValueError` if a config asks for far more layers than there are tensors: building them takes hours."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(path, value, tensors)
        elif re.search(r"layers?$", key) and isinstance(value, int) and value > max(tensors, MANY_LAYERS):
            raise ValueError(
                f"{path} is damaged: {shown(key)} is {shown(value)}, and the weight files have {tensors} tensors."
            )


def _of_stack(key: str, model: PreTrainedModel) -> bool:
    """Whether a tensor is of a layer beyond the last that the model has in a list of layers."""
    parts = key.split(".")
    places = {".".join(parts[:i]): int(part) for i, part in enumerate(parts) if part.isdecimal()}
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return any(index >= len(lists[name]) for name, index in places.items() if name in lists)


def exported_report(source: Path) -> dict[str, Any]:
    """What the report of a packed model says of its methods and results, but not of its files; empty without one."""
    try:
        report = read_json(source / REPORT_FILE) if own_file(source, REPORT_FILE) else {}
        about = dict(report.get("about", {}))
    except (ValueError, TypeError):
        return {}
    if not report:
        return {}
    about = {name: value for name, value in about.items() if name not in ("model_name", "repo_id")}
    kept: dict[str, Any] = {name: report[name] for name in ("methods", "optimizer", "evaluation") if name in report}
    return {**kept, "about": {**about, "exported": True}}


def write_model(
    model: PreTrainedModel,
    source: Path,
    output: Path,
    state: dict[str, Tensor] | None = None,
    report: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> int:
    """Save to `output`, whole or not at all; what belongs to the model in `source` comes along.

    Args:
        model: What to save.
        source: Folder of the other files.
        output: Folder to write; does not exist or is empty.
        state: Tensors to write instead of the model's own.
        report: What its card says beside what is in the files; see `hf_approx.cards.render_card`.
        finish: Called with the folder before it takes its place.

    Returns:
        Bytes of the tensors written.
    """
    with staged(output) as partial:
        model.save_pretrained(partial, state_dict=state)
        _bring_companions(source, partial)
        if report:
            write_text(partial / REPORT_FILE, json.dumps(report, indent=2) + "\n")
        if finish is not None:
            finish(partial)
        return inspect_checkpoint(partial).bytes


def _bring_companions(source: Path, folder: Path) -> None:
    """Copy what belongs to a model beside its weights and configs, and say what is left out."""
    # What describes other files is made anew, and these were not trained with those arguments.
    ours = (CARD_FILE, REPORT_FILE, ARGUMENTS_FILE, *PICTURES)
    found = model_files(source, ours)
    for name in sorted({*found.others} - {*ours, "config.json", "generation_config.json"}):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    for path in folder.rglob("*.json"):
        if (plain := without_code(path)) is not None:
            write_bytes(path, plain)
    if found.left_out:
        logger.warning("Left out of what was written, because it is no part of a model: %s.", listed(found.left_out))

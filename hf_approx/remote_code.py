"""The file of code in a pushed repository: with `trust_remote_code=True`, transformers imports hf_approx by itself.

Without that argument transformers never runs it. Where hf_approx is not installed, transformers says which package is
missing and how to install it, instead of stopping at sizes that do not fit. Code of others does not come along.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import CONFIG_MAPPING

from hf_approx.cards import auto_class, first_architecture, own_class
from hf_approx.checkpoint.config import LOADER
from hf_approx.json_files import read_json
from hf_approx.text import one_line

T = TypeVar("T")

LOADER_FILE = f"{LOADER}.py"

TEMPLATE = '''"""{name} from packed weights: importing hf_approx lets transformers read them."""

import hf_approx  # noqa: F401
import transformers


class {name}(transformers.{name}):
    """As in transformers."""
'''


CODE = ("auto_map", "custom_pipelines")
"""Entries of a config that name classes in files of code."""


def loader_files(folder: Path) -> dict[str, bytes]:
    """The loader of a packed model and the config that names it; nothing for a class that transformers does not have.

    Args:
        folder: A saved packed model.

    Returns:
        Contents by file name.
    """
    config, _ = _without(read_json(folder / "config.json"))
    name = own_class(config)
    if name is None:
        return {}
    config["auto_map"] = {auto_class(name): f"{LOADER}.{name}"}
    return {"config.json": _dumped(config), LOADER_FILE: TEMPLATE.format(name=name).encode()}


def without_code(path: Path) -> bytes | None:
    """What a file of a model says without the classes in files of code that it names; None if it names none.

    Such files do not come along with a model: who loads it would be asked to run code that is not there, or anything
    that someone puts in its place.

    Raises:
        ValueError: transformers has no class for it without that code.
        PackedFormatError: It is damaged.
    """
    if not path.name.endswith("config.json"):
        return None
    config, found = _without(read_json(path))
    if not found:
        return None
    classes = [config.get(key) for key in ("tokenizer_class", "image_processor_type", "feature_extractor_type")]
    if path.name == "config.json" and config.get("model_type") not in CONFIG_MAPPING:
        classes.append(str(config.get("model_type")))
    classes += [config.get("processor_class"), first_architecture(config)]
    strange = [name for name in classes if isinstance(name, str) and not hasattr(transformers, name)]
    if strange:
        raise ValueError(
            f"'{path}' needs code for its '{one_line(strange[0])}' that transformers does not have, and that does not "
            "come along."
        )
    return _dumped(config)


def without_questions(load: Callable[..., T], folder: Path) -> T:
    """What a `from_pretrained` of transformers returns, which neither runs code of the folder nor asks whether to.

    Raises:
        ValueError: It needs that code.
    """
    try:
        return load(folder, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"'{folder}' needs code of its own, which hf_approx never runs: load it yourself, with "
            "trust_remote_code=True, and use attach_packing and save_pretrained."
        ) from None


def _without(data: Any) -> tuple[Any, bool]:
    """The data without what names code, and whether there was any."""
    if isinstance(data, list):
        parts = [_without(part) for part in data]
        return [part for part, _ in parts], any(found for _, found in parts)
    if not isinstance(data, dict):
        return data, False
    inner = {key: _without(value) for key, value in data.items() if key not in CODE}
    found = any(data.get(key) for key in CODE) or any(found for _, found in inner.values())
    return {key: value for key, (value, _) in inner.items()}, found


def _dumped(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

"""The file of code in a pushed repository: with `trust_remote_code=True`, transformers imports hf_approx by itself.

Without that argument transformers never runs it. Where hf_approx is not installed, transformers says which package is
missing and how to install it, instead of stopping at sizes that do not fit.
"""

import json
from pathlib import Path

import transformers

from hf_approx.cards import auto_class, first_architecture
from hf_approx.checkpoint.config import LOADER
from hf_approx.json_files import read_json

LOADER_FILE = f"{LOADER}.py"

TEMPLATE = '''"""{name} from packed weights: importing hf_approx lets transformers read them."""

import hf_approx  # noqa: F401
import transformers


class {name}(transformers.{name}):
    """As in transformers."""
'''


def loader_files(folder: Path) -> dict[str, bytes]:
    """The loader of a packed model and the config that names it; nothing if the model brings code of its own.

    Args:
        folder: A saved packed model.

    Returns:
        Contents by file name.
    """
    config = read_json(folder / "config.json")
    name = first_architecture(config)
    cls = None if name is None else getattr(transformers, name, None)
    theirs = [ref for ref in (config.get("auto_map") or {}).values() if not str(ref).startswith(f"{LOADER}.")]
    if theirs or name is None or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return {}
    config["auto_map"] = {auto_class(name): f"{LOADER}.{name}"}
    return {
        "config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        LOADER_FILE: TEMPLATE.format(name=name).encode(),
    }

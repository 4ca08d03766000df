"""What a saved `config.json` says of packed weights: what is in the files beside it, whatever model has the config.

transformers writes the `quantization_config` that a config has. Configs travel: an encoder has that of its model, a
model made by `from_config` that of a packed file, an encoder-decoder those of its two parts. So what they say is put
right whenever a model is saved.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_approx.checkpoint.config import QUANT_METHOD, ApproxConfig
from hf_approx.checkpoint.contents import located
from hf_approx.checkpoint.places import Names
from hf_approx.files import write_text
from hf_approx.headers import Header
from hf_approx.json_files import read_json
from hf_approx.layout import CONFIG_FILE

SECTION = "quantization_config"
GUARD = "transformers_weights"
"""Where a config can name the weight file. A name that is none stops transformers, whatever it was told to ignore."""
NOTICE = (
    "this model is packed, and only hf_approx knows the sizes of its weights. "
    "pip install hf-approx, and import hf_approx before from_pretrained"
)


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those nested in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


def is_claim(section: Any) -> bool:
    """Whether a `quantization_config` is one of packed weights, read or not."""
    method = section.get("quant_method") if isinstance(section, Mapping) else getattr(section, "quant_method", None)
    return bool(method == QUANT_METHOD)


def forget(config: PreTrainedConfig) -> None:
    """Remove what a config was read with for others: the guard, and what nested ones say of packed weights."""
    for part in configs(config):
        if getattr(part, GUARD, None) == NOTICE:
            delattr(part, GUARD)
        if part is not config and is_claim(vars(part).get(SECTION)):
            delattr(part, SECTION)


@contextmanager
def truthful(model: PreTrainedModel) -> Iterator[ApproxConfig | None]:
    """Let the config of a model, and those nested in it, say what is in the files while these are written.

    A model that saves itself packed says so, and in nested configs that the whole one knows: a part of it can be
    loaded by its own config then. Nobody else says anything, but for a training that notes it is unfinished.

    Yields:
        What the model's config says.
    """
    own = getattr(getattr(model, "hf_quantizer", None), SECTION, None)
    said = [(part, vars(part).get(SECTION)) for part in configs(model.config)]
    training = vars(model.config).get(SECTION)
    if not isinstance(own, ApproxConfig):
        own = training if isinstance(training, ApproxConfig) and training.training else None
    for part, section in said:
        if section is None or is_claim(section):
            _set(part, own if part is model.config or own is None else ApproxConfig(training=own.training))
    try:
        yield own
    finally:
        for part, section in said:
            _set(part, section)


def _set(config: PreTrainedConfig, section: Any) -> None:
    if section is not None:
        setattr(config, SECTION, section)
    elif SECTION in vars(config):
        delattr(config, SECTION)


def whole_section(config: ApproxConfig, files: list[str]) -> ApproxConfig:
    """What is said of the whole model, for a part of it that was loaded by its own config, which says nothing.

    Args:
        config: What the config says that the model is loaded by.
        files: Paths of the weight files; the whole config is beside them.

    Raises:
        PackedFormatError: The whole config is damaged.
    """
    if config.tensors or config.structure or config.activations or not files:
        return config
    path = Path(files[0]).with_name(CONFIG_FILE)
    section = read_json(path).get(SECTION) if path.is_file() else None
    if not isinstance(section, dict) or not is_claim(section):
        return config
    with located(path):
        whole = ApproxConfig.read(section)
    whole.runtime = config.runtime
    return whole


def holds_plain(
    config: ApproxConfig, headers: Mapping[str, Mapping[str, Header]], model: PreTrainedModel, names: Names
) -> bool:
    """Whether every weight that should be packed is in the files as it is: they were not written by a packed model.

    Args:
        config: What the config says.
        headers: Of the weight files, by file and tensor.
        model: The model that loads them.
        names: Of this model.
    """
    existing = model.state_dict()
    stored = [part for tensors in headers.values() for part in tensors.items()]
    plain = {name: shape for name, (dtype, shape) in stored if dtype != "U8"}
    shapes = {names.find(name, existing): shape for name, shape in plain.items()}
    joined = {names.joined(name, existing) for name in plain}
    wanted = {own: spec.shape for n, spec in config.tensors.items() if (own := names.find(n, existing)) is not None}
    return bool(wanted) and all(shapes.get(own) == shape or own in joined for own, shape in wanted.items())


def guard(folder: Path) -> None:
    """Make processes that have not imported hf_approx stop at the config of a packed model."""

    def mark(config: dict[str, Any]) -> None:
        config[GUARD] = NOTICE
        for part in config.values():
            if isinstance(part, dict) and "model_type" in part:
                mark(part)

    data = read_json(folder / CONFIG_FILE)
    if is_claim(data.get(SECTION)):
        mark(data)
        write_text(folder / CONFIG_FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")

"""What a config says is in the weight files, compared with what is in them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from hf_approx.checkpoint.activations import FLOATS, check_buffers
from hf_approx.checkpoint.checksums import tensor_checksum
from hf_approx.checkpoint.config import ApproxConfig
from hf_approx.headers import Header, read_header, weight_map
from hf_approx.json_files import read_json
from hf_approx.modules.bank import BANKS
from hf_approx.packing import PackedFormatError, SharedSpec, shown

MAX_NESTING = 16
"""Banks whose templates are mixed from another bank, whose templates are mixed from a third, and so on."""

_TEMPLATE = re.compile(rf"(?:.*\.)?{BANKS}\.([^.]+)\.(0|[1-9][0-9]*)\.weight", re.DOTALL)


def read_headers(files: Iterable[str | Path]) -> dict[str, dict[str, Header]]:
    """The header of every tensor in the weight files that transformers chose, by file and tensor.

    Raises:
        PackedFormatError: A file is missing, damaged or of another format.
    """
    headers = {}
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise PackedFormatError(f"{path} is no safetensors file: packed weights are in no others.")
        if not path.is_file():
            raise PackedFormatError(f"{path}, one of the model's weight files, is missing.")
        headers[path.name] = read_header(path)
    return headers


def index_of(files: Iterable[str | Path]) -> dict[str, str] | None:
    """The index that lists these files, if there is one beside them.

    Raises:
        PackedFormatError: It is damaged.
    """
    paths = [Path(file) for file in files]
    names = {path.name for path in paths}
    if len(names) < 2:
        return None
    for path in sorted(paths[0].parent.glob("*.safetensors.index*.json")):
        index = weight_map(read_json(path), str(path))
        if set(index.values()) <= names:
            return index
    return None


@contextmanager
def located(path: str | Path) -> Iterator[None]:
    """Put the file or folder in front of what a `PackedFormatError` says."""
    try:
        yield
    except PackedFormatError as error:
        raise PackedFormatError(f"{path}: {error}") from None


def check_contents(config: ApproxConfig, stored: Mapping[str, Header]) -> None:
    """Raise `PackedFormatError` unless all that a config implies is stored, with its shape and kind of dtype.

    That is: every packed weight, the templates of every bank, bits and limits of quantized activations and, since
    version 3 of the format, every other tensor that was saved.
    """
    for name, spec in config.tensors.items():
        if name not in stored:
            raise PackedFormatError(f"Packed weight '{name}' is in config.json but in no weight file.")
        spec.check_stored(name, *stored[name])
    _check_templates(config, stored)
    check_buffers(config.activations, stored)
    for name in config.plain:
        if name not in stored:
            raise PackedFormatError(f"'{name}' is in config.json but in no weight file.")


def _check_templates(config: ApproxConfig, stored: Mapping[str, Header]) -> None:
    found: dict[tuple[str, int], str] = {}
    for name in stored:
        match = _TEMPLATE.fullmatch(name)
        if match and len(match[2]) < 9 and found.setdefault((match[1], int(match[2])), name) != name:
            raise PackedFormatError(f"Template {match[2]} of bank {shown(match[1])} is stored twice.")
    banks = {spec.bank: spec for spec in config.tensors.values() if isinstance(spec, SharedSpec)}
    mixed_from: dict[str, set[str]] = {bank: set() for bank in banks}
    for bank, spec in banks.items():
        for k in range(spec.templates):
            template = found.get((bank, k))
            if template is None:
                raise PackedFormatError(f"Template {k} of bank '{bank}' is in no weight file.")
            packed, (dtype, shape) = config.tensors.get(template), stored[template]
            if packed is not None:
                dtype, shape = FLOATS[0], packed.shape
            if dtype not in FLOATS or shape != spec.shape:
                raise PackedFormatError(
                    f"Template {k} of bank '{bank}' should be numbers of shape {list(spec.shape)}, the file holds "
                    f"{dtype} {list(shape)}."
                )
            if isinstance(packed, SharedSpec):
                mixed_from[bank].add(packed.bank)
    left = set(banks)
    for _ in range(MAX_NESTING):
        left = {bank for bank in left if mixed_from[bank] & left}
    if left:
        raise PackedFormatError(f"The templates of bank '{min(left)}' are mixed from themselves.")


def verify_tensors(files: Iterable[str | Path], config: ApproxConfig) -> None:
    """Read every plain tensor whose checksum the config has, one at a time.

    Raises:
        PackedFormatError: A tensor is not the one that was saved.
    """
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in config.plain and tensor_checksum(name, file.get_tensor(name)) != config.plain[name]:
                    raise PackedFormatError(f"'{name}' in {path} is damaged: it does not match its checksum.")


def verify_packed(files: Iterable[str | Path], config: ApproxConfig) -> None:
    """The same for packed weights, without decoding them; loading does this by itself."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & set(config.tensors):
                try:
                    config.tensors[name].read(file.get_tensor(name))
                except PackedFormatError as error:
                    raise PackedFormatError(f"'{name}' in {path} is damaged: {error}.") from None

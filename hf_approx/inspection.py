"""What is in a checkpoint, read from its config and the headers of its weight files."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from safetensors import SafetensorError, safe_open

from hf_approx.checkpoint import QUANT_METHOD, ApproxConfig
from hf_approx.json_files import read_json
from hf_approx.modules.bank import BANKS
from hf_approx.packing import MAX_BITS, PackedFormatError, QuantizedSpec, SharedSpec, TensorSpec

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "C64": 8,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Row:
    """One tensor: how large it is dense (in its stored dtype) and on disk.

    Attributes:
        bits: Bits a weight on disk, with everything that is stored beside the weights.
        counts: Of a quantized weight: how many of its weights have 0, 1, ..., 8 bits. Otherwise empty.
        bank: Of a weight mixed from templates: the name of their bank. Otherwise empty.
        dense_bytes: 0 for the templates themselves, which no dense model has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    packed: bool
    sparsity: float
    bits: float
    bytes: int
    dense_bytes: int
    counts: tuple[int, ...] = ()
    bank: str = ""


@dataclass(frozen=True)
class Inspection:
    """Every tensor of a checkpoint, and what the packed ones could be at best.

    Attributes:
        format: What the config calls the format of weights that another library quantized; otherwise empty. They
            count as the tensors they are stored in: how large they would be dense is not said.
    """

    rows: list[Row]
    packed_bytes: int
    packed_bound_bytes: float
    format: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(row.bytes for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors if none was packed."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def bound_bytes(self) -> float:
        """Bytes no packing can go below: see `bound_bytes` of each kind; every other tensor as it is."""
        return self.bytes - self.packed_bytes + self.packed_bound_bytes

    @property
    def sparsity(self) -> float:
        """Share of zeros over the packed weights, without those mixed from templates."""
        packed = [row for row in self.rows if row.packed and not row.bank]
        total = sum(math.prod(row.shape) for row in packed)
        return sum(row.sparsity * math.prod(row.shape) for row in packed) / total if total else 0.0

    @property
    def histogram(self) -> list[int]:
        """How many weights of the quantized tensors have 0, 1, ..., 8 bits; zeros have none."""
        counts = [row.counts for row in self.rows if row.counts]
        return [sum(column) for column in zip([0] * (MAX_BITS + 1), *counts, strict=True)]

    @property
    def bits(self) -> float:
        """Bits a weight over the quantized tensors, with precision maps, masks and scales; 0 if there are none."""
        stored = sum(row.bytes for row in self.rows if row.counts)
        return 8 * stored / max(sum(self.histogram), 1)

    @property
    def code_bits(self) -> float:
        """The same without what is stored beside the codes."""
        return sum(k * count for k, count in enumerate(self.histogram)) / max(sum(self.histogram), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `tensors` and `totals`; if weights are quantized, `quantized`, or the `format` of others."""
        data: dict[str, Any] = {
            **({"format": self.format} if self.format else {}),
            "tensors": [asdict(row) for row in self.rows],
            "totals": {
                "bytes": self.bytes,
                **({} if self.format else {"dense_bytes": self.dense_bytes}),
                "packed_sparsity": self.sparsity,
                "packed_bytes": self.packed_bytes,
                "packed_bound_bytes": self.packed_bound_bytes,
            },
        }
        weights = sum(self.histogram)
        if weights:
            data["quantized"] = {
                "bits": self.bits,
                "code_bits": self.code_bits,
                "histogram": [count / weights for count in self.histogram],
            }
        return data


COMPANIONS = (".json", ".txt", ".model", ".spm", ".bpe", ".tiktoken", ".jinja")
"""Endings of the files that belong to a model beside its weights: tokenizer, processor, chat template."""
TEMPLATES = "additional_chat_templates"
"""The one folder with files of the model: chat templates other than the first."""
ELSEWHERE = [
    *(f"{TEMPLATES[:i]}[!{letter}]*/*" for i, letter in enumerate(TEMPLATES)),
    *(f"{TEMPLATES[:i]}/*" for i in range(1, len(TEMPLATES))),
    f"{TEMPLATES}?*/*",
    "*/*/*",
]
"""Patterns of all that is in other folders: checkpoints of a training, say, or the same model for another engine. They
know no "not", so there is one for each place at which the name of a folder can differ."""
STATES = ("trainer_state.json", "approx_state.json")
"""State of a training, not of a model."""


def find_checkpoint(
    path_or_repo: str, everything: bool = False, revision: str | None = None, token: str | None = None
) -> Path:
    """A folder, or the local copy of a Hub repository.

    Args:
        path_or_repo: Path or repository id.
        everything: Download tokenizer and processor files too, not only config and weights.
        revision: Branch, tag or commit of the repository; default `main`.
        token: Default: that of `HF_TOKEN` or `hf auth login`.

    Raises:
        FileNotFoundError: It is neither, may not be read, or holds no `config.json`.
        ValueError: A revision of a folder is asked for.
    """
    folder = Path(path_or_repo)
    if folder.is_dir() and revision is not None:
        raise ValueError(f"'{path_or_repo}' is a folder: only repositories have revisions.")
    if not folder.is_dir():
        endings = [*(COMPANIONS if everything else (".json",)), ".safetensors"]
        try:
            folder = Path(
                snapshot_download(
                    path_or_repo,
                    revision=revision,
                    token=token,
                    allow_patterns=[f"*{ending}" for ending in endings],
                    ignore_patterns=ELSEWHERE,
                )
            )
        except HFValidationError:
            raise FileNotFoundError(f"'{path_or_repo}' is neither a folder nor the name of a repository.") from None
        except HfHubHTTPError as error:
            raise FileNotFoundError(" ".join(str(error).split())) from None
        except (HTTPError, OSError):
            raise FileNotFoundError(
                f"'{path_or_repo}' is neither a folder nor a repository that can be reached."
            ) from None
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"'{path_or_repo}' has no config.json: it is not a saved model.")
    return folder


def companions(folder: Path) -> list[Path]:
    """The files that belong to the model in a folder beside its weights: relative paths, in order."""
    return sorted(
        path.relative_to(folder)
        for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*.jinja"))
        if path.is_file()
        and path.suffix in COMPANIONS
        and path.name not in STATES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")  # of weight files
    )


def read_packing(folder: Path) -> ApproxConfig | None:
    """The packing part of a checkpoint's config, checked; None for an ordinary checkpoint.

    Raises:
        PackedFormatError: It is damaged.
    """
    return read_quantization(folder)[0]


def read_quantization(folder: Path) -> tuple[ApproxConfig | None, str]:
    """As `read_packing`, and what the config calls the format that another library quantized the checkpoint in.

    Raises:
        PackedFormatError: It is damaged.
    """
    config = read_json(folder / "config.json")
    data = config.get("quantization_config")
    if not isinstance(data, dict) or not data:
        return None, ""
    name = data.get("quant_method")
    if name == QUANT_METHOD:
        return ApproxConfig.from_dict(data), ""
    return None, name if isinstance(name, str) and name else "unnamed"


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read a checkpoint folder without loading its weights.

    Raises:
        PackedFormatError: The config or a weight file is damaged.
        FileNotFoundError: There is no safetensors file.
    """
    (packing, other), stored = read_quantization(folder), {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    stored[name] = (part.get_dtype(), tuple(part.get_shape()))
        except SafetensorError as error:
            raise PackedFormatError(f"{path} is damaged: {error}") from None
    return describe_tensors(stored, packing, other)


def describe_tensors(
    stored: Mapping[str, tuple[str, tuple[int, ...]]], packing: ApproxConfig | None, other: str = ""
) -> Inspection:
    """What the headers of weight files say, under the light of the config.

    Args:
        stored: Dtype (in safetensors' notation) and shape of every stored tensor, by name.
        packing: The packing part of the config, if there is one.
        other: The format of another library, as of `read_quantization`.

    Raises:
        PackedFormatError: They contradict each other.
    """
    specs = packing.tensors if packing else {}
    rows = [_row(name, shape, dtype, specs.get(name)) for name, (dtype, shape) in stored.items()]
    missing = set(specs) - set(stored)
    if missing:
        raise PackedFormatError(f"Packed weight '{min(missing)}' is in config.json but in no weight file.")
    bound = sum(spec.bound_bytes for spec in specs.values())
    return Inspection(rows, sum(row.bytes for row in rows if row.packed), bound, other)


def weight_files(folder: Path) -> list[Path]:
    """The files transformers would read: other safetensors files in the folder are none of the model's."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = ["model.safetensors"]
    else:
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise PackedFormatError(f"{index} is damaged.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' has no file '{name}'.")
    return [folder / name for name in names]


def _row(name: str, shape: tuple[int, ...], dtype: str, spec: TensorSpec | None) -> Row:
    template = f".{BANKS}." in f".{name}"
    if spec is None:
        size = math.prod(shape) * ITEM_BYTES.get(dtype, 1)
        return Row(name, shape, dtype, False, 0.0, 8.0 * ITEM_BYTES.get(dtype, 1), size, 0 if template else size)
    spec.check_stored(name, dtype, shape)
    counts = spec.weights if isinstance(spec, QuantizedSpec) else ()
    bank, dense = spec.bank if isinstance(spec, SharedSpec) else "", 0 if template else spec.dense_bytes
    return Row(name, spec.shape, spec.dtype, True, spec.sparsity, spec.bits, spec.nbytes, dense, counts, bank)

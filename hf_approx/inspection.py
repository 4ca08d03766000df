"""What is in a checkpoint, read from its config and the headers of its weight files."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_approx.checkpoint import QUANT_METHOD, ApproxConfig
from hf_approx.checkpoint.contents import check_contents, located, verify_packed, verify_tensors
from hf_approx.headers import BITS, NAMES, Header, join_headers, read_header
from hf_approx.json_files import read_json
from hf_approx.model_folder import weight_files, weight_index
from hf_approx.modules.bank import BANKS
from hf_approx.packing import MAX_BITS, PackedFormatError, QuantizedSpec, SharedSpec, TensorSpec
from hf_approx.text import natural


@dataclass(frozen=True)
class Row:
    """One tensor: how large it is dense (in its stored dtype) and on disk.

    Attributes:
        dtype: As torch calls it; of a packed weight that of its values, or what it would have dense.
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
        rows: In the order of their names, of layers with their numbers.
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
    path = folder / "config.json"
    data = read_json(path).get("quantization_config")
    if data is None or data == {}:
        return None, ""
    if not isinstance(data, dict):
        raise PackedFormatError(f"{path}: quantization_config is no object.")
    name = data.get("quant_method")
    if name == QUANT_METHOD:
        read_json(path, unique_keys=True)
        with located(path):
            return ApproxConfig.read(data), ""
    return None, name if isinstance(name, str) and name else "unnamed"


def inspect_checkpoint(folder: Path, verify: bool = False) -> Inspection:
    """Read a checkpoint folder without loading its weights.

    Args:
        folder: A saved model.
        verify: Also read all tensors that have a checksum and compare; by default only the headers of files are read.

    Raises:
        PackedFormatError: The config or a weight file is damaged, or they do not belong together.
        FileNotFoundError: There is no safetensors file.
    """
    (packing, other), files = read_quantization(folder), weight_files(folder)
    headers = {path.name: read_header(path) for path in files}
    with located(folder):
        result = describe_files(headers, weight_index(folder), packing, other)
    if verify and packing is not None:
        verify_tensors(files, packing)
        verify_packed(files, packing)
    return result


def describe_files(
    headers: Mapping[str, Mapping[str, Header]],
    index: Mapping[str, str] | None,
    packing: ApproxConfig | None,
    other: str = "",
) -> Inspection:
    """What the headers of weight files say, under the light of the config.

    Args:
        headers: By file and tensor.
        index: The file of every tensor, if there is an index.
        packing: The packing part of the config, if there is one.
        other: The format of another library, as of `read_quantization`.

    Raises:
        PackedFormatError: They contradict each other.
    """
    if packing is None:  # transformers reads what it finds, wherever the index says it is
        stored = {name: header for tensors in headers.values() for name, header in tensors.items()}
    else:
        stored = join_headers(headers, index)
        check_contents(packing, stored)
    specs = packing.tensors if packing else {}
    rows = [_row(name, shape, dtype, specs.get(name)) for name, (dtype, shape) in sorted(stored.items(), key=_place)]
    bound = sum(spec.bound_bytes for spec in specs.values())
    return Inspection(rows, sum(row.bytes for row in rows if row.packed), bound, other)


def _place(entry: tuple[str, Header]) -> list[tuple[int, str]]:
    return natural(entry[0])


def _row(name: str, shape: tuple[int, ...], dtype: str, spec: TensorSpec | None) -> Row:
    template = f".{BANKS}." in f".{name}"
    if spec is None:
        size = math.prod(shape) * BITS[dtype] // 8
        return Row(name, shape, NAMES[dtype], False, 0.0, float(BITS[dtype]), size, 0 if template else size)
    counts = spec.weights if isinstance(spec, QuantizedSpec) else ()
    bank, dense = spec.bank if isinstance(spec, SharedSpec) else "", 0 if template else spec.dense_bytes
    return Row(name, spec.shape, spec.dtype, True, spec.sparsity, spec.bits, spec.nbytes, dense, counts, bank)

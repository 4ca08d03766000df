"""What `config.json` says about a packed checkpoint."""

from typing import Any, Literal, Self

from transformers.quantizers import auto as quantizer_registry
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_approx.checkpoint.activations import check_activations
from hf_approx.checkpoint.checksums import FIELD, config_checksum, entry_checksum
from hf_approx.packing import (
    PackedFormatError,
    TensorSpec,
    check_name,
    check_whole,
    dtype_from_name,
    shown,
    spec_from_dict,
)
from hf_approx.structures import check_description

QUANT_METHOD = "hf_approx"
LOADER = "hf_approx_model"
"""Module of a pushed repository that imports hf_approx; see `hf_approx.remote_code`."""
FORMAT_VERSION = 3
"""Version 2 added shared and quantized weights and quantized activations, version 3 checksums of all there is: until
then they covered the bytes of packed weights only."""

MAX_ENTRIES = 1 << 17
"""More tensors than this in one part of a config are taken for damage; no model has a third as many."""
FIELDS = frozenset(["quant_method", "store_dtype", "tensors", "structure", "activations", "training"])
"""What a file of version 1 or 2 can say, beside the version."""

Runtime = Literal["dense", "packed"]


@register_quantization_config(QUANT_METHOD)
class ApproxConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of `config.json`; also how to choose the runtime when loading.

    Args:
        tensors: How each packed weight is stored, by parameter name.
        store_dtype: Dtype of every stored weight, or None to store them as they are.
        runtime: `"dense"`: decode while loading; full speed, trainable, zeros stay zero. `"packed"`: keep
            sparse linear layers packed and multiply by their CSR form (CPU inference). Never saved.
        structure: Sizes of the layers that have fewer features than the architecture's config says, as
            `hf_approx.structures.describe` returns them; None if there are none.
        activations: Layers whose input is quantized, by module name: `{"channels": n, "signed": bool}`, the arguments
            of `ActivationQuantizer`.
        training: True in a checkpoint of unfinished training, which cannot be loaded as a model.
        plain: The checksum of every tensor that is stored beside the packed ones, by name; written by saving.

    Raises:
        PackedFormatError: An entry is impossible.
        ValueError: An option is unknown or has an unknown value.
    """

    def __init__(
        self,
        tensors: dict[str, Any] | None = None,
        store_dtype: str | None = None,
        runtime: Runtime = "dense",
        structure: dict[str, Any] | None = None,
        activations: dict[str, Any] | None = None,
        training: bool = False,
        plain: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise ValueError(f"ApproxConfig: unknown option {shown(min(unknown))}.")
        if runtime not in ("dense", "packed"):
            raise ValueError(f"ApproxConfig: runtime must be 'dense' or 'packed', got {shown(runtime)}.")
        if store_dtype is not None:
            dtype_from_name(store_dtype)
        if type(training) is not bool:
            raise ValueError(f"ApproxConfig: training must be true or false, got {shown(training)}.")
        if not isinstance(tensors, dict | None):
            raise PackedFormatError("ApproxConfig: tensors must map parameter names to entries.")
        if not isinstance(plain, dict | None):
            raise PackedFormatError("ApproxConfig: plain must map names of tensors to checksums.")
        self.tensors: dict[str, TensorSpec] = {
            name: spec if isinstance(spec, TensorSpec) else spec_from_dict(name, spec)
            for name, spec in (tensors or {}).items()
        }
        if structure is not None:
            try:
                check_description(structure)
            except ValueError as error:
                raise PackedFormatError(str(error)) from None
        for name, value in (plain or {}).items():
            check_name(name)
            check_whole(f"The checksum of '{name}'", value, 2**32 - 1)
            if name in self.tensors:
                raise PackedFormatError(f"'{name}' is packed, and has the checksum of a tensor that is not.")
        self.plain = plain or {}
        check_activations({} if activations is None else activations)
        self.activations = activations or {}
        self.structure = structure
        self.store_dtype = store_dtype
        self.runtime = runtime
        self.training = training

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """As of the base class, for what `config.json` says; see `read`."""
        try:
            config = cls.read(config_dict)
        except PackedFormatError as error:
            raise PackedFormatError(f"config.json: {error}") from None
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def read(cls, data: dict[str, Any]) -> Self:
        """The config that `to_dict` gave, in this version or an earlier one.

        Raises:
            PackedFormatError: It was written by a newer version, is not as it was written, or is impossible.
        """
        try:
            return cls._read(data)
        except RecursionError:
            raise PackedFormatError("quantization_config is nested too deeply.") from None
        except ValueError as error:
            raise PackedFormatError(str(error)) from None

    @classmethod
    def _read(cls, data: dict[str, Any]) -> Self:
        fields = dict(data)
        version = fields.pop("format_version", FORMAT_VERSION)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise PackedFormatError(
                f"This checkpoint has hf_approx format version {shown(version)}; this hf_approx reads versions 1 to "
                f"{FORMAT_VERSION}. Upgrade hf_approx."
            )
        unknown = set(fields) - (FIELDS if version < 3 else FIELDS | {"plain", FIELD})
        if unknown:
            raise PackedFormatError(f"Version {version} of the format has no field {shown(min(unknown))}.")
        if any(isinstance(part, dict) and len(part) > MAX_ENTRIES for part in fields.values()):
            raise PackedFormatError(f"quantization_config has more than {MAX_ENTRIES:,} entries.")
        if version < 3:
            return cls(**fields)
        expected = fields.pop(FIELD, None)
        if type(expected) is not int or expected != config_checksum(data):
            raise PackedFormatError("quantization_config is damaged: it does not match its checksum.")
        if isinstance(fields.get("tensors"), dict):
            fields["tensors"] = {name: _of_bytes(name, entry) for name, entry in fields["tensors"].items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        tensors = {name: spec.to_dict() for name, spec in self.tensors.items()}
        for name, entry in tensors.items():
            entry["crc32"] = entry_checksum(name, entry, entry["crc32"])
        data: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "store_dtype": self.store_dtype,
            "tensors": tensors,
            "plain": self.plain,
        }
        if self.structure is not None:
            data["structure"] = self.structure
        if self.activations:
            data["activations"] = self.activations
        if self.training:
            data["training"] = True
        return {**data, FIELD: config_checksum(data)}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the caller of `from_pretrained` decides, whatever the file says."""
        return {"runtime": self.runtime}


def _of_bytes(name: str, entry: Any) -> Any:
    """An entry of version 3 with the checksum of the bytes alone; what is no entry, as it is."""
    if not isinstance(entry, dict) or type(entry.get("crc32")) is not int:
        return entry
    return {**entry, "crc32": entry_checksum(name, entry, entry["crc32"])}


# transformers keeps the classes whose loading attributes may be overridden in a tuple with no way to register.
quantizer_registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (ApproxConfig,)  # type: ignore[assignment]

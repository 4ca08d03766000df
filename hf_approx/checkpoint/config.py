"""What `config.json` says about a packed checkpoint."""

from typing import Any, Literal

from transformers.quantizers import auto as quantizer_registry
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_approx.checkpoint.activations import check_activations
from hf_approx.packing import PackedFormatError, SparseSpec, TensorSpec, dtype_from_name, spec_from_dict
from hf_approx.structures import check_description

QUANT_METHOD = "hf_approx"
LOADER = "hf_approx_model"
"""Module of a pushed repository that imports hf_approx; see `hf_approx.remote_code`."""
FORMAT_VERSION = 2
"""Version 2 added shared and quantized weights and quantized activations; without them version 1 is still written."""

Runtime = Literal["dense", "packed"]


@register_quantization_config(QUANT_METHOD)
class ApproxConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of `config.json`; also how to choose the runtime when loading.

    Args:
        tensors: How each packed weight is stored, by parameter name.
        store_dtype: Dtype of every stored weight, or None to store them as they are.
        runtime: `"dense"`: decode while loading; full speed, trainable, zeros stay zero. `"packed"`: keep
            sparse linear layers packed and multiply by their CSR form (CPU inference). Never saved.
        format_version: Version of the format that was read.
        structure: Sizes of the layers that have fewer features than the architecture's config says, as
            `hf_approx.structures.describe` returns them; None if there are none.
        activations: Layers whose input is quantized, by module name: `{"channels": n, "signed": bool}`, the arguments
            of `ActivationQuantizer`.
        training: True in a checkpoint of unfinished training, which cannot be loaded as a model.

    Raises:
        PackedFormatError: The file was written by a newer version, or an entry is impossible.
        ValueError: An option is unknown or has an unknown value.
    """

    def __init__(
        self,
        tensors: dict[str, Any] | None = None,
        store_dtype: str | None = None,
        runtime: Runtime = "dense",
        format_version: int = FORMAT_VERSION,
        structure: dict[str, Any] | None = None,
        activations: dict[str, Any] | None = None,
        training: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise PackedFormatError(
                f"This checkpoint has hf_approx format version {format_version!r}; this hf_approx reads versions 1 to "
                f"{FORMAT_VERSION}. Upgrade hf_approx."
            )
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise ValueError(f"ApproxConfig: unknown option {min(unknown)!r}.")
        if runtime not in ("dense", "packed"):
            raise ValueError(f"ApproxConfig: runtime must be 'dense' or 'packed', got {runtime!r}.")
        if store_dtype is not None:
            dtype_from_name(store_dtype)
        if not isinstance(tensors or {}, dict):
            raise PackedFormatError("ApproxConfig: tensors must map parameter names to entries.")
        self.tensors: dict[str, TensorSpec] = {
            name: spec if isinstance(spec, TensorSpec) else spec_from_dict(name, spec)
            for name, spec in (tensors or {}).items()
        }
        if structure is not None:
            try:
                check_description(structure)
            except ValueError as error:
                raise PackedFormatError(str(error)) from None
        check_activations(activations or {})
        self.activations = activations or {}
        self.structure = structure
        self.store_dtype = store_dtype
        self.runtime = runtime
        self.training = bool(training)

    @property
    def format_version(self) -> int:
        """The oldest version of the format that can express this config."""
        quantized = any(not isinstance(spec, SparseSpec) for spec in self.tensors.values())
        return 2 if quantized or self.activations else 1

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        data: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "store_dtype": self.store_dtype,
            "tensors": {name: spec.to_dict() for name, spec in self.tensors.items()},
        }
        if self.structure is not None:
            data["structure"] = self.structure
        if self.activations:
            data["activations"] = self.activations
        return {**data, "training": True} if self.training else data

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the caller of `from_pretrained` decides, whatever the file says."""
        return {"runtime": self.runtime}


# transformers keeps the classes whose loading attributes may be overridden in a tuple with no way to register.
quantizer_registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (ApproxConfig,)  # type: ignore[assignment]

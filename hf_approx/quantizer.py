"""The transformers hook: packed weights load with `from_pretrained` and save with `save_pretrained`."""

import logging
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers import auto as quantizer_registry
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_approx.modules import MAX_DENSITY, SparseLinear
from hf_approx.packing import PackedFormatError, TensorSpec, dtype_from_name, pack, unpack

logger = logging.getLogger(__name__)

QUANT_METHOD = "hf_approx"
FORMAT_VERSION = 1
NO_OFFLOAD = "hf_approx cannot decode weights offloaded to disk or CPU; choose a device_map without offloading."
Runtime = Literal["dense", "packed"]


@register_quantization_config(QUANT_METHOD)
class ApproxConfig(QuantizationConfigMixin):
    """What `config.json` says under `quantization_config`; also how to choose the runtime when loading.

    Args:
        tensors: How each packed weight is stored, by parameter name.
        store_dtype: Dtype of every stored weight, or None to store them as they are.
        runtime: `"dense"`: decode while loading; full speed, trainable, zeros stay zero. `"packed"`: keep
            sparse linear layers packed and multiply by their CSR form (CPU inference). Never saved.
        format_version: Version of the format that was written.
        training: True in a checkpoint of unfinished training, which cannot be loaded as a model.

    Raises:
        PackedFormatError: The file was written by a newer version, or an entry is impossible.
        ValueError: An option is unknown.
    """

    def __init__(
        self,
        tensors: dict[str, Any] | None = None,
        store_dtype: str | None = None,
        runtime: Runtime = "dense",
        format_version: int = FORMAT_VERSION,
        training: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        if format_version != FORMAT_VERSION:
            raise PackedFormatError(
                f"This checkpoint has hf_approx format version {format_version!r}; this hf_approx reads version "
                f"{FORMAT_VERSION}. Upgrade hf_approx."
            )
        if runtime not in ("dense", "packed"):
            raise ValueError(f"ApproxConfig: runtime must be 'dense' or 'packed', got {runtime!r}.")
        if store_dtype is not None:
            dtype_from_name(store_dtype)
        if not isinstance(tensors or {}, dict):
            raise PackedFormatError("ApproxConfig: tensors must map parameter names to entries.")
        self.tensors = {
            name: spec if isinstance(spec, TensorSpec) else TensorSpec.from_dict(name, spec)
            for name, spec in (tensors or {}).items()
        }
        self.store_dtype = store_dtype
        self.runtime = runtime
        self.format_version = format_version
        self.training = bool(training)

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        data = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "store_dtype": self.store_dtype,
            "tensors": {name: spec.to_dict() for name, spec in self.tensors.items()},
        }
        return {**data, "training": True} if self.training else data

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the caller of `from_pretrained` decides, whatever the file says."""
        return {"runtime": self.runtime}


# transformers keeps the classes whose loading attributes may be overridden in a tuple with no way to register.
quantizer_registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (ApproxConfig,)  # type: ignore[assignment]


def keep_own_names(model: PreTrainedModel) -> None:
    """Make `save_pretrained` write parameters under the names they have, not those of the model's first release."""
    # An empty list of conversions; without the attribute transformers looks them up.
    model._weight_conversions = []  # type: ignore[assignment]


def keep_zeros(param: nn.Parameter) -> None:
    """Zero the gradient of weights that are zero, so training with any optimizer keeps them zero."""
    reference = weakref.ref(param)

    def mask_gradient(grad: Tensor) -> Tensor:
        weight = reference()
        return grad if weight is None else grad.masked_fill(weight == 0, 0)

    param.register_hook(mask_gradient)


@register_quantizer(QUANT_METHOD)
class ApproxQuantizer(HfQuantizer):
    """Turns packed rows of bytes into weights after loading, and weights into bytes when saving."""

    quantization_config: ApproxConfig
    requires_calibration = False

    def __init__(self, quantization_config: ApproxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtypes: dict[str, torch.dtype] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be loaded before anything is built."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(NO_OFFLOAD)
        if self.quantization_config.training:
            raise PackedFormatError(
                "This is a checkpoint of unfinished training. Resume it with "
                "ApproxTrainer.train(resume_from_checkpoint=...); the finished model is saved when training ends."
            )
        if not self.pre_quantized:
            raise ValueError(
                "ApproxConfig cannot compress a dense model while loading it; "
                "train with ApproxTrainer, or use `hf-approx compress`."
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Packed weights do not have the shape of the module's weight; their bytes are checked here instead."""
        return param_name in self.quantization_config.tensors

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes a packed byte takes once decoded, so `device_map="auto"` plans for the dense weight."""
        spec = self.quantization_config.tensors.get(param_name)
        if spec is None or self.quantization_config.runtime == "packed":
            return param.element_size()
        return spec.numel * self._dtypes[param_name].itemsize / max(param.numel(), 1)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """None: a packed file uses the model's own parameter names, never those of its first release."""
        return []

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check config and files against the model, then put a row of bytes in the place of each packed weight."""
        config = self.quantization_config
        _check_files(checkpoint_files or [], config.tensors)
        params = dict(model.named_parameters(remove_duplicate=False))
        config.tensors = _own_names(config.tensors, model, params)
        for name, spec in config.tensors.items():
            if tuple(params[name].shape) != spec.shape:
                raise PackedFormatError(
                    f"Packed weight '{name}': the file says shape {list(spec.shape)}, "
                    f"the model has {list(params[name].shape)}."
                )
            self._dtypes[name] = params[name].dtype
        for name, spec in config.tensors.items():
            packed = torch.empty(spec.nbytes, dtype=torch.uint8, device="meta")
            _replace(model, params[name], nn.Parameter(packed, requires_grad=False))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, spec in self.quantization_config.tensors.items():
            packed = model.get_parameter(name)
            if packed.device.type == "meta":
                raise ValueError(NO_OFFLOAD)
            if packed.dtype != torch.uint8:  # a tied weight, decoded under its other name
                continue
            try:
                if self.quantization_config.runtime == "packed" and self._runs_packed(model, name, spec):
                    self._install_sparse(model, name, spec)
                    continue
                dense = nn.Parameter(unpack(packed.data, spec, self._dtypes[name]))
            except PackedFormatError as error:
                raise PackedFormatError(f"Packed weight '{name}' is damaged: {error}.") from None
            keep_zeros(dense)
            _replace(model, packed, dense)
        return model

    def _runs_packed(self, model: PreTrainedModel, name: str, spec: TensorSpec) -> bool:
        module = model.get_submodule(name.rpartition(".")[0])
        packed = model.get_parameter(name)
        users = sum(p is packed for m in model.modules() for p in m._parameters.values())
        return (
            type(module) in (nn.Linear, Conv1D)
            and users == 1
            and spec.nnz / spec.numel <= MAX_DENSITY
            and packed.device.type == "cpu"
            and self._dtypes[name] in (torch.float32, torch.float64)
        )

    def _install_sparse(self, model: PreTrainedModel, name: str, spec: TensorSpec) -> None:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        packed = model.get_parameter(name).data
        bias = module._parameters["bias"]
        sparse = SparseLinear(packed, spec, bias, self._dtypes[name], isinstance(module, Conv1D))
        model.set_submodule(path, sparse.train(module.training))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to write: packed weights as bytes, the others in the stored dtype."""
        config = self.quantization_config
        dtype = dtype_from_name(config.store_dtype) if config.store_dtype else None
        params = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        done: dict[int, tuple[Tensor, TensorSpec | None]] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            spec = config.tensors.get(name)
            if id(tensor) not in done:
                if spec is not None and tensor.dtype != torch.uint8:
                    done[id(tensor)] = pack(tensor, dtype)
                elif dtype is not None and name in params and tensor.is_floating_point():
                    done[id(tensor)] = (_rounded(name, tensor.detach(), dtype), None)
                else:
                    done[id(tensor)] = (tensor.detach(), spec)
            state[name], written = done[id(tensor)]
            if spec is not None and written is not None:
                config.tensors[name] = written
        keep_own_names(model)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if self.quantization_config.runtime == "packed":
            raise ValueError("Load the model with runtime='dense' to write a dense checkpoint.")
        return model

    def is_serializable(self) -> bool:
        """Loaded packed models save again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Decoded weights are ordinary parameters."""
        return self.quantization_config.runtime == "dense"

    @property
    def is_qat_trainable(self) -> bool:
        """Training needs no adapter."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """Decoded modules are ordinary modules."""
        return self.quantization_config.runtime == "dense"


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if bool((rounded.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"'{name}' has a value that does not fit {dtype}; store bfloat16.")
    return rounded


def _own_names(
    tensors: dict[str, TensorSpec], model: PreTrainedModel, params: dict[str, Any]
) -> dict[str, TensorSpec]:
    """The entries under the names this class has: a base model lacks the prefix a model with a head has.

    Entries for parameters that only the saved class has (its head, say) are left out, as transformers does.
    """
    prefix = f"{model.base_model_prefix}."
    own = {}
    for name, spec in tensors.items():
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in params), None)
        if found is not None:
            own[found] = spec
        elif type(model).__name__ in (model.config.architectures or ()):
            raise PackedFormatError(f"Packed weight '{name}' does not exist in {type(model).__name__}.")
    return own


def _check_files(files: list[str], tensors: dict[str, TensorSpec]) -> None:
    """Raise `PackedFormatError` unless every entry has its row of bytes in one of the files."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & set(tensors):
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    for name, spec in tensors.items():
        if name not in found:
            raise PackedFormatError(f"Packed weight '{name}' is in config.json but in no weight file.")
        spec.check_stored(name, *found[name])


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` wherever `old` is used, so tied weights stay tied."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is old:
                module._parameters[name] = new


def attach_packing(
    model: PreTrainedModel, names: Iterable[str], store_dtype: str | None = "float16"
) -> dict[str, TensorSpec]:
    """Make `model.save_pretrained` write the named weights packed; the model in memory equals what is saved.

    Every floating-point parameter is rounded to `store_dtype` in place (its own dtype stays), so the loaded
    model computes bit for bit what this one does. Weights that would not get smaller stay as they are.

    Args:
        model: A model whose weights are final.
        names: Names of the parameters to pack, as in `named_parameters()`.
        store_dtype: `"float16"`, `"bfloat16"`, `"float32"` or None to keep each parameter's own.

    Returns:
        How each packed weight is stored.

    Raises:
        ValueError: A name is no parameter, or a value overflows the stored dtype. The model is unchanged.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(f"attach_packing: {type(model).__name__} has no parameter '{unknown[0]}'.")
    dtype = dtype_from_name(store_dtype) if store_dtype else None
    rounded = {}
    for name, param in params.items():
        if id(param) not in rounded and param.is_floating_point():
            value = param.detach() if dtype is None else _rounded(name, param.detach(), dtype).to(param.dtype)
            rounded[id(param)] = (param, torch.where(value == 0, torch.zeros_like(value), value))
    specs = {}
    for name in names:
        value = rounded[id(params[name])][1]
        spec = pack(value, dtype)[1]
        if spec.nbytes < value.numel() * (dtype or value.dtype).itemsize:
            specs[name] = spec
    with torch.no_grad():
        for param, value in rounded.values():
            param.copy_(value)
    for name in specs:
        keep_zeros(params[name])

    config = ApproxConfig(tensors=specs, store_dtype=store_dtype)
    attributes: dict[str, Any] = {
        "hf_quantizer": ApproxQuantizer(config, pre_quantized=True),
        "is_quantized": True,
        "quantization_method": QUANT_METHOD,
    }
    for name, value in attributes.items():
        setattr(model, name, value)
    model.config.quantization_config = config
    return specs

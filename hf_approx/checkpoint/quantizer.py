"""The transformers hook: packed weights load with `from_pretrained` and save with `save_pretrained`."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantizer

from hf_approx.checkpoint.activations import activations_of, check_loaded, install_activations
from hf_approx.checkpoint.changes import sort_grids, warn_of_changes
from hf_approx.checkpoint.checksums import seal
from hf_approx.checkpoint.claims import forget, holds_plain, whole_section
from hf_approx.checkpoint.config import LOADER, QUANT_METHOD, ApproxConfig
from hf_approx.checkpoint.contents import (
    check_contents,
    index_of,
    located,
    read_headers,
    verify_tensors,
)
from hf_approx.checkpoint.places import Names, Placing, places
from hf_approx.checkpoint.shared import install_banks, install_shared, materialize_shared, pack_sharing
from hf_approx.checkpoint.stored import is_rounded, overflowing
from hf_approx.checkpoint.unpacking import Unpacking
from hf_approx.checkpoint.zeros import hold_zeros, holds_zeros, release_filled
from hf_approx.finite import refuse_not_finite
from hf_approx.headers import join_headers
from hf_approx.logs import get_logger
from hf_approx.modules import MAX_DENSITY, ParameterCount, SparseLinear
from hf_approx.packing import (
    Grid,
    PackedFormatError,
    QuantizedSpec,
    SharedSpec,
    SparseSpec,
    TensorSpec,
    dtype_from_name,
    pack,
    pack_quantized,
    round_to_grid,
    unpack,
    unpack_quantized,
)
from hf_approx.structures import apply_description, current_description, own_description, set_sizes
from hf_approx.targets import has_adapters, own_name

logger = get_logger(__name__)

Entry = TypeVar("Entry")

NO_OFFLOAD = "hf_approx cannot decode weights offloaded to disk or CPU; choose a device_map without offloading."


def keep_own_names(model: PreTrainedModel) -> None:
    """Make `save_pretrained` write parameters under the names they have, not those of the model's first release."""
    # An empty list of conversions; without the attribute transformers looks them up.
    model._weight_conversions = []  # type: ignore[assignment]


@register_quantizer(QUANT_METHOD)
class ApproxQuantizer(HfQuantizer):
    """Turns packed rows of bytes into weights after loading, and weights into bytes when saving.

    Attributes:
        grids: The grids of quantized weights, on the CPU, by parameter name. Saving rounds these weights to them.
    """

    quantization_config: ApproxConfig
    requires_calibration = False

    def __init__(
        self, quantization_config: ApproxConfig, grids: Mapping[str, Grid] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, **kwargs)
        self.grids = dict(grids or {})
        specs = quantization_config.tensors
        self._shapes = {name: specs[name].shape for name in self.grids if name in specs}
        self._dtypes: dict[str, torch.dtype] = {}
        self._is_plain = False
        self._places: dict[str, str] = {}
        self._rows: dict[str, Tensor | None] = {}

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

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config without what keeps processes that have not imported hf_approx from reading the file."""
        forget(config)
        return config

    update_tp_plan = update_attn_implementation
    """What transformers 5.17 calls in its place."""

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes a weight takes in the loaded model, so `device_map="auto"` plans for what stays packed as it is."""
        spec = self.quantization_config.tensors.get(param_name)
        stays = isinstance(spec, SharedSpec) or self.quantization_config.runtime == "packed"
        return spec.nbytes / spec.numel if spec is not None and stays else param.element_size()

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Those of a packed file: every tensor to its place, every packed one decoded."""
        if self._is_plain:
            return weight_conversions
        return [Placing(self._places), Unpacking(self._dtypes, self._decode)]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check config and files against the model, and find the place of every tensor in it."""
        files = checkpoint_files or []
        self.quantization_config = config = whole_section(self.quantization_config, files)
        headers = read_headers(files)
        names = Names(model, {name for tensors in headers.values() for name in tensors})
        self._is_plain = holds_plain(config, headers, model, names)
        if self._is_plain:
            logger.warning(
                "%s: config.json says that weights are packed, but they are not: they are loaded as they are, and the "
                "model is an ordinary one.",
                files[0],
            )
            return
        with located(Path(files[0]).parent if files else "config.json"):
            stored = join_headers(headers, index_of(files))
            check_contents(config, stored)
        verify_tensors(files, config)
        if config.structure is not None:
            try:
                config.structure = own_description(model, config.structure, names.find)
                apply_description(model, config.structure)
            except ValueError as error:
                raise PackedFormatError(str(error)) from None
        install_activations(model, config.activations, names)
        install_banks(model, config.tensors, names)
        self._places = places(stored, config.tensors, model, names)
        config.tensors = {self._places[n]: spec for n, spec in config.tensors.items() if n in self._places}
        params = dict(model.named_parameters(remove_duplicate=False))
        plan = model._get_dtype_plan(kwargs.get("dtype") or model.dtype)
        kept_wide = build_glob_alternation(list(plan))[0].search if plan else lambda name: None
        self._dtypes = {
            name: torch.float32 if kept_wide(name) else param.dtype
            for name, param in params.items()
            if param.is_floating_point()
        }
        for name, spec in config.tensors.items():
            shape = list(params[name].shape) if name in params else "no parameter of that name"
            if shape != list(spec.shape):
                raise PackedFormatError(
                    f"Packed weight '{name}': the file says shape {list(spec.shape)}, the model has {shape}."
                )

    def _decode(self, model: PreTrainedModel, name: str, row: Tensor) -> Tensor:
        """What transformers puts in the place of a parameter: the weight, in the dtype it has in the model.

        For weights that stay packed it is zeros that take no memory, until the model is complete. transformers 5.17
        leaves those that were renamed in the dtype of the file.
        """
        spec, dtype = self.quantization_config.tensors.get(name), self._dtypes[name]
        if spec is None:
            return row.to(dtype)
        self._rows[name] = None
        try:
            if isinstance(spec, SharedSpec) or self._runs_packed(model, name, row):
                self._rows[name] = row
                return torch.zeros((), dtype=dtype, device=row.device).expand(spec.shape)
            if isinstance(spec, SparseSpec):
                return unpack(row, spec, dtype)
            assert isinstance(spec, QuantizedSpec)
            weight, self.grids[name] = unpack_quantized(row, spec, dtype)
            self._shapes[name] = spec.shape
            return weight
        except PackedFormatError as error:
            raise _damaged(name, error) from None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._is_plain:
            self.remove_quantization_config(model)
            return model
        for name, spec in self.quantization_config.tensors.items():
            if name not in self._rows or model.get_parameter(name).device.type == "meta":
                raise ValueError(NO_OFFLOAD)
            row = self._rows.pop(name)
            try:
                if row is None and spec.sparsity > 0:
                    hold_zeros(model.get_parameter(name))
                elif row is not None and isinstance(spec, SparseSpec):
                    self._install_sparse(model, name, spec, row)
                elif row is not None and isinstance(spec, SharedSpec):
                    install_shared(model, name, spec, row, self._dtypes[name])
            except PackedFormatError as error:
                raise _damaged(name, error) from None
        check_loaded(model)
        packed_layers = any(isinstance(module, SparseLinear) for module in model.modules())
        if self.quantization_config.runtime == "packed" and not packed_layers:
            logger.warning(
                "runtime='packed' keeps no weight of this %s packed: it is for linear layers with at most %.0f %% of "
                "their weights, not quantized, in float32 on a CPU.",
                type(model).__name__,
                100 * MAX_DENSITY,
            )
        for part in model.modules():
            if packed_layers and isinstance(part, PreTrainedModel):
                part.num_parameters = ParameterCount(part)  # type: ignore[method-assign]
        self.settle(model)
        own = [str(ref).startswith(f"{LOADER}.") for ref in (getattr(model.config, "auto_map", None) or {}).values()]
        if own and all(own) and not model._auto_class:
            # The file it names is only in that repository.
            del model.config.auto_map
        return model

    def settle(self, model: PreTrainedModel) -> None:
        """Make the model an ordinary one that saves through this quantizer, and its base model too."""
        for part in {model, model.base_model}:
            if self.quantization_config.structure is not None:
                set_sizes(part, own_description(part, self.quantization_config.structure))
            part.hf_quantizer = self  # type: ignore[assignment]
            # Decoded weights are cast and trained like any others; transformers refuses both for quantized models.
            part.is_quantized = self.quantization_config.runtime == "packed"  # type: ignore[assignment]
            part.register_load_state_dict_pre_hook(_refuse_packed_state)
            part.register_load_state_dict_post_hook(release_filled)

    def _runs_packed(self, model: PreTrainedModel, name: str, row: Tensor) -> bool:
        module, param = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        spec = self.quantization_config.tensors[name]
        tied = model.all_tied_weights_keys
        users = sum(p is param for m in model.modules() for p in m._parameters.values())
        return (
            self.quantization_config.runtime == "packed"
            and isinstance(spec, SparseSpec)
            and type(module) in (nn.Linear, Conv1D)
            and users == 1
            and name not in {*tied, *tied.values()}
            and not module._forward_pre_hooks
            and spec.nnz / spec.numel <= MAX_DENSITY
            and row.device.type == "cpu"
            and self._dtypes[name] in (torch.float32, torch.float64)
        )

    def _install_sparse(self, model: PreTrainedModel, name: str, spec: SparseSpec, row: Tensor) -> None:
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        bias = module._parameters["bias"]
        sparse = SparseLinear(row, spec, bias, self._dtypes[name], isinstance(module, Conv1D))
        model.set_submodule(path, sparse.train(module.training))

    def sort_grids(self, model: PreTrainedModel) -> tuple[dict[str, Grid], dict[str, str]]:
        """Which grids still are those of their weights; see `hf_approx.checkpoint.changes`."""
        return sort_grids(model, self.grids, self._shapes)

    def current_grids(self, model: PreTrainedModel) -> dict[str, Grid]:
        """As `sort_grids`; the others are forgotten, with a warning."""
        own, others = self.sort_grids(model)
        for key in others.values():
            del self.grids[key]
        warn_of_changes([], [], [*others])
        return own

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to write: packed weights as bytes, the others in the stored dtype."""
        if has_adapters(model):
            if getattr(model, "_hf_peft_config_loaded", False):
                return model.state_dict(), {}  # of which transformers writes the adapters alone
            raise ValueError(
                f"{type(model).__name__} has PEFT adapters in it: save those with PeftModel.save_pretrained, and this "
                "model after unload()."
            )
        offloaded = next((name for name, param in model.named_parameters() if param.is_meta), None)
        if offloaded is not None:
            raise ValueError(
                f"save_pretrained: '{offloaded}' is offloaded; bring it back before saving, with "
                "accelerate.hooks.remove_hook_from_submodules(model)."
            )
        refuse_not_finite("save_pretrained", model)
        config = self.quantization_config
        tensors = model.state_dict(keep_vars=True)
        specs = _own_names(config.tensors, model, tensors)
        grids, others = self.sort_grids(model)
        params = dict(model.named_parameters(remove_duplicate=False))
        dtype = dtype_from_name(config.store_dtype) if config.store_dtype else None
        large = None if dtype is None else overflowing({n: p for n, p in params.items() if n not in grids}, dtype)
        if large is not None:
            logger.warning(
                "'%s' was trained to a value that does not fit %s: every weight is stored in its own dtype instead.",
                large,
                config.store_dtype,
            )
            config.store_dtype = dtype = None
        shared = pack_sharing(model, dtype)
        packed_as = {id(tensors[name]): name for name in (*specs, *grids)}
        done: dict[int, tuple[Tensor, TensorSpec | None]] = {}
        filled, moved = [], []
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name in shared:
                mixed, state[mixed], specs[mixed] = shared[name]
                continue
            own = packed_as.get(id(tensor), name)
            spec = specs.get(own)
            if id(tensor) not in done:
                if own in grids:
                    weight = tensor.detach()
                    if not torch.equal(round_to_grid(weight, grids[own].to(weight.device)), weight):
                        moved.append(own)
                    done[id(tensor)] = pack_quantized(tensor, grids[own], dtype)
                elif spec is not None and tensor.dtype == torch.uint8:
                    done[id(tensor)] = (tensor.detach(), spec)
                else:
                    written = pack(tensor, dtype) if spec is not None else None
                    if written is not None and spec is not None and written[1].sparsity < spec.sparsity - 0.01:
                        filled.append(own)
                    if written is not None and written[1].nbytes < written[1].dense_bytes:
                        done[id(tensor)] = written
                    elif dtype is not None and name in params and is_rounded(tensor):
                        done[id(tensor)] = (tensor.detach().to(dtype), None)
                    else:
                        done[id(tensor)] = (tensor.detach(), None)
            state[name], described = done[id(tensor)]
            if own == name:
                specs.pop(name, None)
                if described is not None:
                    specs[name] = described
        state, config.plain = seal(model, state, specs)
        # The config is written after this, so it always describes exactly what is in the file.
        config.tensors = specs
        for key in others.values():
            del self.grids[key]
        filled = [name for name in filled if name not in others]
        warn_of_changes(filled, moved, [*others], all(holds_zeros(tensors[name]) for name in filled))
        if config.structure is not None:
            config.structure = current_description(model, config.structure)
        config.activations = activations_of(model)
        keep_own_names(model)
        return state, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if self.quantization_config.runtime == "packed":
            raise ValueError("Load the model with runtime='dense' to make it plain.")
        if self.quantization_config.structure is not None:
            raise ValueError(
                "The layers of this model have sizes that its architecture's config cannot express, so it cannot be "
                "made plain: only hf_approx loads it."
            )
        if self.quantization_config.activations:
            raise ValueError(
                "Layers of this model quantize their input, which transformers alone cannot do, so it cannot be made "
                "plain: only hf_approx loads it."
            )
        materialize_shared(model)
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Make a decoded model, and its base model, save as they are."""
        for part in {model, model.base_model}:
            super().remove_quantization_config(part)

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


def _own_names(tensors: dict[str, Entry], model: PreTrainedModel, existing: Container[str]) -> dict[str, Entry]:
    """The entries under the names this model has; see `own_name`.

    A tied weight is named as the one of its names that transformers writes. Entries for parameters the model
    does not have (the head of another class, a layer that was removed) are left out.
    """
    tied = model.all_tied_weights_keys
    own = {}
    for name, spec in tensors.items():
        found = own_name(name, model.base_model_prefix, existing)
        if found is not None:
            own[tied.get(found, found)] = spec
    return own


def _damaged(name: str, error: PackedFormatError) -> PackedFormatError:
    return PackedFormatError(f"Packed weight '{name}' is damaged: {error}.")


def _refuse_packed_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Say what to do where `load_state_dict`, which has no config to decode with, would report wrong shapes."""
    config = getattr(module.config, "quantization_config", None)
    for name in getattr(config, "tensors", ()):
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.dtype == torch.uint8 and tensor.dim() == 1:
            raise ValueError(
                f"'{name}' is packed, and only from_pretrained unpacks. To resume a Trainer from its checkpoints, or "
                "to load the best of them, use ApproxTrainer, or call model.dequantize() before training and "
                "hf_approx.attach_packing(model, names) after it."
            )

"""Trainers that compress while they fine-tune."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from hf_approx.checkpoint import ApproxQuantizer, attach_packing
from hf_approx.checkpoint.zeros import note_zeros
from hf_approx.finite import NotFiniteError, Suspect
from hf_approx.logs import get_logger
from hf_approx.methods import Method, MethodConfig
from hf_approx.methods.base import method_configs
from hf_approx.methods.stack import MethodStack
from hf_approx.modules.bank import banks_of, name_of_coefficients, saved_weights, share_of, sharing_of, template_names
from hf_approx.optim import AvaGrad, AvaGradConfig, CompositeOptimizer
from hf_approx.optim.composite import stepping_problem
from hf_approx.optim.config import check_arguments, check_config
from hf_approx.packing import SharedSpec, TensorSpec, dtype_from_name
from hf_approx.packing.grid import Grid, round_to_grid
from hf_approx.report import Recorder, average_bits, describe_layers
from hf_approx.trainer_checkpoint import CheckpointMixin, as_json, identity
from hf_approx.trainer_divergence import _Watch
from hf_approx.trainer_sharded import sharding_problem

logger = get_logger(__name__)


class _Schedule(TrainerCallback):
    """Moves the schedules of a stack from step to step, and finalizes it after the last.

    Args:
        stack: That of the trainer; None without methods, and once it is finalized.
        finish: Finalizes, and logs what came of it. Called before any tracker closes its run.
        check: Says when training diverged, if it did.
    """

    def __init__(self, stack: MethodStack | None, finish: Callable[[], None], check: Callable[[], None]) -> None:
        self.stack, self.finish, self.check = stack, finish, check

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stack is not None:
            self.stack.begin()
            if state.global_step == 0:
                self._checked(self.stack.advance, 0.0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stack is not None:
            step = state.global_step + 1
            progress = step / max(state.max_steps - 1, 1) if step < state.max_steps else None
            self._checked(self.stack.after_step, progress)

    def _checked(self, move: Callable[[Any], None], progress: float | None) -> None:
        try:
            move(progress)
        except NotFiniteError:
            self.check()
            raise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.finish()


class ApproxTrainerMixin(CheckpointMixin):
    """Adds compression methods and AvaGrad to a `Trainer`, TRL's among them.

    `class ApproxSFTTrainer(ApproxTrainerMixin, SFTTrainer)` is all it takes. A model with PEFT adapters trains with
    AvaGrad, but not with methods.

    Args:
        approx: Configs of the methods, applied in this order. They are attached to the model at once, and
            finalized when `train` ends: the model is then an ordinary one with compressed weights, and
            `save_model` writes it packed.
        optimizer: AvaGrad's settings; by default the optimizer `TrainingArguments` names.
        store_dtype: Dtype of every stored weight once finalized: `"float16"`, `"bfloat16"`, `"float32"`,
            or None to keep each parameter's own.

    Raises:
        ValueError: An argument is no config, or does not fit the model; the model is then unchanged.
    """

    def __init__(
        self,
        *args: Any,
        approx: MethodConfig | Sequence[MethodConfig] = (),
        optimizer: AvaGradConfig | None = None,
        store_dtype: str | None = "float16",
        **kwargs: Any,
    ) -> None:
        configs = method_configs(approx, type(self).__name__)
        check_config(optimizer, type(self).__name__)
        if configs and kwargs.get("peft_config") is not None:
            raise ValueError(
                f"{type(self).__name__}: methods compress whole models: compress in a run without peft_config, and "
                "train adapters of the result in another."
            )
        if optimizer is not None and any([*(kwargs.get("optimizers") or ()), kwargs.get("optimizer_cls_and_kwargs")]):
            raise ValueError(
                f"{type(self).__name__}: optimizer=AvaGradConfig(...) is the optimizer; leave out optimizers and "
                "optimizer_cls_and_kwargs, or pass optimizer=None."
            )
        model = kwargs.get("model", args[0] if args else None)
        mro = type(self).__mro__
        behind = next((cls for cls in mro[mro.index(ApproxTrainerMixin) :] if issubclass(cls, Trainer)), None)
        if isinstance(model, str) and behind in (Trainer, Seq2SeqTrainer):  # TRL's trainers load models by name
            raise ValueError(
                f"{type(self).__name__}: model is the name '{model}'; load it first, with "
                f"AutoModelFor….from_pretrained('{model}')."
            )
        quantizer = getattr(model, "hf_quantizer", None)
        if isinstance(quantizer, ApproxQuantizer) and not quantizer.is_trainable:
            raise ValueError(f"{type(self).__name__}: load the model with runtime='dense' to train it.")
        if store_dtype is not None:
            dtype_from_name(store_dtype)
        self.methods: list[Method] = [config.build() for config in configs]  # attached below, once nothing refuses
        self.store_dtype = store_dtype
        self.approx_report: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        self._measured: dict[str, Any] = {}
        self._finalized = not self.methods
        self._repack: list[str] = []
        self._grids: dict[str, Grid] = {}
        self._special = False
        self._avagrad = optimizer
        if optimizer is not None:
            kwargs["optimizer_cls_and_kwargs"] = (AvaGrad, optimizer.kwargs())
        super().__init__(*args, **kwargs)
        trainer = cast(Trainer, self)
        if optimizer is not None:
            check_arguments(trainer.args, optimizer, type(self).__name__)
        self._refuse_unsupported()
        self.stack = MethodStack(self._plain_model, configs)
        self.methods = self.stack.methods
        sharded = trainer.is_fsdp_enabled and (self.methods or isinstance(self._quantizer, ApproxQuantizer))
        if self.methods or sharded:
            self._unpack()
        if sharded:
            self._prepare_sharding()
        self._recorder = Recorder(self.stack)
        self._suspect = Suspect()
        self._schedule = _Schedule(self.stack if configs else None, self._end_training, self.refuse_diverged)
        trainer.callback_handler.callbacks[:0] = [_Watch(self), self._schedule]

    def _refuse_unsupported(self) -> None:
        trainer, name = cast(Trainer, self), type(self).__name__
        quantizer = self._quantizer
        packed = isinstance(quantizer, ApproxQuantizer)
        problem = sharding_problem(trainer, self.methods) if self.methods or packed else None
        if problem is not None:
            raise ValueError(f"{name}: {problem}")
        if self.methods and trainer.args.n_gpu > 1:
            raise ValueError(
                f"{name}: torch.nn.DataParallel cannot copy masks; start with `accelerate launch` to use "
                f"all {trainer.args.n_gpu} GPUs, or show the process one of them through CUDA_VISIBLE_DEVICES."
            )
        if self.methods and trainer.model_init is not None:
            raise ValueError(
                f"{name}: model_init would replace the model the methods are attached to; pass model= instead."
            )
        self._refuse_reference(name)
        adapted = [module for key, module in self._plain_model.named_modules() if key.endswith(".base_layer")]
        if any(sharing_of(module) for module in adapted):
            logger.warning(
                "%s: adapters of layers that share weights work beside them, but PEFT loses them when it merges; to "
                "merge, call model.dequantize() before adding adapters.",
                name,
            )
        if isinstance(quantizer, ApproxQuantizer):
            sparse = [key for key, spec in quantizer.quantization_config.tensors.items() if spec.sparsity > 0]
            if sparse and trainer.is_fsdp_enabled:
                raise ValueError(
                    f"{name}: FSDP would lose the zeros of '{sparse[0]}'; train this sparse model without FSDP."
                )
            cutting = [method.name for method in self.methods if method.resizes or method.shares]
            if quantizer.grids and cutting:
                raise ValueError(
                    f"{name}: {cutting[0]} changes which weights there are, and those of this model are quantized; "
                    "call model.dequantize() first, and quantize again afterwards."
                )
        problem = stepping_problem(trainer.args.optim, trainer.optimizer) if self.methods else None
        if problem is not None:
            raise ValueError(f"{name}: {problem}")
        fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        flat = fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1
        if self._avagrad is not None and (trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and flat)):
            raise ValueError(
                f"{name}: AvaGrad needs the norm over the whole model; shard with FSDP2, not ZeRO or FSDP1."
            )

    def _refuse_reference(self, name: str) -> None:
        """TRL's `sync_ref_model` mixes two models parameter by parameter, in the order in which they have them."""
        trainer = cast(Any, self)
        references = [
            callback.ref_model
            for callback in trainer.callback_handler.callbacks
            if hasattr(callback, "sync_target_model") and callback.ref_model is not None
        ]
        if references and self.methods:
            raise ValueError(
                f"{name}: sync_ref_model=True needs a model with the parameters of its reference, and methods change "
                "them; leave it out, or train with it first and compress in another run."
            )
        shapes = [param.shape for param in self._plain_model.parameters()]
        if not trainer.is_fsdp_enabled and any([p.shape for p in ref.parameters()] != shapes for ref in references):
            raise ValueError(
                f"{name}: sync_ref_model=True needs a model with the parameters of its reference, and this ref_model "
                "has others; pass ref_model=copy.deepcopy(model)."
            )

    @property
    def _quantizer(self) -> Any:
        return getattr(self._plain_model, "hf_quantizer", None)

    def _unpack(self) -> None:
        """Train a packed model as an ordinary one: its checkpoints are exact then, and `finalize` packs it again."""
        model, quantizer = self._plain_model, self._quantizer
        if isinstance(model, PreTrainedModel) and isinstance(quantizer, ApproxQuantizer):
            config = model.config.quantization_config
            smaller = (config.structure or {"shapes": {}})["shapes"]
            packed = [name for name, spec in config.tensors.items() if not isinstance(spec, SharedSpec)]
            smaller_weights = [name for name in smaller if name.endswith(".weight")]
            self._repack = list(dict.fromkeys([*packed, *smaller_weights, *template_names(model)]))
            self._grids = quantizer.current_grids(model)
            self._special = bool(config.activations or config.structure or banks_of(model))
            quantizer.remove_quantization_config(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Coefficients of shared weights never decay."""
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]
        kept = tuple(map(name_of_coefficients, self._shared()))
        return [name for name in names if not name.endswith(kept)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The task's optimizer and, for the methods' own parameters, Adam without decay, behind one interface."""
        trainer = cast(Trainer, self)
        groups = [] if self._finalized else self.stack.param_groups()
        if trainer.optimizer is not None:
            # After a training that was interrupted it is what accelerate made of the one below.
            plain = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            if groups and not isinstance(plain, CompositeOptimizer):
                trainer.optimizer = CompositeOptimizer(trainer.optimizer, torch.optim.Adam(groups, fused=True))
            return self._lend(trainer.optimizer)
        own = [param for group in groups for param in group["params"]]
        for param in own:
            param.requires_grad_(False)
        with self.stack.exposed():
            optimizer = super().create_optimizer(*([] if model is None else [model]))  # type: ignore[misc]
        for param in own:
            param.requires_grad_(True)
        if self._avagrad is not None:
            # Trainer gives each group the decay of its arguments, AvaGrad's config has its own.
            with self.stack.exposed():
                named = dict((model or self._plain_model).named_parameters(remove_duplicate=False))
            names = trainer.get_decay_parameter_names(model or self._plain_model)
            decayed = {id(named[name]) for name in names}
            for group in optimizer.param_groups:
                decays = any(id(param) in decayed for param in group["params"])
                group["weight_decay"] = self._avagrad.weight_decay if decays else 0.0
        if groups:
            optimizer = CompositeOptimizer(optimizer, torch.optim.Adam(groups, fused=True))
        trainer.optimizer = optimizer
        return self._lend(optimizer)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As of `Trainer`."""
        with self._autocast():
            return super().compute_loss(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of `Trainer`; after the last backward pass of a step, gradients go to what is trained.

        That is before a GradScaler looks for infinities, and before gradients are clipped.
        """
        loss = super().training_step(*args, **kwargs)
        accelerator = cast(Trainer, self).accelerator
        if accelerator.sync_gradients and self.methods and not self._finalized:
            scaler = accelerator.scaler
            self.stack.before_step(1.0 if scaler is None else scaler.get_scale())
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._trained(model))  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._trained(model), grad_norm)

    def _trained(self, model: nn.Module) -> Any:
        """What the optimizer trains, for who asks a model for its parameters."""
        if self._finalized or not self.methods:
            return model
        groups = cast(Any, self).optimizer.param_groups
        return SimpleNamespace(parameters=lambda: [param for group in groups for param in group["params"]])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As of `Trainer`, without the noise of training."""
        if self._finalized or not self.methods:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        # Schedule-free optimizers evaluate other weights than those they train.
        switch = getattr(cast(Trainer, self).optimizer, "eval", None)
        if callable(switch):
            switch()
        with self.stack.evaluating():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the methods' numbers to each training log."""
        if "loss" in logs and not self._finalized:
            logs.update(self._recorder.record(cast(Trainer, self).state.global_step))
        if "loss" in logs:
            self._look()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, then finalize: bake the methods into the weights and make saving write them packed.

        Args:
            resume_from_checkpoint: A folder, or True for the last checkpoint in `args.output_dir` that was written to
                its end.
            *args: Those of `Trainer.train`.
            **kwargs: Those of `Trainer.train`.

        Raises:
            ValueError: The checkpoint was not written to its end, or does not fit this run.
            NotFiniteError: Training diverged: a weight is NaN or infinite. The checkpoints before that are left.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        with self.stack.exposed():
            note_zeros(self._plain_model)
        if self._twin is None:
            self._unpack()
        elif self._finalized and not self._repack:
            raise ValueError(
                f"{type(self).__name__}: a sharded model is trained once; save it, and load it to train it on."
            )
        self.forget_evaluation()
        self._measured = {}
        try:
            return super().train(checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            cast(Trainer, self).is_in_train = False

    def _end_training(self) -> None:
        if not self._finalized or self._repack:
            self.finalize()
            cast(Trainer, self).log({f"approx/{k}": v for k, v in self.approx_report["totals"].items()})

    def forget_evaluation(self) -> None:
        """Let a model that was evaluated first be trained on several processes.

        accelerate counts it as prepared then, and would train it without averaging gradients over the processes.
        """
        trainer = cast(Trainer, self)
        plain = trainer.model_wrapped is self._plain_model and not trainer.is_fsdp_enabled
        if trainer.args.world_size > 1 and plain:
            vars(self._plain_model).pop("_is_accelerate_prepared", None)

    def finalize(self) -> dict[str, Any]:
        """Bake the methods in now; `train` calls it. Returns and keeps (`approx_report`) what was done.

        On a sharded model all processes must call it.

        Raises:
            NotFiniteError: A weight is NaN or infinite. Nothing is baked.
        """
        trainer = cast(Trainer, self)
        # Schedule-free optimizers train other weights than those that are to be kept.
        evaluate = getattr(trainer.optimizer, "eval", None)
        if callable(evaluate):
            evaluate()
        self.refuse_diverged(everywhere=False)
        if not self._finalized and not all(method.is_final or method.after_training for method in self.methods):
            logger.warning("Training ended before the masks were fixed; fixing them now, without fine-tuning.")
            self.stack.settle()
        if self._twin is None:
            self._finish()
            # The wrapped model holds parameters that are gone.
            trainer.model_wrapped = self._plain_model
        else:
            if self._twin.fill(self.stack):
                self._finished, self.stack = self._twin.model, self._twin.stack
                self.methods = self.stack.methods
                history, self._recorder = self._recorder.history, Recorder(self.stack)
                self._recorder.history = history
                self._finish()
            self.approx_report = broadcast_object_list([self.approx_report])[0]
        self._finalized, self._repack = True, []
        self._schedule.stack = None
        # They hold parameters that are gone.
        trainer.optimizer = trainer.lr_scheduler = None
        return self.approx_report

    def _finish(self) -> None:
        """Bake the methods into the model, make it save packed, and report that."""
        names = list(self._repack)
        if not self._finalized:
            reports = {label: method.report() for label, method in self._recorder.methods.items()}
            self.approx_report["methods"] = [
                {"label": label, **report, "settings": identity(self._recorder.methods[label])["config"]}
                for label, report in reports.items()
            ]
            self.approx_report["history"] = self._recorder.history
            if self._avagrad is not None:
                self.approx_report["optimizer"] = {"method": "avagrad", **as_json(asdict(self._avagrad))}
            names = self.stack.bake(names)
        # A weight that was loaded packed may be shared now.
        shared = self._shared_names()
        names = [name for name in dict.fromkeys(names) if name not in shared]
        self._warn_of_rounding()
        self.approx_report["totals"] = self._pack(names)
        params = dict(self._plain_model.named_parameters(remove_duplicate=False))
        self.approx_report.update(describe_layers(params, names, self._all_grids()))
        logger.info("Finalized %d weights: %s", len(names), self.approx_report["totals"])

    def _warn_of_rounding(self) -> None:
        """Say what becomes of quantized weights that were trained without a method that rounds them."""
        rounded = {name for method in self.methods for name in method.grids}
        params = dict(self._plain_model.named_parameters(remove_duplicate=False))
        moved = total = 0
        for name in self._grids.keys() - rounded:
            weight = params[name].detach()
            moved += int((weight != round_to_grid(weight, self._grids[name].to(weight.device))).sum())
            total += weight.numel()
        if moved:
            logger.warning(
                "%.1f %% of the quantized weights left their grid in training and are rounded to it again, which can "
                "undo what was learned: train quantized models with FixedPrecisionConfig.",
                100 * moved / total,
            )

    def _pack(self, names: list[str]) -> dict[str, float]:
        """Make the model save packed; returns, over the named weights, their share, sparsity, and bytes."""
        model = self._plain_model
        params = dict(model.named_parameters(remove_duplicate=False))
        removed = sum(method.removed for method in self.methods) + saved_weights(model)
        total = sum(params[name].numel() for name in names) + removed
        width = params[names[0]].element_size()
        specs: dict[str, TensorSpec] = {}
        grids = self._all_grids()
        if isinstance(model, PreTrainedModel):
            try:
                specs = attach_packing(model, names, self.store_dtype, grids)
            except ValueError as error:
                logger.warning("%s Storing every weight in its own dtype instead.", error)
                self.store_dtype = None
                specs = attach_packing(model, names, None, grids)
        else:
            logger.warning("The model is no PreTrainedModel: its zeros are real, but it will be saved dense.")
        halved = self.store_dtype is not None and hasattr(getattr(model, "config", None), "quantization_config")
        stored = dtype_from_name(cast(str, self.store_dtype)).itemsize if halved else width
        kept = sum(int(params[name].count_nonzero()) for name in names)
        return {
            "share": share_of(model, names, sum(method.removed for method in self.methods)),
            "sparsity": 1 - kept / total,
            **({"bits": average_bits(params, grids)} if grids else {}),
            "dense_bytes": total * width,
            "packed_bytes": sum(spec.nbytes for spec in specs.values())
            + sum(params[name].numel() * stored for name in names if name not in specs),
        }

    def _all_grids(self) -> dict[str, Grid]:
        """Of the methods and, where they have none, of the packed model that training started from."""
        return {**self._grids, **{name: grid for method in self.methods for name, grid in method.grids.items()}}


class ApproxTrainer(ApproxTrainerMixin, Trainer):
    """`transformers.Trainer` with compression methods; see [`ApproxTrainerMixin`] for its three arguments."""


class ApproxSeq2SeqTrainer(ApproxTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with compression methods; see [`ApproxTrainerMixin`]."""

"""Training with accelerate's FSDP2: what is refused, and what becomes of the finished model."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import Optimizer
from transformers import Trainer

from hf_approx.methods import Method, MethodStack
from hf_approx.methods.latent import Latent
from hf_approx.methods.unsharding import Unsharded

BESIDE = "hf_approx_training"
"""Where, in the checkpoint of a sharded model, that is which is trained and kept beside the model."""
FSDP2 = "shard with FSDP2 instead (recipes/accelerate/fsdp2.yaml)"


def sharding_problem(trainer: Trainer, methods: Sequence[Method]) -> str | None:
    """Why these methods cannot train as the launch says and what to do; None if they can."""
    if trainer.is_deepspeed_enabled:
        return f"DeepSpeed trains copies of the parameters and would lose what methods write to them; {FSDP2}."
    if not trainer.is_fsdp_enabled:
        return None
    plugin, args = trainer.accelerator.state.fsdp_plugin, trainer.args
    if plugin.fsdp_version != 2:
        return "FSDP1 merges parameters and masks into one; set fsdp_version: 2."
    if plugin.cpu_ram_efficient_loading:
        return "every process needs the weights when methods are attached; set fsdp_cpu_ram_efficient_loading: false."
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "methods need parameters on the device; set fsdp_offload_params: false."
    if trainer.accelerator.mixed_precision not in ("no", "bf16"):
        return "sharded models train in float32 or bf16; set mixed_precision: bf16."
    if args.torch_compile:
        return "torch.compile and sharding were not tried together; set torch_compile=False."
    return next((problem for problem in (method.sharding_problem for method in methods) if problem), None)


class ShardedMixin:
    """The part of `ApproxTrainerMixin` that knows of FSDP2.

    What has a number for each weight is sharded like the weight. `model` stays sharded after training, computes with
    the masks and precisions that were found, and can be evaluated (its weights are not rounded to `store_dtype`); the
    finished model is in memory of the first process alone, on the CPU.
    """

    stack: MethodStack
    _finalized: bool
    _twin: Unsharded | None = None
    _lent: list[list[Latent | Tensor | None]] | None = None
    _finished: nn.Module | None = None

    @property
    def _plain_model(self) -> nn.Module:
        """The model without the wrappers of accelerate and torch.compile; once a sharded one is finished, that."""
        return cast(nn.Module, cast(Trainer, self).model) if self._finished is None else self._finished

    def _prepare_sharding(self) -> None:
        """Keep what finishing the model needs, before accelerate shards it."""
        trainer = cast(Trainer, self)
        self._twin = Unsharded(self.stack)
        # Scores and scales in half precision would be others than those that are finished. The computation is
        # autocast instead, as it is without FSDP.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def _lend(self, optimizer: Optimizer) -> Optimizer:
        """Let the optimizer of a model that is to be sharded have parameters of the model alone.

        accelerate shards both together: it looks every parameter of the optimizer up in the model and exchanges it.
        """
        if self._twin is not None and not self._finalized and self._lent is None:
            latents = {id(latent.weight): latent for latent in self.stack.latents if not latent.mixes}
            in_model = {id(param) for param in self.stack.model.parameters()}
            self._lent = []
            for group in optimizer.param_groups:
                slots = [None if id(p) in in_model else latents.get(id(p), p) for p in group["params"]]
                pairs = zip(slots, group["params"], strict=True)
                lent = [slot.effective if isinstance(slot, Latent) else p for slot, p in pairs]
                group["params"] = [p for slot, p in zip(slots, lent, strict=True) if not isinstance(slot, Tensor)]
                self._lent.append(slots)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As of `Trainer`, which calls it once the model is sharded: the optimizer gets what it is to train."""
        if self._lent is not None:
            own = self._own_parameters()
            self.stack.follow()
            now = dict(zip(own, self._own_parameters().values(), strict=True))
            for group, slots in zip(cast(Any, self).optimizer.param_groups, self._lent, strict=True):
                lent = iter(group["params"])
                group["params"] = [
                    now[id(slot)] if isinstance(slot, Tensor) else _trained_in(slot, next(lent)) for slot in slots
                ]
            self._lent = None
        return super().create_scheduler(*args, **kwargs)  # type: ignore[misc]

    def _own_parameters(self) -> dict[int, Tensor]:
        """All that is trained beside the model but latent weights, by identity, always in one order."""
        own = [p for latent in self.stack.latents for stage in latent.stages for p in stage.parameters()]
        return {id(p): p for p in [*own, *(latent.weight for latent in self.stack.latents if latent.mixes)]}

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Within, all that is trained and kept beside a sharded model is in it.

        So what reads and writes the state of a model and of its optimizer in pieces, by the names of the model, does
        so with that too.
        """
        if self._twin is None or self._finalized:
            yield
            return
        self.stack.follow()
        model, beside = self.stack.model, nn.Module()
        for latent in self.stack.latents:
            entry = nn.Module()
            entry.register_parameter("weight", latent.weight)
            entry.add_module("stages", nn.ModuleList(latent.stages))
            beside.add_module(latent.target.name.replace(".", "/"), entry)
        model.add_module(BESIDE, beside)
        try:
            yield
        finally:
            delattr(model, BESIDE)

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with self._beside():
            super()._save_optimizer_and_scheduler(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with self._beside():
            super()._load_optimizer_and_scheduler(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._beside():
            super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        with self._beside():
            super()._load_best_model(*args, **kwargs)  # type: ignore[misc]
        if self._twin is not None and not self._finalized:
            self.stack.write()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        accelerator = cast(Trainer, self).accelerator
        if self._twin is None or accelerator.mixed_precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(accelerator.device.type, torch.bfloat16)

    @contextlib.contextmanager
    def _finished_as_model(self) -> Iterator[None]:
        """What `Trainer` does to its model, it does to the finished one."""
        trainer, sharded = cast(Trainer, self), cast(Trainer, self).model
        trainer.model = cast(Any, self._plain_model)
        try:
            yield
        finally:
            trainer.model = sharded


def _trained_in(latent: Latent | None, param: Tensor) -> Tensor:
    """What is trained in the place of a parameter of the model."""
    return param if latent is None else latent.weight

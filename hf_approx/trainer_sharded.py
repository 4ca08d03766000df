"""Training with accelerate's FSDP2: what is refused, and what becomes of the finished model."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from hf_approx.methods import Method
from hf_approx.methods.unsharding import Unsharded

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

    The methods' parameters are sharded like all others. `model` stays sharded after training, computes with the masks
    and precisions that were found, and can be evaluated (its weights are not rounded to `store_dtype`); the finished
    model is in memory of the first process alone, on the CPU.
    """

    _twin: Unsharded | None = None
    _finished: nn.Module | None = None

    @property
    def _plain_model(self) -> nn.Module:
        """The model without the wrappers of accelerate and torch.compile; once a sharded one is finished, that."""
        return cast(nn.Module, cast(Trainer, self).model) if self._finished is None else self._finished

    def _prepare_sharding(self, methods: Sequence[Method]) -> None:
        """Keep what finishing the model needs, before accelerate shards it."""
        trainer = cast(Trainer, self)
        self._twin = Unsharded(self._plain_model, methods)
        # Scores and scales in half precision would be others than those that are finished. The computation is
        # autocast instead, as it is without FSDP.
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None

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

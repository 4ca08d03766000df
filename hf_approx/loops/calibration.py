"""Quantizing a trained model without training its weights: SMOL's limits and scales learn from a few examples.

Nothing is known of the task: the loss is how far the outputs are from those the model has with its own weights. It is
this project's way to use SMOL on models that cannot be trained again, and not in the paper.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, tqdm
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_approx.finite import NotFiniteError, refuse_not_finite
from hf_approx.loops.distillation import Fidelity, Outputs
from hf_approx.methods import MethodStack, Smol, SmolConfig
from hf_approx.packing import Grid

STEPS = 200
"""Default length of the calibration."""
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class Calibration:
    """What was done to a model.

    Attributes:
        names: Parameters that are on grids now, for `attach_packing`.
        grids: Their grids, for `attach_packing`.
        bits: Average bits of their weights that are not zero.
        rounded: How well the model does on held-out batches if its weights are only rounded to as many bits, to the
            nearest; None if there are no such batches, or no target bits.
        calibrated: The same with the precisions and scales that were learned; None if there are no such batches.
        taken: Which of the two the model is now.
    """

    names: list[str]
    grids: dict[str, Grid]
    bits: float
    rounded: Fidelity | None
    calibrated: Fidelity | None
    taken: Literal["rounded", "calibrated"]


def calibrate(
    model: PreTrainedModel,
    loader: DataLoader[Any],
    config: SmolConfig | None = None,
    steps: int = STEPS,
    held_out: DataLoader[Any] | None = None,
    accelerator: Accelerator | None = None,
) -> Calibration:
    """Learn the precisions of a trained model's weights and round them; nothing else of it changes.

    The model works in eval mode throughout, without dropout. The loss compares its outputs with those it has with its
    own weights: the mean Kullback-Leibler divergence where it predicts classes or tokens (of independent ones if it
    predicts several labels at once), else the mean squared difference over the mean square, of regression outputs or
    the last hidden state. Padding does not count.

    If on the held-out batches the model would be closer to its old self with weights that are only rounded to the
    nearest, it gets those, and the result says so. Where inputs of layers are quantized, what was learned stays.

    Args:
        model: Changed in place: afterwards its target weights are on grids. `attach_packing(model, result.names,
            grids=result.grids)` makes it save them packed.
        loader: Batches of inputs, as the model takes them; labels are not needed. Gone through again as often as
            `steps` wants.
        config: Of the method; `train_weights` is taken for False.
        steps: Optimizer steps.
        held_out: Batches to measure the result on, each example once, however many processes share them.
        accelerator: Default: a new one. Its trackers get the loss and the average bits of every step. It must not
            shard the model.

    Raises:
        ValueError: The config, the batches or the accelerator do not fit, a weight is not finite, or the loss is not
            at some step. The model is then unchanged.
    """
    _check_config("calibrate", config)
    for name, batches in {"loader": loader, **({} if held_out is None else {"held_out": held_out})}.items():
        if not isinstance(batches, DataLoader):
            raise ValueError(
                f"calibrate: {name} must be a torch.utils.data.DataLoader, got a {type(batches).__name__}; wrap the "
                "data in DataLoader(data, batch_size=...)."
            )
    accelerator = accelerator or Accelerator()
    if accelerator.distributed_type in SHARDING:
        raise ValueError(
            f"calibrate: weights cannot be rounded in a model that {accelerator.distributed_type.value} shards; "
            "launch without it, as recipes/accelerate/multi_gpu.yaml does."
        )
    if accelerator.mixed_precision == "fp16" or accelerator.gradient_accumulation_steps != 1:
        raise ValueError("calibrate: use bf16 or no mixed precision, and no gradient accumulation.")
    if held_out is not None and accelerator.num_processes > 1 and not accelerator.even_batches:
        raise ValueError("calibrate: processes measure held-out batches together; leave even_batches at True.")
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"calibrate: steps must be a whole number >= 2, got {steps!r}.")
    config = replace(config or SmolConfig(), train_weights=False)
    refuse_not_finite("calibrate", model)
    with _borrowed(model, accelerator):
        rounded = None
        if held_out is not None and config.target_bits is not None:
            rounded = _rounded(model, config, held_out, accelerator)
        stack = MethodStack(model, config)
        try:
            trained = _train(stack, model, loader, steps, accelerator)
            calibrated = None if held_out is None else _measure(stack, trained, held_out, accelerator)
        except BaseException:
            stack.detach()
            raise
        # A loss that is no number is worse than any.
        worse = calibrated is not None and rounded is not None and not calibrated.loss <= rounded.loss
        if worse and not config.activations:
            stack.detach()
            return replace(round_weights(model, config), rounded=rounded, calibrated=calibrated)
        return _baked(stack, "calibrated", rounded, calibrated)


def round_weights(model: PreTrainedModel, config: SmolConfig | None = None) -> Calibration:
    """Round a trained model's weights to the nearest, with the scales that fit best and without any data.

    All parts get as many bits; of a target between two precisions some get more than others, whichever they are.

    Args:
        model: Changed in place, as by `calibrate`.
        config: Of the method.

    Raises:
        ValueError: The config does not fit the model or wants `activations`. The model is then unchanged.
    """
    _check_config("round_weights", config)
    refuse_not_finite("round_weights", model)
    config = config or SmolConfig()
    if config.activations:
        raise ValueError(
            "round_weights: the limits of inputs are learned from data; set activations=False, or use calibrate."
        )
    stack = MethodStack(model, _rounding(config))
    stack.settle()
    return _baked(stack, "rounded")


class _Rounding(SmolConfig):
    """SMOL without any training."""

    def build(self) -> Smol:
        """A method that is settled as soon as it is attached."""
        return Smol(self, trains=False)


def _rounding(config: SmolConfig) -> _Rounding:
    return _Rounding(**{field.name: getattr(config, field.name) for field in fields(config)})


def _baked(
    stack: MethodStack,
    taken: Literal["rounded", "calibrated"],
    rounded: Fidelity | None = None,
    calibrated: Fidelity | None = None,
) -> Calibration:
    bits = stack.methods[0].metrics()["bits"]
    return Calibration(stack.bake(), stack.grids, bits, rounded, calibrated, taken)


def _check_config(where: str, config: Any) -> None:
    if config is not None and not isinstance(config, SmolConfig):
        raise ValueError(
            f"{where}: config must be a SmolConfig, such as SmolConfig(target_bits=4.0), or None, got {config!r}."
        )


@contextmanager
def _borrowed(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Within, the model is in eval mode, its parameters are frozen, and accelerate prepares it; all of that ends."""
    prepared = getattr(model, "_is_accelerate_prepared", False)
    training = {module: module.training for module in model.modules()}
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        if not prepared:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            vars(model).pop("_is_accelerate_prepared", None)
        for param in trained:
            param.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def _train(
    stack: MethodStack, model: PreTrainedModel, loader: DataLoader[Any], steps: int, accelerator: Accelerator
) -> nn.Module:
    """Train limits and scales; returns the model as accelerate prepared it."""
    # Noise without dropout: of the whole model only what makes noise is in training mode.
    for maker in stack.methods[0].inserted:
        maker.train()
    optimizer = torch.optim.Adam(stack.param_groups())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    prepared, loader, optimizer = accelerator.prepare(model, loader, optimizer)
    stack.begin()
    outputs = Outputs(model)
    batches = _repeated(loader)
    bar = tqdm(total=steps, desc="calibration", disable=not accelerator.is_local_main_process)
    for step in range(steps):
        batch = next(batches)
        with torch.no_grad(), stack.bypassed():
            wanted = outputs.rows(prepared, batch)
        stack.advance(step / (steps - 1))
        loss = outputs.loss(outputs.rows(prepared, batch), wanted)
        accelerator.backward(loss)
        stack.before_step()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotFiniteError(
                f"calibrate: the loss is {value} at step {step + 1} of {steps}, and the model is as it was; give "
                "SmolConfig smaller learning rates, or look for inputs that are not finite."
            )
        if accelerator.trackers:
            numbers = {"loss": value, **stack.methods[0].metrics()}
            accelerator.log({f"calibration/{name}": value for name, value in numbers.items()}, step=step)
        bar.set_postfix(loss=f"{value:.4g}", refresh=False)
        bar.update()
    bar.close()
    stack.settle()
    return cast(nn.Module, prepared)


def _repeated(loader: DataLoader[Any]) -> Iterator[Mapping[str, Any]]:
    """The batches, again and again."""
    while True:
        batch = None
        for batch in loader:
            if not isinstance(batch, Mapping):
                raise ValueError(f"calibrate: batches must be mappings of inputs by name, got {type(batch).__name__}.")
            yield batch
        if batch is None:
            raise ValueError("calibrate: the loader has no batch.")


def _rounded(
    model: PreTrainedModel, config: SmolConfig, held_out: DataLoader[Any], accelerator: Accelerator
) -> Fidelity:
    """How well the model does if its weights are only rounded, to as many bits."""
    stack = MethodStack(model, _rounding(replace(config, activations=False)))
    try:
        stack.settle()
        return _measure(stack, accelerator.prepare(model), held_out, accelerator)
    finally:
        stack.detach()


@torch.no_grad()
def _measure(stack: MethodStack, model: nn.Module, held_out: DataLoader[Any], accelerator: Accelerator) -> Fidelity:
    """Compare with the model's own weights, batch by batch."""
    outputs = Outputs(accelerator.unwrap_model(model))
    for batch in accelerator.prepare(held_out):
        with stack.bypassed():
            wanted = outputs.rows(model, batch)
        outputs.add(outputs.rows(model, batch), wanted, accelerator)
    return outputs.total()

"""How far the outputs of a changed model are from those it had."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

IGNORED = -100
"""The label of padding, throughout transformers."""


@dataclass(frozen=True)
class Fidelity:
    """How far the outputs of a changed model are from those it had.

    Attributes:
        loss: As of `calibrate`.
        agreement: Share of equal predictions, of classes or tokens; None for other outputs.
    """

    loss: float
    agreement: float | None


class Divergence(torch.autograd.Function):
    """The Kullback-Leibler divergence of softmax(logits) from softmax(wanted), over the last dimension.

    The terms of its definition, p log(p / q), cancel: of two distributions that are nearly equal, less is left than
    the terms were rounded by, and the sum may be negative. With the change d of log p they are p (e^d - 1 - d), for p
    and q = p e^d have the same sum; none of these is negative, and in float32 too most digits are right.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        """The divergence, of shape (...), of logits of shape (..., classes); gradients reach only the first."""
        change = logits - wanted - (logits.logsumexp(-1, True) - wanted.logsumexp(-1, True))
        p, q = wanted.softmax(-1), logits.softmax(-1)
        ctx.save_for_backward(q - p)
        # For small d the series is more exact; for large d, e^d could overflow.
        small = change.abs() < 0.25
        d = change.where(small, 0)
        series = d * d / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7 * (1 + d / 8))))))
        return (p * series).where(small, q - p - p * change).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of the divergence is q - p."""
        (gradient,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * gradient, None


class Outputs:
    """Compares outputs of one model, batch by batch.

    Args:
        model: Says what its outputs mean.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self._decodes = bool(config.is_encoder_decoder)
        self._mask = "decoder_attention_mask" if self._decodes else "attention_mask"
        self._problem = getattr(config, "problem_type", None)
        self._kind: Literal["classes", "labels", "numbers"] = "numbers"
        self._examples = torch.zeros(0, dtype=torch.long)
        self._sums = torch.zeros(4, dtype=torch.float64)

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What the model predicts for every example, token or pixel of a batch that is no padding.

        Args:
            model: The model, or what accelerate made of it.
            batch: Its inputs.

        Returns:
            Of shape (predictions, size of each); float32, or float64 if the model computes in that.

        Raises:
            ValueError: The model returns neither logits nor a last hidden state.
        """
        output = model(**batch)
        value = getattr(output, "logits", None)
        numbers = not isinstance(value, Tensor) or value.shape[-1] == 1 or self._problem == "regression"
        self._kind = "numbers" if numbers else "labels" if self._problem == "multi_label_classification" else "classes"
        if not isinstance(value, Tensor):
            value = getattr(output, "last_hidden_state", None)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"calibrate: {type(output).__name__} has neither logits nor a last hidden state to compare."
            )
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if value.dim() == 4:  # channels of an image come first
            value = value.movedim(1, -1)
        mask, labels = batch.get(self._mask), batch.get("labels")
        if mask is None and self._decodes and isinstance(labels, Tensor):
            mask = labels != IGNORED  # collators of encoder-decoders make labels and no mask of them
        if isinstance(mask, Tensor) and mask.shape == value.shape[:-1]:
            self._examples = mask.bool().reshape(len(mask), -1).sum(1)
            return value[mask.bool()]
        self._examples = torch.full(value.shape[:1], math.prod(value.shape[1:-1]))
        return value.flatten(0, -2)

    def loss(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """The mean distance of rows from those of the unchanged model."""
        distances, weights = self._distances(rows, wanted)
        return distances.sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)

    def _distances(self, rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The distance of every row, and what the sum of the distances is to be divided by."""
        if self._kind == "numbers":
            return (rows - wanted).square().sum(-1), wanted.square().sum(-1)
        shape = rows.shape
        if self._kind == "labels":
            rows, wanted = (torch.stack([r, torch.zeros_like(r)], -1) for r in (rows, wanted))
        each = Divergence.apply(rows, wanted)
        distances = each.mean(-1) if self._kind == "labels" else each
        return distances, torch.ones(shape[:1], dtype=rows.dtype, device=rows.device)

    def add(self, rows: Tensor, wanted: Tensor, accelerator: Accelerator) -> None:
        """Count a batch of a prepared loader, the last that `rows` was called with; all processes call this together.

        Examples that accelerate repeats, so that all processes have as many, are counted once.
        """
        same = (rows > 0) == (wanted > 0) if self._kind == "labels" else rows.argmax(-1) == wanted.argmax(-1)
        equal = same.to(rows.dtype).mean(-1) if self._kind == "labels" else same.to(rows.dtype)
        distances, weights = self._distances(rows, wanted)
        columns = torch.stack([distances, weights, equal, torch.ones_like(equal)], 1)
        sums = torch.stack([example.sum(0) for example in columns.split(self._examples.tolist())])
        if accelerator.num_processes > 1:
            sums = accelerator.gather_for_metrics(sums)
        self._sums += sums.cpu().double().sum(0)

    def total(self) -> Fidelity:
        """Of all batches, on all processes.

        Raises:
            ValueError: There was none.
        """
        distance, weight, equal, rows = self._sums.tolist()
        if not rows:
            raise ValueError("calibrate: there is nothing to measure in the held-out batches.")
        loss = distance / max(weight, torch.finfo(torch.float32).tiny)
        return Fidelity(loss, None if self._kind == "numbers" else equal / rows)

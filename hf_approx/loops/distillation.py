"""How far the outputs of a changed model are from those it had."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
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
            Float32, of shape (predictions, size of each).

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
        if value.dim() == 4:  # channels of an image come first
            value = value.movedim(1, -1)
        mask, labels = batch.get(self._mask), batch.get("labels")
        if mask is None and self._decodes and isinstance(labels, Tensor):
            mask = labels != IGNORED  # collators of encoder-decoders make labels and no mask of them
        if isinstance(mask, Tensor) and mask.shape == value.shape[:-1]:
            self._examples = mask.bool().reshape(len(mask), -1).sum(1)
            return value[mask.bool()].float()
        self._examples = torch.full(value.shape[:1], math.prod(value.shape[1:-1]))
        return value.flatten(0, -2).float()

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
        each = kl_div(log_softmax(rows, -1), log_softmax(wanted, -1), reduction="none", log_target=True).sum(-1)
        distances = each.mean(-1) if self._kind == "labels" else each
        return distances, torch.ones(shape[:1], device=rows.device)

    def add(self, rows: Tensor, wanted: Tensor, accelerator: Accelerator) -> None:
        """Count a batch of a prepared loader, the last that `rows` was called with; all processes call this together.

        Examples that accelerate repeats, so that all processes have as many, are counted once.
        """
        same = (rows > 0) == (wanted > 0) if self._kind == "labels" else rows.argmax(-1) == wanted.argmax(-1)
        equal = same.float().mean(-1) if self._kind == "labels" else same.float()
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

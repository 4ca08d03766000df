"""How far the outputs of a changed model are from those it had."""

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
        self._loss = self._equal = self._rows = 0.0

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
            return value[mask.bool()].float()
        return value.flatten(0, -2).float()

    def loss(self, rows: Tensor, wanted: Tensor) -> Tensor:
        """The mean distance of rows from those of the unchanged model."""
        if self._kind == "numbers":
            return (rows - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        if self._kind == "labels":
            rows, wanted = (torch.stack([r, torch.zeros_like(r)], -1).flatten(0, -2) for r in (rows, wanted))
        return kl_div(log_softmax(rows, -1), log_softmax(wanted, -1), reduction="batchmean", log_target=True)

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """Count a batch."""
        self._loss += float(self.loss(rows, wanted)) * len(rows)
        same = (rows > 0) == (wanted > 0) if self._kind == "labels" else rows.argmax(-1) == wanted.argmax(-1)
        self._equal += float(same.float().mean()) * len(rows)
        self._rows += len(rows)

    def total(self, accelerator: Accelerator) -> Fidelity:
        """Of all batches, on all processes.

        Raises:
            ValueError: There was none.
        """
        counts = torch.tensor([self._loss, self._equal, self._rows], device=accelerator.device)
        loss, equal, rows = accelerator.reduce(counts, "sum").tolist()
        if not rows:
            raise ValueError("calibrate: there is nothing to measure in the held-out batches.")
        return Fidelity(loss / rows, None if self._kind == "numbers" else equal / rows)

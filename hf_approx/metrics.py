"""Compression as a metric of Hugging Face `evaluate`, to stand beside accuracy in one dictionary. Needs `evaluate`."""

import tempfile
from pathlib import Path
from typing import Any

try:
    import datasets
    import evaluate
except ModuleNotFoundError:
    raise ModuleNotFoundError("hf_approx.metrics needs evaluate: pip install 'hf-approx[demo]'.") from None
from transformers import PreTrainedModel

from hf_approx.checkpoint import at_work, unfinished_allowed
from hf_approx.hub import inspect_source
from hf_approx.inspection import Inspection, inspect_checkpoint


class Compression(evaluate.Metric):
    """Sparsity, bits and bytes of a model; predictions and references are accepted and play no part.

    `evaluate.combine` hands every keyword of `compute` to every metric, and others refuse those they do not know. So
    in a combination the model is given here: `evaluate.combine([evaluate.load("accuracy"), Compression("out")])`.
    Alone, it may be given to `compute` too. `evaluate.load(hf_approx.metrics.__file__, model="out")` is the same.

    Args:
        model: Folder of a saved model, Hub repository id (its config and headers are read), or a model
            in memory, which is measured as it would be saved, once its training has ended.
        config_name: As in every metric of `evaluate`.
        **options: Those of `evaluate.Metric`.
    """

    def __init__(
        self, model: str | Path | PreTrainedModel | None = None, config_name: str | None = None, **options: Any
    ) -> None:
        super().__init__(config_name=config_name, **options)
        self.model = model

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Sparsity, bits and bytes of a model, as it is stored.",
            citation="",
            inputs_description="model: a folder, a Hub repository id, or a model in memory.",
            features=datasets.Features({}),
        )

    def add(self, **_: Any) -> None:
        """Nothing: the model is all there is to measure."""

    def add_batch(self, **_: Any) -> None:
        """Nothing, as `add`."""

    def compute(self, *, model: str | Path | PreTrainedModel | None = None, **_: Any) -> dict[str, float] | None:
        """Measure a model.

        Args:
            model: Default: the one the metric was made with.

        Returns:
            `sparsity`, the share of zeros of the packed weights; `bits`, those stored for a quantized weight with
            masks, precisions and scales, if weights are quantized; `bytes` of all tensors; and, unless another library
            quantized them, `dense_bytes`, of the same tensors if none was packed, and `compression`, the ratio of the
            two. None on other processes than the first, as every metric.

        Raises:
            ValueError: There is no model, or methods are at work on it: what it will be is not known yet.
            FileNotFoundError: The path or repository holds none.
            PackedFormatError: It is damaged.
        """
        if self.process_id != 0:
            return None
        model = self.model if model is None else model
        if model is None:
            raise ValueError("Compression: give the model, to the metric or to compute.")
        found = _inspect(model)
        dense = {"dense_bytes": found.dense_bytes, "compression": found.dense_bytes / found.bytes}
        return {
            "sparsity": found.sparsity,
            **({"bits": found.bits} if any(found.histogram) else {}),
            "bytes": found.bytes,
            **({} if found.format else dense),
        }


def _inspect(model: str | Path | PreTrainedModel) -> Inspection:
    if not isinstance(model, PreTrainedModel):
        return inspect_source(model)
    found = at_work(model)
    if found is not None:
        raise ValueError(
            f"Compression: {found[0]} is at work on '{found[1]}', and its masks or precisions are no part of the "
            "model; measure the model after training."
        )
    with tempfile.TemporaryDirectory() as folder, unfinished_allowed():
        model.save_pretrained(folder)
        return inspect_checkpoint(Path(folder))

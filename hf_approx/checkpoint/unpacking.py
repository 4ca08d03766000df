"""Decoding a packed file while transformers reads it."""

from collections.abc import Callable, Container
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform


class Unpacking(WeightConverter):
    """The conversion that makes the weight itself of each packed row, before the model is initialized.

    So everything that transformers does after reading, and every architecture's initialization, sees the shapes of the
    dense model.

    Args:
        packed: Names of the packed parameters in the model.
        decode: Gets the model, the name of a parameter and its row of bytes; returns what the parameter becomes.
    """

    def __init__(self, packed: Container[str], decode: Callable[[PreTrainedModel, str, Tensor], Tensor]) -> None:
        # WeightConverter itself asks for operations; it reports what they raise without the message.
        WeightTransform.__init__(self, "packed", "packed")
        self.operations = []
        self.force_cpu = False
        self._packed, self._decode = packed, decode

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """transformers copies the conversion for every parameter; what it decodes for is not copied."""
        return type(self)(self._packed, self._decode)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name as it is, with the pattern that chooses this conversion if it is one of a packed parameter."""
        return source_key, self.source_patterns[0] if source_key in self._packed else None

    def convert(self, layer_name: str, model: PreTrainedModel, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The named parameter, decoded."""
        ((row, *_),) = self.materialize_tensors().values()
        return {layer_name: self._decode(model, layer_name, row)}

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
        names: Those of the parameters to decode, in the model.
        decode: Gets the model, the name of a parameter and what the file has of it; returns what it becomes.
    """

    def __init__(self, names: Container[str], decode: Callable[[PreTrainedModel, str, Tensor], Tensor]) -> None:
        # WeightConverter itself asks for operations; it reports what they raise without the message.
        WeightTransform.__init__(self, "packed", "packed")
        self.operations = []
        self.force_cpu = False
        self._names, self._decode = names, decode

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """transformers copies the conversion for every parameter; what it decodes for is not copied."""
        return type(self)(self._names, self._decode)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name as it is, with the pattern that chooses this conversion if the parameter is to be decoded."""
        return source_key, self.source_patterns[0] if source_key in self._names else None

    def convert(self, layer_name: str, model: PreTrainedModel, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The named parameter, decoded."""
        ((row, *_),) = self.materialize_tensors().values()
        return {layer_name: self._decode(model, layer_name, row)}

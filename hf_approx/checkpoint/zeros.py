"""Training a sparse model without losing its zeros."""

import weakref

from torch import Tensor, nn
from transformers import PreTrainedModel


def keep_zeros(model: PreTrainedModel) -> None:
    """Let no optimizer move the weights of a packed model that are zero.

    Loading and `attach_packing` do this already. Call it on a `copy.deepcopy`, or after unfreezing parameters:
    neither carries the gradient hooks that do the work.

    Args:
        model: A model loaded from a packed checkpoint, or one `attach_packing` was called on.

    Raises:
        ValueError: The model is neither.
    """
    config = getattr(model.config, "quantization_config", None)
    tensors = getattr(config, "tensors", None)
    if tensors is None:
        raise ValueError("keep_zeros: the model is not packed; load it from a packed checkpoint.")
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, spec in tensors.items():
        if name in params and spec.sparsity > 0:
            mask_gradient(params[name])


def mask_gradient(param: nn.Parameter) -> None:
    """Zero the gradient of the weights that are zero, at every backward pass."""
    if not param.requires_grad:
        return
    reference = weakref.ref(param)

    def hook(grad: Tensor) -> Tensor:
        weight = reference()
        return grad if weight is None else grad.masked_fill(weight == 0, 0)

    param.register_hook(hook)

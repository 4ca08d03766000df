"""Masks on whole Transformer blocks."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from hf_approx.methods.masks import SigmoidMask


class BlockMask(SigmoidMask):
    """Block i of a list computes m_i block(x) + (1 - m_i) x, for the masks m of its scores, shape (blocks,).

    With a mask of zero a block is the identity whatever norms it has and wherever they are, so that removing it
    changes nothing; with a mask of one it is what it was. (Masks on what its branches add would leave the norms
    after them in place, in blocks like BERT's.)

    The mask is a parametrization of a weight that it leaves as it is. There its scores are in the model like those
    of any other mask: saved, resumed, shared out over processes, and refused by whoever takes the checkpoint of
    unfinished training for a model.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """The weight."""
        return weight

    def install(self, blocks: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Mask the blocks until the handles are removed."""
        # Before any other hook, so that what is recorded as a hidden state is what the next block gets.
        return [
            block.register_forward_hook(partial(_blend, self, i), with_kwargs=True, prepend=True)
            for i, block in enumerate(blocks)
        ]


def _blend(
    mask: BlockMask, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """A forward hook. A function and not a closure, so that a copy of the model has its own mask in it."""
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    if isinstance(mask.scores, DTensor):
        # The gradient of a score that is gathered outside its own layer would not be averaged.
        raise ValueError("Masks on whole layers cannot be sharded; train on several devices without FSDP.")
    share = mask.mask()[index]
    blended = share * after + (1 - share) * before
    return (blended, *output[1:]) if isinstance(output, tuple) else blended

"""Masks on whole Transformer blocks."""

from functools import partial
from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor

from hf_approx.blocks import Blocks
from hf_approx.methods.masks import SigmoidMask

NAME = "hf_approx_layer_mask"
"""The submodule, of what holds the list of blocks, that masks them."""


class BlockMask(SigmoidMask):
    """Block i of a list computes m_i block(x) + (1 - m_i) x, for the masks m of its scores, shape (blocks,).

    With a mask of zero a block is the identity whatever norms it has and wherever they are, so that removing it
    changes nothing; with a mask of one it is what it was. (Masks on what its branches add would leave the norms
    after them in place, in blocks like BERT's.)

    It works on what blocks compute, not on weights, so it is a module beside the blocks, and its scores are trained,
    saved and shared out over processes like any parameter of the model.

    Attributes:
        carrier: Name of a vector of the first block, which no method works on: checkpoints of unfinished training
            hold it elsewhere, so that nothing takes them for a model.
    """

    bypassed = False
    carrier: str

    def install(self, model: nn.Module, blocks: Blocks) -> None:
        """Mask the blocks."""
        parent, _, last = blocks.name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, NAME, self)
        layers = cast(nn.ModuleList, owner.get_submodule(last))
        # Before any other hook, so that what is recorded as a hidden state is what the next block gets.
        self._hooks = [
            block.register_forward_hook(partial(_blend, self, i), with_kwargs=True, prepend=True)
            for i, block in enumerate(layers)
        ]
        self._owner = (owner,)
        self.carrier = next(f"{blocks.name}.0.{n}" for n, p in layers[0].named_parameters() if p.dim() == 1)

    def uninstall(self) -> None:
        """Undo that."""
        for hook in self._hooks:
            hook.remove()
        delattr(self._owner[0], NAME)


def is_masked(model: nn.Module, name: str) -> bool:
    """Whether there is a mask on the list of blocks of that name."""
    return hasattr(model.get_submodule(name.rpartition(".")[0]), NAME)


def _blend(
    mask: BlockMask, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """A forward hook. A function and not a closure, so that a copy of the model has its own mask in it."""
    if mask.bypassed:
        return output
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    if isinstance(mask.scores, DTensor):
        # The gradient of a score that is gathered outside its own layer would not be averaged.
        raise ValueError("Masks on whole layers cannot be sharded; train on several devices without FSDP.")
    share = mask.mask()[index]
    blended = share * after + (1 - share) * before
    return (blended, *output[1:]) if isinstance(output, tuple) else blended

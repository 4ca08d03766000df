"""The optimizer of a training loop that knows nothing of methods."""

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hf_approx.optim import CompositeOptimizer

if TYPE_CHECKING:
    from hf_approx.methods.stack import MethodStack

TAKEN = "hf_approx_steps"
"""What the state has beside that of other optimizers."""


class BoundOptimizer(CompositeOptimizer):
    """An optimizer that keeps a stack in step: see `MethodStack.bind`."""

    def __init__(self, stack: "MethodStack", optimizer: Optimizer, steps: int | None) -> None:
        groups = stack.param_groups()
        super().__init__(optimizer, *([torch.optim.Adam(groups, fused=True)] if groups else []))
        self.stack, self.steps, self.taken = stack, steps, 0
        if steps is not None:
            stack.advance(0.0)

    def _progress(self) -> float | None:
        if self.steps is None or self.taken >= self.steps:
            return None
        return self.taken / max(self.steps - 1, 1)

    def step(self, closure: Any = None) -> Any:
        """Gradients to what is trained, one step of every optimizer, effective weights anew."""
        if closure is not None:
            raise ValueError("An optimizer of MethodStack.bind takes no closure: call backward, then step().")
        if not self.stack._pulled:
            self.stack.before_step()
        super().step()
        self.taken += 1
        self.stack.after_step(self._progress())

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; also how many steps were taken."""
        return {**super().state_dict(), TAKEN: self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the schedules are where `MethodStack.load_state_dict` puts them."""
        state_dict = state_dict.copy()
        self.taken = state_dict.pop(TAKEN, 0)
        super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer; also forgets the gradients of effective weights."""
        super().zero_grad(set_to_none)
        self.stack.zero_grad()

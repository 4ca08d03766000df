"""One optimizer interface over several: the task's optimizer and the one of the methods' parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class CompositeOptimizer(Optimizer):
    """Steps several optimizers as one, so a scheduler, GradScaler or accelerate sees a single optimizer.

    Args:
        optimizers: At least one; no parameter may belong to two of them. Their `param_groups` and `state`
            stay theirs: changing a group's `lr` here changes it there.

    Raises:
        ValueError: No optimizer was given, or a parameter belongs to two.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        if not params or len({id(p) for p in params}) != len(params):
            raise ValueError("CompositeOptimizer: needs parameters, each in exactly one of its optimizers.")
        super().__init__(params, {})
        self.optimizers = optimizers
        self._collect_groups()

    def _collect_groups(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CompositeOptimizer.__init__(self, *state["optimizers"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the first optimizer."""
        if not hasattr(self, "optimizers"):  # the base class is collecting what the parts have already
            super().add_param_group(param_group)
            return
        self.optimizers[0].add_param_group(param_group)
        self._collect_groups()

    @property  # type: ignore[override]
    def state(self) -> dict[torch.Tensor, Any]:
        """State of every parameter, by parameter."""
        return {p: s for optimizer in self.optimizers for p, s in optimizer.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """The base class starts with an empty state; the parts keep theirs."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part; the closure runs once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned: that of one optimizer with the groups of all parts, in order.

        Raises:
            ValueError: The number of parameter groups differs.
        """
        groups, state = list(state_dict.get("param_groups", [])), state_dict.get("state", {})
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"CompositeOptimizer: the checkpoint holds {len(groups)} parameter groups, this run has "
                f"{len(self.param_groups)}; resume with the same methods and optimizer."
            )
        for optimizer in self.optimizers:
            own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            keys = [key for group in own for key in group["params"] if key in state]
            optimizer.load_state_dict({"state": {key: state[key] for key in keys}, "param_groups": own})
        self._collect_groups()

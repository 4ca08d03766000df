"""One optimizer interface over several: the task's optimizer and the one of the methods' parameters."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

T = TypeVar("T")


class CompositeOptimizer(Optimizer):
    """Steps several optimizers as one, so a scheduler, GradScaler or accelerate sees a single optimizer.

    Args:
        optimizers: At least one; no parameter may belong to two of them. Their `param_groups` and `state`
            stay theirs: changing a group's `lr` here changes it there. `defaults` are those of the first.

    Raises:
        ValueError: No optimizer was given, or a parameter belongs to two.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        params = [p for group in groups for p in group["params"]]
        if not params or len({id(p) for p in params}) != len(params):
            raise ValueError("CompositeOptimizer: needs parameters, each in exactly one of its optimizers.")
        defaults = dict(optimizers[0].defaults)
        if not all("betas" in group for group in groups):
            # Schedulers that see it change it in every group.
            defaults.pop("betas", None)
        super().__init__(params, defaults)
        self.optimizers = optimizers
        self._original_groups = [len(optimizer.param_groups) for optimizer in optimizers]

    def _owners(self) -> list[int]:
        """Which optimizer each group is of. Groups added later are last: schedulers know groups by position."""
        counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        original = [min(pair) for pair in zip(self._original_groups, counts, strict=True)]
        added = [whole - part for whole, part in zip(counts, original, strict=True)]
        return [owner for sizes in (original, added) for owner, size in enumerate(sizes) for _ in range(size)]

    def _merge(self, parts: Sequence[Sequence[T]]) -> list[T]:
        """What each optimizer has for its groups, in the order of `param_groups`."""
        left = [iter(part) for part in parts]
        return [next(left[owner]) for owner in self._owners()]

    def _split(self, groups: Sequence[T]) -> list[list[T]]:
        """What is in the order of `param_groups`, for each optimizer."""
        parts: list[list[T]] = [[] for _ in self.optimizers]
        for owner, group in zip(self._owners(), groups, strict=True):
            parts[owner].append(group)
        return parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all parts, which they share with this list."""
        return self._merge([optimizer.param_groups for optimizer in self.optimizers])

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not hasattr(self, "optimizers"):  # the base class starts with none; the parts have theirs
            return
        if len(value) != len(self.param_groups):
            raise ValueError("CompositeOptimizer: use add_param_group to change the number of parameter groups.")
        for optimizer, groups in zip(self.optimizers, self._split(value), strict=True):
            optimizer.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Any, Any]:
        """State of every parameter, by parameter; what is written goes to the optimizer the parameter is of."""
        return _States(self.optimizers)

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        if not hasattr(self, "optimizers"):
            return
        items = dict(value)
        self.state.clear()
        self.state.update(items)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "original_groups": self._original_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).clear()
        CompositeOptimizer.__init__(self, *state["optimizers"])
        self._original_groups = state["original_groups"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the first optimizer; here it is the last."""
        if hasattr(self, "optimizers"):  # else the base class is collecting what the parts have already
            others = {id(p) for optimizer in self.optimizers[1:] for g in optimizer.param_groups for p in g["params"]}
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, torch.Tensor) else list(params)
            if any(id(param[1] if isinstance(param, tuple) else param) in others for param in params):
                raise ValueError("CompositeOptimizer: needs parameters, each in exactly one of its optimizers.")
            self.optimizers[0].add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every part; the first runs the closure, as often as it does alone."""
        first, *others = self.optimizers
        loss = first.step() if closure is None else first.step(closure)
        for optimizer in others:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for optimizer in self.optimizers:
            # Some of other packages take no argument, and clear them so.
            optimizer.zero_grad(**({} if set_to_none else {"set_to_none": False}))

    def train(self) -> None:
        """For parts that train other weights than they evaluate, such as schedule-free ones: those to train."""
        self._switch("train")

    def eval(self) -> None:
        """The weights to evaluate and to save; see `train`."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers:
            if callable(getattr(optimizer, mode, None)):
                getattr(optimizer, mode)()

    def state_dict(self) -> dict[str, Any]:
        """That of one optimizer with the groups of all parts; what else the first part saves is kept beside them."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        parts = [optimizer.state_dict() for optimizer in self.optimizers]
        numbers: list[dict[Any, int]] = [{} for _ in parts]
        groups, next_number = [], count()
        merged = self._merge([part["param_groups"] for part in parts])
        for owner, group in zip(self._owners(), merged, strict=True):
            numbers[owner].update((key, next(next_number)) for key in group["params"])
            groups.append({**group, "params": [numbers[owner][key] for key in group["params"]]})
        state = {
            own.get(key, key): value
            for own, part in zip(numbers, parts, strict=True)
            for key, value in part["state"].items()
        }
        result = {**parts[0], "state": state, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, result) or result
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: The number of parameter groups, or of the parameters in one, differs.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups, state = list(state_dict.get("param_groups", [])), state_dict.get("state", {})
        here, there = ([len(group["params"]) for group in side] for side in (self.param_groups, groups))
        if len(here) != len(there):
            raise ValueError(
                f"CompositeOptimizer: the checkpoint holds {len(there)} parameter groups, this run has "
                f"{len(here)}; resume with the same methods and optimizer."
            )
        if here != there:
            raise ValueError(
                f"CompositeOptimizer: the checkpoint's parameter groups have {', '.join(map(str, there))} parameters, "
                f"those of this run {', '.join(map(str, here))}; resume with the same methods and optimizer."
            )
        split = self._split(groups)
        keys = [{key for group in own for key in group["params"]} for own in split]
        # What is no parameter's is the first part's, like every further entry of the state dict.
        keys[0] |= state.keys() - set().union(*keys)
        for i, (optimizer, own) in enumerate(zip(self.optimizers, split, strict=True)):
            kept = {key: value for key, value in state.items() if key in keys[i]}
            optimizer.load_state_dict({**({} if i else state_dict), "state": kept, "param_groups": own})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as the one of a single optimizer: an entry that is asked for is there."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers

    def _of(self, key: Any) -> Any:
        """The state that has, or is to have, an entry."""
        for optimizer in self.optimizers:
            if key in optimizer.state:
                return optimizer.state
        owners = (o for o in self.optimizers if any(key is p for group in o.param_groups for p in group["params"]))
        return next(owners, self.optimizers[0]).state

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self.optimizers)

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self.optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.optimizers)

    def __repr__(self) -> str:
        return repr(dict(self))


def stepping_problem(name: Any, optimizer: Any) -> str | None:
    """Why an optimizer that `TrainingArguments(optim=...)` names, or one that was given, cannot train methods."""
    name = str(getattr(name, "value", name))
    kind = type(optimizer).__name__ if optimizer is not None else ""
    if name in ("lomo", "adalomo") or name.endswith("_layerwise") or kind in ("Lomo", "AdaLomo"):
        return (
            f"{kind or name} changes weights during backward, before the methods see their gradients; use another "
            "optimizer."
        )
    if name.startswith(("galore", "apollo")):
        return f"{name} would leave out every layer that a method compresses; use another optimizer."
    return None

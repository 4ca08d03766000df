"""Weights that are no numbers, which is what a diverged training leaves: nothing is made of them, nothing is saved."""

import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

STATISTICS = ("running_mean", "running_var")
"""Buffers that training changes. Others may be infinite: masks of attention are."""
SMALL = 2
"""Bytes of the smallest dtype that torch can look for infinities in."""


class NotFiniteError(ValueError):
    """A weight is NaN or infinite."""


Named = tuple[str, Tensor] | tuple[str, Tensor, bool]
"""A tensor with its name and, by default not, whether it may be infinite."""


def refuse_not_finite(where: str, tensors: nn.Module | Iterable[Named]) -> None:
    """Raise `NotFiniteError`, naming the first tensor that holds NaN or infinity, if any does.

    The device is waited for once, whatever the number of tensors.

    Args:
        where: Who refuses, for the message.
        tensors: A model, or tensors with their names. Of a model all parameters must be finite, and buffers no NaN;
            only what a module lists in `may_be_infinite`, such as scores of masks that are fixed, may be infinite.
            Where tensors are split over processes, all of these must call.
    """
    found = first_not_finite(tensors)
    if found is not None:
        raise NotFiniteError(f"{where}: {found}, as training that diverged leaves it.")


def first_not_finite(tensors: nn.Module | Iterable[Named]) -> str | None:
    """The same as a text, "'name' holds NaN"; None if all is well."""
    if isinstance(tensors, nn.Module):
        entries = list(_of_model(tensors))
    else:
        entries = [(name, tensor, bool(infinite)) for name, tensor, *infinite in tensors]
    checked = [
        (name, tensor.detach(), infinite)
        for name, tensor, infinite in entries
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.device.type != "meta" and tensor.numel()
    ]
    if not checked:
        return None
    device = checked[0][1].device
    bad = torch.stack([_bad(tensor, infinite).to(device, torch.uint8) for _, tensor, infinite in checked])
    if any(isinstance(tensor, DTensor) for _, tensor, _ in checked):
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    if not bool(bad.any()):
        return None
    name, tensor, _ = checked[int(bad.argmax())]
    what = "NaN" if bool(_wide(tensor).isnan().any()) else "infinity"
    more = int(bad.sum()) - 1
    return f"'{_own(name)}'{f' and {more} other tensors hold' if more else ' holds'} {what}"


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Every parameter and buffer once, by name, and whether it may be infinite."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        allowed = getattr(module, "may_be_infinite", ())
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                infinite = name in allowed or (kind is module._buffers and name not in STATISTICS)
                yield f"{prefix}.{name}" if prefix else name, tensor, infinite


def _bad(tensor: Tensor, infinite: bool) -> Tensor:
    """Whether it holds NaN, or also infinity; one value, where the tensor is."""
    values = _wide(tensor)
    if not values.numel():  # a small tensor that is split over several processes has parts with nothing in them
        return torch.zeros((), dtype=torch.bool, device=values.device)
    largest = torch.linalg.vector_norm(values, torch.inf)  # one pass, without a copy; NaN if any is
    return largest.isnan() if infinite else ~largest.isfinite()


def _wide(tensor: Tensor) -> Tensor:
    """What is here of it, in a dtype and layout that can be looked at."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.layout != torch.strided:
        tensor = tensor.to_sparse_coo().coalesce().values()
    return tensor if tensor.element_size() >= SMALL else tensor.float()


def _own(name: str) -> str:
    """The name a weight has for those who know nothing of wrappers, or of how a layer shares its weight."""
    return re.sub(r"\bparametrizations\.(\w+)\.original$", r"\1", name).replace("_orig_mod.", "")


NEVER = torch.iinfo(torch.int64).max


class Suspect:
    """The first step whose loss or gradient was not finite, kept on the device so that no step waits for it.

    That alone is no harm: a batch without a single label has no loss, a step whose gradients overflowed is skipped.
    """

    def __init__(self) -> None:
        self._now: Tensor | None = None
        self._first: Tensor | None = None

    def see(self, value: Tensor | float | None) -> None:
        """Look at a loss, or at the norm of a gradient, of the step that is being made."""
        if isinstance(value, Tensor):
            value = value.detach()
            odd = ~(value.full_tensor() if isinstance(value, DTensor) else value).isfinite().all()
            self._now = odd if self._now is None else self._now | odd.to(self._now.device)
        elif value is not None and not math.isfinite(value):
            self._now = torch.tensor(True)

    def end_step(self, step: int, skipped: bool = False) -> None:
        """Keep what was seen, unless the optimizer skipped the step."""
        if self._now is not None and not skipped:
            found = torch.where(self._now, step, NEVER)
            self._first = found if self._first is None else torch.minimum(self._first, found.to(self._first.device))
        self._now = None

    def step(self) -> int | None:
        """The first one since the last `clear`; waits for the device."""
        first = NEVER if self._first is None else int(self._first)
        return None if first == NEVER else first

    def clear(self) -> None:
        """All weights are known to be finite."""
        self._now = self._first = None

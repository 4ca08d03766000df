"""Weights that are mixed from the templates of a bank: what is trained for a layer is its coefficients.

Layers of one bank are mixed together, by one product of matrices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_approx.checkpoint.zeros import release_zeros
from hf_approx.methods.batch import MOST, stacked
from hf_approx.methods.latent import Latent, Partials, Stage, add_grad
from hf_approx.modules.bank import TemplateBank
from hf_approx.modules.sharded import from_piece, piece
from hf_approx.targets import Target


class Mixing(Latent):
    """The coefficients of a layer, which are what is trained in the place of its weight.

    Args:
        target: The layer's weight.
        bank: The templates it is mixed from.
        coefficients: Shape (templates,).
    """

    mixes = True

    def __init__(self, target: Target, bank: TemplateBank, coefficients: nn.Parameter) -> None:
        self.bank, self._own = bank, coefficients
        super().__init__(target)
        stage = Stage()
        stage.method = "sharing"
        self.add(stage)

    @property
    def latents(self) -> list["Mixing"]:
        """Itself, as a batch of one."""
        return [self]

    def hand_out(self) -> None:
        """It has its gradient."""

    def start(self) -> nn.Parameter:
        """The coefficients."""
        return self._own

    def _take_zeros(self, effective: nn.Parameter) -> None:
        """Templates that are mixed from sparse weights are free to become dense."""
        release_zeros(effective)

    def local(self, stage: Stage | None = None) -> Tensor:
        """The mix."""
        return self.bank.mix(self.weight)

    @property
    def moved(self) -> bool:
        """Whether the model went to another device, or its templates to another dtype."""
        return super().moved or self.weight.dtype != self.effective.dtype

    def follow(self) -> None:
        """Also have the dtype of the templates, where those are whole."""
        super().follow()
        if not self.is_sharded:
            self.weight.data = self.weight.data.to(self.effective.dtype)

    def split(self, effective: DTensor) -> None:
        """Coefficients stay whole on every process."""
        self.weight.data = self.weight.data.to(effective.device)

    @torch.no_grad()
    def write(self, bare: bool = False, confine: bool = False) -> None:
        """Mix again; a bare layer is what it is mixed to."""
        self.follow()
        piece(self.effective).copy_(self.local())

    @torch.no_grad()
    def pull(self) -> Partials:
        """Gradients of the coefficients, and of the templates as the model has them."""
        effective = self.effective
        grad, effective.grad = effective.grad, None
        if grad is None:
            return []
        self.follow()
        own, rows = [], piece(grad)
        for factor, template in zip(self.weight.detach(), self.bank, strict=True):
            weight = template.get_parameter("weight")
            there = rows.to(weight.device)
            own.append((there * piece(weight)).sum().to(factor))
            if weight.requires_grad and weight.grad is None:
                made = there * factor
                weight.grad = from_piece(made, weight) if isinstance(weight, DTensor) else made
            elif weight.requires_grad:
                piece(cast(Tensor, weight.grad)).addcmul_(there, factor)
        if not self.weight.requires_grad:
            return []
        row = torch.stack(own)
        if isinstance(effective, DTensor):
            return [(self.weight, row, effective)]
        add_grad(self.weight, row)
        return []


class MixedBatch:
    """Weights that are mixed from one bank: W = C T, of coefficients (layers, templates) and templates as rows.

    Args:
        latents: The coefficients of every layer; on one device.
    """

    def __init__(self, latents: Sequence[Mixing]) -> None:
        self.latents = list(latents)
        self.coefficients = stacked([latent.weight for latent in latents])

    def hand_out(self) -> None:
        """Every layer has its gradient."""

    def zero_grad(self) -> None:
        """Every layer forgets its own."""

    def _pieces(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """The tensors in runs of rows of which all layers together have no more than `MOST` entries."""
        rows = len(tensors[0])
        run = max(MOST * rows // (len(self.latents) * tensors[0].numel()), 1)
        if run >= rows:
            return iter([tensors])
        return ([tensor[start : start + run] for tensor in tensors] for start in range(0, rows, run))

    @torch.no_grad()
    def write(self, bare: bool = False, confine: bool = False) -> None:
        """As of `Latent`; bare weights are mixed too."""
        layers, templates = [latent.effective for latent in self.latents], self.latents[0].bank.weights
        with exact_products():
            for made, given in zip(self._pieces(layers), self._pieces(templates), strict=True):
                mixed = self.coefficients @ torch.stack(list(given)).flatten(1)
                torch._foreach_copy_(list(made), mixed.view(-1, *made[0].shape).unbind())

    @torch.no_grad()
    def pull(self) -> Partials:
        """Turn gradients of effective weights into those of coefficients and of templates as the model has them.

        Returns:
            Nothing that is still to be added up: these weights are whole.
        """
        effective = [latent.effective for latent in self.latents]
        if any(param.grad is None for param in effective):
            return [part for latent in self.latents for part in latent.pull()]
        grads = [cast(Tensor, param.grad) for param in effective]
        for param in effective:
            param.grad = None
        templates = self.latents[0].bank.weights
        of_rows = torch.zeros_like(self.coefficients)
        of_templates: list[tuple[Tensor, ...]] = []
        with exact_products():
            for each, given in zip(self._pieces(grads), self._pieces(templates), strict=True):
                grad = torch.stack(list(each)).flatten(1)
                of_rows.addmm_(grad, torch.stack(list(given)).flatten(1).T)
                of_templates.append((self.coefficients.T @ grad).view(-1, *given[0].shape).unbind())
        for latent, row in zip(self.latents, of_rows.unbind(), strict=True):
            add_grad(latent.weight, row)
        for template, parts in zip(self.latents[0].bank, zip(*of_templates, strict=True), strict=True):
            add_grad(template.get_parameter("weight"), parts[0] if len(parts) == 1 else torch.cat(parts))
        return []


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, float32 matrices are multiplied in float32, whatever is allowed elsewhere: weights are made of them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def mixed_batches(latents: Sequence[Mixing]) -> Sequence[MixedBatch | Mixing]:
    """The layers of each bank together, where they are on one device with it; others by themselves."""
    found: dict[int, list[Mixing]] = {}
    for latent in latents:
        found.setdefault(id(latent.bank), []).append(latent)
    batches: list[MixedBatch | Mixing] = []
    for same in found.values():
        tensors = [*(latent.effective for latent in same), *same[0].bank.weights]
        alike = len({(t.device, t.dtype, t.is_contiguous()) for t in tensors}) == 1 and tensors[0].is_contiguous()
        batches += [MixedBatch(same)] if alike else same
    return batches

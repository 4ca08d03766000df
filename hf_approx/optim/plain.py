"""AvaGrad as one writes it down: what tests hold the fast forms equal to, step by step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_approx.optim.avagrad import AvaGrad


class PlainAvaGrad(AvaGrad):
    """[`AvaGrad`], one parameter after another, each formula on whole tensors; takes states of it and gives them.

    Slow, and uses memory of several times the largest parameter. Not for DTensors.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        variant = self.defaults["variant"]
        trained = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for _, param in trained:
            state = self.state[param]
            if not state:
                like = param.float() if param.dtype in (torch.float16, torch.bfloat16) else param
                state.update(step=0, exp_avg=torch.zeros_like(like), exp_avg_sq=torch.zeros_like(like))
            state["step"] += 1

        # The first call of the exact variant has no second moment yet.
        counted = [(g, p) for g, p in trained if variant != "exact" or self.state[p]["step"] > 1]
        offset = {"exact": -1, "reference": 0, "paper": None}[variant]
        gammas = {}
        for group in self.param_groups:
            scope = [(g, p) for g, p in counted if self.defaults["gamma_scope"] == "global" or g is group]
            if scope:
                rates = torch.cat([self._rate(*one, offset).double().reshape(-1) for one in scope])
                gammas[id(group)] = (rates.numel() / rates.square().sum()).sqrt()

        for group, param in trained:
            state, (beta1, beta2) = self.state[param], group["betas"]
            step, mean, square = state["step"], _real(state["exp_avg"]), _real(state["exp_avg_sq"])
            weight, grad = _real(param).to(mean.dtype), _real(param.grad).to(mean.dtype)
            if group["maximize"]:
                grad = -grad
            if not group["decoupled_weight_decay"]:
                grad = grad + group["weight_decay"] * weight
            mean.copy_(beta1 * mean + (1 - beta1) * grad)
            if variant == "paper" or step > 1:
                gamma = group["gamma"] if variant == "reference" else gammas[id(group)]
                rate = self._rate(group, param, None if variant == "paper" else -1)
                corrected = mean if variant == "paper" else mean / (1 - beta1**step)
                if group["decoupled_weight_decay"]:
                    weight = weight * (1 - group["lr"] * group["weight_decay"])
                _real(param).copy_(weight - group["lr"] * gamma * rate * corrected)
            square.copy_(beta2 * square + (1 - beta2) * grad * grad)
        if variant == "reference":
            for group in self.param_groups:
                group["gamma"] = gammas.get(id(group), group["gamma"])
        return loss

    def _rate(self, group: dict[str, Any], param: Tensor, offset: int | None) -> Tensor:
        """eta = 1 / (sqrt(v) + eps), v corrected for the step count plus `offset`; not corrected if that is None."""
        root = _real(self.state[param]["exp_avg_sq"]).sqrt()
        if offset is not None:
            root = root / (1 - group["betas"][1] ** (self.state[param]["step"] + offset)) ** 0.5
        return 1 / (root + group["eps"])


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor

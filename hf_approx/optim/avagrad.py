"""AvaGrad (Savarese et al., CVPR 2021): adaptive steps whose size and adaptability tune independently."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from hf_approx.optim.config import GammaScope, Variant, check_hyperparameters, resolve_gamma_scope
from hf_approx.optim.kernels import Batch, pieces, squared_norm


class AvaGrad(Optimizer):
    r"""AvaGrad, and AvaGradW with `decoupled_weight_decay=True`.

    With \(\eta_t = 1 / (\sqrt{\hat v_{t-1}} + \epsilon)\), elementwise, over the d weights that have a gradient:

        w <- w - lr * gamma_t * eta_t * m_t,   gamma_t = sqrt(d) / ||eta_t||

    so the root mean square of the rates `gamma * eta` is 1 whatever eps is. Hence two one-dimensional
    searches, not a grid: `eps` chooses between Adam-like (small) and SGD-like (large) steps, `lr` their
    size. The second moment is one step old, so rates do not depend on the gradient they multiply. Weights whose
    gradient is always zero (rows of an embedding, pruned weights) count with the largest rate, 1 / eps: an eps far
    below the other gradients then leaves those almost no step.

    Args:
        params: Parameters, or dicts of parameter groups with their own `lr`, `betas`, `eps`,
            `weight_decay`, `maximize`.
        lr: Step size. Useful values are those of SGD with momentum (0.1 in the paper), not Adam's. A tensor of one
            element is used where it is, at every step; the other options are read once if they are tensors.
        betas: Decay of the running mean of the gradient and of its square.
        eps: Adaptability, added to the root of the second moment; in the units of a gradient.
        weight_decay: L2 added to the gradient, or, if decoupled, the rate of shrinking the weights.
        decoupled_weight_decay: Multiply weights by `1 - lr * weight_decay` and leave gradients alone.
        variant: `"exact"`: bias-corrected moments, gamma from the very rates it scales, the first call
            only fills the state. `"reference"`: the authors' code, whose gamma is one call old and per
            group. `"paper"`: no bias correction, moves from the first call.
        gamma_scope: `"global"` (default): one gamma for the whole model, so splitting parameters into
            decay and no-decay groups changes nothing. `"group"`: one per group.
        maximize: Ascend.
        foreach: Use the multi-tensor implementation; None: yes.

    Each optimizer sees the gradients of all weights it normalises: one that is given a share of the parameters by
    `ZeroRedundancyOptimizer` normalises that share alone.

    Raises:
        ValueError: A hyper-parameter is NaN, infinite or out of range, or differs between groups and must not.
        RuntimeError: A gradient is sparse, or a CUDA graph is being captured: steps are counted on the host.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 0.1,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        variant: Variant = "exact",
        gamma_scope: GammaScope | None = None,
        maximize: bool = False,
        foreach: bool | None = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": _number(betas),
            "eps": _number(eps),
            "weight_decay": _number(weight_decay),
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "variant": variant,
            "gamma_scope": resolve_gamma_scope(variant, gamma_scope),
            "foreach": foreach,
            "gamma": None,
        }
        super().__init__(params, defaults)
        if isinstance(lr, torch.Tensor):
            # Schedulers change the groups' tensor in place, and some scale by the rate of the beginning.
            self.defaults["lr"] = lr.clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its hyper-parameters."""
        given = {"betas", "eps", "weight_decay"} & param_group.keys()
        merged = {**self.defaults, **param_group, **{name: _number(param_group[name]) for name in given}}
        check_hyperparameters(merged["lr"], merged["betas"], merged["eps"], merged["weight_decay"])
        for option in ("variant", "gamma_scope"):
            if merged[option] != self.defaults[option]:
                raise ValueError(
                    f"AvaGrad: {option} is one for all groups, {self.defaults[option]!r} here, got {merged[option]!r}."
                )
        for option in ("capturable", "differentiable", "fused"):
            if merged.get(option):
                raise ValueError(f"AvaGrad: there is no {option} implementation; leave out {option}={merged[option]}.")
        param_group.update({name: merged[name] for name in given})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the moments of half-precision parameters stay float32, as they were saved.

        Raises:
            ValueError: The state was saved by another variant.
        """
        seen: dict[str, Any] = {}

        def check(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
            variants = {group.get("variant") for group in loaded["param_groups"]}
            if variants != {self.defaults["variant"]}:
                raise ValueError(
                    f"AvaGrad: the state was saved with variant {', '.join(map(repr, variants))}, this optimizer has "
                    f"{self.defaults['variant']!r}."
                )
            seen.update(loaded)

        def restore(optimizer: Optimizer) -> None:
            # The base class has cast them to the dtype of their parameter.
            saved_ids = [i for group in seen["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for saved_id, param in zip(saved_ids, params, strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    if saved_id in seen["state"]:
                        moment = seen["state"][saved_id][name]
                        self.state[param][name] = moment.detach().to(param.device, copy=True)

        # Hooks of others may change what is loaded, and are told when it is there.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, if one was given."""
        on_cuda = any(param.is_cuda for group in self.param_groups for param in group["params"][:1])
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("AvaGrad: step() counts on the host, which no CUDA graph repeats; call it outside.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        batches = [batch for group in self.param_groups for batch in self._gather(group)]
        if self.defaults["variant"] == "reference":
            self._step_reference(batches)
        else:
            self._step_same_gamma(batches)
        return loss

    def _gather(self, group: dict[str, Any]) -> list[Batch]:
        """The group's parameters that have a gradient, in batches one multi-tensor call can take."""
        if any(param.grad is not None and param.grad.is_sparse for param in group["params"]):
            raise RuntimeError(
                "AvaGrad: a gradient is sparse; build the embedding with sparse=False, "
                "or give those parameters to torch.optim.SparseAdam."
            )
        foreach = group["foreach"] is None or group["foreach"]
        done: list[Batch] = []
        open_batches: dict[tuple[Any, ...], Batch] = {}
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                dtype = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            state["step"] += 1
            # Ordinary tensors share batches; anything else (a DTensor, say) has batches of its own mesh.
            kind = (type(param.data), getattr(param, "device_mesh", None), param.device, param.dtype)
            key: tuple[Any, ...] = (*kind, state["step"]) if foreach else (index,)
            whole: tuple[torch.Tensor, ...] = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
            if param.is_complex():
                whole = tuple(torch.view_as_real(tensor) for tensor in whole)
            for piece in pieces(whole) if foreach else [whole]:
                batch = open_batches.setdefault(key, Batch(group, state["step"]))
                batch.append(*piece)
                if batch.is_full:
                    done.append(open_batches.pop(key))
        return [*done, *open_batches.values()]

    def _step_same_gamma(self, batches: list[Batch]) -> None:
        """`exact` and `paper`: gamma normalises the rates of this very step."""
        corrected = self.defaults["variant"] == "exact"
        moving = [batch for batch in batches if batch.step > 1 or not corrected]
        gammas = self._gammas(moving, offset=-1 if corrected else None)
        for batch in batches:
            grads = batch.decayed_gradients()
            batch.update_mean(grads)
            if batch.step > 1 or not corrected:
                # Computed again rather than kept: cheaper than a copy of the model in memory.
                rates = batch.rates(batch.step - 1 if corrected else None)
                correction = 1 - batch.group["betas"][0] ** batch.step if corrected else 1.0
                batch.move(rates, gammas[self._scope_key(batch)], correction)
            batch.update_square(grads)

    def _step_reference(self, batches: list[Batch]) -> None:
        """The authors' code: gamma was left by the previous call, from a second moment one step older."""
        gammas = self._gammas(batches, offset=0)
        for batch in batches:
            grads = batch.decayed_gradients()
            batch.update_mean(grads)
            if batch.step > 1:
                correction = 1 - batch.group["betas"][0] ** batch.step
                batch.move(batch.rates(batch.step - 1), batch.group["gamma"], correction)
            batch.update_square(grads)
        for batch in batches:
            # A tensor: to read its number would wait for the device.
            batch.group["gamma"] = gammas[self._scope_key(batch)]

    def _scope_key(self, batch: Batch) -> int:
        return id(batch.group) if self.defaults["gamma_scope"] == "group" else 0

    def _gammas(self, batches: list[Batch], offset: int | None) -> dict[int, torch.Tensor]:
        """sqrt(d) / ||eta|| for each scope, summed in float64; rates are corrected for step + offset."""
        square: dict[int, torch.Tensor] = {}
        count: dict[int, int] = {}
        for batch in batches:
            key = self._scope_key(batch)
            total = squared_norm(batch.rates(None if offset is None else batch.step + offset))
            square[key] = total if key not in square else square[key] + total.to(square[key].device)
            count[key] = count.get(key, 0) + batch.numel
        return {key: (count[key] / square[key]).sqrt() for key in square}


def _number(value: Any) -> Any:
    """The number a tensor holds, also those of a tuple; anything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(map(_number, value))
    return value.item() if isinstance(value, torch.Tensor) else value

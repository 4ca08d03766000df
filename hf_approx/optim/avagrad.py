"""AvaGrad (Savarese et al., CVPR 2021): adaptive steps whose size and adaptability tune independently."""

import weakref
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_approx.optim import kernels, native
from hf_approx.optim.config import GammaScope, Variant, check_hyperparameters, resolve_gamma_scope
from hf_approx.optim.kernels import Batch, Rule, local_quad, reduced


class AvaGrad(Optimizer):
    r"""AvaGrad, and AvaGradW with `decoupled_weight_decay=True`.

    With \(\eta_t = 1 / (\sqrt{\hat v_{t-1}} + \epsilon)\), elementwise, over the d weights that have a gradient:

        w <- w - lr * gamma_t * eta_t * m_t,   gamma_t = sqrt(d) / ||eta_t||

    so the root mean square of the rates `gamma * eta` is 1 whatever eps is. Hence two one-dimensional
    searches, not a grid: `eps` chooses between Adam-like (small) and SGD-like (large) steps, `lr` their
    size. The second moment is one step old, so rates do not depend on the gradient they multiply. Weights whose
    gradient is always zero (rows of an embedding, pruned weights) count with the largest rate, 1 / eps: an eps far
    below the other gradients then leaves those almost no step.

    A step is one pass over memory: the rates of the next step need only the second moment that this one writes, so
    their norm is added up in the same pass, and stays on the device. A pass of its own computes it again when it does
    not hold for the next step: a state was loaded or written to, eps or beta2 changed, other parameters have
    gradients. On a GPU a Triton kernel steps all tensors of a group in one launch; on a CPU, from four million weights
    on, C++ does that the machine's compiler builds once a process. Nothing is built again as options, steps or shapes
    change. Everything else, and all where these do not run, takes multi-tensor operations on parts of bounded size. No
    form has a temporary as large as the model, and none waits for the device. Half-precision weights are computed in
    float32 and rounded once. Of DTensors each process steps its own part, and all norms of a step are one reduction.

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
        foreach: Take many tensors in one call; None: yes. False takes one after another, and nothing compiled.

    Each optimizer sees the gradients of all weights it normalises: one that is given a share of the parameters by
    `ZeroRedundancyOptimizer` normalises that share alone.

    Raises:
        ValueError: A hyper-parameter is NaN, infinite or out of range, or differs between groups and must not.
        RuntimeError: A gradient is sparse, or a CUDA graph is being captured: steps are counted on the host.
    """

    _next: "_Next | None" = None

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

        trained = [[param for param in group["params"] if param.grad is not None] for group in self.param_groups]
        if any(param.grad.is_sparse for params in trained for param in params):
            raise RuntimeError(
                "AvaGrad: a gradient is sparse; build the embedding with sparse=False, "
                "or give those parameters to torch.optim.SparseAdam."
            )
        batches = [batch for number, params in enumerate(trained) for batch in self._gather(number, params)]
        on_cpu = sum(batch.local_numel for batch in batches if batch.device.type == "cpu")
        forms = [_form(batch, on_cpu) for batch in batches]
        if self.defaults["variant"] == "reference":
            gammas = {number: group["gamma"] for number, group in enumerate(self.param_groups)}
        elif self._next is not None and self._next.holds([b for b in batches if b.rule.moves]):
            gammas = self._next.gammas
        else:
            pairs = [(b, k) for b, k in zip(batches, forms, strict=True) if b.rule.moves]
            gammas = self._gammas([b for b, _ in pairs], [k.norm(b) for b, k in pairs])
        sums = [k.step(b, gammas.get(self._scope(b))) for b, k in zip(batches, forms, strict=True)]
        gammas = self._gammas(batches, sums)
        if self.defaults["variant"] == "reference":
            for number, gamma in gammas.items():
                # A tensor: to read its number would wait for the device.
                self.param_groups[number]["gamma"] = gamma
        else:
            self._next = _Next(batches, gammas)
        return loss

    def _gather(self, number: int, params: list[torch.Tensor]) -> list[Batch]:
        """The parameters of a group that have a gradient, in batches that one call can take."""
        group = self.param_groups[number]
        foreach = group["foreach"] is None or group["foreach"]
        batches: dict[tuple[Any, ...], Batch] = {}
        for param in params:
            state = self.state[param]
            if not state:
                dtype = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            state["step"] += 1
            square = state["exp_avg_sq"]
            grad: Any = param.grad
            quad, dense = local_quad((param, grad, state["exp_avg"], square))
            mesh = None
            if isinstance(param, DTensor):
                mesh = (param.device_mesh, tuple(not placement.is_replicate() for placement in param.placements))
            one, two, three, four = quad
            key = (state["step"], dense, mesh, one.device, one.dtype, two.dtype, three.dtype, four.dtype)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(number, self._rule(group, state["step"]), foreach, dense, mesh)
            batch.quads.append(quad)
            batch.states.append(square)
            batch.numel += param.numel() * (2 if param.is_complex() else 1)
        return list(batches.values())

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        """What the variant does to a group's parameters at their step of that number, counted from 1."""
        variant, (beta1, beta2), decay = self.defaults["variant"], group["betas"], group["weight_decay"]
        corrected = variant != "paper"
        now = (1 - beta2**step) ** 0.5 if corrected else 1.0
        # Rates are made of what the step before left. At the first there is nothing to correct, and nothing moves.
        before = (1 - beta2 ** (step - 1)) ** 0.5 if corrected and step > 1 else 1.0
        return Rule(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            lr=group["lr"],
            l2=0.0 if group["decoupled_weight_decay"] else decay,
            decay=decay if group["decoupled_weight_decay"] else 0.0,
            maximize=group["maximize"],
            root=before,
            correction=1 - beta1**step if corrected else 1.0,
            moves=step > 1 or not corrected,
            norm_root=now,
            norm_of_old=variant == "reference",
        )

    def _scope(self, batch: Batch) -> int:
        return batch.group if self.defaults["gamma_scope"] == "group" else 0

    def _gammas(self, batches: list[Batch], sums: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """sqrt(d) / ||eta|| of each scope, from the sums of squared rates that batches have on this process."""
        squares: dict[int, torch.Tensor] = {}
        counts: dict[int, int] = {}
        for batch, square in zip(batches, reduced(batches, sums), strict=True):
            scope = self._scope(batch)
            squares[scope] = squares[scope] + square.to(squares[scope].device) if scope in squares else square
            counts[scope] = counts.get(scope, 0) + batch.numel
        return {scope: (counts[scope] / square).sqrt() for scope, square in squares.items()}


class _Next:
    """The gammas that a step left for the next one, and what that must find unchanged to use them."""

    def __init__(self, batches: list[Batch], gammas: dict[int, torch.Tensor]) -> None:
        self.gammas = gammas
        self.numbers = [(batch.group, batch.rule.norm_root, batch.rule.eps) for batch in batches]
        self.squares = [weakref.ref(square) for batch in batches for square in batch.states]
        self.versions = _versions(batches)

    def holds(self, batches: list[Batch]) -> bool:
        """Whether these batches, whose weights are to move, have the second moments and options of that step."""
        squares = [square for batch in batches for square in batch.states]
        return (
            self.numbers == [(batch.group, batch.rule.root, batch.rule.eps) for batch in batches]
            and len(squares) == len(self.squares)
            and all(kept() is square for kept, square in zip(self.squares, squares, strict=True))
            and self.versions is not None
            and self.versions == _versions(batches)
        )


def _versions(batches: list[Batch]) -> list[int] | None:
    """Numbers that grow whenever a second moment is written to; None if one is a tensor that does not count that."""
    versions = []
    for batch in batches:
        if any(square.is_inference() for square in batch.states):
            return None
        versions += [square._version for square in batch.states]
        if batch.mesh is not None:
            versions += [square.to_local()._version for square in batch.states]  # type: ignore[attr-defined]
    return versions


def _form(batch: Batch, on_cpu: int) -> ModuleType:
    """The fastest form there is for a batch; `on_cpu` is how many weights this call steps on the CPU."""
    if batch.device.type == "cuda" and (triton := _triton()) is not None and triton.takes(batch):
        return triton
    return native if on_cpu >= native.ELEMENTS and native.takes(batch) else kernels


@cache
def _triton() -> ModuleType | None:
    """The form for GPUs, where the package it needs is installed."""
    if find_spec("triton") is None:
        return None
    return import_module("hf_approx.optim.triton_step")


def _number(value: Any) -> Any:
    """The number a tensor holds, also those of a tuple; anything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(map(_number, value))
    return value.item() if isinstance(value, torch.Tensor) else value

"""The forms of AvaGrad's step against the plain one: equal step by step, one pass, no large temporaries, no syncs.

With TRITON_INTERPRET=1 and triton installed the form for GPUs is tested too, on the CPU.
"""

import copy
import itertools
import os
import subprocess
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hf_approx.optim import AvaGrad, avagrad, kernels, native
from hf_approx.optim.plain import PlainAvaGrad

VARIANTS = [("exact", "global"), ("exact", "group"), ("paper", "global"), ("paper", "group"), ("reference", "group")]

# Blocks of the compiled form have 1024 elements.
SHAPES = [(70, 50), (1024,), (1025,), (), (0, 3), (7, 5, 3)]


FORMS = ["compiled", "multi-tensor", "one by one"]
if os.environ.get("TRITON_INTERPRET") == "1":
    # The one for GPUs, on the CPU; Triton reads the variable when it is imported.
    FORMS.append("triton")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Options of an AvaGrad that takes the form; the compiled one needs a C++ compiler on the machine."""
    if request.param == "triton":
        triton_step = import_module("hf_approx.optim.triton_step")
        monkeypatch.setattr(avagrad, "_form", lambda batch, _: triton_step if batch.dense else kernels)
    monkeypatch.setattr(native, "ELEMENTS", 0 if request.param == "compiled" else float("inf"))
    if request.param == "compiled":
        assert native.library() is not None
    return {"foreach": False} if request.param == "one by one" else {}


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(native, "ELEMENTS", 0)
    assert native.library() is not None


@pytest.fixture
def passes(form, monkeypatch):
    """How often a norm was computed in a pass of its own."""
    counted = []
    triton = [import_module("hf_approx.optim.triton_step")] if "triton" in FORMS else []
    for module in (kernels, native, *triton):
        monkeypatch.setattr(module, "norm", lambda b, norm=module.norm: counted.append(1) or norm(b))
    return counted


def make(cls=AvaGrad, shapes=SHAPES, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(1)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}]
    return params, cls(groups, **{"lr": 0.1, "eps": 1e-3, **options})


def give_gradients(params, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 10 ** -(step % 3)
        param.grad = grad.to(dtype)


def trajectory(params, optimizer, steps=14):
    """Every kind of event a training may have, and what all tensors are after each step."""
    for step in range(steps):
        give_gradients(params, step)
        first, second = optimizer.param_groups[:2]
        if step in (3, 6):
            params[1].grad = None
        if step == 4:
            first["lr"] = 0.2
        if step == 5:
            second["eps"] = 5e-3
        if step == 7:
            first["betas"] = (0.8, 0.99)
        if step == 8:
            late = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
            params.append(late)
            optimizer.add_param_group({"params": [late]})
            give_gradients(params, step)
        if step == 10:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 12:
            optimizer.state[params[0]]["exp_avg_sq"].mul_(2)
        optimizer.step()
        yield [
            (param.detach().clone(), *(state[name].clone() for name in ("exp_avg", "exp_avg_sq") if state))
            for param in params
            for state in [optimizer.state.get(param, {})]
        ]


@pytest.mark.parametrize(("variant", "scope"), VARIANTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"decoupled_weight_decay": True}, {"maximize": True}, {"lr": torch.tensor(0.1, dtype=torch.float64)}],
    ids=["l2", "decoupled", "maximize", "tensor"],
)
def test_every_form_equals_the_plain_one_step_by_step(form, variant, scope, options):
    options = {"variant": variant, "gamma_scope": scope, **options}
    one = trajectory(*make(PlainAvaGrad, **copy.deepcopy(options)))
    for expected, got in zip(one, trajectory(*make(**copy.deepcopy(options), **form)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("variant", "scope"), VARIANTS)
def test_every_step_from_equal_states_is_equal_to_the_last_digits(form, variant, scope, dtype):
    params, optimizer = make(dtype=dtype, variant=variant, gamma_scope=scope, **form)
    others, plain = make(PlainAvaGrad, dtype=dtype, variant=variant, gamma_scope=scope)
    for step in range(6):
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for param, other in zip(params, others, strict=True):
            other.data.copy_(param)
        give_gradients(params, step, dtype)
        give_gradients(others, step, dtype)
        optimizer.step()
        plain.step()
        for param, other in zip(params, others, strict=True):
            # Weights of half precision may be rounded to the neighbour.
            torch.testing.assert_close(param, other, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
            for name in ("exp_avg", "exp_avg_sq"):
                one, two = optimizer.state[param][name], plain.state[other][name]
                assert one.dtype == torch.float32
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_half_precision_weights_are_rounded_once(form):
    """Shrinking by 2^-9 and moving back by as much, each rounded to bfloat16, would not return to 1."""
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AvaGrad([w], lr=2**-9, betas=(0.0, 0.0), eps=1e-6, weight_decay=1.0, **form, variant="paper",
                        decoupled_weight_decay=True)  # fmt: skip
    w.grad = -torch.ones_like(w)
    optimizer.step()
    assert torch.equal(w.detach(), torch.ones_like(w))


@pytest.mark.parametrize(("variant", "scope"), VARIANTS)
def test_a_step_is_one_pass_unless_something_changed(form, passes, variant, scope):
    params, optimizer = make(variant=variant, gamma_scope=scope, **form)

    def expect(extra, change=None):
        give_gradients(params, 1)
        if change is not None:
            change()
        passes.clear()
        optimizer.step()
        assert bool(passes) == (extra and variant != "reference")

    def changed(group, **values):
        return lambda: optimizer.param_groups[group].update(values)

    give_gradients(params, 0)
    optimizer.step()
    for _ in range(3):
        expect(extra=False)
    expect(extra=False, change=changed(0, lr=0.5, weight_decay=0.2))
    expect(extra=False, change=changed(1, maximize=True))
    expect(extra=False, change=lambda: optimizer.state_dict())
    expect(extra=True, change=changed(1, eps=0.3))
    expect(extra=False)
    expect(extra=variant == "exact", change=changed(0, betas=(0.9, 0.9)))
    expect(extra=False, change=changed(0, betas=(0.5, 0.9)))
    expect(extra=True, change=lambda: setattr(params[0], "grad", None))
    expect(extra=True)
    expect(extra=False)
    expect(extra=True, change=lambda: optimizer.state[params[2]]["exp_avg_sq"][3].fill_(1))
    expect(extra=True, change=lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())))
    expect(extra=False)
    del optimizer.state[params[0]]
    expect(extra=True)


@pytest.mark.parametrize("copied_by", ["state", "deepcopy"])
@pytest.mark.parametrize("variant", ["exact", "paper", "reference"])
def test_a_resumed_run_computes_the_norm_again_and_goes_on_to_the_last_bit(form, variant, copied_by):
    shapes = [(300, 301), (4097,), (70, 3)]
    params, optimizer = make(shapes=shapes, dtype=torch.float32, variant=variant, **form)
    for step in range(4):
        give_gradients(params, step, torch.float32)
        optimizer.step()
    if copied_by == "deepcopy":
        others, other = copy.deepcopy((params, optimizer))
    else:
        others, other = make(shapes=shapes, dtype=torch.float32, variant=variant, **form)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, two in zip(others, params, strict=True):
            one.data.copy_(two)
    for step in range(4, 8):
        for these, opt in ((params, optimizer), (others, other)):
            give_gradients(these, step, torch.float32)
            opt.step()
        assert all(torch.equal(one, two) for one, two in zip(params, others, strict=True))


def test_threads_change_nothing(compiled):
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            params, optimizer = make(shapes=[(300, 301), (4097,), (3,)], dtype=torch.float32)
            for step in range(3):
                give_gradients(params, step, torch.float32)
                optimizer.step()
            results.append(torch.cat([param.detach().reshape(-1) for param in params]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize(
    "layouts", [pair for pair in itertools.product(LAYOUTS, repeat=2) if pair[0] != "expanded"], ids=" and ".join
)
def test_weights_and_gradients_may_lie_anyhow_in_memory(form, layouts):
    start, grad = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for cls, options in ((PlainAvaGrad, {}), (AvaGrad, form)):
        param = torch.nn.Parameter(LAYOUTS[layouts[0]](start.clone()))
        optimizer = cls([param], eps=1e-2, weight_decay=0.1, **options)
        for step in range(4):
            param.grad = LAYOUTS[layouts[1]](grad * (step + 1))
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


class _Allocations(TorchDispatchMode):
    """Notes elements of the largest tensor an operation made, and that none read a number on the host."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        for made in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, made.numel())
        return result


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("variant", "scope"), VARIANTS)
def test_no_temporary_is_as_large_as_a_parameter_and_nothing_is_read(
    form, monkeypatch, variant, scope, dtype, transposed
):
    monkeypatch.setattr(kernels, "CPU_ELEMENTS", 1 << 12)
    params, optimizer = make(shapes=[(160, 200), (90, 90), (3,)], dtype=dtype, variant=variant, lr=torch.tensor(0.1))
    seen = _Allocations()
    for step in range(3):
        give_gradients(params, step, dtype)
        if transposed:
            params[0].grad = params[0].grad.t().contiguous().t()
        if step == 2:
            optimizer.param_groups[0]["eps"] = 0.5
        if step > 0:  # the first call makes the state
            with seen:
                optimizer.step()
        else:
            optimizer.step()
    assert seen.largest <= 1 << 12


def test_nothing_is_built_again(compiled, monkeypatch):
    """As rates, steps, shapes, dtypes and variants change."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a compiler was called"))
    for variant, dtype in itertools.product(("exact", "paper", "reference"), (torch.float32, torch.float64)):
        for shapes in ([(5,), (7,)], [(50, 3), (2,), (2000,)]):
            params, optimizer = make(shapes=shapes, dtype=dtype, variant=variant)
            for step in range(4):
                optimizer.param_groups[0]["lr"] = 0.1 * step
                give_gradients(params, step, dtype)
                optimizer.step()


@pytest.mark.parametrize("compiler", ["", "false", "no-such-compiler"])
def test_without_a_compiler_the_multi_tensor_form_steps_after_one_warning(compiler, monkeypatch, caplog):
    def run():
        params, optimizer = make(dtype=torch.float32)
        for step in range(3):
            give_gradients(params, step, torch.float32)
            optimizer.step()
        return params

    expected = run()
    assert not caplog.records
    monkeypatch.setattr(native, "ELEMENTS", 0)
    monkeypatch.setattr(native, "library", cache(native.library.__wrapped__))
    monkeypatch.setattr("hf_approx.optim.native.shutil.which", lambda name: None)
    monkeypatch.setenv("CXX", compiler)
    assert all(torch.equal(one, two) for one, two in zip(run(), expected, strict=True))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("AvaGrad: no C++ compiler could build its pass for CPUs (")
    assert (compiler or "none was found") in message
    assert message.endswith("install g++, or set CXX.")


if "triton" in FORMS:

    def test_where_triton_fails_is_said_once(monkeypatch, caplog):
        triton_step = import_module("hf_approx.optim.triton_step")
        assert triton_step._works(torch.device("cpu"))
        triton_step._works.cache_clear()
        monkeypatch.setattr(triton_step, "_step", None)
        assert not triton_step._works(torch.device("cpu"))
        assert not triton_step._works(torch.device("cpu"))
        (record,) = caplog.records
        assert "AvaGrad: Triton does not run on cpu ('NoneType' object" in record.getMessage()
        triton_step._works.cache_clear()


def test_small_models_call_no_compiler(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: pytest.fail("a compiler was called"))
    params, optimizer = make()
    give_gradients(params, 0)
    optimizer.step()


def test_autograd_sees_that_weights_were_written(form):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = AvaGrad([w], variant="paper", **form)
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_infinite_weight_harms_no_other(form):
    w = torch.nn.Parameter(torch.tensor([float("-inf"), 1.0, 2.0]))
    optimizer = AvaGrad([w], **form)
    for _ in range(3):
        w.grad = torch.tensor([0.0, 1.0, 1.0])
        optimizer.step()
    assert w[0] == float("-inf")
    assert (w[1:].isfinite() & (w[1:] < torch.tensor([1.0, 2.0]))).all()


def test_steps_in_inference_mode_are_the_same(form):
    (params, optimizer), (others, other) = make(**form), make(**form)
    for step in range(3):
        give_gradients(others, step)
        other.step()
        with torch.inference_mode():
            give_gradients(params, step)
            optimizer.step()
        assert all(torch.equal(one, two) for one, two in zip(params, others, strict=True))


@pytest.fixture
def mesh():
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("groups", [1, 2])
def test_sharded_weights_cost_one_reduction_a_step(form, mesh, groups):
    """Of a process that stands alone: its own part moves as if it were the whole, by a count of both parts."""
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])) for _ in range(6)]
    size = len(params) // groups
    parts = [{"params": params[i : i + size]} for i in range(0, len(params), size)]
    optimizer = AvaGrad(parts, gamma_scope="group", **form)
    local = torch.nn.Parameter(torch.ones(3, 4))
    alone = AvaGrad([local], eps=0.1, lr=0.1 * 2**0.5)
    for step in range(4):
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        for param in params:
            param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        local.grad = grad[:3].clone()
        with CommDebugMode() as communication:
            optimizer.step()
        assert communication.get_total_counts() == 1
        alone.step()
        for param in params:
            torch.testing.assert_close(param.to_local(), local, rtol=1e-6, atol=1e-6)

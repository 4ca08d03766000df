"""What schedulers, wrappers and checkpoints expect of an optimizer: ours have all that torch's AdamW has."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SchedulerType, get_scheduler

from helpers import arguments, make_trainer, weights
from hf_approx import ApproxTrainer, AvaGradConfig, SmolConfig, SparsificationConfig
from hf_approx.optim import AvaGrad, CompositeOptimizer
from models import build as build_model

LR = 0.1


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def groups(net, **options):
    return [{"params": list(net[0].parameters())}, {"params": list(net[1].parameters()), "lr": LR / 4, **options}]


def composite(first):
    def build(net, **options):
        one, two = groups(net, **options)
        two.pop("lr")
        return CompositeOptimizer(first([one], lr=LR), torch.optim.Adam([two], lr=LR / 4))

    return build


OPTIMIZERS = {
    # The first is what the others must be like: a check it does not pass is wrong itself.
    "adamw": lambda net, **options: torch.optim.AdamW(groups(net, **options), lr=LR),
    "avagrad": lambda net, **options: AvaGrad(groups(net, **options), lr=LR),
    "avagrad-reference": lambda net, **options: AvaGrad(groups(net, **options), lr=LR, variant="reference"),
    "avagrad-tensor": lambda net, **options: AvaGrad(groups(net, **options), lr=torch.tensor(LR)),
    "composite-avagrad": composite(AvaGrad),
    "composite-adamw": composite(torch.optim.AdamW),
}


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    return OPTIMIZERS[request.param]


def flat(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def train(net, optimizer, steps=3):
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    return flat(net)


def test_nothing_of_the_interface_is_missing(build):
    net = model()
    ours, torchs = build(net), OPTIMIZERS["adamw"](net)
    assert {name for name in dir(torchs) if not name.startswith("_")} <= set(dir(ours))
    assert isinstance(ours, torch.optim.Optimizer)
    assert float(ours.defaults["lr"]) == pytest.approx(LR)
    assert len(ours.param_groups) == 2
    assert all(name in group for name in ("lr", "betas", "eps", "weight_decay") for group in ours.param_groups)
    text = repr(ours)
    assert text.startswith(f"{type(ours).__name__} (\nParameter Group 0\n")
    assert text.count("    betas: (0.9, 0.999)\n") == text.count("Parameter Group") == 2


def test_the_state_is_read_and_written(build):
    net = model()
    optimizer = build(net)
    assert not optimizer.state
    assert len(optimizer.state) == 0
    train(net, optimizer)
    params = list(net.parameters())
    assert set(optimizer.state) == set(params)
    assert {p for p, state in optimizer.state.items() if state["exp_avg"].shape == p.shape} == set(params)
    for param in params:
        optimizer.state[param]["mine"] = 1
    assert all(state["mine"] == 1 for state in optimizer.state.values())
    del optimizer.state[params[0]]
    assert params[0] not in optimizer.state
    optimizer.state[params[0]]["new"] = 2
    assert optimizer.state[params[0]] == {"new": 2}
    before = dict(optimizer.state)
    optimizer.state = {params[-1]: before[params[-1]]}
    assert list(optimizer.state) == [params[-1]]
    optimizer.state.clear()
    assert not optimizer.state


def test_parameters_are_switched_as_accelerate_does(build):
    net, other = model(), model()
    optimizer = build(net)
    switched = dict(zip(net.parameters(), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [switched[p] for p in group["params"]]
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    assert torch.equal(train(other, optimizer), train(net, build(net)))


def test_hooks_are_called_once_and_may_replace(build):
    net = model()
    optimizer, called = build(net), []
    optimizer.register_step_pre_hook(lambda *_: called.append("step"))
    optimizer.register_step_post_hook(lambda *_: called.append("stepped"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda loaded: called.append(f"loaded {len(loaded.state)}"))
    train(net, optimizer, steps=1)
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    assert len(saved["state"]) == 4
    optimizer.load_state_dict(saved)
    assert called == ["step", "stepped", "save", "loaded 0"]
    assert not optimizer.state


def test_copies_and_saved_states_go_on_alike(build):
    net = model()
    optimizer = build(net)
    train(net, optimizer)
    copies = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(net)
    restored = build(loaded)
    restored.load_state_dict(torch.load(file, weights_only=True))
    expected = train(net, optimizer)
    for copied in (*copies, (loaded, restored)):
        assert torch.equal(train(*copied), expected)


def test_parameters_are_numbered_as_in_one_optimizer(build):
    """Whatever reads a state dict by number finds the state of that parameter."""
    net = model()
    optimizer = build(net)
    train(net, optimizer)
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]
    for number, param in enumerate(net.parameters()):
        assert torch.equal(saved["state"][number]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_gradients_are_cleared_to_none_or_zero(build):
    net = model()
    optimizer = build(net)
    train(net, optimizer, steps=1)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_closure_runs_once_with_gradients(build):
    net, calls = model(), []
    optimizer = build(net)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0


def test_an_added_group_is_last_and_scheduled_apart(build):
    net, late = model(), torch.nn.Parameter(torch.ones(3))
    optimizer = build(net)
    optimizer.add_param_group({"params": late, "lr": 0.5})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]
    assert optimizer.param_groups[-1]["params"] == [late]
    assert optimizer.param_groups[-1]["betas"] == (0.9, 0.999)
    lr_scheduler.LambdaLR(optimizer, [lambda _: 1, lambda _: 2, lambda _: 3])
    assert [float(group["lr"]) for group in optimizer.param_groups][1:] == pytest.approx([LR / 2, 1.5])
    for _ in range(2):
        late.grad = torch.ones(3)
        optimizer.step()
    assert (late < 1).all()
    saved = optimizer.state_dict()
    assert torch.equal(saved["state"][4]["exp_avg"], optimizer.state[late]["exp_avg"])
    optimizer.load_state_dict(saved)
    assert torch.equal(saved["state"][4]["exp_avg"], optimizer.state[late]["exp_avg"])
    for param in (next(net.parameters()), net[1].weight):
        with pytest.raises(ValueError, match=r"appear in more than one|in exactly one"):
            optimizer.add_param_group({"params": [param]})


def test_accelerate_and_the_profiler(build):
    net = model()
    wrapped = Accelerator(cpu=True).prepare(build(net))
    with torch.profiler.profile() as profile:
        train(net, wrapped)
    assert any(event.key.startswith("Optimizer.step#") for event in profile.key_averages())
    assert wrapped.defaults["lr"] == wrapped.optimizer.defaults["lr"]
    wrapped.train()
    wrapped.eval()
    alone = model()
    assert torch.equal(train(alone, build(alone)), flat(net))


@pytest.mark.parametrize("flattened", [False, True])
def test_distributed_checkpoints(build, flattened):
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    net = model()
    optimizer = build(net)
    fresh = get_optimizer_state_dict(net, optimizer, options=options)
    assert torch.equal(flat(net), flat(model()))
    set_optimizer_state_dict(net, optimizer, fresh, options=options)
    train(net, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    other = copy.deepcopy(net)
    restored = build(other)
    set_optimizer_state_dict(other, restored, saved, options=options)
    assert torch.equal(train(other, restored), train(net, optimizer))


def test_gradients_are_unscaled_before_the_step(build):
    net, plain = model(), model()
    optimizer, expected = build(net), build(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        scaler.scale((net(torch.ones(2, 4)) * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != float("inf"):
            expected.zero_grad()
            (plain(torch.ones(2, 4)) * factor).sum().backward()
            expected.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_averaged_models(build):
    net = model()
    optimizer = build(net)
    averaged, schedule = AveragedModel(net), SWALR(optimizer, swa_lr=0.3, anneal_epochs=2)
    train(net, optimizer)
    averaged.update_parameters(net)
    schedule.step()
    assert torch.equal(averaged.module[0].weight, net[0].weight)


class _NoReading(TorchDispatchMode):
    """Refuses to wait for the number in a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("variant", ["exact", "reference", "paper"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_rate_that_is_a_tensor(variant, foreach, decoupled, dtype):
    """As the same number, and no step reads it on the host; a change in place counts at the next step."""
    options = {"variant": variant, "foreach": foreach, "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    rates = {"number": 0.25, "tensor": torch.tensor(0.25), "one element": torch.tensor([0.25])}
    tolerance = {"rtol": 0, "atol": 2e-2 if dtype == torch.bfloat16 else 1e-6}
    results = {}
    for name, lr in rates.items():
        param = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype))
        optimizer = AvaGrad([param], lr=lr, **options)
        for step in range(4):
            param.grad = torch.linspace(-1, 2, 6, dtype=dtype)
            with _NoReading():
                optimizer.step()
            if step == 2:
                group = optimizer.param_groups[0]
                group["lr"] = group["lr"].mul_(2) if isinstance(lr, torch.Tensor) else group["lr"] * 2
        results[name] = param.detach()
    for name in ("tensor", "one element"):
        torch.testing.assert_close(results[name], results["number"], **tolerance)
    assert not torch.equal(results["number"], torch.linspace(-1, 1, 6, dtype=dtype))


def test_options_of_avagrads_groups():
    def param():
        return torch.nn.Parameter(torch.ones(2))

    optimizer = AvaGrad([("first", param())], eps=torch.tensor(0.5), betas=(torch.tensor(0.5), torch.tensor(0.75)))
    assert optimizer.defaults["eps"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    assert optimizer.param_groups[0]["param_names"] == ["first"]
    for group, message in [
        ({"lr": torch.ones(2)}, "lr must be one number, got a tensor of shape \\(2,\\)"),
        ({"lr": torch.tensor(-1.0)}, "lr must be a finite number >= 0"),
        ({"variant": "paper"}, "variant is one for all groups, 'exact' here, got 'paper'"),
        ({"gamma_scope": "group"}, "gamma_scope is one for all groups"),
        ({"capturable": True}, "there is no capturable implementation"),
        ({"fused": True}, "there is no fused implementation"),
        ({"weight_decay": torch.tensor(float("nan"))}, "weight_decay must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [("late", param())], **group})
        with pytest.raises(ValueError, match=message):
            AvaGrad([{"params": [param()], **group}])
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_pairs_of_real_ones():
    gradients = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    real = torch.nn.Parameter(torch.ones(3, 2))
    pairs = torch.nn.Parameter(torch.view_as_complex(torch.ones(3, 2)))
    for param, of in ((real, lambda g: g), (pairs, torch.view_as_complex)):
        optimizer = AvaGrad([param])
        for gradient in gradients:
            param.grad = of(gradient.clone())
            optimizer.step()
    assert torch.equal(torch.view_as_real(pairs.detach()), real.detach())


def test_a_composite_refuses_before_it_changes():
    net = model()
    optimizer = OPTIMIZERS["composite-adamw"](net)
    train(net, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["params"].append(4)
    for state in saved["state"].values():
        state["exp_avg"].zero_()
    with pytest.raises(ValueError, match="groups have 2, 3 parameters, those of this run 2, 2"):
        optimizer.load_state_dict(saved)
    assert all(state["exp_avg"].any() for state in optimizer.state.values())
    with pytest.raises(ValueError, match="use add_param_group"):
        optimizer.param_groups = optimizer.param_groups[:1]


def test_what_a_part_saves_beside_its_parameters_is_kept():
    class Counting(torch.optim.SGD):
        """Keeps a number for the whole model, in its state and beside it, as some optimizers do."""

        def state_dict(self):
            return {**super().state_dict(), "version": 3}

        def load_state_dict(self, state_dict):
            self.version = state_dict["version"]
            super().load_state_dict(state_dict)

    net = model()

    def build():
        return CompositeOptimizer(Counting(net[0].parameters(), lr=LR), torch.optim.Adam(net[1].parameters(), lr=LR))

    optimizer = build()
    train(net, optimizer)
    optimizer.state["average"] = 7
    other = build()
    other.load_state_dict(optimizer.state_dict())
    assert other.optimizers[0].version == 3
    assert other.state["average"] == other.optimizers[0].state["average"] == 7


TORCH_SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5**step]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, power=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[1e-4, 1e-3]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.7)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "SWALR": lambda o: SWALR(o, [0.3, 0.4], anneal_epochs=3),
}
KWARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "polynomial": {"lr_end": 1e-4, "power": 2},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0},
}


def test_every_scheduler_is_tested():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= TORCH_SCHEDULERS.keys()
    assert KWARGS.keys() <= {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("name", [*TORCH_SCHEDULERS, *SchedulerType])
def test_schedulers_set_what_they_set_in_adamw(name, build):
    def settings(build):
        net = model()
        optimizer = build(net)
        if isinstance(name, SchedulerType):
            schedule = get_scheduler(name, optimizer, 1, 6, KWARGS.get(name.value))
        else:
            schedule = TORCH_SCHEDULERS[name](optimizer)
        seen = []
        for step in range(5):
            train(net, optimizer, steps=1)
            takes_a_metric = name in ("ReduceLROnPlateau", SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
            schedule.step(*([1.0 + step] if takes_a_metric else []))
            seen.append([(float(group["lr"]), *group["betas"]) for group in optimizer.param_groups])
        state = schedule.state_dict()
        schedule.load_state_dict(state)
        return torch.tensor(seen)

    torch.testing.assert_close(settings(build), settings(OPTIMIZERS["adamw"]), rtol=1e-6, atol=1e-9)


def test_momentum_is_cycled_only_where_every_part_has_some():
    net = model()
    parts = [torch.optim.AdamW(net[0].parameters(), lr=LR), torch.optim.SGD(net[1].parameters(), lr=LR)]
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(CompositeOptimizer(*parts), 0.1, total_steps=4)
    optimizer = CompositeOptimizer(*parts[::-1])
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    train(net, optimizer, steps=1)
    schedule.step()
    assert parts[1].param_groups[0]["momentum"] < 0.95


@pytest.mark.parametrize("kind", SchedulerType, ids=lambda kind: kind.value)
def test_every_schedule_trains_with_a_method(kind, tmp_path):
    plateau = kind in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    trainer = make_trainer(
        "bert",
        tmp_path,
        SparsificationConfig(target_sparsity=0.5),
        optimizer=AvaGradConfig(lr=0.1, eps=1e-3),
        eval_dataset=[{"input_ids": torch.arange(8), "labels": 0}] if plateau else None,
        max_steps=2,
        logging_steps=1,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=KWARGS.get(kind.value, {}),
        **({"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"} if plateau else {}),
    )
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.5, abs=1e-2)


class TwoFaced(torch.optim.SGD):
    """Evaluates at the mean of the weights it trained, and refuses to step them, as schedule-free optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.training = False

    def _exchange(self, training):
        if self.training != training:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("offset", torch.full_like(p, 0.5))
                    p.data.add_(self.state[p]["offset"], alpha=-1 if training else 1)
        self.training = training

    def train(self):
        self._exchange(True)

    def eval(self):
        self._exchange(False)

    def step(self, closure=None):
        assert self.training, "not in train mode"
        return super().step(closure)


def test_an_optimizer_of_two_modes_trains_and_is_finalized_in_the_one_to_evaluate(tmp_path):
    trainer = make_trainer("bert", tmp_path, SmolConfig(target_bits=4), max_steps=2)
    before = weights(trainer.model)
    trainer.optimizer_cls_and_kwargs = (TwoFaced, {"lr": 0.0})
    trainer.train()
    after = weights(trainer.model)
    untouched = [name for name in before if name.removesuffix(".weight") not in trainer.methods[0].targets]
    assert len(untouched) > 10
    # Without a rate nothing but the exchange, and storing them in half precision, moves them.
    for name in untouched:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_optimizers_of_the_arguments_train_with_a_method(optim, tmp_path):
    trainer = make_trainer("bert", tmp_path, SparsificationConfig(target_sparsity=0.5), max_steps=2, optim=optim)
    before = weights(trainer.model)["classifier.bias"]
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.5, abs=1e-2)
    assert not torch.equal(weights(trainer.model)["classifier.bias"], before)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("lomo", "lomo changes weights during backward"),
        ("adalomo", "adalomo changes weights during backward"),
        ("galore_adamw_layerwise", "galore_adamw_layerwise changes weights during backward"),
        ("galore_adafactor", "galore_adafactor would leave out every layer that a method compresses"),
        ("apollo_adamw", "apollo_adamw would leave out every layer"),
    ],
)
def test_optimizers_that_methods_cannot_train_with_are_refused(optim, message, tmp_path):
    model = build_model("bert")
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        make_trainer("bert", tmp_path, SparsificationConfig(), model=model, optim=optim)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adafactor"}, "and optim='adafactor' name two optimizers; leave one of them out"),
        ({"optim": "sgd"}, "and optim='sgd' name two"),
        ({"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None)}, "leave out optimizers and"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "leave out optimizers and optimizer_cls_and_kwargs"),
    ],
    ids=["adafactor", "sgd", "optimizers", "optimizer_cls_and_kwargs"],
)
def test_two_optimizers_are_refused(options, message, tmp_path):
    args = arguments(tmp_path, **({"optim": options.pop("optim")} if "optim" in options else {}))
    with pytest.raises(ValueError, match=message):
        ApproxTrainer(model=build_model("bert"), args=args, optimizer=AvaGradConfig(), **options)

"""Zeros of a packed model stay zero, whatever trains it."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers import make_trainer
from hf_approx import (
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach,
    attach_packing,
    keep_zeros,
)
from hf_approx.modules.bank import template_names
from models import batch, build

KEY = "bert.encoder.layer.0.output.dense.weight"
NAMES = [f"bert.encoder.layer.{i}.{part}.dense.weight" for i in (0, 1) for part in ("intermediate", "output")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed BERT of which four weights are 80 % zeros."""
    model = build("bert")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in NAMES:
            weight = model.get_parameter(name)
            weight.mul_(torch.rand(weight.shape, generator=generator) > 0.8)
    attach_packing(model, NAMES)
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).train()


def loss_of(model):
    return model(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss


def step(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def zeros(model):
    return {name: model.get_parameter(name).detach() == 0 for name in NAMES}


class Noisy(torch.optim.SGD):
    """Langevin dynamics: noise on every weight, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(torch.randn_like(param), alpha=1e-3)


class Mixing(torch.optim.Optimizer):
    """As Shampoo and SOAP do: steps in another basis than that of the weights, through `.data`."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.dim() == 2:
                    gram = param.grad @ param.grad.T
                    param.data -= 1e-2 * torch.linalg.solve(
                        gram + torch.ones_like(gram) + torch.eye(len(gram)), param.grad
                    )
                    param.data -= 1e-3


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimization: the gradient is taken beside the weights, which then come back."""

    def __init__(self, params):
        super().__init__(params, {})
        self.base = torch.optim.AdamW(self.param_groups, lr=1e-2)

    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for param in params:
                param.add_(torch.randn_like(param), alpha=1e-2)
        self.zero_grad()
        with torch.enable_grad():
            closure().backward()
        for param, value in zip(params, before, strict=True):
            param.data = value
        self.base.step()


def matrices(params):
    return [param for param in params if param.dim() == 2]


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "muon": lambda params: torch.optim.Muon(matrices(params), lr=0.01),
    "mixing": Mixing,
    "noisy": lambda params: Noisy(params, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_optimizer_fills_zeros(model, make):
    before, weight = zeros(model), model.get_parameter(KEY).detach().clone()
    optimizer = make(list(model.parameters()))
    for _ in range(3):
        step(model, optimizer)
    assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())
    assert not torch.equal(model.get_parameter(KEY), weight)


def test_closures_and_points_beside_the_weights_fill_no_zeros(model):
    before = zeros(model)
    optimizers = [
        torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
        Sharp(list(model.parameters())),
    ]
    for optimizer in optimizers:

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model)
            if not isinstance(optimizer, Sharp):
                loss.backward()
            return loss

        weight = model.get_parameter(KEY).detach().clone()
        optimizer.step(closure)
        assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())
        assert not torch.equal(model.get_parameter(KEY), weight)


def test_a_momentum_from_before_fills_no_zeros(model):
    before = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for param in model.parameters():
        optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)
    step(model, optimizer)
    assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())


def test_gradients_are_those_of_the_sparse_model(model):
    """So that clipping, which happens before the step, measures nothing that cannot move."""
    loss_of(model).backward()
    for name, zero in zeros(model).items():
        assert not model.get_parameter(name).grad[zero].any()
        assert model.get_parameter(name).grad[~zero].any()


def test_a_weight_that_training_brings_to_zero_moves_on(model):
    weight = model.get_parameter(KEY)
    row, column = (weight != 0).nonzero()[0].tolist()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.zeros_like(weight)
    weight.grad[row, column] = weight[row, column].item()
    optimizer.step()
    assert weight[row, column] == 0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight[row, column] == -1
    assert int((weight == 0).sum()) == int(zeros(model)[KEY].sum()) > 0.7 * weight.numel()


def test_weights_that_are_unfrozen_later_keep_zeros(folder):
    model = build("bert")
    model = type(model).from_pretrained(folder).train()
    before = zeros(model)
    model.requires_grad_(False)
    keep_zeros(model)
    model.requires_grad_(True)
    step(model, torch.optim.Muon(matrices(model.parameters()), lr=0.01))
    assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())
    assert not model.get_parameter(KEY).grad[before[KEY]].any()


def test_a_copy_keeps_zeros_once_told_and_is_warned_of_else(model, tmp_path, caplog):
    told, untold = copy.deepcopy(model), copy.deepcopy(model)
    keep_zeros(told)
    for each in (told, untold):
        step(each, torch.optim.Muon(matrices(each.parameters()), lr=0.01))
    told.save_pretrained(tmp_path)
    assert not caplog.records
    untold.save_pretrained(tmp_path)
    assert "call hf_approx.keep_zeros on a copy" in caplog.text
    assert "adapters" not in caplog.text


def test_what_is_written_by_hand_is_told_apart_from_copies(model, tmp_path, caplog):
    step(model, torch.optim.AdamW(model.parameters()))
    with torch.no_grad():
        model.get_parameter(KEY).add_(1e-3)
    model.save_pretrained(tmp_path)
    assert "written to in another way" in caplog.text
    assert "copy" not in caplog.text


def test_other_weights_that_are_loaded_are_not_zeroed(model):
    step(model, torch.optim.AdamW(model.parameters()))
    dense = build("bert", seed=1)
    model.load_state_dict(dense.state_dict())
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_weight_that_was_grown_by_hand_stays_once_told(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, optimizer)
    with torch.no_grad():
        model.get_parameter(KEY).fill_(0.5)
    keep_zeros(model)
    step(model, optimizer)
    assert bool((model.get_parameter(KEY) > 0.4).all())


def test_the_mask_follows_a_model_to_another_dtype(model):
    optimizer = torch.optim.Muon(matrices(model.parameters()), lr=0.01)
    step(model, optimizer)
    before = zeros(model)
    model.bfloat16()
    step(model, torch.optim.Muon(matrices(model.parameters()), lr=0.01))
    # In bfloat16 another weight may come to zero by itself.
    assert all(bool(now[before[name]].all()) for name, now in zeros(model).items())


def test_compiled_models_and_steps_keep_zeros(model):
    before = zeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="aot_eager")
    move = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        loss_of(compiled).backward()
        for param in model.parameters():
            param.grad.add_(1.0)  # whatever the gradient says
        move()
    assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())


def test_averaged_weights_have_the_same_zeros(model):
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    before, optimizer = zeros(model), torch.optim.Muon(matrices(model.parameters()), lr=0.01)
    for _ in range(2):
        step(model, optimizer)
        averaged.update_parameters(model)
    assert all(torch.equal(now, before[name]) for name, now in zeros(averaged.module).items())


METHODS = {
    "cs": SparsificationConfig(target_sparsity=0.85),
    "one shot": MagnitudePruningConfig(target_sparsity=0.85, ramp_fraction=0.0),
    "movement": MovementPruningConfig(target_sparsity=0.85),
    "smol": SmolConfig(target_bits=4.0),
    "uniform": UniformQuantizationConfig(bits=4),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_what_is_trained_under_a_method_keeps_the_zeros_and_no_others(model, config):
    before, names = zeros(model), {"target_modules": ["intermediate.dense", "output.dense"]}
    stack = attach(model, replace(config, **names, exclude=["attention.output.dense"]))
    optimizer = stack.bind(torch.optim.Muon(matrices(stack.parameters()), lr=0.01), steps=6)
    latents = {latent.target.name: latent.weight for latent in stack.latents}
    assert latents.keys() == before.keys()
    start = {name: weight.detach().clone() for name, weight in latents.items()}
    for _ in range(5):
        loss_of(model).backward()
        stack.before_step()
        for name, zero in before.items():
            assert not latents[name].grad[zero].any()
        optimizer.step()
        optimizer.zero_grad()
        for name, zero in before.items():
            assert torch.equal(latents[name] == 0, zero)
    assert all(not torch.equal(weight, start[name]) for name, weight in latents.items())
    stack.detach()
    assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())
    step(model, torch.optim.Muon(matrices(model.parameters()), lr=0.01))
    assert all(torch.equal(now, before[name]) for name, now in zeros(model).items())
    assert not any(model.get_parameter(name).grad[zero].any() for name, zero in before.items())


def test_templates_of_sparse_weights_become_dense(model):
    stack = attach(model, SharingConfig(templates=1))
    optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=0.01))
    names = [name for name in template_names(model) if "intermediate" in name]
    zero = {name: (model.get_parameter(name) == 0).float().mean() for name in names}
    assert min(zero.values()) > 0.5
    step(model, optimizer)
    assert all(bool((model.get_parameter(name) != 0).all()) for name in names)


def test_a_trainer_keeps_zeros_with_muon_and_under_a_method(folder, tmp_path):
    for approx in ((), SparsificationConfig(target_sparsity=0.9)):
        model = type(build("bert")).from_pretrained(folder)
        before = zeros(model)
        trainer = make_trainer("bert", tmp_path, approx, model=model, max_steps=4)
        trainer.optimizer = torch.optim.Muon(matrices(trainer.stack.parameters()), lr=0.01)
        trainer.train()
        now = zeros(trainer.model)
        assert all(bool(now[name][zero].all()) for name, zero in before.items())
        if not approx:
            assert all(torch.equal(now[name], zero) for name, zero in before.items())

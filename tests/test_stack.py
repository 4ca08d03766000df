"""What `MethodStack` promises to loops of one's own, whatever the methods are."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from helpers import assert_same_weights, every_latent, stacked, trained, weights
from hf_approx import SharingConfig, SmolConfig, SparsificationConfig, attach
from hf_approx.methods.latent import value_of
from models import batch, build
from stacks import CS, LARGE, MAGNITUDE, SMALL, SMOL, STEPS, UNIFORM, bind, each, loop, small, small_loss

LAYERS = SparsificationConfig(granularity="layer", target_sparsity=0.5)
NOISY = ("smol", "cs and smol", "sharing and smol")
BARE = ("cs", "magnitude and uniform", "smol", "sharing")
INPUTS = SmolConfig(target_bits=4.0, activations=True, train_weights=False)  # else they are clipped


@each(SMALL, LARGE)
def test_the_three_lines_of_a_loop_are_what_is_driven_by_hand(make, configs, loss):
    stack = attach(make(), configs)
    loop(stack, loss, bind(stack))
    by_hand = attach(make(), configs)
    groups = by_hand.param_groups()
    optimizers = [
        torch.optim.AdamW(by_hand.parameters(), lr=0.01),
        *([torch.optim.Adam(groups, fused=True)] if groups else []),
    ]
    by_hand.advance(0.0)
    for step in range(STEPS):
        loss(by_hand.model, step).backward()
        by_hand.before_step()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        by_hand.after_step((step + 1) / (STEPS - 1) if step + 1 < STEPS else None)
    assert_same_weights(trained(stack.model), trained(by_hand.model))
    assert any(not torch.equal(t, by_hand.model.state_dict()[n]) for n, t in weights(make()).items())
    assert all(method.is_final or method.after_training for method in stack.methods)
    with torch.no_grad():
        assert stack.finalize() == by_hand.finalize()
    assert_same_weights(weights(stack.model), weights(by_hand.model))
    assert not every_latent(stack.model)


def without_banks(model):
    """The weights but templates, which a copy of a model at work has no use for."""
    return {name: weight for name, weight in weights(model).items() if "hf_approx_banks" not in name}


def same_mix(made, expected):
    """Layers that are mixed together are summed in another order than one by itself."""
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-7)


def anatomy(model):
    """All there is to a model but the values of its weights."""
    return [
        (
            name,
            type(module),
            module.training,
            sorted(vars(module)),
            list(module._parameters),
            list(module._buffers),
            list(module._modules),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            [param is not None and (id(param), param.requires_grad) for param in module._parameters.values()],
        )
        for name, module in model.named_modules()
    ]


@each(SMALL, LARGE)
def test_all_configs_are_attached_or_none(make, configs, loss):
    model = make()
    before, state = anatomy(model), weights(model)
    with pytest.raises(ValueError, match="matches target_modules"):
        attach(model, [*configs, SparsificationConfig(target_modules=["nowhere"])])
    assert anatomy(model) == before
    assert_same_weights(weights(model), state)


@each({name: configs for name, configs in SMALL.items() if "inputs" not in name})
def test_a_copy_of_a_model_at_work_is_an_ordinary_model(make, configs, loss):
    stack = attach(make(), configs)
    loop(stack, loss, bind(stack), range(3))
    model = stack.model
    copied = copy.deepcopy(model)
    assert not every_latent(copied)
    assert_same_weights(weights(copied), without_banks(model))
    x = torch.randn(4, 8)
    assert torch.equal(copied(x), model(x))
    before = weights(model)
    loss(copied, 0).backward()
    torch.optim.SGD(copied.parameters(), lr=0.1).step()
    assert not any(torch.equal(copied[i].weight, before[f"{i}.weight"]) for i in (0, 2, 4))
    assert_same_weights(weights(model), before)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("config", [SparsificationConfig(target_sparsity=0.5), SharingConfig(templates=2)])
def test_a_copy_of_a_model_at_work_can_be_saved(config, tmp_path):
    stack, _ = stacked(build("bert"), config)
    stack.advance(0.5)
    with pytest.raises(ValueError, match="is still at work"):
        stack.model.save_pretrained(tmp_path)
    for copied in (copy.deepcopy(stack.model), pickle.loads(pickle.dumps(stack.model))):
        copied.save_pretrained(tmp_path)
        assert_same_weights(weights(type(copied).from_pretrained(tmp_path)), without_banks(stack.model))
    assert (sum("hf_approx_banks" in name for name in weights(stack.model)) > 0) == isinstance(config, SharingConfig)
    shared = copy.deepcopy(stack)
    shared.finalize()
    stack.finalize()
    assert_same_weights(weights(copy.deepcopy(stack.model)), weights(stack.model))


@pytest.mark.parametrize("configs", [[CS], [SMOL]], ids=["cs", "smol"])
def test_targets_that_become_one_parameter_are_refused(configs):
    stack = attach(small(), configs)
    stack.model[2].weight = stack.model[0].weight
    with pytest.raises(ValueError, match="were tied after methods were attached"):
        bind(stack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@each(SMALL, LARGE)
def test_a_model_may_get_another_dtype_before_it_is_trained(make, configs, loss, dtype):
    stack = attach(make(), configs)
    model = stack.model.to(dtype)
    before = weights(model)
    loop(stack, loss, bind(stack))
    stack.bake()
    after = model.state_dict()
    kept = [name for name in before if name in after and "quantizer" not in name]
    assert all(after[name].dtype == before[name].dtype and after[name].isfinite().all() for name in kept)
    assert any(not torch.equal(after[name], before[name]) for name in kept)
    assert loss(model, 0).dtype == dtype


@each(SMALL, LARGE)
def test_state_dicts_resume_bit_for_bit(make, configs, loss):
    straight = attach(make(), configs)
    loop(straight, loss, bind(straight))
    for taken in (2, 6):
        stopped = attach(make(), configs)
        optimizer = bind(stopped)
        loop(stopped, loss, optimizer, range(taken))
        file = io.BytesIO()
        torch.save([stopped.model.state_dict(), stopped.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        resumed = attach(make(), configs)
        optimizer = bind(resumed)
        for owner, state in zip((resumed.model, resumed, optimizer), torch.load(file), strict=True):
            owner.load_state_dict(state)
        assert_same_weights(weights(resumed.model), weights(stopped.model))
        assert resumed.metrics() == stopped.metrics()
        loop(resumed, loss, optimizer, range(taken, STEPS))
        assert_same_weights(trained(resumed.model), trained(straight.model))
        assert resumed.state_dict()["methods"] == straight.state_dict()["methods"]


def test_tensors_of_other_methods_are_refused_and_change_nothing():
    stack, _ = stacked(small(), CS)
    before = trained(stack.model)
    tensors = {name: tensor.detach().clone() for name, tensor in stack.tensors().items()}
    some = next(iter(tensors))
    for wrong, told in (
        ({name: tensor for name, tensor in tensors.items() if name != some}, "is missing"),
        ({**tensors, "0.weight.7.scores": torch.zeros(1)}, "'0.weight.7.scores' is unknown"),
        ({**tensors, some: torch.zeros(3)}, f"'{some}' is of another shape"),
    ):
        with pytest.raises(ValueError, match=told):
            stack.load_tensors({name: tensor + 1 for name, tensor in wrong.items()})
        assert_same_weights(trained(stack.model), before)


@pytest.mark.parametrize("configs", [SMALL[name] for name in NOISY], ids=NOISY)
def test_evaluation_has_no_noise_and_training_gets_it_back(configs):
    stack = attach(small(), configs)
    loop(stack, small_loss, bind(stack), range(3))
    noisy = weights(stack.model)
    state = trained(stack.model)
    with stack.evaluating():
        quiet = weights(stack.model)
        assert not any(torch.equal(quiet[f"{i}.weight"], noisy[f"{i}.weight"]) for i in (0, 2))
        for latent in stack.latents:
            same_mix(value_of(latent.target), latent.effective)
    assert_same_weights(weights(stack.model), noisy)
    assert_same_weights(trained(stack.model), state)
    assert all(stage.training for latent in stack.latents for stage in latent.stages)


@each({name: configs for name, configs in SMALL.items() if "inputs" not in name})
def test_what_looks_at_a_stack_changes_nothing_of_its_training(make, configs, loss):
    straight, looked_at = attach(make(), configs), attach(make(), configs)
    loop(straight, loss, bind(straight))
    optimizer = bind(looked_at)
    for step in range(STEPS):
        with looked_at.evaluating():
            loss(looked_at.model, step)
        with looked_at.bypassed():
            loss(looked_at.model, step)
        with looked_at.exposed():
            dict(looked_at.model.named_parameters())
        looked_at.metrics()
        copy.deepcopy(looked_at.model)
        loop(looked_at, loss, optimizer, [step])
    assert_same_weights(trained(looked_at.model), trained(straight.model))


@pytest.mark.parametrize("config", [LAYERS, INPUTS], ids=["layers", "inputs"])
def test_a_bypassed_model_computes_what_it_did(config):
    model = build("bert").eval()
    before = model(**batch("bert")).logits
    stack = attach(model, config)
    model.train()
    stack.advance(0.0)
    model(**batch("bert"))
    stack.advance(0.2)
    model.eval()
    assert not torch.equal(model(**batch("bert")).logits, before)
    model.train()
    for module in model.modules():
        module.training = isinstance(module, tuple(type(inserted) for inserted in stack.methods[0].inserted))
    with stack.bypassed():
        assert torch.equal(model(**batch("bert")).logits, before)
    model.eval()
    assert not torch.equal(model(**batch("bert")).logits, before)


@pytest.mark.parametrize("configs", [SMALL[name] for name in BARE], ids=BARE)
def test_a_bypassed_model_has_what_is_trained_for_weights(configs):
    stack = attach(small(), configs)
    loop(stack, small_loss, bind(stack), range(5))
    before = weights(stack.model)
    with stack.bypassed():
        for latent in stack.latents:
            expected = latent.before() if latent.mixes else latent.weight
            same_mix(latent.effective, expected)
            assert latent.mixes == torch.equal(latent.effective, before[latent.target.name])
    assert_same_weights(weights(stack.model), before)


@pytest.mark.parametrize("within", ["evaluating", "bypassed", "exposed"])
def test_an_error_within_a_context_leaves_it(within):
    stack = attach(small(), [CS, SMOL])
    loop(stack, small_loss, bind(stack), range(3))
    before, state = weights(stack.model), trained(stack.model)
    params = [id(param) for param in stack.model.parameters()]
    with pytest.raises(KeyError), getattr(stack, within)():
        raise KeyError
    assert [id(param) for param in stack.model.parameters()] == params
    assert_same_weights(weights(stack.model), before)
    assert_same_weights(trained(stack.model), state)


@each(SMALL)
def test_optimizers_are_shown_what_is_trained(make, configs, loss):
    stack = attach(make(), configs)
    model = stack.model
    effective = dict(model.named_parameters())
    own = [param for group in stack.param_groups() for param in group["params"]]
    with stack.exposed():
        shown = dict(model.named_parameters())
    assert {name: id(param) for name, param in model.named_parameters()} == {n: id(p) for n, p in effective.items()}
    latents = {latent.target.name: latent for latent in stack.latents}
    assert shown.keys() == effective.keys()
    for name, param in shown.items():
        assert param is (latents[name].weight if name in latents else effective[name])
    named = dict(stack.named_parameters())
    assert stack.parameters() == list(named.values())
    assert {n: id(p) for n, p in named.items()} == {
        n: id(p) for n, p in shown.items() if p.requires_grad and not any(p is each for each in own)
    }
    assert len({id(p) for p in [*named.values(), *own]}) == len(named) + len(own)
    assert not {id(latent.effective) for latent in latents.values()} & {id(p) for p in [*named.values(), *own]}


def test_finalizing_early_is_warned_of(caplog):
    for configs in ([CS], [MAGNITUDE, UNIFORM], [SMOL]):
        for steps, taken, warned in ((STEPS, 3, True), (None, STEPS, True), (STEPS, STEPS, False)):
            caplog.clear()
            stack = attach(small(), configs)
            loop(stack, small_loss, bind(stack, steps), range(taken))
            with caplog.at_level(logging.WARNING):
                assert stack.finalize() == ["0.weight", "2.weight"]
            told = "finalize: the schedules did not come to their end" in caplog.text
            assert told == warned, (configs, steps, taken)
            assert stack.is_final
    caplog.clear()
    for name in ("late", "sharing", "uniform"):
        attach(small(), SMALL[name]).finalize()
    assert not caplog.text


def test_an_optimizer_with_a_closure_is_refused_and_nothing_moves():
    stack, _ = stacked(small(), CS)
    optimizer = bind(stack)
    before = trained(stack.model)
    with pytest.raises(ValueError, match="takes no closure: call backward, then step"):
        optimizer.step(lambda: small_loss(stack.model, 0))
    assert_same_weights(trained(stack.model), before)


@pytest.mark.parametrize("configs", [[CS], [MAGNITUDE], [SMOL]], ids=["cs", "magnitude", "smol"])
def test_a_norm_that_is_put_on_top_of_a_target_trains(configs):
    """As networks of GANs have it: what the methods make is normalized, and gradients pass both."""
    stack = attach(small(), configs)
    model = spectral_norm_on(stack.model)
    start = trained(model)
    loop(stack, small_loss, bind(stack))
    assert isinstance(model[0], nn.Linear)
    latents = list(stack.latents)
    assert [latent.target.name for latent in latents] == ["0.weight", "2.weight"]
    for latent in latents:
        assert not torch.equal(latent.weight, start[latent.target.name])
        assert latent.effective is latent.target.module.parametrizations.weight.original
        with torch.no_grad():
            assert torch.equal(latent.effective, latent.before())
    for layer in (model[0], model[2]):
        assert torch.linalg.matrix_norm(layer.weight.detach(), 2) == pytest.approx(1.0, rel=0.1)
    for group in stack.param_groups():
        assert all(param.grad is None for param in group["params"])
    if configs == [MAGNITUDE]:
        zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 2))
        assert zeros == 64


def spectral_norm_on(model):
    for i in (0, 2):
        spectral_norm(model[i], n_power_iterations=5)
    return model


@each(SMALL)
def test_taking_methods_off_gives_back_what_was_trained(make, configs, loss):
    model = make()
    before = anatomy(model)
    stack = attach(model, configs)
    loop(stack, loss, bind(stack), range(3))
    state = trained(stack.model)
    with stack.bypassed():
        mixed = {latent.target.name: latent.effective.detach().clone() for latent in stack.latents if latent.mixes}
    stack.detach()
    assert anatomy(stack.model) == before
    for name, tensor in weights(stack.model).items():
        if not name.startswith("hf_approx"):
            if name in mixed:
                same_mix(tensor, mixed[name])
            else:
                assert torch.equal(tensor, state[name]), name

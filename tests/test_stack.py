"""What `MethodStack` promises to loops of one's own, whatever the methods are."""

import io

import pytest
import torch
from torch import nn

from helpers import assert_same_weights, trained, weights
from hf_approx import MagnitudePruningConfig, SmolConfig, SparsificationConfig, attach
from models import batch, build

LAYERS = SparsificationConfig(granularity="layer", target_sparsity=0.5)
INPUTS = SmolConfig(target_bits=4.0, activations=True, train_weights=False)  # else they are clipped


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


def train(stack, optimizer, steps):
    for _ in range(steps):
        stack.model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    mask = MagnitudePruningConfig(target_sparsity=0.5, target_modules=["0"], update_every=1)
    stack = attach(model, [mask, SmolConfig(target_modules=["0", "2"], target_bits=4.0)])
    return stack, stack.bind(torch.optim.AdamW(stack.parameters(), lr=0.01), steps=8)


@pytest.mark.parametrize("taken", [3, 6])
def test_a_loop_goes_on_from_the_states_of_model_stack_and_optimizer(taken):
    straight, optimizer = start()
    train(straight, optimizer, 8)
    stopped, optimizer = start()
    train(stopped, optimizer, taken)
    file = io.BytesIO()
    torch.save([stopped.model.state_dict(), stopped.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed, optimizer = start()
    for owner, state in zip((resumed.model, resumed, optimizer), torch.load(file), strict=True):
        owner.load_state_dict(state)
    train(resumed, optimizer, 8 - taken)
    assert_same_weights(trained(resumed.model), trained(straight.model))
    assert resumed.state_dict()["methods"] == straight.state_dict()["methods"]
    assert resumed.bake() == straight.bake() == ["0.weight", "2.weight"]
    assert_same_weights(weights(resumed.model), weights(straight.model))

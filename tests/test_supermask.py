"""Pure supermasks: the target weights keep their values, only scores and everything else are trained."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from helpers import assert_same_weights, make_trainer, stacked, trained_weight, weights
from hf_approx.methods import SparsificationConfig
from models import build

FROZEN = {"train_weights": False, "scale_mask": False}


@pytest.mark.parametrize("store_dtype", [None, "float16"])
def test_a_trainer_only_chooses_among_the_weights_there_are(tmp_path, store_dtype):
    model = build("bert")
    before = copy.deepcopy(model.state_dict())
    approx = SparsificationConfig(target_sparsity=0.8, mask_lr=0.1, **FROZEN)
    trainer = make_trainer("bert", tmp_path, approx, model, learning_rate=1e-2, weight_decay=0.1)
    trainer.store_dtype = store_dtype
    targets = {f"{name}.weight" for name in trainer.methods[0].modules}
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    for name, tensor in model.state_dict().items():
        if name in targets:
            start = before[name] if store_dtype is None else before[name].half().float()
            assert torch.equal(tensor, torch.where(tensor == 0, 0.0, start)), name
        elif tensor.is_floating_point() and "pooler" not in name:
            assert not torch.equal(tensor, before[name]), name
    assert all(param.requires_grad for param in model.parameters())


def test_the_scores_learn_while_the_weights_do_not(tmp_path):
    approx = SparsificationConfig(
        target_sparsity=None, preset="paper", penalty=0.0, mask_lr=0.1, soft_fraction=1.0, train_weights=False
    )
    trainer = make_trainer("bert", tmp_path, approx)
    ends = []
    trainer.add_callback(Ends(trainer.methods[0], ends))
    trainer.train()
    assert ends[0].std() > 0.05


class Ends(TrainerCallback):
    """Keeps the scores before the last step but one: the schedule of the last hardens them."""

    def __init__(self, method, ends):
        self.method, self.ends = method, ends

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 2:
            self.ends.append(torch.cat([mask.scores.detach().flatten() for mask in self.method.masks]))


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_detaching_lets_the_weights_train_again(granularity):
    model = build("bert")
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    state = weights(model)
    stack, _ = stacked(model, SparsificationConfig(granularity=granularity, target_sparsity=0.5, **FROZEN))
    assert not any(trained_weight(layer.intermediate.dense).requires_grad for layer in model.bert.encoder.layer)
    offered = {name for name, _ in stack.named_parameters() if "intermediate.dense" in name}
    assert offered == {f"bert.encoder.layer.{i}.intermediate.dense.bias" for i in range(2)}
    assert model.bert.encoder.layer[0].intermediate.dense.bias.requires_grad
    stack.detach()
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before
    assert_same_weights(weights(model), state)


def test_neurons_are_removed_from_frozen_layers(tmp_path):
    """What is left of both layers of a neuron is rows and columns of what there was."""
    model = build("bert")
    start = copy.deepcopy(model.state_dict())
    approx = SparsificationConfig(granularity="neuron", target_sparsity=0.5, mask_lr=0.1, **FROZEN)
    trainer = make_trainer("bert", tmp_path, approx, model, learning_rate=1e-2)
    trainer.store_dtype = None
    trainer.train()
    for layer in (0, 1):
        name = f"bert.encoder.layer.{layer}.%s.dense.weight"
        rows, columns = model.get_parameter(name % "intermediate"), model.get_parameter(name % "output")
        assert rows.shape[0] == columns.shape[1] == 32
        kept = [i for i, row in enumerate(start[name % "intermediate"]) if (rows == row).all(1).any()]
        assert len(kept) == 32
        assert torch.equal(columns, start[name % "output"][:, kept])
        assert rows.requires_grad
        assert columns.requires_grad

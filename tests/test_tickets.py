"""Ticket search: rounds, resets and rewinding against the published rules, and exact resumption."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import ROOT, assert_same_weights, launch, trained
from hf_approx import MagnitudePruningConfig, MovementPruningConfig, SparsificationConfig
from hf_approx.loops import Ticket, TicketConfig, TicketSearch, pareto_front, search_in_parallel


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
    )


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) * 40).long().clamp(-1, 1) + 1), batch_size=16)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sgd(params):
    optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-2)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 4)


def accuracy(model):
    with torch.no_grad():
        return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data()) / 3


def cs(**options):
    return SparsificationConfig(
        **{
            "preset": "paper",
            "soft_fraction": 1.0,
            "target_sparsity": None,
            "target_modules": ["0", "4"],
            "mask_lr": 0.05,
            **options,
        }
    )


IMP = MagnitudePruningConfig(target_sparsity=0.875, target_modules=["0", "4"])


def search(config, metric=accuracy, checkpoint=None, model=None):
    return TicketSearch(model or build(), config, data(), loss, sgd, metric, checkpoint=checkpoint)


def test_b3_reset_between_rounds():
    for legacy, scores, soft in (
        (False, (-10.0, -0.2, 0.0, 0.0), (4.5e-5, 0.450, 0.5, 0.5)),
        (True, (-0.05, -0.001, 0.0, 0.0), (0.4875, 0.49975, 0.5, 0.5)),
    ):
        method = cs(scale_mask=False, target_modules=["0"]).build()
        method.attach(nn.ModuleList([nn.Linear(4, 1, bias=False)]))
        with torch.no_grad():
            method.masks[0].scores.copy_(torch.tensor([[-0.05, -0.001, 0.002, 0.3]]))
        method.on_round_step(0, 3, 0.9)
        assert method.end_round(0, 3, legacy) is False
        torch.testing.assert_close(method.masks[0].scores.detach()[0], torch.tensor(scores))
        torch.testing.assert_close(method.masks[0].mask().detach()[0], torch.tensor(soft), rtol=1e-2, atol=1e-4)
        assert method.metrics()["temperature"] == 1.0


def test_temperature_rises_anew_in_every_round():
    method = cs().build()
    method.attach(build())
    for round_ in range(2):
        seen = []
        for step in range(4):
            method.on_round_step(round_, 2, step / 4)
            seen.append(method.metrics()["temperature"])
        assert seen == pytest.approx([200 ** (step / 4) for step in range(4)])


class Snoop:
    """A metric that also keeps, at every call, what is trained and the state of the model."""

    def __init__(self):
        self.trained, self.states = [], []

    def __call__(self, model):
        assert not model.training
        self.trained.append(trained(model))
        self.states.append({n: t.detach().clone() for n, t in model.state_dict().items()})
        return float(len(self.states))


@pytest.mark.parametrize("method", [cs(), IMP], ids=["cs", "imp"])
def test_b4_the_ticket_starts_from_the_exact_early_weights(method):
    """Buffers of the normalisation included. The supermask is measured right after rewinding."""
    snoop = Snoop()
    run = search(TicketConfig(method=method, rounds=2, epochs=2, rewind_step=2), snoop)
    ticket = run.run()
    early, untrained = run.early, snoop.states[2]
    assert early.keys() == untrained.keys() == build().state_dict().keys()
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= early.keys()
    assert int(early["1.num_batches_tracked"]) == 2
    assert all(torch.equal(snoop.trained[2][name], tensor) for name, tensor in early.items())
    scale = 1 if method is IMP else 2  # what `scale_mask` makes of scores that start at zero
    for name, tensor in early.items():
        made = torch.where(untrained[name] == 0, 0, scale * tensor) if name in ticket.names else tensor
        assert torch.equal(untrained[name], made), name
    assert ticket.supermask == 3.0
    assert [entry["metric"] for entry in ticket.history] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("option", [{"rewind_step": 6}, {"rewind_epoch": 2}], ids=["step", "epoch"])
def test_the_ticket_starts_from_the_start_of_the_epoch(option):
    """Two epochs of three batches were trained by then: counted by the normalisation's own buffer."""
    run = search(TicketConfig(method=cs(), rounds=1, epochs=3, **option))
    run.run()
    assert int(run.early["1.num_batches_tracked"]) == 6


def test_frozen_weights_stay_while_scores_and_the_rest_train():
    model = build()
    before = copy.deepcopy(model.state_dict())
    method = cs(train_weights=False, scale_mask=False, target_sparsity=0.5)
    ticket = search(TicketConfig(method=method, rounds=2, epochs=2), model=model).run()
    after = model.state_dict()
    assert ticket.sparsity == pytest.approx(0.5, abs=5e-3)
    for name in ticket.names:
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept])
        assert model.get_parameter(name).requires_grad
    assert not torch.equal(after["4.bias"], before["4.bias"])


def test_a_supermask_of_a_model_without_other_parameters():
    """There is nothing to train in the ticket: it is what the search left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
    method = cs(train_weights=False, target_modules=["1"], target_sparsity=0.5)
    ticket = search(TicketConfig(method=method, rounds=2, epochs=1), model=model).run()
    assert len(ticket.history) == 2
    assert ticket.metric == ticket.supermask == accuracy(model)
    assert int((model[1].weight == 0).sum()) == 24


def test_weights_go_on_between_rounds_of_continuous_sparsification():
    snoop = Snoop()
    run = search(TicketConfig(method=cs(), rounds=2, epochs=1), snoop)
    before = trained(run.plain)
    run.run()
    assert not torch.equal(snoop.trained[0]["0.weight"], before["0.weight"])
    assert not torch.equal(snoop.trained[1]["0.weight"], snoop.trained[0]["0.weight"])


def test_b5_pruned_weights_stay_zero_while_the_ticket_trains():
    model = build()
    ticket = search(TicketConfig(method=cs(target_sparsity=0.8), rounds=2, epochs=2), model=model).run()
    assert ticket.sparsity == pytest.approx(0.8, abs=2e-3)
    assert ticket.names == ["0.weight", "4.weight"]
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in ticket.names)
    assert zeros == round(0.8 * (36 + 192))


def test_iterative_magnitude_pruning_removes_the_same_share_each_round():
    ticket = search(TicketConfig(method=IMP, rounds=3, epochs=1)).run()
    densities = [1 - entry["sparsity"] for entry in ticket.history]
    assert densities == pytest.approx([1.0, 0.5, 0.25, 0.125], abs=5e-3)


@pytest.mark.parametrize("method", [cs(), cs(target_sparsity=0.7), IMP], ids=["cs", "cs-target", "imp"])
@pytest.mark.parametrize("crash", [2, 3])
def test_a_search_goes_on_after_a_crash_and_ends_the_same(tmp_path, method, crash):
    config = TicketConfig(method=method, rounds=3, epochs=1, rewind_step=1)
    straight_model, resumed_model = build(), build()
    straight = search(config, model=straight_model).run()

    calls = []

    def crashing(model):
        calls.append(1)
        if len(calls) == crash:
            raise KeyboardInterrupt
        return accuracy(model)

    with pytest.raises(KeyboardInterrupt):
        search(config, crashing, tmp_path).run()
    resumed_run = search(config, checkpoint=tmp_path, model=resumed_model)
    assert resumed_run.round == crash - 1
    resumed = resumed_run.run()
    assert resumed == straight
    for name, tensor in straight_model.state_dict().items():
        assert torch.equal(tensor, resumed_model.state_dict()[name]), name


@pytest.mark.parametrize("other", [{"rounds": 2}, {"method": cs(target_sparsity=0.9)}], ids=["rounds", "target"])
def test_a_search_does_not_go_on_from_another(tmp_path, other):
    options = {"method": cs(target_sparsity=0.5), "rounds": 3, "epochs": 1}
    search(TicketConfig(**options), checkpoint=tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["round-3"]
    model = build()
    with pytest.raises(ValueError, match="holds a search with another config"):
        search(TicketConfig(**{**options, **other}), checkpoint=tmp_path, model=model)
    assert_same_weights(model.state_dict(), build().state_dict())


def test_a_search_does_not_go_on_from_that_of_another_version(tmp_path):
    config = TicketConfig(method=cs(target_sparsity=0.5), rounds=1, epochs=1)
    search(config, checkpoint=tmp_path).run()
    mark = tmp_path / "round-1" / "complete"
    mark.write_text(json.dumps({k: v for k, v in json.loads(mark.read_text()).items() if k != "version"}))
    with pytest.raises(ValueError, match="holds a search of another version of hf_approx"):
        search(config, checkpoint=tmp_path)


def test_half_a_checkpoint_is_not_used(tmp_path):
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1" / "model.safetensors").write_bytes(b"half")
    assert search(TicketConfig(method=cs(), rounds=1, epochs=1), checkpoint=tmp_path).round == 0


def ticket(sparsity, metric):
    return Ticket(sparsity, 0.0, metric, [], [])


def test_pareto_front():
    tickets = [ticket(0.5, 0.9), ticket(0.8, 0.9), ticket(0.9, 0.8), ticket(0.85, 0.7), ticket(0.95, 0.6)]
    assert [t.sparsity for t in pareto_front(tickets)] == [0.8, 0.9, 0.95]


def test_the_front_of_several_searches_says_where_each_started():
    found = search_in_parallel(lambda score: ticket(0.5 - score, 0.9 - abs(score - 0.05)), [0.3, -0.1, 0.0])
    assert list(found.items()) == [(0.0, ticket(0.5, 0.9 - 0.05)), (-0.1, ticket(0.6, 0.9 - abs(-0.1 - 0.05)))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer >= 1"),
        ({"rewind_step": -1}, "rewind_step must be"),
        ({"reset": "none"}, "reset must be"),
        ({"mask_optimizer": "lion"}, "mask_optimizer must be"),
        ({"method": SparsificationConfig()}, "set soft_fraction=1.0"),
        ({"method": SparsificationConfig(granularity="head", soft_fraction=1.0)}, "cannot be rewound"),
        ({"method": MovementPruningConfig()}, "MovementPruningConfig: this method does not work in the rounds"),
        ({"method": "sparsification"}, "must be the config of a method"),
        ({"rewind_step": 0, "rewind_epoch": 0}, "rewind_step or rewind_epoch, not both"),
        ({"rewind_epoch": -1}, "rewind_epoch must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"epochs": 2, "rewind_epoch": 2}, "rewind_epoch 2 lies beyond a round of 2 epochs"),
    ],
)
def test_bad_ticket_config(options, message):
    with pytest.raises(ValueError, match=message):
        TicketConfig(**options)


def test_a_start_beyond_the_round_is_refused():
    with pytest.raises(ValueError, match="rewind_step 3 lies beyond a round of 3 steps"):
        search(TicketConfig(method=cs(), rounds=1, epochs=1, rewind_step=3)).run()


def test_epochs_must_be_given():
    model = build()
    with pytest.raises(ValueError, match="epochs must be given"):
        search(TicketConfig(method=cs(), rounds=1), model=model)
    assert model.state_dict().keys() == build().state_dict().keys()


@pytest.mark.parametrize(
    ("optimizers", "got"),
    [
        (lambda params: sgd(params)[0], "SGD"),
        (lambda params: None, "NoneType"),
        (lambda params: sgd(params)[::-1], "tuple"),
        (lambda params: (sgd(params)[0], 0.1), "tuple"),
    ],
    ids=["optimizer", "none", "reversed", "number"],
)
def test_optimizers_must_be_a_pair(optimizers, got):
    """The model is then as it was, and another search can be made of it."""
    model = build()
    config = TicketConfig(method=cs(), rounds=1, epochs=1)
    with pytest.raises(ValueError, match=rf"must return \(optimizer, scheduler\), or \(optimizer, None\).* got {got}"):
        TicketSearch(model, config, data(), loss, optimizers, accuracy).run()
    assert_same_weights(dict(model.named_parameters()), dict(build().named_parameters()))
    search(config, model=model).run()


def test_parallel_searches_do_not_touch_each_other(tmp_path):
    """Two processes find what one does: no gradient is averaged and no data is shared out between searches."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(ROOT / "tests" / "scripts" / "parallel_tickets.py", folder, processes, processes=processes)
        found += [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 1

"""Whole layers: a masked layer is the identity, and the model without it is an ordinary one."""

import copy
import json

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import assert_same_weights, make_trainer, python, stacked, weights
from hf_approx import LayerDroppingConfig, PackedFormatError, SparsificationConfig
from hf_approx.blocks import LISTS, find_blocks, remove_blocks
from models import batch, build
from test_structures import EXTRA, LOAD_ALL, make, outputs

KEPT = (1, 3)


def deep(name, layers=4, **options):
    """The tiny model of an architecture with more layers; norms that do something."""
    shallow = make(name)
    config = copy.deepcopy(shallow.config)
    for option in set(LISTS[name].values()):
        setattr(config, option, layers)
    if hasattr(config, "layer_types"):
        config.layer_types = None
    for option, value in options.items():
        setattr(config, option, value)
    config = type(config).from_dict(config.to_dict())
    torch.manual_seed(1)
    model = type(shallow)(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model


def attach(model, target=0.5, **options):
    return stacked(model, SparsificationConfig(granularity="layer", target_sparsity=target, **options))[1]


def keep(method, kept=KEPT):
    """Let the scores say which layers stay, and harden."""
    with torch.no_grad():
        for mask in method.masks:
            mask.scores.fill_(-0.1)
            mask.scores[list(kept)] = 0.1
    method.settle()


def without_layers(model, name, kept=KEPT):
    """A new model of the same class with the kept layers, made from its weights by hand."""
    config = copy.deepcopy(model.config)
    for option in set(LISTS[name].values()):
        setattr(config, option, len(kept))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    smaller = type(model)(config).eval()
    names = [blocks.name for blocks in find_blocks(model)]
    old = {}
    for key in smaller.state_dict():
        source = key
        for path in names:
            if key.startswith(f"{path}."):
                number, _, rest = key.removeprefix(f"{path}.").partition(".")
                source = f"{path}.{kept[int(number)]}.{rest}"
        old[key] = model.state_dict()[source]
    smaller.load_state_dict(old)
    return smaller


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    """Models with removed layers, saved, and computed with by a process without the library."""
    results, lines = {}, []
    for name in LISTS:
        model = deep(name)
        expected = outputs(without_layers(model, name), name)
        method = attach(model)
        keep(method)
        masked = outputs(model, name)
        method.finalize()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        lines.append(("bert" if name in EXTRA else name, type(model).__name__, str(folder)))
        results[name] = (model, folder, expected, masked, method)
    python(LOAD_ALL, json.dumps(lines))
    return results


@pytest.mark.parametrize("name", LISTS)
def test_masked_removed_and_saved_are_the_same_model(removed, name):
    model, folder, expected, masked, method = removed[name]
    assert torch.equal(masked, expected)
    assert torch.equal(outputs(model, name), expected)
    assert torch.equal(torch.load(folder / "output.pt"), expected)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert method.removed == sum(p.numel() for p in deep(name).parameters()) - sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_soft_mask_mixes_what_goes_in_with_what_comes_out(name):
    model = deep(name)
    method = attach(model, target=None, initial_temperature=1.0)
    share = torch.tensor([0.9, 0.25, 0.5, 0.75])
    with torch.no_grad():
        method.masks[0].scores.copy_(torch.logit(share))
    tokens = torch.tensor([[5], [6]])
    states = model(tokens, output_hidden_states=True).hidden_states
    method.detach()
    rest = {"position_embeddings": model.model.rotary_emb(states[0], torch.tensor([[0]]))} if name == "llama" else {}
    blocks = model.get_submodule(find_blocks(model)[0].name)
    for i in range(3):  # the last hidden state of a decoder has passed its final norm
        block = blocks[i](states[i], **rest)
        block = block[0] if isinstance(block, tuple) else block
        torch.testing.assert_close(states[i + 1], share[i] * block + (1 - share[i]) * states[i])
        assert not torch.allclose(states[i + 1], block, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mistral"])
def test_generation_with_the_cache(name):
    options = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2} if name == "qwen2" else {}
    model = deep(name, **options)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = without_layers(model, name).generate(tokens, use_cache=False, **options)
    method = attach(model)
    keep(method)
    assert torch.equal(model.generate(tokens, use_cache=True, **options), expected)
    method.finalize()
    assert torch.equal(model.generate(tokens, use_cache=True, **options), expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
    assert len({tuple(row) for row in expected[:, 3:].tolist()}) == 2
    if name == "qwen2":
        assert model.config.layer_types == ["full_attention", "sliding_attention"]


def test_a_copy_of_a_masked_model_has_its_own_masks():
    model = deep("bert")
    method = attach(model)
    copied = copy.deepcopy(model)
    before = outputs(copied, "bert")
    keep(method)
    assert torch.equal(outputs(copied, "bert"), before)
    assert not torch.equal(outputs(model, "bert"), before)


def test_detaching_leaves_the_model_as_it_was():
    model = deep("gpt2")
    before, expected = weights(model), outputs(model, "gpt2")
    method = attach(model)
    keep(method)
    method.detach()
    assert_same_weights(weights(model), before)
    assert torch.equal(outputs(model, "gpt2"), expected)


@pytest.mark.parametrize(
    ("layers", "target", "left"), [(6, 0.5, 3), (6, 0.4, 4), (5, 0.5, 2), (4, 0.1, 4), (4, 0.9, 1), (4, 1.0, 1)]
)
def test_the_target_counts_layers_and_one_stays(layers, target, left):
    model = deep("bert", layers)
    method = attach(model, target=target)
    method.finalize()
    assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == left


def test_encoder_and_decoder_have_targets_of_their_own():
    def left(**options):
        model = deep("bart")
        attach(model, **options).finalize()
        assert (model.config.encoder_layers, model.config.decoder_layers) == (
            len(model.encoder.layers),
            len(model.decoder.layers),
        )
        return len(model.encoder.layers), len(model.decoder.layers)

    assert left() == (2, 2)
    assert left(target={"encoder.layers": 0.25, "decoder.layers": 0.75}) == (3, 1)
    assert left(exclude=["encoder.layers"]) == (4, 2)
    assert sum(left(scope="global", target=0.625)) == 3
    assert min(left(scope="global", target=1.0)) == 1


def test_the_scores_find_the_layers_that_a_target_was_made_with():
    original, found = deep("gpt2", layers=5), 0
    for kept in [(0, 1), (0, 3), (1, 4), (2, 3), (2, 4)]:
        model = copy.deepcopy(original)
        expected = outputs(without_layers(model, "gpt2", kept), "gpt2")
        method = attach(model, target=0.6, mask_lr=0.05)
        optimizer = torch.optim.Adam(method.param_groups())
        for step in range(60):
            method.on_step(step / 59)
            optimizer.zero_grad()
            (model(**batch("gpt2")).logits - expected).square().mean().backward()
            optimizer.step()
        method.finalize()
        found += torch.allclose(outputs(model, "gpt2"), expected)
    assert found >= 4  # by chance one of ten


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_get_the_gradient_of_the_loss(checkpointing):
    model = deep("bert").double()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    method = attach(model, target=None)
    scores = method.masks[0].scores

    def loss():
        return model(**batch("bert")).logits.square().mean()

    loss().backward()
    for i in range(4):
        steps = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                scores[i] += step
                steps.append(float(loss()))
                scores[i] -= step
        assert float(scores.grad[i]) == pytest.approx((steps[0] - steps[1]) / 2e-5, rel=1e-5)


def layers(**options):
    return SparsificationConfig(**{"granularity": "layer", "target_sparsity": 0.5, "mask_lr": 0.1, **options})


def test_a_trained_model_is_plain_and_its_report_says_what_is_gone(tmp_path):
    trainer = make_trainer("llama", tmp_path, model=deep("llama"), approx=layers())
    before = sum(p.numel() for p in trainer.model.model.layers.parameters())
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert not hasattr(loaded.config, "quantization_config")
    [report] = trainer.approx_report["methods"]
    assert report["sparsity"] == report["soft_sparsity"] == 0.5
    left = sum(p.numel() for p in loaded.model.layers.parameters())
    assert before == 2 * left
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert trainer.approx_report["totals"]["packed_bytes"] <= 4 * left
    make_trainer("llama", tmp_path / "on", model=loaded).train()


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("first", [True, False])
def test_layers_heads_neurons_and_single_weights_in_one_run(tmp_path, name, first):
    """The names of what the other methods removed or zeroed move with the layers."""
    others = [SparsificationConfig(granularity=kind, target_sparsity=0.5) for kind in ("head", "neuron")]
    others.append(SparsificationConfig(target_sparsity=0.8, target_modules=["query", "q_proj"]))
    approx = [layers(), *others] if first else [*others, layers()]
    trainer = make_trainer(name, tmp_path, model=deep(name), approx=approx)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = type(trainer.model).from_pretrained(tmp_path / "model").eval()
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert torch.equal(outputs(loaded, name), outputs(trainer.model.eval(), name))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert len(config["quantization_config"]["tensors"]) == 2
    assert ("structure" in config["quantization_config"]) == (name == "bert")


def test_layers_of_a_packed_model_can_be_removed(tmp_path):
    dense = make_trainer("bert", tmp_path, model=deep("bert"), approx=SparsificationConfig(target_sparsity=0.8))
    dense.train()
    dense.save_model(tmp_path / "sparse")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    trainer = make_trainer("bert", tmp_path, model=model, approx=layers())
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert len(loaded.config.quantization_config.tensors) == 12
    assert float((loaded.bert.encoder.layer[1].output.dense.weight == 0).float().mean()) > 0.5


def test_checkpoints_resume_and_never_load_as_a_model(tmp_path):
    def trainer(folder):
        return make_trainer("bert", folder, model=deep("bert"), approx=layers(), save_strategy="steps", save_steps=3)

    straight = trainer(tmp_path / "straight")
    straight.train()
    for step in (3, 6):
        resumed = trainer(tmp_path / f"resumed-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert_same_weights(weights(resumed.model), weights(straight.model))
        assert resumed.approx_report == straight.approx_report
    checkpoint = tmp_path / "straight" / "checkpoint-3"
    with pytest.raises(PackedFormatError, match="unfinished training"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)
    code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1]); print('loaded')"
    plain = python(code, checkpoint, check=False)
    assert plain.returncode != 0
    assert "loaded" not in plain.stdout


def test_what_cannot_be_done_is_refused_and_changes_nothing():
    for name, message in (
        ("t5", "cannot remove layers from 't5' models, only from bart, bert"),
        ("resnet", "cannot remove layers from 'resnet' models"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(build(name))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        attach(deep("gpt2", scale_attn_by_inverse_layer_idx=True))
    model = deep("bart")
    before, expected = weights(model), outputs(model, "bart")
    with pytest.raises(ValueError, match=r"it has encoder\.layers and decoder\.layers"):
        attach(model, target_modules=["layer"])
    with pytest.raises(ValueError, match=r"no pattern for 'decoder\.layers'"):
        attach(model, target={"encoder.layers": 0.5})
    assert_same_weights(weights(model), before)
    assert torch.equal(outputs(model, "bart"), expected)
    attach(model)
    with pytest.raises(ValueError, match=r"Another method works on 'encoder\.layers' already"):
        attach(model)
    with pytest.raises(ValueError, match="set scale_mask=False"):
        SparsificationConfig(granularity="layer", preset="paper")
    blocks = find_blocks(build("bert"))[0]
    with pytest.raises(ValueError, match="lose all its layers"):
        remove_blocks(build("bert"), blocks, [False, False])


@pytest.mark.parametrize(("order", "kept"), [("last", (0, 1)), ("alternate", (0, 2))])
def test_dropped_layers_are_out_of_the_model_from_the_first_step_on(order, kept, tmp_path):
    model = deep("bert")
    expected = outputs(without_layers(model, "bert", kept), "bert")
    stack, _ = stacked(model, LayerDroppingConfig(target_sparsity=0.5, order=order))
    assert torch.equal(outputs(model, "bert"), expected)
    stack.detach()

    trainer = make_trainer("bert", tmp_path, LayerDroppingConfig(order=order), model)
    optimizer = trainer.create_optimizer()
    assert not any(param.shape == (4,) for group in optimizer.param_groups for param in group["params"])
    trainer.train()
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2
    trainer.save_model(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"), [({"order": "first"}, "order must be"), ({"target_sparsity": 1.5}, "target_sparsity must")]
)
def test_bad_layer_dropping_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LayerDroppingConfig(**options)

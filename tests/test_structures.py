"""Heads, neurons, rows, columns and 2:4: what is removed is what was off, and the smaller model loads."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from helpers import assert_same_weights, edit_packing, make_trainer, python, stacked, weights
from hf_approx import PackedFormatError, SparsificationConfig
from hf_approx.cli import main
from hf_approx.structures import ARCHITECTURES, feature_dim, find_structures, remove_units
from models import VOCAB, batch, build

SIZE = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def distilbert():
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, n_layers=2, n_heads=4, dim=32, hidden_dim=64)
    )


def opt():
    return OPTForCausalLM(OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32))


def phi3():
    return Phi3ForCausalLM(Phi3Config(**SIZE, intermediate_size=64, pad_token_id=0))


def bart():
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartModel(BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=32, **layers, **heads))


def like_llama(name, **options):
    config = AutoConfig.for_model(name, **SIZE, intermediate_size=64, num_key_value_heads=2, head_dim=8, **options)
    return lambda: AutoModelForCausalLM.from_config(config)


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SIZE, intermediate_size=64, max_position_embeddings=34))


EXTRA = {"distilbert": distilbert, "opt": opt, "phi3": phi3, "bart": bart, "roberta": roberta}
EXTRA |= {name: like_llama(name, pad_token_id=0) for name in ("mistral", "qwen2", "qwen3", "gemma")}
CASES = [(name, kind) for kind in ("head", "neuron") for name in sorted(ARCHITECTURES[kind])]


def make(name):
    torch.manual_seed(0)
    return (EXTRA[name]() if name in EXTRA else build(name)).eval()


def outputs(model, name):
    with torch.no_grad():
        return model(**batch("bert" if name in EXTRA else name))[0]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_removing_units_is_the_same_as_masking_them(name, kind):
    model = make(name)
    generator = torch.Generator().manual_seed(0)
    structures = find_structures(model, kind)
    keep = {}
    for structure in structures:
        keep[structure.name] = torch.rand(structure.units, generator=generator) < 0.5
        keep[structure.name][0], keep[structure.name][-1] = True, False
        layer = model.get_submodule(structure.consumer.module)
        off = structure.consumer.kept(~keep[structure.name])
        with torch.no_grad():
            layer.weight.index_fill_(feature_dim(layer, "in"), off, 0.0)
    masked, before = outputs(model, name), sum(p.numel() for p in model.parameters())
    removed = sum(remove_units(model, s, keep[s.name]) for s in structures)
    torch.testing.assert_close(outputs(model, name), masked, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == before - removed
    assert removed > 0


def test_grouped_query_attention_loses_whole_groups():
    structures = find_structures(build("llama"), "head")
    assert [s.units for s in structures] == [2, 2]
    assert [(side.module.rpartition(".")[2], side.width) for side in structures[0].sides] == [
        ("q_proj", 16),
        ("k_proj", 8),
        ("v_proj", 8),
        ("o_proj", 16),
    ]


def test_targets_name_the_blocks():
    model = build("bert")
    found = find_structures(model, "neuron", target_modules=r".*layer\.1")
    assert [s.name for s in found] == ["bert.encoder.layer.1"]
    with pytest.raises(ValueError, match="cannot remove heads from 'resnet' models"):
        find_structures(build("resnet"), "head")
    with pytest.raises(ValueError, match=r"they are in bert\.encoder\.layer\.0\.attention"):
        find_structures(model, "head", target_modules=["query"])
    with pytest.raises(ValueError, match="lose all its units"):
        remove_units(model, found[0], torch.zeros(64))


def train(name, folder, **options):
    trainer = make_trainer(name, folder, approx=SparsificationConfig(target_sparsity=0.5, **options))
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return trainer


LOAD = """
import sys, torch, transformers
if sys.argv[4] == "with": import hf_approx
from models import batch
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**batch(sys.argv[3])).logits, sys.argv[1] + "/logits.pt")
"""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bert", "neuron"), ("gpt2", "neuron"), ("llama", "neuron"), ("llama", "head"), ("t5", "neuron")],
)
def test_a_model_its_config_can_express_is_plain(tmp_path, name, kind):
    trainer = train(name, tmp_path, granularity=kind)
    folder = tmp_path / "model"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    python(LOAD, folder, type(trainer.model).__name__, name, "without")
    assert torch.equal(torch.load(folder / "logits.pt"), outputs(trainer.model.eval(), name))
    totals = trainer.approx_report["totals"]
    assert totals["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert totals["packed_bytes"] == pytest.approx(totals["dense_bytes"] / 2, rel=0.02)


LOAD_ALL = """
import json, sys, torch, transformers
from models import batch
for name, cls, folder in json.loads(sys.argv[1]):
    model = getattr(transformers, cls).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(**batch(name))[0], folder + "/output.pt")
assert "hf_approx" not in sys.modules
"""


def test_every_config_can_express_fewer_neurons(tmp_path):
    models, lines, removed = {}, [], {}
    for name in sorted(ARCHITECTURES["neuron"]):
        models[name] = make(name)
        stack, method = stacked(models[name], SparsificationConfig(granularity="neuron", target_sparsity=0.25))
        stack.settle()
        stack.bake()
        removed[name] = method.removed
        models[name].save_pretrained(tmp_path / name)
        lines.append(("bert" if name in EXTRA else name, type(models[name]).__name__, str(tmp_path / name)))
    python(LOAD_ALL, json.dumps(lines))
    for name, model in models.items():
        assert removed[name] > 0
        assert torch.equal(torch.load(tmp_path / name / "output.pt"), outputs(model, name)), name


@pytest.mark.parametrize(("name", "kind"), [("bert", "head"), ("gpt2", "head"), ("bert", "uneven")])
def test_a_model_its_config_cannot_express_needs_the_library(tmp_path, name, kind):
    options = {"granularity": "neuron", "scope": "global"} if kind == "uneven" else {"granularity": kind}
    trainer = train(name, tmp_path, **options)
    folder, cls = tmp_path / "model", type(trainer.model).__name__
    python(LOAD, folder, cls, name, "with")
    assert torch.equal(torch.load(folder / "logits.pt"), outputs(trainer.model.eval(), name))
    plain = python(LOAD, folder, cls, name, "without", check=False)
    assert plain.returncode != 0
    assert "size" in plain.stderr
    loaded = type(trainer.model).from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = type(trainer.model).from_pretrained(tmp_path / "again")
    assert_same_weights(weights(again), weights(trainer.model))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_heads_neurons_and_single_weights_in_one_run(tmp_path, name):
    """Llama's config can express both structures, BERT's only the neurons; the zeros are packed in either."""
    targets = ["query", "q_proj"]
    approx = [SparsificationConfig(granularity=kind, target_sparsity=0.5) for kind in ("head", "neuron")]
    approx.append(SparsificationConfig(target_sparsity=0.8, target_modules=targets))
    trainer = make_trainer(name, tmp_path, approx=approx)
    trainer.train()
    assert {"sparsification-0/sparsity", "sparsification-2/sparsity"} <= trainer.state.log_history[0].keys()
    trainer.save_model(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert ("structure" in config) == (name == "bert")
    assert len(config["tensors"]) == 2
    loaded = type(trainer.model).from_pretrained(tmp_path / "model")
    assert_same_weights(weights(loaded), weights(trainer.model))


def test_a_smaller_model_trains_on_and_saves_again(tmp_path):
    train("bert", tmp_path, granularity="head")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    trainer = make_trainer("bert", tmp_path / "on", model=model)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert loaded.bert.encoder.layer[0].attention.self.query.out_features == 16


def test_a_share_that_a_config_refuses_is_noted_instead(tmp_path):
    """Three of four heads do not divide Llama's hidden size, which its config insists on."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, intermediate_size=64)
    trainer = make_trainer(
        "llama",
        tmp_path,
        model=LlamaForCausalLM(config),
        approx=SparsificationConfig(granularity="head", target_sparsity=0.25),
    )
    trainer.train()
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert loaded.model.layers[0].self_attn.o_proj.in_features == 24


def test_the_base_model_of_a_smaller_model_loads_and_saves(tmp_path):
    trainer = train("bert", tmp_path, granularity="head")
    base = AutoModel.from_pretrained(tmp_path / "model")
    expected = trainer.model.bert.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.state_dict().items())
    trainer.model.bert.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert_same_weights(weights(again), weights(trainer.model.bert))
    with pytest.raises(ValueError, match="cannot be made plain"):
        again.dequantize()


def test_targets_of_structures_go_by_the_module_that_holds_them(tmp_path):
    target = {"bert.encoder.layer.0.attention": 0.0, "attention": 0.5}
    trainer = make_trainer(
        "bert", tmp_path, approx=SparsificationConfig(granularity="head", target_sparsity=target, scope="global")
    )
    trainer.train()
    sizes = [layer.attention.self.query.out_features for layer in trainer.model.bert.encoder.layer]
    assert sizes == [32, 16]


def test_a_smaller_llama_generates_with_its_cache(tmp_path):
    train("llama", tmp_path, granularity="head")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.config.num_key_value_heads == 1
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    cached = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["shapes"].update({"bert.encoder.layer.0.attention.self.query.weight": [10**6, 32]}),
        lambda s: s["shapes"].update({"bert.encoder.layer.0.attention.self.query.weight": [-1, 32]}),
        lambda s: s["shapes"].update({"bert.nowhere.weight": [8, 8]}),
        lambda s: s["attributes"].update({"bert.encoder.layer.0.attention.self": {"forward": 3}}),
        lambda s: s["attributes"].update({"bert": {"num_heads": 3}}),
        lambda s: s.pop("shapes"),
        lambda s: s["shapes"].update({"bert.encoder.layer.0.attention.self.query.weight": [True, 32]}),
        lambda s: s["attributes"]["bert.encoder.layer.0.attention.self"].update(num_attention_heads=10**30),
        lambda s: s["attributes"]["bert.encoder.layer.0.attention.self"].update(num_attention_heads=0),
        lambda s: s["attributes"].update({"encoder.layer.0.attention.self": {"num_attention_heads": 2}}),
        lambda s: s["shapes"].update({"bert\x1b[2J.weight": [8, 8]}),
    ],
    ids=[
        *("larger", "negative", "unknown", "method", "no-such-attribute", "missing", "bool"),
        *("many-heads", "no-heads", "twice", "escape"),
    ],
)
def test_hostile_sizes_are_refused(tmp_path, change):
    train("bert", tmp_path, granularity="head")
    edit_packing(tmp_path / "model", lambda q: change(q["structure"]))
    with pytest.raises(PackedFormatError, match=r"structure|The file"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")


def test_decompress_refuses_sizes_no_config_can_express(tmp_path, capsys):
    train("bert", tmp_path, granularity="head")
    with pytest.raises(SystemExit):
        main(["decompress", str(tmp_path / "model"), str(tmp_path / "plain")])
    assert "cannot express" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


def compress(layer, granularity, target=0.5):
    config = SparsificationConfig(granularity=granularity, target_sparsity=target, target_modules=["layer"])
    stack, _ = stacked(nn.ModuleDict({"layer": layer}), config)
    for step in range(9):
        stack.advance(step / 8)
    stack.finalize()
    return layer.weight.detach()


@pytest.mark.parametrize(
    ("layer", "rows"),
    [(nn.Linear(8, 6), 0), (Conv1D(6, 8), 1), (nn.Conv2d(8, 6, 3), 0), (nn.ConvTranspose2d(8, 6, 3), 1)],
    ids=lambda v: type(v).__name__,
)
def test_rows_and_columns_go_as_a_whole(layer, rows):
    for granularity, dim in (("row", rows), ("column", 1 - rows)):
        copied = type(layer).__new__(type(layer))
        copied.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        copied.weight = nn.Parameter(layer.weight.detach().clone())
        sizes = layer.weight.detach().abs().movedim(dim, 0).flatten(1).mean(1)
        weight = compress(copied, granularity)
        off = (weight == 0).movedim(dim, 0).flatten(1)
        assert torch.equal(off.all(1), off.any(1))
        assert torch.equal(off.all(1), sizes < sizes.median() if len(sizes) % 2 else sizes <= sizes.median())


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Conv1D(6, 8)], ids=lambda v: type(v).__name__)
def test_two_of_every_four_inputs_stay(layer):
    original = layer.weight.detach().clone()
    weight = compress(layer, "2:4")
    rows, before = (weight, original) if isinstance(layer, nn.Linear) else (weight.T, original.T)
    kept = (rows != 0).unflatten(1, (-1, 4))
    assert bool((kept.sum(-1) == 2).all())
    largest = before.abs().unflatten(1, (-1, 4)).topk(2, dim=-1).indices.sort().values
    assert torch.equal(kept.nonzero()[:, 2].reshape(*largest.shape), largest)


def test_two_of_four_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"set target_sparsity=0\.5"):
        SparsificationConfig(granularity="2:4", target_sparsity=0.9)
    config = SparsificationConfig(granularity="2:4", target_sparsity=0.5, target_modules=["0"])
    with pytest.raises(ValueError, match="multiple of 4 input features; exclude '0'"):
        stacked(nn.ModuleList([nn.Linear(6, 4)]), config)

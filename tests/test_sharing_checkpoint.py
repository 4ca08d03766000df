"""Shared weights on disk: what is written, what loads, what is refused."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from transformers import BertForSequenceClassification, BertModel

from helpers import assert_same_weights, make_trainer, python, weights
from hf_approx import ApproxConfig, PackedFormatError, SharingConfig, SmolConfig, SparsificationConfig, attach_packing
from hf_approx.inspection import inspect_checkpoint
from hf_approx.modules.bank import banks_of, shared_layers, template_names
from hf_approx.packing import SharedSpec, expand, pack_shared, unpack_shared
from models import batch, build
from sharing import deep_bert, logits, parameters, shared

LOAD = """
import sys, torch, transformers, hf_approx
from models import batch
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(**batch(sys.argv[3])).logits, sys.argv[2] + "/logits.pt")
model.save_pretrained(sys.argv[2] + "/again")
"""


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_train_save_and_load_in_a_fresh_process(tmp_path, name):
    model = deep_bert() if name == "bert" else build(name)
    trainer = make_trainer(name, tmp_path, SharingConfig(), model, max_steps=3, logging_steps=1)
    trainer.train()
    folder = tmp_path / "model"
    trainer.save_model(str(folder))
    expected = logits(model, name)
    python(LOAD, type(model).__name__, folder, name)
    assert torch.equal(torch.load(folder / "logits.pt"), expected)
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "again" / "config.json").read_text()) == config
    entries = config["quantization_config"]["tensors"]
    assert {entry["kind"] for entry in entries.values()} == {"shared"}
    size = (folder / "model.safetensors").stat().st_size
    assert size < 2 * parameters(model) + 2**15
    totals = trainer.approx_report["totals"]
    assert totals["sparsity"] == pytest.approx(0.5)
    assert totals["packed_bytes"] < totals["dense_bytes"] / 4 + 2000


@pytest.fixture(scope="module")
def shared_bert(tmp_path_factory):
    """A folder with a saved shared model, and that model."""
    folder = tmp_path_factory.mktemp("shared")
    model = shared(deep_bert(), templates=2)
    attach_packing(model, [])
    model.save_pretrained(folder)
    return folder, model


def test_a_process_without_hf_approx_stops(shared_bert):
    code = "import sys, transformers; transformers.BertForSequenceClassification.from_pretrained(sys.argv[1])"
    result = python(code, shared_bert[0], check=False)
    assert result.returncode != 0
    assert "import hf_approx before from_pretrained" in result.stderr.splitlines()[-1]


def test_a_loaded_model_is_shared_and_trains_on(shared_bert, tmp_path):
    folder, model = shared_bert
    loaded = BertForSequenceClassification.from_pretrained(folder)
    assert parameters(loaded) == parameters(model)
    assert all(p.requires_grad for p in loaded.parameters())
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    trainer = make_trainer("bert", tmp_path / "a", (), loaded, **options)
    trainer.train()
    assert banks_of(trainer.model)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    with pytest.raises(PackedFormatError, match="unfinished training"):
        BertForSequenceClassification.from_pretrained(checkpoint)
    resumed = make_trainer(
        "bert", tmp_path / "b", (), BertForSequenceClassification.from_pretrained(folder), **options
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(weights(resumed.model), weights(trainer.model))
    trainer.save_model(str(tmp_path / "model"))
    again = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(trainer.model))
    assert not torch.equal(logits(again), logits(model))


def test_base_model_and_head_load_from_each_other(shared_bert, tmp_path):
    folder, model = shared_bert
    with torch.no_grad():
        expected = model.bert.eval()(**batch("bert")).last_hidden_state
        base = BertModel.from_pretrained(folder)
        assert torch.equal(base.eval()(**batch("bert")).last_hidden_state, expected)
        base.save_pretrained(tmp_path)
        head = BertForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(head.bert.eval()(**batch("bert")).last_hidden_state, expected)


def test_a_shared_model_can_be_pickled(shared_bert, tmp_path):
    folder, model = shared_bert
    torch.save(copy.deepcopy(model), tmp_path / "pickle")
    again = torch.load(tmp_path / "pickle", weights_only=False)
    assert torch.equal(logits(again), logits(model))
    assert [sorted(entry.layers) for entry in shared_layers(again).values()] == [
        sorted(entry.layers) for entry in shared_layers(model).values()
    ]
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    before = logits(model)
    with torch.no_grad():
        for template in next(iter(banks_of(again).values())).weights:
            template.zero_()
    assert not torch.equal(logits(again), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("to_disk", [False, True])
def test_a_shared_model_can_be_offloaded(shared_bert, tmp_path, to_disk):
    folder, model = shared_bert
    loaded = BertForSequenceClassification.from_pretrained(folder)
    if to_disk:
        disk_offload(loaded, tmp_path / "offload", torch.device("cpu"))
    else:
        cpu_offload(loaded, torch.device("cpu"))
    assert all(param.is_meta for param in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"is offloaded; .* accelerate\.hooks\.remove_hook_from_submodules"):
        loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    if not to_disk:
        remove_hook_from_submodules(loaded)
        loaded.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_dequantize_gives_plain_independent_weights(shared_bert, tmp_path):
    folder, model = shared_bert
    loaded = BertForSequenceClassification.from_pretrained(folder)
    loaded.dequantize()
    assert parameters(loaded) == parameters(deep_bert())
    assert loaded.state_dict().keys() == deep_bert().state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(BertForSequenceClassification.from_pretrained(tmp_path)), logits(model))


def test_inspection_counts_every_template_once(shared_bert):
    folder, model = shared_bert
    result = inspect_checkpoint(folder)
    assert result.dense_bytes == 2 * parameters(deep_bert())
    assert result.bytes == 2 * parameters(model)
    assert len({row.bank for row in result.rows if row.bank}) == 6
    assert not any(row.sparsity for row in result.rows)


def test_damage_is_found_before_it_is_used(shared_bert):
    config = json.loads((shared_bert[0] / "config.json").read_text())["quantization_config"]
    name, entry = next(iter(config["tensors"].items()))
    for change in (
        {"templates": 3},
        {"templates": 0},
        {"bank": "a.b"},
        {"bank": 3},
        {"nbytes": 5},
        {"dtype": "int8"},
    ):
        with pytest.raises(PackedFormatError, match=name.replace(".", r"\.")):
            ApproxConfig(tensors={name: {**entry, **change}})
    row, spec = pack_shared(torch.tensor([1.0, -2.5]), (3, 4), "b", torch.float16)
    assert torch.equal(unpack_shared(row, spec, torch.float32), torch.tensor([1.0, -2.5]))
    row[0] ^= 1
    with pytest.raises(PackedFormatError, match="checksum"):
        unpack_shared(row, spec)
    with pytest.raises(ValueError, match="does not fit"):
        pack_shared(torch.tensor([1e9]), (3, 4), "b", torch.float16)
    assert SharedSpec.from_dict("x", {k: v for k, v in spec.to_dict().items() if k != "kind"}) == spec


def test_pruning_beside_sharing_and_of_templates(tmp_path):
    attention = r".*(query|key|value)"
    configs = [
        SharingConfig(exclude=attention),
        SparsificationConfig(target_modules=attention, target_sparsity=0.8),
        SparsificationConfig(target_modules=r".*hf_approx_banks\..*", target_sparsity=0.9),
    ]
    trainer = make_trainer("bert", tmp_path, configs, deep_bert(), max_steps=6)
    trainer.train()
    model = trainer.model
    for name in template_names(model):
        assert float((model.get_parameter(name) != 0).float().mean()) < 0.4
    trainer.save_model(str(tmp_path / "model"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    entries = loaded.config.quantization_config.tensors
    assert {spec.kind for spec in entries.values()} == {"sparse", "shared"}
    assert set(template_names(model)) <= set(entries)


def test_templates_that_are_sparse_and_quantized_in_one_checkpoint(tmp_path):
    banks = r".*hf_approx_banks\..*"
    configs = [
        SharingConfig(),
        SparsificationConfig(target_modules=banks, target_sparsity=0.5, soft_fraction=0.5),
        SmolConfig(target_modules=banks, target_bits=3, group_size=16),
    ]
    trainer = make_trainer("bert", tmp_path, configs, deep_bert(), max_steps=8)
    trainer.train()
    model, grids = trainer.model, trainer.methods[2].grids
    names = template_names(model)
    assert set(names) == set(grids)
    kept = {name: model.get_parameter(name) != 0 for name in names}
    count = sum(int(mask.sum()) for mask in kept.values())
    assert count == pytest.approx(0.5 * sum(mask.numel() for mask in kept.values()), rel=1e-3)
    spent = sum(float((expand(grids[name].bits, mask.shape) * mask).sum()) for name, mask in kept.items())
    assert spent / count == pytest.approx(3, abs=0.02)
    trainer.save_model(str(tmp_path / "model"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    kinds = {spec.kind for spec in loaded.config.quantization_config.tensors.values()}
    assert kinds == {"quantized", "shared"}


def test_a_loaded_sparse_model_can_share(tmp_path):
    sparse = make_trainer("bert", tmp_path / "a", SparsificationConfig(target_sparsity=0.8), deep_bert(), max_steps=2)
    sparse.train()
    sparse.save_model(str(tmp_path / "sparse"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "sparse")
    config = SharingConfig(exclude=["query"])
    trainer = make_trainer("bert", tmp_path / "b", config, loaded, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(trainer.model))
    kinds = [spec.kind for spec in again.config.quantization_config.tensors.values()]
    assert (kinds.count("sparse"), kinds.count("shared")) == (4, 20)

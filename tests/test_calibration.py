"""Quantizing trained models without training their weights: what changes, what it gains, and from which files."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    ViTImageProcessorPil,
)

from helpers import assert_same_weights, make_trainer, python, weights
from hf_approx import SmolConfig, attach_packing
from hf_approx.cli import main
from hf_approx.inspection import inspect_checkpoint
from hf_approx.loops import calibrate, round_weights
from hf_approx.loops.calibration_data import calibration_batches, find_images, read_texts
from hf_approx.packing.grid import expand, round_to_grid
from models import VOCAB, batch, build, dataset

CONFIG = SmolConfig(target_bits=3.0, group_size=16)


def accelerator(precision="no"):
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision)


def batches(name, size=32, seed=0):
    examples = [{k: v for k, v in e.items() if k != "labels"} for e in dataset(name, size, seed)]
    return DataLoader(examples, 8)


def uneven():
    """A BERT with large weights, of whose two layers the second adds next to nothing to what it is given."""
    model = build("bert").eval()
    with torch.no_grad():
        for layer, size in zip(model.bert.encoder.layer, (20.0, 1e-2), strict=True):
            for part in (layer.attention.output, layer.output):
                part.dense.weight.mul_(size)
            for part in (layer.attention.self.query, layer.attention.self.value, layer.intermediate.dense):
                part.weight.mul_(20.0)
        model.bert.pooler.dense.weight.mul_(10.0)
        model.classifier.weight.mul_(20.0)
    return model


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "resnet"])
def test_only_target_weights_change_and_they_are_only_rounded(name):
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    before, trains = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    result = calibrate(model, batches(name), CONFIG, steps=6, held_out=batches(name, 8, 1))
    after = weights(model)
    assert before.keys() == after.keys()
    assert set(result.names) == set(result.grids)
    for key, tensor in before.items():
        grid = result.grids.get(key)
        assert torch.equal(after[key], tensor if grid is None else round_to_grid(tensor, grid)), key
    bits = [expand(grid.bits, before[key].shape).float().reshape(-1) for key, grid in result.grids.items()]
    assert float(torch.cat(bits).mean()) == pytest.approx(3.0, abs=0.02)
    assert result.bits == pytest.approx(3.0, abs=0.02)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert all(module.training for module in model.modules())
    assert abs(result.calibrated.loss) < 1


def test_calibration_gives_bits_to_the_layer_that_needs_them():
    """The second layer hardly matters: nearly all of its bits can go to the first."""
    model = uneven()
    result = calibrate(model, batches("bert", 64), CONFIG, steps=60, held_out=batches("bert", 64, 1))
    assert result.calibrated.loss < 0.5 * result.rounded.loss
    assert result.calibrated.agreement >= result.rounded.agreement
    used = {key: float(grid.bits.float().mean()) for key, grid in result.grids.items()}
    first, second = ([used[key] for key in used if f"layer.{i}." in key] for i in (0, 1))
    assert sum(first) / len(first) > sum(second) / len(second) + 1.5


@pytest.mark.parametrize(
    ("options", "taken"), [({}, "calibrated"), ({"scale_lr": 1.0, "noise_fraction": 0.0}, "rounded")]
)
def test_the_better_model_is_taken_and_measured_by_its_divergence_from_the_dense_one(options, taken):
    config = replace(CONFIG, **options)
    model, held_out = uneven(), batches("bert", 13, 1)
    dense, nearest = copy.deepcopy(model), copy.deepcopy(model)
    result = calibrate(model, batches("bert"), config, steps=20, held_out=held_out)
    assert result.taken == taken
    assert (result.calibrated.loss < result.rounded.loss) == (taken == "calibrated")
    round_weights(nearest, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), nearest.parameters(), strict=True)) == (
        taken == "rounded"
    )
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    measured = result.calibrated if taken == "calibrated" else result.rounded
    inputs = {"input_ids": torch.cat([each["input_ids"] for each in held_out])}
    with torch.no_grad():
        before, after = (m(**inputs).logits.log_softmax(-1) for m in (dense, model))
    assert measured.loss == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert measured.agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))


def test_without_target_bits_there_is_nothing_to_round_to():
    config = SmolConfig(target_bits=None, group_size=16)
    result = calibrate(uneven(), batches("bert"), config, steps=2, held_out=batches("bert", 8, 1))
    assert result.rounded is None
    assert result.calibrated is not None
    assert result.taken == "calibrated"


def test_the_loss_of_numbers_is_a_share_of_their_size_over_all_batches():
    model = build("bert").bert.eval()
    dense, held_out = copy.deepcopy(model), batches("bert", 13, 1)
    result = calibrate(model, batches("bert"), CONFIG, steps=2, held_out=held_out)
    inputs = {"input_ids": torch.cat([each["input_ids"] for each in held_out])}
    with torch.no_grad():
        before, after = (m(**inputs).last_hidden_state for m in (dense, model))
    measured = result.calibrated if result.taken == "calibrated" else result.rounded
    assert measured.loss == pytest.approx(float((before - after).square().sum() / before.square().sum()), rel=1e-3)


def test_padding_does_not_count():
    losses = []
    for padding in (0, 5):
        ids = torch.randint(3, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([ids, torch.full((4, padding), 7)], 1)
        mask = (torch.arange(8 + padding) < 8).long().expand(4, -1)
        held_out = [{"input_ids": row, "attention_mask": kept} for row, kept in zip(ids, mask, strict=True)]
        result = calibrate(build("gpt2"), batches("gpt2"), CONFIG, steps=2, held_out=DataLoader(held_out, 4))
        losses.append(result.rounded.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_padded_labels_of_an_encoder_decoder_do_not_count():
    losses = []
    for padding in (0, 5):
        ids = torch.randint(3, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
        labels = torch.cat([ids, torch.full((4, padding), -100)], 1)
        held_out = [{"input_ids": row, "labels": wanted} for row, wanted in zip(ids, labels, strict=True)]
        result = calibrate(build("t5"), DataLoader(held_out, 4), CONFIG, steps=2, held_out=DataLoader(held_out, 4))
        losses.append(result.rounded.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_models_of_numbers_and_of_several_labels():
    regression, labels = build("bert"), build("bert")
    labels.config.problem_type = "multi_label_classification"
    regression.config.problem_type = "regression"
    kinds = {
        "hidden states": (build("bert").bert, None),
        "regression": (regression, None),
        "several labels": (labels, 1.0),
    }
    for kind, (model, agreement) in kinds.items():
        result = calibrate(
            model, batches("bert"), SmolConfig(target_bits=8.0), steps=2, held_out=batches("bert", 8, 1)
        )
        assert result.calibrated.agreement == agreement, kind
        assert 0 < result.calibrated.loss < 1e-3, kind


def test_inputs_of_layers_can_be_quantized_too():
    model = uneven()
    config = SmolConfig(target_bits=4.0, group_size=16, activations=True)
    result = calibrate(model, batches("bert"), config, steps=20, held_out=batches("bert", 8, 1))
    assert result.taken == "calibrated"
    quantizer = model.bert.encoder.layer[0].output.dense.input_quantizer
    assert quantizer.limit > 0
    assert float(quantizer.bits.mean()) == pytest.approx(8, abs=1)
    assert result.bits == pytest.approx(4.0, abs=0.02)


def test_the_same_seed_gives_the_same_model():
    first, second, other = (build("bert") for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        torch.rand(seed + 3)
        calibrate(model, batches("bert"), SmolConfig(target_bits=3.0, group_size=16, seed=seed), steps=6)
    assert_same_weights(weights(first), weights(second))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (DataLoader([]), {}, "no batch"),
        (DataLoader([torch.ones(2)]), {}, "must be mappings"),
        (batches("bert"), {"steps": 1}, "steps must be"),
        (batches("bert"), {"config": SmolConfig(target_modules=["nothing"])}, "No module"),
        (batches("bert"), {"held_out": DataLoader([])}, "nothing to measure"),
    ],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_cannot_be_calibrated_is_left_alone(loader, options, message, precision):
    model = build("bert").eval()
    before, wanted = weights(model), model(**batch("bert")).logits
    model.train()
    with pytest.raises(ValueError, match=message):
        calibrate(model, loader, **options, accelerator=accelerator(precision))
    assert_same_weights(weights(model), before)
    assert all(param.requires_grad for param in model.parameters())
    assert model.training
    assert torch.equal(model.eval()(**batch("bert")).logits, wanted)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused(kind, monkeypatch):
    model, sharding = build("bert"), accelerator()
    before = weights(model)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
    with pytest.raises(ValueError, match=f"{kind.value} shards; launch without it"):
        calibrate(model, batches("bert"), CONFIG, steps=2, held_out=batches("bert", 8, 1), accelerator=sharding)
    assert_same_weights(weights(model), before)


def test_rounding_without_data_refuses_to_quantize_inputs():
    model = build("bert")
    before = weights(model)
    with pytest.raises(ValueError, match="set activations=False, or use calibrate"):
        round_weights(model, SmolConfig(activations=True))
    assert_same_weights(weights(model), before)


def test_after_bf16_the_model_computes_in_its_own_precision_and_can_be_prepared_again():
    model = uneven()
    calibrate(model, batches("bert"), CONFIG, steps=2, accelerator=accelerator("bf16"))
    own = AutoModelForSequenceClassification.from_config(model.config).eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact, again = own(**batch("bert")).logits, model(**batch("bert")).logits
        assert torch.equal(again, exact)
        rounded = accelerator("bf16").prepare(model)(**batch("bert")).logits
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("others", [True, False], ids=["others train", "others frozen"])
def test_a_trainer_only_rounds_the_weights(tmp_path, others):
    model = build("bert")
    for param in model.parameters():
        param.requires_grad_(others)
    before = weights(model)
    approx = SmolConfig(target_bits=3.0, group_size=16, train_weights=False)
    trainer = make_trainer("bert", tmp_path, approx, model, learning_rate=1e-2, weight_decay=0.1)
    trainer.store_dtype = None
    limits = [noise.limits.detach().clone() for noise in trainer.methods[0].noises]
    noises = trainer.methods[0].noises
    trainer.train()
    assert any(not torch.equal(a, noise.limits) for a, noise in zip(limits, noises, strict=True))
    grids = trainer.methods[0].grids
    assert trainer.approx_report["totals"]["bits"] == pytest.approx(3.0, abs=0.02)
    for name, tensor in weights(model).items():
        if name in grids:
            assert torch.equal(tensor, round_to_grid(before[name], grids[name])), name
        elif "position_ids" not in name:
            assert torch.equal(tensor, before[name]) != others or not tensor.is_floating_point(), name
    assert all(param.requires_grad == others for param in model.parameters())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "vocabulary.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCAB - 5))]
    file.write_text("\n".join(words))
    return BertTokenizerFast(vocab=str(file))


def save(folder, name, companion):
    (uneven() if name == "bert" else build(name).eval()).save_pretrained(folder)
    companion.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    return save(tmp_path_factory.mktemp("bert"), "bert", tokenizer)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save(tmp_path_factory.mktemp("vit"), "vit", ViTImageProcessorPil(size={"height": 16, "width": 16}))


def lines(size=40):
    generator = torch.Generator().manual_seed(0)
    return [" ".join(f"w{int(i)}" for i in torch.randint(VOCAB - 5, (6,), generator=generator)) for _ in range(size)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(lines()) + "\n\n")
    return file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for i in range(8):
        image = torch.randint(256, (20, 20, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(folder / ("more" if i % 2 else ".") / f"{i}.png")
    return folder


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    return exit_.value.code


SHORT = ("--steps", 20, "--batch-size", 10)

RELOAD = """
import sys, torch, hf_approx, transformers
from models import batch
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(**batch(sys.argv[3])).logits, sys.argv[4])
"""


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert", AutoModelForSequenceClassification),
        ("gpt2", AutoModelForCausalLM),
        ("vit", AutoModelForImageClassification),
    ],
)
def test_compress_to_bits(name, auto, request, tokenizer, texts, images, tmp_path, capsys):
    folder = save(tmp_path / "gpt2", "gpt2", tokenizer) if name == "gpt2" else request.getfixturevalue(name)
    source = images if name == "vit" else texts
    assert run("compress", folder, tmp_path / "out", "--bits", 3, "--calibration", source, *SHORT) == 0
    shown = capsys.readouterr().out
    assert "rounded to the nearest" in shown
    assert "calibrated" in shown
    assert "3.0" in shown
    packed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["tensors"]
    weights_of = [spec["weights"] for spec in packed.values()]
    counts = [sum(column) for column in zip(*weights_of, strict=True)]
    assert sum(bits * count for bits, count in enumerate(counts)) / sum(counts) == pytest.approx(3.0, abs=0.02)
    dense, small = (auto.from_pretrained(path).eval() for path in (folder, tmp_path / "out"))
    stored = {n: p for n, p in small.named_parameters() if n not in packed}
    assert all(torch.equal(p, dense.get_parameter(n).half().float()) for n, p in stored.items())
    python(RELOAD, auto.__name__, tmp_path / "out", name, tmp_path / "logits.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), small(**batch(name)).logits)


def test_what_is_closer_to_the_dense_model_is_written_and_said(bert, texts, tmp_path, capsys):
    """Two steps are too few to gain anything over rounding to 6 bits, and enough at 3 bits."""
    for bits, said in ((6, "The weights rounded to the nearest were written"), (3, "The calibrated weights were")):
        calibrated, nearest = tmp_path / f"calibrated{bits}", tmp_path / f"nearest{bits}"
        source = ("--bits", bits, "--calibration", texts, "--steps", 2, "--batch-size", 10)
        assert run("compress", bert, calibrated, *source) == 0
        assert said in capsys.readouterr().out
        assert run("compress", bert, nearest, "--bits", bits) == 0
        models = [AutoModelForSequenceClassification.from_pretrained(path) for path in (calibrated, nearest)]
        same = [torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True)]
        assert all(same) == (bits == 6)


def test_without_data_weights_are_rounded_and_zeros_stay(bert, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight) > 0.5)
    model.save_pretrained(tmp_path / "sparse")
    assert run("compress", tmp_path / "sparse", tmp_path / "out", "--bits", 4) == 0
    assert "rounded to the nearest" in capsys.readouterr().out
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    after = small.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(after == 0, weight == 0)
    assert all(len(row[row != 0].unique()) <= 16 for row in after)


def test_zeros_stay_zero_in_calibration(tmp_path):
    model = uneven()
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight) > 0.5)
    zeros = weight == 0
    result = calibrate(model, batches("bert"), CONFIG, steps=6)
    attach_packing(model, result.names, grids=result.grids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.bert.encoder.layer[0].output.dense.weight == 0, zeros)


def test_an_encoder_decoder_is_calibrated_on_its_own_answers(bert, texts, tmp_path):
    """Greedy decoding: with an answer for its input, the model predicts the next token of it at every place."""
    BertTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path / "t5")
    model = build("t5").eval()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    with torch.no_grad():
        for layer in model.decoder.block:
            layer.layer[1].EncDecAttention.v.weight.mul_(50)
        model.lm_head.weight[1] *= 4  # the end comes soon, but not at once
    model.save_pretrained(tmp_path / "t5")
    loaders = calibration_batches(model, tmp_path / "t5", texts, samples=20, batch_size=4, max_length=6)
    lengths = set()
    for each in (*loaders[0], *loaders[1]):
        with torch.no_grad():
            predicted = model(**each).logits.argmax(-1)
        for row, mask, best in zip(each["decoder_input_ids"], each["decoder_attention_mask"], predicted, strict=True):
            length = int(mask.sum())
            assert torch.equal(row[1:length], best[: length - 1])
            assert int(best[length - 1]) == model.config.eos_token_id or length == 7
            assert bool((row[length:] == model.config.pad_token_id).all())
            lengths.add(length)
    assert len(lengths) > 1
    options = ["--bits", 3, "--max-bits", 3, "--calibration", texts, "--steps", 4, "--samples", 8, "--max-length", 6]
    assert run("compress", tmp_path / "t5", tmp_path / "out", *options) == 0
    found = inspect_checkpoint(tmp_path / "out")
    assert found.code_bits == pytest.approx(3, abs=0.02)
    assert found.histogram[4:] == [0] * 5


def test_useless_files_are_refused_and_nothing_is_written(bert, vit, texts, images, tmp_path, capsys):
    def refused(message, folder, source, *options):
        assert run("compress", folder, tmp_path / "out", "--bits", 3, "--calibration", source, *options) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
        assert not (tmp_path / "out").exists()

    bare, blind = (shutil.copytree(folder, tmp_path / folder.name) for folder in (bert, vit))
    for path in (*bare.glob("tokenizer*"), *blind.glob("*processor*")):
        path.unlink()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "table.csv").write_text("sentence,label\na,1\nb,2\n")
    (tmp_path / "broken.json").write_text('{"text": [')
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no image")
    (tmp_path / "pictures" / "b.png").write_bytes(b"no image")
    refused("does not exist", bert, tmp_path / "nowhere.txt")
    refused("its name must end in .txt", bert, images)
    refused("holds no text", bert, tmp_path / "empty.txt")
    refused("has no column 'text'; it has sentence, label", bert, tmp_path / "table.csv")
    refused("holds int, not texts", bert, tmp_path / "table.csv", "--column", "label")
    refused("cannot be read as json", bert, tmp_path / "broken.json")
    refused("has no tokenizer", bare, texts)
    refused("is no folder", vit, texts)
    refused("has no image processor", blind, images)
    refused("is damaged or no image", vit, tmp_path / "pictures")
    (tmp_path / "one.txt").write_text("w1\n")
    refused("samples must be at least 2", bert, texts, "--samples", "1")
    refused("at least two", bert, tmp_path / "one.txt")
    refused("target_bits must be between 1 and 8", bert, texts, "--bits", "9")
    assert run("compress", bert, tmp_path / "out", "--calibration", texts) == 1
    assert "give --bits too" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_texts_of_every_kind_of_file(tmp_path, ending):
    from datasets import Dataset

    data = Dataset.from_dict({"sentence": ["one", "", "two", None, "three"]})
    file = tmp_path / f"data.{ending}"
    {"csv": data.to_csv, "parquet": data.to_parquet}.get(ending, data.to_json)(str(file))
    assert read_texts(file, "sentence") == ["one", "two", "three"]


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    (tmp_path / "[v2] *.txt").write_text("mine")
    (tmp_path / "v x.txt").write_text("another's")
    (tmp_path / "[v2] x.txt").write_text("another's")
    assert read_texts(tmp_path / "[v2] *.txt", "text") == ["mine"]


def test_a_quarter_is_held_out_and_long_texts_are_cut(bert, texts, images):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    train, held_out = calibration_batches(model, bert, texts, samples=20, batch_size=5, max_length=4)
    assert len(train.dataset) == 15
    assert not set(train.dataset) & set(held_out.dataset)
    assert set(held_out.dataset) < set(lines())
    assert all(each["input_ids"].shape[1] == 4 for each in (*train, *held_out))
    assert len(find_images(images)) == 8

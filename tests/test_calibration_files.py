"""Calibration from the command line: which files it learns from, and what it writes and says."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    ViTImageProcessorPil,
)

from helpers import python
from hf_approx.cli import main
from hf_approx.inspection import inspect_checkpoint
from hf_approx.loops.calibration_data import calibration_batches, find_images, read_texts
from models import VOCAB, batch, build, uneven


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
    # How the repository's own generation searches is of no use here.
    searching = {"num_return_sequences": 2, "num_beams": 4, "return_dict_in_generate": True, "top_k": 3}
    model.generation_config.update(**searching)
    loaders = calibration_batches(model, tmp_path / "t5", texts, samples=20, batch_size=4, max_length=6)
    assert {name: getattr(model.generation_config, name) for name in searching} == searching
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
    refused("no weight may have more than --max-bits 8", bert, texts, "--bits", "9")
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

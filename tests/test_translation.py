"""The translation recipe on a small parallel text, and the text that gettext catalogues hold."""

import io
import json
import shutil

import pytest
import torch
import yaml
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import translation
from common import load_metric
from config_files import read_yaml
from gettext_catalogues import load, read_pairs
from hf_approx import attach_packing
from translation import Translation, TranslationConfig, learn_tokenizer

TINY = {
    "type": "marian",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    pairs = [
        {"translation": {"en": f"{a} and {b}", "de": f"{x} und {y}"}}
        for a, x in zip(NUMBERS, ZAHLEN, strict=True)
        for b, y in zip(NUMBERS, ZAHLEN, strict=True)
    ]
    for split, part in (("train", pairs[:80]), ("validation", pairs[80:])):
        (folder / f"{split}.json").write_text("\n".join(json.dumps(pair) for pair in part), encoding="utf-8")
    files = {split: str(folder / f"{split}.json") for split in ("train", "validation")}
    data = {
        "model": TINY,
        "dataset": {"path": "json", "data_files": files},
        "source_column": "translation.en",
        "target_column": "translation.de",
        "vocabulary": 300,
        "max_length": 16,
        "training": {
            "max_steps": 6,
            "learning_rate": 1e-3,
            "label_smoothing_factor": 0.1,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "steps",
            "save_steps": 3,
        },
        "approx": [{"method": "smol", "target_bits": 4, "granularity": "channel"}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_dense_and_compressed_translate_again_after_loading(config, tmp_path, capsys):
    options = ["--config", str(config), "--output_dir", str(tmp_path)]
    assert translation.main(options) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["compressed"]["bits"] == pytest.approx(4, abs=0.02)
    assert rows["compressed"]["bytes"] < rows["compressed"]["dense_bytes"] < rows["dense"]["bytes"]
    printed = capsys.readouterr().out
    recipe = Translation(read_yaml(TranslationConfig, config), str(tmp_path))
    references = [f"{x} und {y}" for x in ZAHLEN[8:] for y in ZAHLEN]
    inputs = torch.tensor(recipe.data["validation"]["input_ids"][:1])
    for name, row in rows.items():
        assert row["reloaded_equal"] is True
        assert f"{row['chrf']:.4f}" in printed
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        sources = tokenizer([f"{a} and {b}" for a in NUMBERS[8:] for b in NUMBERS], return_tensors="pt", padding=True)
        tokens = model.generate(**sources, max_length=16)
        said = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        assert recipe.metric.compute(predictions=said, references=references) == {
            score: pytest.approx(row[score]) for score in ("bleu", "chrf")
        }
        cached, slow = (model.generate(inputs, max_length=12, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, slow)
    for name in rows:
        shutil.rmtree(tmp_path / f"{name}-checkpoints" / "checkpoint-6")
    assert translation.main([*options, "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert {name: row["chrf"] for name, row in again.items()} == {name: row["chrf"] for name, row in rows.items()}


def test_a_pretrained_model_keeps_its_tokenizer_and_gets_its_prefix(config, tmp_path):
    tokenizer = learn_tokenizer(["translate: one and two", "eins und zwei"], 300)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes)
    ).bfloat16().save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    changes = [f"model={tmp_path / 't5'}", "prefix='translate: '", "max_length=12", "training.save_strategy='no'"]
    recipe = Translation(read_yaml(TranslationConfig, config, changes), str(tmp_path))
    assert {param.dtype for param in recipe.model().parameters()} == {torch.float32}
    text = recipe.tokenizer.decode(recipe.data["train"][0]["input_ids"], skip_special_tokens=True)
    assert "translate: one and one".startswith(text)
    assert len(text) > len("translate: ")
    options = [
        part
        for change in [*changes, "baseline=false", "training.max_steps=2", "max_eval_samples=3"]
        for part in ("--set", change)
    ]
    assert translation.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert list(rows) == ["compressed"]
    assert rows["compressed"]["reloaded_equal"] is True


def test_positions_that_are_computed_keep_their_digits(config, tmp_path):
    """Marian's are not in the file: a loaded model has them in full precision, so the one in memory must too."""
    model = Translation(read_yaml(TranslationConfig, config), str(tmp_path)).model()
    before = model.model.encoder.embed_positions.weight.clone()
    attach_packing(model, ["model.encoder.layers.0.fc1.weight"])
    assert torch.equal(model.model.encoder.embed_positions.weight, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_references_are_not_cut(config, tmp_path):
    recipe = Translation(read_yaml(TranslationConfig, config, ["max_length=3"]), str(tmp_path))
    assert max(map(len, recipe.data["train"]["labels"])) == 3
    labels = recipe.data["validation"][3]["labels"]
    assert recipe.tokenizer.decode(labels, skip_special_tokens=True) == "neun und vier"


def test_learnt_tokens_give_every_text_back():
    tokenizer = learn_tokenizer(["a cat", "eine Katze"], 300)
    text = "  Grüße,\t%(name)s — 漢字 \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bleu_is_the_formula():
    """One of two translations is right, the other has three of five words and nothing longer than two in common."""
    metric, _ = load_metric("metrics/bleu.py", ["a"])
    same = metric.compute(predictions=["the cat sat on it"], references=["the cat sat on it"])
    assert same == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    found = metric.compute(
        predictions=["a b c d e", "p q x y z"],
        references=["a b c d e", "p q u v w"],
    )
    precisions = [7 / 10, 5 / 8, 3 / 6, 2 / 4]
    assert found["bleu"] == pytest.approx(100 * torch.tensor(precisions).log().mean().exp().item())


def test_catalogues_become_pairs():
    catalogue = Catalog(locale="de")
    catalogue.add("_Open the file", "Die Datei _öffnen")
    catalogue.add(("one person", "%d persons"), ("eine Person", "%d Personen"))
    catalogue.add("%(a_b)s was born", "%(a_b)s wurde geboren")
    catalogue.add("Close", "Schließen", context="verb")
    catalogue.add("Name", "Name")
    catalogue.add("%d:", "%d;")
    catalogue.add("Not translated", "")
    catalogue.add("First.\n\nSecond.", "Erstens.\n\nZweitens.")
    catalogue.add("Two\nlines", "Zwei\nZeilen")
    catalogue.add("many " * 9, "viele " * 9)
    catalogue.add("Doubtful", "Zweifelhaft", flags=["fuzzy"])
    file = io.BytesIO()
    write_mo(file, catalogue)
    file.seek(0)
    assert read_pairs(file, most_words=8) == {
        "Open the file": "Die Datei öffnen",
        "one person": "eine Person",
        "%d persons": "%d Personen",
        "%(a_b)s was born": "%(a_b)s wurde geboren",
        "Close": "Schließen",
        "Two lines": "Zwei Zeilen",
    }


def test_no_message_is_on_both_sides():
    data = load()
    train, held_out = (set(map(str.casefold, data[split]["source"])) for split in ("train", "validation"))
    assert not train & held_out
    assert len(train) > 5 * len(held_out) > 2500
    assert not [source for source in held_out if set(source) & set("%{<")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.type=gpt2"], "type must be one transformers knows, such as marian or t5, got 'gpt2'"),
        (["model.depth=3"], "MarianConfig has no option 'depth'"),
        (["source_column=english"], "no column 'english'; it has translation"),
        (["target_column=translation.fr"], "the column 'translation' has no entry 'fr'"),
        (["max_length=0"], "max_length must be a positive integer, got 0"),
        (["training.num_beams=2"], "Seq2SeqTrainingArguments has no option 'num_beams'"),
        (["dataset={python: 'gettext_catalogues:load', package: nowhere}"], "install hf-approx[translation]"),
        (["dataset={python: 'gettext_catalogues:load', language: xx}"], "has no catalogue of 'xx'"),
        (["dataset.streaming=true"], "this recipe cannot stream"),
    ],
)
def test_a_wrong_config_is_one_line(config, tmp_path, capsys, overrides, message):
    options = [part for override in overrides for part in ("--set", override)]
    assert translation.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1

"""The language model recipe on a text file."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import language_modeling
from config_files import read_yaml
from language_modeling import LanguageModel, LanguageModelConfig, byte_tokenizer
from models import build

BLOCK = 16
TINY = {
    "type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    lines = [f"Line {i}: the cat sat on the mat and naïve." for i in range(60)]
    for split, part in (("train", lines[:48]), ("held_out", lines[48:])):
        (folder / f"{split}.txt").write_text("\n".join(part), encoding="utf-8")
    files = {split: str(folder / f"{split}.txt") for split in ("train", "held_out")}
    data = {
        "model": TINY,
        "tokenizer": "bytes",
        "dataset": {"path": "text", "data_files": files},
        "eval_split": "held_out",
        "block_size": BLOCK,
        "training": {"max_steps": 8, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True},
        "approx": [
            {"method": "sparsification", "target_sparsity": 0.8, "soft_fraction": 0.5},
            {"method": "smol", "target_bits": 4, "granularity": "channel"},
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def blocks(lines):
    """What the validation split must be: bytes and an end after each text, cut into blocks; no part of one."""
    tokenizer = byte_tokenizer()
    symbol = {byte: tokenizer.convert_tokens_to_ids(piece) for byte, piece in bytes_to_unicode().items()}
    tokens = [token for line in lines for token in [*(symbol[b] for b in line.encode()), tokenizer.eos_token_id]]
    return torch.tensor(tokens[: len(tokens) // BLOCK * BLOCK]).view(-1, BLOCK)


def test_dense_and_compressed_in_one_run(config, tmp_path, capsys):
    assert language_modeling.main(["--config", str(config), "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["compressed"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert rows["compressed"]["bits"] == pytest.approx(4, abs=0.02)
    assert rows["compressed"]["bytes"] < rows["compressed"]["dense_bytes"] < rows["dense"]["bytes"]
    printed = capsys.readouterr().out
    lines = (config.parent / "held_out.txt").read_text(encoding="utf-8").split("\n")
    tokens = blocks(lines)
    for name, row in rows.items():
        assert row["reloaded_equal"] is True
        assert f"{row['perplexity']:.4f}" in printed
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logp = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        loss = -logp.gather(-1, tokens[:, 1:, None]).mean()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.decode(tokenizer("naïve §")["input_ids"]) == "naïve §"


def test_a_token_is_a_byte():
    tokenizer = byte_tokenizer()
    text = "a  b\n\tčeština 漢字 \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == 256


def test_a_stream_has_the_blocks_of_the_whole(config, tmp_path):
    streaming = ["dataset.streaming=true", "max_eval_samples=5"]
    whole = LanguageModel(read_yaml(LanguageModelConfig, config, ["max_eval_samples=5"]), str(tmp_path))
    stream = LanguageModel(read_yaml(LanguageModelConfig, config, streaming), str(tmp_path))
    assert list(stream.data["validation"]) == list(whole.data["validation"])
    assert len(whole.data["validation"]) == 5
    sets = [
        sorted(token for block in recipe.data["train"] for token in block["input_ids"]) for recipe in (stream, whole)
    ]
    # Shuffling the texts changes which tokens are left over at the end, no others.
    assert abs(len(sets[0]) - len(sets[1])) <= BLOCK
    assert [b["input_ids"] for b in stream.data["train"]] != [b["input_ids"] for b in whole.data["train"]]


def test_training_on_a_stream(config, tmp_path):
    options = ["--set", "dataset.streaming=true", "--set", "max_eval_samples=4", "--set", "approx=[]"]
    assert language_modeling.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["dense"]["reloaded_equal"] is True
    assert rows["dense"]["perplexity"] < 257


def test_a_pretrained_model_keeps_its_tokenizer(config, tmp_path):
    model = build("gpt2")
    model.resize_token_embeddings(257)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.25)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--set", f"model={tmp_path / 'model'}", "--set", "tokenizer=null", "--set", "training.learning_rate=0"]
    options += ["--set", "baseline=false", "--set", "approx=[{method: magnitude, target_sparsity: 0.5}]"]
    assert language_modeling.main(["--config", str(config), "--output_dir", str(tmp_path), "--smoke", *options]) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert torch.equal(found.transformer.ln_f.bias, model.transformer.ln_f.bias)
    row = json.loads((tmp_path / "results.json").read_text())["compressed"]
    assert row["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_from_scratch_has_the_dtype_of_the_config(config, tmp_path, dtype):
    model = LanguageModel(read_yaml(LanguageModelConfig, config, [f"dtype={dtype}"]), str(tmp_path)).model()
    assert {str(param.dtype) for param in model.parameters()} == {f"torch.{dtype}"}
    assert str(model.config.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(("dtype", "found"), [("float32", torch.float32), ("auto", torch.bfloat16)])
def test_the_dtype_of_a_pretrained_model(config, tmp_path, dtype, found):
    model = build("gpt2").bfloat16()
    model.resize_token_embeddings(257)
    model.save_pretrained(tmp_path / "model")
    options = [f"model={tmp_path / 'model'}", f"dtype={dtype}"]
    loaded = LanguageModel(read_yaml(LanguageModelConfig, config, options), str(tmp_path)).model()
    assert loaded.transformer.h[0].mlp.c_fc.weight.dtype == found
    assert torch.equal(loaded.transformer.h[0].mlp.c_fc.weight.bfloat16(), model.transformer.h[0].mlp.c_fc.weight)


def test_shared_layers_from_scratch(config, tmp_path):
    options = ["--set", "approx=[{method: sharing, templates: 1, init: random}]", "--set", "baseline=false"]
    assert language_modeling.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 0
    row = json.loads((tmp_path / "results.json").read_text())["compressed"]
    assert row["reloaded_equal"] is True
    # Two layers of 10,240 weights in half precision become one; the header and the coefficients are small.
    assert 0 < row["bytes"] - (row["dense_bytes"] - 2 * 10_240) < 4096


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.type=lama"], "type must be one transformers knows, such as gpt2 or llama, got 'lama'"),
        (["model.hiden_size=3"], "LlamaConfig has no option 'hiden_size'"),
        (["model.dtype=float16"], "model: set the recipe's own option dtype"),
        (["model.torch_dtype=float16"], "model: set the recipe's own option dtype"),
        (["tokenizer=null"], "tokenizer must be given for a model from scratch"),
        (["block_size=0"], "block_size must be a positive integer, got 0"),
        (["block_size=33"], "the model has 32 positions, got 33"),
        (["text_column=body"], "no column 'body'; it has text"),
        (["model.max_position_embeddings=100000", "block_size=100000"], "train is shorter than one block of 100000"),
        (["dataset.streaming=true"], "a stream has no length; set max_eval_samples"),
        (["dataset.streaming=true", "training.max_steps=-1"], "a stream has no length; set training.max_steps"),
        (["baseline=false", "approx=[]"], "There is nothing to train"),
        (["metric=x"], "unknown option 'metric'"),
    ],
)
def test_a_wrong_config_is_one_line(config, tmp_path, capsys, overrides, message):
    options = [part for override in overrides for part in ("--set", override)]
    assert language_modeling.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_tokenizer_of_too_many_tokens_is_refused(config, tmp_path, capsys):
    build("gpt2").save_pretrained(tmp_path / "model")
    options = ["--config", str(config), "--set", f"model={tmp_path / 'model'}"]
    assert language_modeling.main(options) == 2
    assert "tokenizer: 257 tokens, but the model knows" in capsys.readouterr().err

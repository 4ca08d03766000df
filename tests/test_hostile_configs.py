"""Configs that anyone may have made: every command says in one sentence what is wrong with which file."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hf_approx.cli import main
from hf_approx.exports import load_model
from hf_approx.json_files import MAX_BYTES

DATA = Path(__file__).parent / "data" / "version_1_sparse"


@pytest.fixture
def folder(tmp_path):
    """A small packed model; its weights are read under any name of the folder's config."""
    return shutil.copytree(DATA, tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))


def edit(folder, dense=False, **fields):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    if dense:
        del config["quantization_config"]
    path.write_text(json.dumps(config))


def refused(capsys, *command):
    """What the command line says; it ends with an error, and nothing is written."""
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in command])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"quantization_config": ' + "[" * 300 + "]" * 300 + "}", "is nested too deeply"),
        ("{" + " " * MAX_BYTES + "}", "are not read"),
        ('{"quantization_config": [1]}', "quantization_config is no object"),
        ('{"quantization_config": "x"}', "quantization_config is no object"),
        ('{"quantization_config": {"quant_method": "hf_approx", "self": 1}}', "no field 'self'"),
        ('{"quantization_config": {"quant_method": "hf_approx", "store_dtype": NaN}}', "does not match its checksum"),
        ('{"quantization_config": {"quant_method": "hf_approx", "quant_method": "hf_approx"}}', "same key twice"),
    ],
    ids=["brackets", "deep", "large", "list", "text", "self", "nan", "twice"],
)
def test_every_command_names_the_config(folder, tmp_path, capsys, text, expected):
    (folder / "config.json").write_text(text)
    out = tmp_path / "out"
    commands = [("inspect", folder), ("card", folder), ("push", folder, "me/model", "--token", "hf_some")]
    commands += [(name, folder, out) for name in ("compress", "export", "decompress")]
    for command in commands:
        message = refused(capsys, *command)
        assert expected in message, command
        assert str(folder / "config.json") in message, command
    assert not out.exists()
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**30},
        {"hidden_size": 0, "head_dim": 0},
        {"hidden_size": -8},
        {"hidden_size": 10**30},
        {"vocab_size": 10**9},
        {"vocab_size": 10**12},
        {"vocab_size": 10**30},
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 1.0},
        {"num_hidden_layers": True},
        {"model_type": ["llama"]},
        {"rope_parameters": 3},
        {"architectures": [3]},
        {"architectures": {"a": 1}},
    ],
    ids=lambda fields: " ".join(f"{name}={value!r}"[:40] for name, value in fields.items()),
)
@pytest.mark.parametrize("dense", [False, True])
def test_a_config_that_describes_no_model_is_one_sentence(folder, dense, fields):
    """Whatever transformers makes of it, and before it takes memory or hours."""
    edit(folder, dense, **fields)
    with pytest.raises(ValueError, match=r"config\.json|'.*weight'|no model class") as error:
        load_model(folder)
    assert len(str(error.value)) < 600
    assert str(error.value).isprintable()


def test_a_folder_with_only_a_pickle(folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    for dense in (False, True):
        edit(folder, dense)
        for command in (("inspect", folder), ("card", folder), ("push", folder, "me/model", "--token", "hf_some")):
            assert "pytorch_model.bin" in refused(capsys, *command)
        with pytest.raises((FileNotFoundError, ValueError), match=r"pytorch_model\.bin"):
            load_model(folder)

"""Which files of a folder are a model's: all of its parts, and nothing else that is there."""

import ast
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from hf_approx.cli import main
from hf_approx.exports import load_model, write_model
from hf_approx.hub import _model
from hf_approx.model_folder import TOKENIZER_FILES, find_checkpoint, model_files
from hf_approx.remote_code import without_code
from models import build

POOLING = "1_Pooling/config.json"
PARTS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
        {"idx": 4, "name": "4", "path": "4_Router", "type": "sentence_transformers.base.modules.Router"},
    ],
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
    "sentence_bert_config.json": {"max_seq_length": 32},
    POOLING: {"pooling_mode_mean_tokens": True},
    "2_Dense/config.json": {"in_features": 32, "out_features": 4},
    "4_Router/router_config.json": {"types": {"query_0_Dense": "sentence_transformers.models.Dense"}},
    "4_Router/query_0_Dense/config.json": {"in_features": 4, "out_features": 4},
}
INNER_WEIGHTS = ("2_Dense/model.safetensors", "4_Router/query_0_Dense/model.safetensors")
ALONG = {*PARTS, *INNER_WEIGHTS}
SECRETS = (
    "credentials.json",
    "secrets.json",
    "token.json",
    "id_rsa.txt",
    "notes.txt",
    "key.model",
    "training_args.bin",
)
ELSEWHERE = (
    "onnx/model.onnx",
    "openvino/config.json",
    "checkpoint-5/tokenizer_config.json",
    "runs/events",
    "x/a.json",
)


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model with zeros, in a folder of its own."""
    folder = tmp_path_factory.mktemp("folders") / "dense"
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[::2] = 0
    model.save_pretrained(folder)
    write(folder, {"vocab.txt": b"[PAD]\n[UNK]\n", "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})
    return folder


@pytest.fixture
def folder(dense, tmp_path):
    return Path(shutil.copytree(dense, tmp_path / "model"))


@pytest.fixture
def parts(folder):
    """The same with parts as sentence-transformers saves them."""
    write(folder, PARTS)
    for name in INNER_WEIGHTS:
        save_file({"linear.weight": torch.ones(4, 4)}, folder / name)
    return folder


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    assert exit_.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_the_names_are_all_that_the_tokenizers_of_transformers_have():
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        text = path.read_text(encoding="utf-8")
        start = text.find("VOCAB_FILES_NAMES = {")
        if start >= 0:
            names.update(ast.literal_eval(text[start:].partition("=")[2].partition("}")[0].strip() + "}").values())
    assert len(names) > 20
    assert names <= set(TOKENIZER_FILES)


def test_parts_come_along_through_every_command(parts, tmp_path, capsys):
    names = {name: (parts / name).read_bytes() for name in ALONG}
    for command in (["compress", parts, tmp_path / "packed"], ["decompress", tmp_path / "packed", tmp_path / "plain"]):
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in command])
        assert exit_.value.code == 0
        assert {name: (command[2] / name).read_bytes() for name in ALONG} == names
        assert (command[2] / "vocab.txt").is_file()
    assert set(_model(tmp_path / "packed", "me/x")[0]) >= ALONG
    for name, then in (("packed", ", after"), ("plain", ".\n")):
        with pytest.raises(SystemExit):
            main(["card", str(tmp_path / name)])
        assert (
            f'SentenceTransformer("PATH_OR_REPO")` loads it too{then}' in (tmp_path / name / "README.md").read_text()
        )
    capsys.readouterr()
    (parts / POOLING).unlink()
    assert "1_Pooling', a part of the model, is missing" in refusal(capsys, "compress", parts, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([{"path": "../elsewhere", "type": "a.b.C"}], "no folder in this one"),
        ([{"path": "/etc", "type": "a.b.C"}], "no folder in this one"),
        ([{"path": "1_Pooling/../..", "type": "a.b.C"}], "no folder in this one"),
        ([{"path": "a\\..\\b", "type": "a.b.C"}], "no folder in this one"),
        ([{"path": ".git", "type": "a.b.C"}], "no folder in this one"),
        ([{"path": "\x1b[31m", "type": "a.b.C"}], "no folder in this one"),
        ([{"path": 1, "type": "a.b.C"}], "no path or no type"),
        ([{"path": ""}], "no path or no type"),
        ([3], "no path or no type"),
        ({}, "not a JSON list"),
        ([{"path": "", "type": "custom.Model"}], "needs code of its own, 'custom.Model'"),
        ([{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}], "in a folder of its own"),
        ([*PARTS["modules.json"], {"path": "5_Dense", "type": "sentence_transformers.models.Dense"}], "no weights"),
        ([*PARTS["modules.json"], {"path": "5_Mine", "type": "a.b.Mine"}], "is missing"),
    ],
)
def test_parts_that_cannot_come_along(parts, change, message):
    write(parts, {"modules.json": change})
    with pytest.raises(ValueError, match=message) as error:
        find_checkpoint(str(parts), everything=True)
    assert str(error.value).isprintable()


def test_a_part_that_is_only_pickled_is_refused(parts):
    (parts / "2_Dense" / "model.safetensors").rename(parts / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="2_Dense', a part of the model, has no weights in safetensors"):
        model_files(parts)
    save_file({"linear.weight": torch.ones(4, 4)}, parts / "2_Dense" / "model.safetensors")
    found = model_files(parts)
    assert found.left_out == ("2_Dense/pytorch_model.bin",)


def test_models_of_other_libraries_are_named(folder, capsys, tmp_path):
    write(folder, {"language_model/attrs.json": {}})
    assert "decodes with a language model" in refusal(capsys, "compress", folder, tmp_path / "out")
    write(folder, {"model_index.json": {}})
    assert "pipeline of diffusers" in refusal(capsys, "push", folder, "me/x")
    (folder / "model_index.json").unlink()
    (folder / "config.json").rename(folder / "modules.json")
    assert "a model of sentence-transformers" in refusal(capsys, "inspect", folder)
    (folder / "modules.json").unlink()
    assert "has no config.json" in refusal(capsys, "card", folder)


def test_only_what_has_the_name_of_a_model_file_is_taken(parts, tmp_path, caplog):
    write(
        parts, dict.fromkeys([*SECRETS, *ELSEWHERE, ".env.json", ".env", "1_Pooling/secrets.json", "LICENSE"], b"{}")
    )
    more = ("qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json", "tokenizer.4.0.0.json")
    more += ("additional_chat_templates/tools.jinja", "chat_template.jinja", "tokenizer.model.v3")
    write(parts, dict.fromkeys([*more, "qformer_tokenizer/secrets.json"], b"{}"))
    found = model_files(parts)
    folders = {f"{name.split('/')[0]}/" for name in ELSEWHERE}
    assert set(found.left_out) == {*SECRETS, *folders, "1_Pooling/secrets.json"}
    expected = {*ALONG, *more, "LICENSE", "config.json", "tokenizer_config.json", "vocab.txt"}
    assert set(found.others) == expected
    assert found.weights == ("model.safetensors",)
    pushed, left_out = _model(parts, "me/x")
    assert set(pushed) == {*expected, "model.safetensors", "README.md"}
    assert left_out == found.left_out
    write_model(load_model(parts), parts, tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert written - {"1_Pooling", "2_Dense", "4_Router", "4_Router/query_0_Dense"} >= expected
    assert not written & {*SECRETS, *ELSEWHERE, ".env.json"}
    assert "checkpoint-5/, credentials.json" in caplog.text


def place(link, target):
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)


KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize(
    "name",
    [
        "vocab.txt",
        "README.md",
        "config.json",
        "model.safetensors",
        "approx_report.json",
        "layers.png",
        POOLING,
        "modules.json",
        "additional_chat_templates/a.jinja",
        "model.safetensors.index.json",
        "2_Dense/model.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["outside", "inside", "broken", "loop", "pipe"])
def test_links_and_what_is_no_file_are_refused(parts, tmp_path, name, kind):
    secret = tmp_path / "id_rsa"
    secret.write_bytes((parts / name).read_bytes() if (parts / name).exists() else KEY)
    (parts / ".env").write_bytes(secret.read_bytes())
    path = parts / name
    if name == "model.safetensors.index.json":
        (parts / "model.safetensors").unlink()  # beside which transformers, and so we, look at no index
    (path.unlink if path.exists() else path.parent.mkdir)(**({} if path.exists() else {"exist_ok": True}))
    targets = {"outside": secret, "inside": parts / ".env", "broken": tmp_path / "nothing", "loop": path}
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(targets[kind])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        _model(find_checkpoint(str(parts), everything=True), "me/x")
    assert path.name in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["id_rsa", "model"]


@pytest.mark.parametrize("name", ["1_Pooling", "2_Dense", "additional_chat_templates"])
def test_linked_folders_are_refused(parts, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, {"config.json": {}, "a.jinja": b"", "model.safetensors": b""})
    shutil.rmtree(parts / name, ignore_errors=True)
    (parts / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=f"{name}' is a link to another place"):
        model_files(parts)


def test_unknown_links_sockets_and_folders_of_links_are_left_out(folder, tmp_path):
    write(tmp_path, {"keys/secret.json": b"{}"})
    (folder / "mine").symlink_to(tmp_path / "keys")
    (folder / "a.json").symlink_to(tmp_path / "keys" / "secret.json")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
        assert model_files(folder).left_out == ("a.json", "mine", "socket")


def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder_with_files_of_its_own(parts, tmp_path):
    repo = tmp_path / "cache" / "models--me--x"
    names = [path.relative_to(parts) for path in parts.rglob("*") if path.is_file()]
    snapshot = repo / "snapshots" / ("a" * 40)
    for i, name in enumerate(names):
        blob = repo / "blobs" / f"{i:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(parts / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (tmp_path / "link").symlink_to(snapshot)
    assert model_files(tmp_path / "link") == model_files(snapshot) == model_files(parts)
    pushed = {
        name: Path(data).read_bytes() for name, data in _model(snapshot, "me/x")[0].items() if name != "README.md"
    }
    assert pushed == {name: (parts / name).read_bytes() for name in pushed}

    # The same layout with something else in the place of the files.
    secret = tmp_path / "secret"
    secret.write_bytes(KEY)
    vocab = snapshot / "vocab.txt"
    outside, other = repo / "blobs" / ("f" * 64), repo / "blobs" / "id_rsa"
    outside.symlink_to(secret)
    other.write_bytes(KEY)
    foreign = tmp_path / "cache" / "models--me--y" / "blobs" / ("0" * 64)
    write(foreign.parent, {foreign.name: KEY})
    for target in (outside, other, foreign, secret):
        place(vocab, target)
        with pytest.raises(ValueError, match="is a link to another place"):
            model_files(snapshot)
    vocab.unlink()
    keys = tmp_path / "keys"
    (repo / "blobs").rename(keys)
    (repo / "blobs").symlink_to(keys)
    with pytest.raises(ValueError, match="is a link to another place"):
        model_files(snapshot)


def test_a_card_is_never_written_through_a_link(folder, tmp_path):
    target, card = tmp_path / "elsewhere", folder / "README.md"
    for content in (None, b""):
        if content is not None:
            target.write_bytes(content)
        place(card, target)
        with pytest.raises(SystemExit) as exit_:
            main(["card", str(folder)])
        assert exit_.value.code == 0
        assert not card.is_symlink()
        assert "hf_approx" in card.read_text()
        assert (target.read_bytes() if target.exists() else None) == content


CODE = {"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModel": "other/repo--modeling_x.XModel"}}


def test_names_of_code_do_not_come_along(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    tokenizer = {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}, "a": "é"}
    processor = {"image_processor": {"image_processor_type": "ViTImageProcessor", **CODE}, "b": [1, {"c": 2}]}
    files = {"config.json": {**config, **CODE, "custom_pipelines": {"x": {"impl": "x.Y"}}}}
    files |= {"tokenizer_config.json": tokenizer, "processor_config.json": processor}
    write(folder, files)
    pushed, _ = _model(folder, "me/x")
    assert json.loads(pushed["config.json"]) == config
    assert json.loads(pushed["tokenizer_config.json"]) == {"tokenizer_class": "BertTokenizer", "a": "é"}
    assert json.loads(pushed["processor_config.json"]) == {
        "image_processor": {"image_processor_type": "ViTImageProcessor"},
        "b": [1, {"c": 2}],
    }
    write_model(load_model(folder), folder, tmp_path / "out")
    for name in files:
        assert not {"auto_map", "custom_pipelines", "impl"} & set((tmp_path / "out" / name).read_text().split('"'))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", {"model_type": "mine", "architectures": ["BertModel"]}),
        ("config.json", {"model_type": "bert", "architectures": ["MyModel"]}),
        ("tokenizer_config.json", {"tokenizer_class": "MyTokenizer"}),
        ("preprocessor_config.json", {"image_processor_type": "Mine"}),
        ("processor_config.json", {"processor_class": "Mine"}),
    ],
)
def test_what_needs_code_is_refused(tmp_path, name, data):
    write(tmp_path, {name: {**data, **CODE}})
    with pytest.raises(ValueError, match=r"needs code for its '(mine|MyModel|MyTokenizer|Mine)'"):
        without_code(tmp_path / name)
    write(tmp_path, {name: data})
    assert without_code(tmp_path / name) is None


def test_nobody_is_asked_whether_to_run_code(folder, monkeypatch, capsys, tmp_path):
    def asked(*args):
        raise AssertionError

    monkeypatch.setattr("builtins.input", asked)
    code = "raise SystemExit('the code of a model was run')"
    config = json.loads((folder / "config.json").read_text())
    write(folder, {"configuration_x.py": code.encode(), "modeling_x.py": code.encode(), "x.py": code.encode()})
    write(folder, {"config.json": {**config, **CODE}})
    load_model(folder)
    write(folder, {"config.json": {**config, **CODE, "model_type": "mine"}})
    assert "needs code of its own, which hf_approx never runs" in refusal(capsys, "compress", folder, tmp_path / "out")
    texts = tmp_path / "texts.txt"
    texts.write_text("one\ntwo\nthree\nfour\n")
    tokenizer = {"tokenizer_class": "Y", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    write(folder, {"config.json": config, "tokenizer_config.json": tokenizer})
    main_args = ("compress", folder, tmp_path / "out", "--bits", "4", "--calibration", texts)
    assert "needs code for its 'Y'" in refusal(capsys, *main_args)
    assert not (tmp_path / "out").exists()

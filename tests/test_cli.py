"""The command line as a user runs it: real processes, exit codes, no tracebacks."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

import hf_approx_cli
from helpers import ROOT, python, target_modules
from hf_approx import attach_packing
from hf_approx.cli import main
from hf_approx.console import tell_quantized
from hf_approx.hub import push_folder
from hf_approx.inspection import inspect_checkpoint
from hf_approx.loops.calibration import STEPS, Calibration
from hf_approx.loops.distillation import Fidelity
from hf_approx.packing import MAX_BITS, Grid
from hf_approx.plots import plot_bits
from hf_approx.report import kind_of
from models import batch, build


def cli(*args):
    return python("from hf_approx.cli import main; main()", *args, check=False)


def zeroed(sparsity=0.9):
    model = build("bert").eval()
    names = [f"{name}.weight" for name in target_modules(model)]
    with torch.no_grad():
        for name in names:
            param = model.get_parameter(name)
            param.mul_(torch.rand_like(param) >= sparsity)
    return model, names


def logits(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**batch("bert")).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dense checkpoint with zeros in it, as another tool's pruning would leave it, and its tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    model, _ = zeroed()
    model.save_pretrained(folder)
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good"]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    vocabulary.unlink()
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model, names = zeroed()
    attach_packing(model, names)
    model.save_pretrained(folder)
    return folder


def size(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    model, names = zeroed(0.2)
    grids = {}
    for i, name in enumerate(names):
        bits = torch.full(model.get_parameter(name).shape, 2 + i % 3, dtype=torch.uint8)
        grids[name] = Grid(bits, torch.full((1, 1), 0.05))
    attach_packing(model, names, "float16", grids)
    model.save_pretrained(folder)
    return folder


def test_compress_then_decompress(trained, tmp_path):
    result = cli("compress", trained, tmp_path / "small", "--store-dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert "90" in result.stdout
    assert size(tmp_path / "small") < 0.6 * size(trained)
    assert torch.equal(logits(tmp_path / "small"), logits(trained))
    assert AutoTokenizer.from_pretrained(tmp_path / "small").tokenize("good") == ["good"]

    result = cli("decompress", tmp_path / "small", tmp_path / "plain")
    assert result.returncode == 0, result.stderr
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(tmp_path / "plain"), logits(trained))
    assert size(tmp_path / "plain") == pytest.approx(size(trained), rel=0.01)


def test_only_files_of_the_model_come_along(packed, tmp_path, caplog):
    """An index of other weight files would be wrong, and so would what the report says of these files before."""
    folder = shutil.copytree(packed, tmp_path / "packed")
    for name in (
        *("pytorch_model.bin.index.json", "trainer_state.json", "training_args.json", "chat_template.jinja"),
        "source.spm",
    ):
        (folder / name).write_text("{}")
    for name in ("additional_chat_templates", "checkpoint-8"):
        (folder / name).mkdir()
        (folder / name / "tools.jinja").write_text("{}")
    report = {"kinds": {"key": {"sparsity": 0.5}}, "totals": {}, "methods": [], "about": {"repo_id": "me/packed"}}
    (folder / "approx_report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit) as exit_:
        main(["decompress", str(folder), str(tmp_path / "plain")])
    assert exit_.value.code == 0
    plain = tmp_path / "plain"
    assert {path.relative_to(plain).as_posix() for path in plain.rglob("*") if path.is_file()} == {
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
        "source.spm",
        "additional_chat_templates/tools.jinja",
        "approx_report.json",
    }
    kept = json.loads((plain / "approx_report.json").read_text())
    assert kept["methods"] == []
    assert set(kept) == {"methods", "about"}
    assert kept["about"] == {"exported": True}
    (told,) = [text for text in caplog.messages if "Left out" in text]
    assert "trainer_state.json" in told
    assert "training_args.json" not in told  # which every training of ours writes


def test_inspect_counts_what_is_in_the_file(packed):
    result = cli("inspect", packed, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    weight = AutoModelForSequenceClassification.from_pretrained(packed).bert.encoder.layer[0].output.dense.weight
    row = next(r for r in report["tensors"] if r["name"] == "bert.encoder.layer.0.output.dense.weight")
    assert row["shape"] == list(weight.shape)
    assert row["sparsity"] == pytest.approx(float((weight == 0).float().mean()))
    totals = report["totals"]
    assert totals["bytes"] == sum(r["bytes"] for r in report["tensors"])
    assert totals["bytes"] < size(packed) < totals["bytes"] + 10_000
    assert totals["packed_bound_bytes"] < totals["packed_bytes"]


def test_inspect_table_has_a_row_for_each_tensor(packed):
    result = cli("inspect", packed)
    assert result.returncode == 0, result.stderr
    assert "sparsity" in result.stdout
    assert "times smaller than dense" in result.stdout.replace("\n", " ")


def test_inspect_shows_bits_and_their_histogram(quantized, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(quantized), "--plot", str(tmp_path / "layers.svg")])
    assert exit_.value.code == 0
    table = capsys.readouterr().out
    report = inspect_checkpoint(quantized)
    assert "2 bits" in table
    assert f"{report.bits:.3f} bits a weight, {report.code_bits:.3f} of them codes" in table
    assert f"{report.histogram[3] / sum(report.histogram):.2%}" in table
    assert report.histogram[0] == pytest.approx(0.2 * sum(report.histogram), rel=0.1)
    assert (tmp_path / "layers.svg").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["inspect", str(quantized), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.to_dict()))


def test_inspect_reads_no_weights(quantized, tmp_path, capsys):
    """The header of a weight file is enough: here the bytes after it are all zero."""
    folder = shutil.copytree(quantized, tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    (folder / "model.safetensors").write_bytes(data[:header] + bytes(len(data) - header))
    assert inspect_checkpoint(folder) == inspect_checkpoint(quantized)


def test_decompress_a_quantized_checkpoint(quantized, tmp_path, refuse):
    refuse("packed already, in float16: give --bits", "compress", quantized, tmp_path / "out")
    with pytest.raises(SystemExit) as exit_:
        main(["decompress", str(quantized), str(tmp_path / "plain")])
    assert exit_.value.code == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(tmp_path / "plain"), logits(quantized))


@pytest.mark.parametrize("command", [(), ("train",), ("compress",), ("inspect",), ("decompress",)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "Usage" in capsys.readouterr().out


@pytest.fixture
def refuse(capsys):
    """Run the command line in this process and expect one line of error."""

    def run(message, *args, code=1):
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        error = capsys.readouterr().err
        assert exit_.value.code == code
        assert message in error
        assert code == 2 or error.strip().splitlines()[-1].startswith("error: ")

    return run


def test_an_error_in_a_process_of_its_own_is_one_line(tmp_path):
    result = cli("inspect", tmp_path / "nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_user_errors(trained, packed, tmp_path, refuse):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    refuse("neither a folder nor", "inspect", tmp_path / "nowhere")
    refuse("not a saved model. There are models in its folders broken, list.", "push", tmp_path, "me/x")
    for command in (("inspect", packed), ("decompress", packed, tmp_path / "out")):
        refuse("only repositories have revisions", *command, "--revision", "v1")
    refuse("has no config.json", "inspect", tmp_path / "full")
    refuse("is not JSON", "inspect", tmp_path / "broken")
    refuse("is not a JSON object", "inspect", tmp_path / "list")
    refuse("not an empty folder", "compress", trained, tmp_path / "full")
    refuse("packed already", "compress", packed, tmp_path / "out")
    refuse("--max-bits says how to quantize: give --bits too", "compress", trained, tmp_path / "out", "--max-bits", 3)
    refuse("--bits 4 is an average, and no", "compress", trained, tmp_path / "out", "--bits", 4, "--max-bits", 3)
    refuse("not 'int4'", "compress", trained, tmp_path / "out", "--store-dtype", "int4")
    refuse("is not packed", "decompress", trained, tmp_path / "out")
    refuse("does not exist", "train", tmp_path / "no.yaml")
    recipes = (
        "image_classification, image_generation, language_modeling, optimizer_sweep, shortest_paths, "
        "text_classification, ticket_search, translation."
    )
    for name in ("image_clasification", "common"):
        refuse(f"no recipe '{name}'; --recipe takes {recipes}", "train", trained / "config.json", "--recipe", name)
    refuse("No such command", "frobnicate", code=2)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "full", "list"]


def test_a_dense_model_has_nothing_to_compress(tmp_path, refuse, capsys):
    build("bert").save_pretrained(tmp_path / "dense")
    refuse("no weight with enough zeros", "compress", tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    run("inspect", tmp_path / "dense")
    shown = capsys.readouterr().out
    assert f"{inspect_checkpoint(tmp_path / 'dense').bytes:,} bytes, nothing of it packed." in shown
    assert "smaller" not in shown


@pytest.mark.parametrize("name", ["TrainingArguments", "pipeline", "Nonsense", 5])
def test_the_file_cannot_name_just_any_class(trained, tmp_path, refuse, name):
    shutil.copytree(trained, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    refuse("", "compress", tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def edited(trained, tmp_path):
    """A copy of the dense checkpoint with other entries in its config."""

    def make(**entries):
        folder = shutil.copytree(trained, tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((trained / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))
        return folder

    return make


def test_what_is_wrong_with_a_model_is_one_sentence(edited, tmp_path, refuse):
    out = tmp_path / "out"
    refuse("config.json is damaged", "compress", edited(hidden_size="wide"), out)
    refuse("transformers has no model class 5", "compress", edited(architectures=5), out)
    refuse("'bert.embeddings.LayerNorm.bias' has shape [32] instead of [64]", "compress", edited(hidden_size=64), out)
    refuse("'bert.encoder.layer.2.attention.output.LayerNorm.bias' is m", "compress", edited(num_hidden_layers=3), out)
    refuse("the class has no 'bert.encoder.layer.1.att", "compress", edited(num_hidden_layers=1), out)
    refuse("a AutoModel: the class has no 'classifier.bias'", "compress", edited(architectures=None), out)
    for method in ("gptq", "bitsandbytes", "compressed-tensors", "unheard-of"):
        folder = edited(quantization_config={"quant_method": method, "load_in_4bit": True})
        refuse(f"is quantized already, by {method}", "compress", folder, out, "--bits", 3)
    assert not out.exists()


def test_heads_of_another_training_and_old_buffers_are_left_out(edited, tmp_path, caplog):
    """As many a repository has them; layers of the model itself are not."""
    folder = edited()
    tensors = load_file(folder / "model.safetensors")
    others = {"cls.predictions.bias": torch.zeros(48), "bert.encoder.layer.0.mask": torch.zeros(2)}
    save_file({**tensors, **others}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as exit_:
        main(["compress", str(folder), str(tmp_path / "out")])
    assert exit_.value.code == 0
    assert {row.name for row in inspect_checkpoint(tmp_path / "out").rows} == set(tensors)
    (message,) = caplog.messages
    assert message == "BertForSequenceClassification has no 'bert.encoder.layer.0.mask' and 1 more: left out."


def test_a_card_of_a_config_without_a_list_of_architectures(edited):
    for names in (5, [], [5], "BertForSequenceClassification", None):
        folder = edited(architectures=names)
        with pytest.raises(SystemExit) as exit_:
            main(["card", str(folder)])
        assert exit_.value.code == 0
        assert "AutoModel.from_pretrained" in (folder / "README.md").read_text()


def test_other_weight_files_in_the_folder_are_not_counted(packed, tmp_path, capsys):
    shutil.copytree(packed, tmp_path / "model")
    shutil.copy(packed / "model.safetensors", tmp_path / "model" / "consolidated.safetensors")
    counts = []
    for folder in (packed, tmp_path / "model"):
        with pytest.raises(SystemExit):
            main(["inspect", str(folder), "--json"])
        counts.append(json.loads(capsys.readouterr().out)["totals"])
    assert counts[0] == counts[1]


def test_a_plot_of_the_layers(packed, trained, tmp_path, refuse):
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(packed), "--plot", str(tmp_path / "layers.png")])
    assert exit_.value.code == 0
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    refuse("no packed weight to draw", "inspect", trained, "--plot", tmp_path / "none.png")
    assert kind_of("bert.encoder.layer.10.attention.self.query.weight") == "attention.self.query"
    with pytest.raises(ValueError, match="no packed weight to draw"):
        plot_bits(inspect_checkpoint(packed), tmp_path / "bits.png")


def test_the_card_of_a_model_that_was_quantized_without_training(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["compress", str(trained), "out", "--bits", "3"], ["card", "out"]):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "compressed with rounding, saved by hf_approx" in card
    assert "cite" not in card.lower().replace("citation", "cite") or "smol" not in card
    assert "Quantized without training, by rounding to the nearest" in card
    assert "| rounding | target bits = 3, max bits = 8 | bits = 3 |" in card.replace("_", " ").replace("&#95;", " ")
    assert "Every number below was read from these files, or measured when the model was made." in card


def test_zeros_anywhere_are_packed(tmp_path):
    model = build("bert").eval()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.mul_(torch.rand(48, 32) > 0.9)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        main(["compress", str(tmp_path / "model"), str(tmp_path / "out"), "--store-dtype", "float32"])
    assert exit_.value.code == 0
    tensors = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["tensors"]
    assert list(tensors) == ["bert.embeddings.word_embeddings.weight"]


def test_a_truncated_weight_file_is_named(packed, tmp_path, refuse):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refuse("model.safetensors is damaged", "inspect", tmp_path)
    refuse("error: ", "decompress", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsigned_integers_are_measured_at_their_size(tmp_path):
    build("bert").save_pretrained(tmp_path)
    kinds = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.complex64)
    tensors = {str(kind): torch.zeros(3, dtype=kind) for kind in kinds}
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path).bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_names_in_a_file_are_neither_markup_nor_codes_for_the_terminal(tmp_path, capsys, refuse):
    build("bert").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({"a[/b]": torch.zeros(2, 2), "c[red]": torch.zeros(2), "d\x1b[2Jx": torch.zeros(2)}, weights)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(tmp_path)])
    table = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "a[/b]" in table
    assert "c[red]" in table
    assert "\x1b" not in table
    refuse("clear [2J it", "inspect", "clear\x1b[2J it")


def rows(folder):
    return json.loads(json.dumps(inspect_checkpoint(folder).to_dict()))["tensors"]


def test_tensors_are_in_the_order_of_their_numbers_and_dtypes_have_one_notation(packed, tmp_path):
    build("bert").save_pretrained(tmp_path)
    numbers = ["h.0.b", "h.1.b", "h.2.a", "h.2.b", "h.10.a", "h.10.b", "h.11.b", "x1", "x02", "x10", f"x{'1' * 5000}"]
    tensors = {name: torch.zeros(1, dtype=torch.bfloat16) for name in sorted(numbers)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert [row["name"] for row in rows(tmp_path)] == numbers
    assert {row["dtype"] for row in rows(tmp_path)} == {"bfloat16"}
    assert {row["dtype"] for row in rows(packed)} == {"float16"}
    every = {row.name: row.dtype for row in inspect_checkpoint(tmp_path).rows}
    kinds = ("float64", "float32", "float16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "complex64")
    save_file({kind: torch.zeros(2).to(getattr(torch, kind)) for kind in kinds}, tmp_path / "model.safetensors")
    every = {row.name: row.dtype for row in inspect_checkpoint(tmp_path).rows}
    assert every == {kind: kind for kind in kinds}


def test_the_weight_files_are_those_that_transformers_reads(trained, packed, tmp_path, refuse):
    """An index that another save has left is not read, and does not come along."""
    index = json.dumps({"metadata": {}, "weight_map": {"gone": "model-00001-of-00002.safetensors"}})
    for i, source in enumerate((trained, packed)):
        folder = shutil.copytree(source, tmp_path / f"left-over-{i}")
        (folder / "model.safetensors.index.json").write_text(index)
        assert inspect_checkpoint(folder) == inspect_checkpoint(source)
        assert torch.equal(logits(folder), logits(source))
        command = "decompress" if i else "compress"
        with pytest.raises(SystemExit) as exit_:
            main([command, str(folder), str(tmp_path / f"out-{i}")])
        assert exit_.value.code == 0
        assert "model.safetensors.index.json" not in {path.name for path in (tmp_path / f"out-{i}").iterdir()}
    only = tmp_path / "left-over-0"
    (only / "model.safetensors").unlink()
    refuse("has no file 'model-00001-of-00002.safetensors', which its", "inspect", only)


def test_weights_that_transformers_would_not_read_by_themselves_are_named(trained, tmp_path, refuse):
    for i, (name, message) in enumerate(
        {
            "model.fp16.safetensors": "variant 'fp16' only: rename them to 'model.safetensors', or load",
            "model.safetensors.index.fp16.json": "variant 'fp16' only",
            "pytorch_model.bin": "has its weights in 'pytorch_model.bin', not in safetensors",
            "pytorch_model-00001-of-00002.bin": "not in safetensors",
            "tf_model.h5": "not in safetensors",
            "other.safetensors": "has no file 'model.safetensors'",
        }.items()
    ):
        folder = shutil.copytree(trained, tmp_path / str(i))
        (folder / "model.safetensors").rename(folder / name)
        for command in (["inspect"], ["card"], ["push", "me/x", "--token", "t"]):
            refuse(message, command[0], folder, *command[1:])
        for command in ("compress", "export"):
            refuse(message, command, folder, tmp_path / "out")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refuse("holds adapters of PEFT, not a model", "inspect", adapter)


def test_what_is_neither_a_folder_nor_a_repository(trained, tmp_path, refuse, monkeypatch):
    refuse("'nobody/nothing' is no folder, and the Hub cannot be reached", "inspect", "nobody/nothing")
    refuse("'nobody/nothing' is no folder, and the Hub cannot be", "compress", "nobody/nothing", tmp_path / "out")
    file = trained / "model.safetensors"
    for command in (["inspect", file], ["decompress", file, tmp_path / "out"], ["compress", file, tmp_path / "out"]):
        refuse("is a file: give the folder of the model", *command)

    def fail(*args, **kwargs):
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr("hf_approx.hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("hf_approx.model_folder.is_offline_mode", lambda: False)
    monkeypatch.setattr("hf_approx.hub.HfApi.model_info", fail)
    refuse("'outputs/model' is no folder, and the Hub cannot be reached for a repo", "inspect", "outputs/model")


def test_a_push_without_a_token_says_how_to_log_in_before_anything_is_asked(trained, tmp_path, refuse, monkeypatch):
    monkeypatch.setattr("hf_approx.hub.get_token", lambda: None)
    monkeypatch.setattr("hf_approx.hub.HfApi", None)
    refuse("Nothing was pushed to 'me/x': log in with `hf auth login`, or give a token", "push", trained, "me/x")
    refuse("to 'me/x/y': that is no name of a repository, as USER/NAME is.", "push", trained, "me/x/y")
    with pytest.raises(ValueError, match="log in with `hf auth login`"):
        push_folder(trained, "me/x", is_model=False)


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    assert exit_.value.code == 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(["good", "good good", "bad good good", "worse"] * 4))
    return path


def test_compressing_what_is_packed_is_decompressing_it_before(packed, quantized, tmp_path, refuse):
    for name, source in (("sparse", packed), ("grids", quantized)):
        run("compress", source, tmp_path / name, "--bits", 4)
        run("decompress", source, tmp_path / f"{name}-plain")
        run("compress", tmp_path / f"{name}-plain", tmp_path / f"{name}-two", "--bits", 4)
        assert load_file(tmp_path / name / "model.safetensors").keys()
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            tmp_path / f"{name}-two" / "model.safetensors"
        ).read_bytes()
        before = load_file(tmp_path / f"{name}-plain" / "model.safetensors")
        after = AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
        entries = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["tensors"]
        assert entries
        for tensor in entries:
            assert torch.equal(after[tensor] == 0, before[tensor] == 0)
    run("compress", packed, tmp_path / "wide", "--store-dtype", "float32")
    assert size(tmp_path / "wide") > size(packed)
    unfinished = shutil.copytree(packed, tmp_path / "unfinished")
    config = json.loads((unfinished / "config.json").read_text())
    # As it was before there were checksums of the config.
    entries = {name: value for name, value in config["quantization_config"].items() if name in ("quant_method",)}
    config["quantization_config"] = {**entries, "format_version": 2, "tensors": {}, "training": True}
    (unfinished / "config.json").write_text(json.dumps(config))
    refuse("unfinished training", "compress", unfinished, tmp_path / "out", "--bits", 4)
    shared = ROOT / "tests" / "data" / "version_2_shared"
    refuse("mixes weights from shared templates", "compress", shared, tmp_path / "out", "--bits", 4)
    assert not (tmp_path / "out").exists()


def about(folder):
    return json.loads((folder / "approx_report.json").read_text())["about"]


def test_base_model_and_license_reach_the_card(trained, tmp_path, refuse, monkeypatch):
    given = ("--base-model", "me/base", "--license", "mit")
    run("compress", trained, tmp_path / "a", *given)
    run("compress", tmp_path / "a", tmp_path / "b", "--bits", 3)
    run("decompress", tmp_path / "b", tmp_path / "c", "--license", "apache-2.0")
    for name, license_ in (("a", "mit"), ("b", "mit"), ("c", "apache-2.0")):
        assert about(tmp_path / name).items() >= {"base_model": "me/base", "license": license_}.items()
    run("card", tmp_path / "b", "--license", "cc-by-4.0")
    run("card", tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "base_model: me/base" in card
    assert "license: cc-by-4.0" in card
    sent = []
    monkeypatch.setattr("hf_approx.hub._push", lambda api, files, *args: sent.append(files))
    push = ("push", tmp_path / "b", "me/x", "--token", "t")
    run(*push, "--base-model", "you/base")
    run(*push)
    assert b"base_model: you/base" in sent[0]["README.md"]
    assert b"license: cc-by-4.0" in sent[0]["README.md"]
    assert (tmp_path / "b" / "README.md").read_text() == card
    (tmp_path / "b" / "README.md").write_text("mine")
    refuse("was written by hand: say there what its base and license are", *push, "--license", "mit")
    before = sorted(tmp_path.iterdir())
    for command in (
        ["compress", trained, tmp_path / "n"],
        ["export", tmp_path / "a", tmp_path / "n"],
        ["card", trained],
    ):
        refuse("'My License' is no name of a license", *command, "--license", "My License")
        refuse("'a/b/c' cannot be a base model", *command, "--base-model", "a/b/c")
    assert sorted(tmp_path.iterdir()) == before


def test_compress_and_export_say_what_came_out_and_what_to_try(trained, texts, tmp_path, capsys):
    run("compress", trained, tmp_path / "q", "--bits", 4)
    said = capsys.readouterr().out
    assert f"{size(trained):,} bytes of the source, {size(tmp_path / 'q'):,} bytes of the result" in said
    assert "nothing was measured" in said
    assert "--max-bits 3" in said
    run("export", tmp_path / "q", tmp_path / "dense")
    said = capsys.readouterr().out
    rate = size(tmp_path / "dense") / size(tmp_path / "q")
    assert f"{size(tmp_path / 'q'):,} bytes of the source, {size(tmp_path / 'dense'):,} bytes of this" in said
    assert f"{rate:.2f} times as large" in said
    assert "--dtype float16 would halve" in said
    run("compress", trained, tmp_path / "c", "--bits", 3, "--max-bits", 3, "--calibration", texts, "--steps", 2)
    said = capsys.readouterr().out
    assert "on 4 held-out examples" in said
    assert "integers of 4 bits" in said
    assert "Warning" not in said


def test_a_model_that_disagrees_with_its_source_comes_with_a_warning(capsys):
    def say(agreement, loss, bits=2.0):
        fidelity = Fidelity(loss, agreement)
        tell_quantized(Calibration([], {}, bits, fidelity, fidelity, "rounded"), bits, 4)
        return capsys.readouterr().out

    assert "predicts as the source in 62% of cases. Try more bits (--bits 3)" in say(0.62, 1.0)
    assert "--scale-granularity group" in say(0.62, 1.0)
    assert "more bits" not in say(0.62, 1.0, 8)
    for agreement, loss in ((0.9, 1.0), (1.0, 0.0), (None, 0.05)):
        assert "Warning" not in say(agreement, loss)
    for agreement, loss in ((None, 0.2), (None, float("nan")), (float("nan"), 0.0)):
        assert "Warning" in say(agreement, loss)


def test_help_does_not_wait_for_what_the_commands_need():
    code = """
import sys, hf_approx_cli
for args in ([], ["inspect"], ["compress"], ["push"]):
    try:
        hf_approx_cli.main([*args, "--help"])
    except SystemExit as exit_:
        assert exit_.code == 0
assert not {"torch", "transformers", "huggingface_hub", "numpy", "hf_approx"} & set(sys.modules), sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage") == 4
    assert (hf_approx_cli.MAX_BITS, hf_approx_cli.STEPS) == (MAX_BITS, STEPS)

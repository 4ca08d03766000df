"""Recipes as real processes on a tiny model and a CSV file."""

import csv
import json
import shutil

import pytest
import yaml
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

import hf_approx  # noqa: F401 - registers the packed format
import optimizer_sweep
import text_classification
import ticket_search
from common import RecipeConfig
from config_files import ConfigError, read_yaml
from helpers import ROOT, launch, python
from models import build
from splits import load_data

RECIPE = ROOT / "recipes" / "text_classification.py"
WORDS = ["good", "fine", "nice", "bad", "awful", "poor"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file, with everything it names beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    build("bert").bert.save_pretrained(folder / "model")
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder / "model")
    for name, rows in (("train", 64), ("eval", 24)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["first", "second", "verdict"])
            for i in range(rows):
                word = WORDS[i % 6]
                writer.writerow([word, f"very {word}", "up" if i % 6 < 3 else "down"])
    data = {
        "model": str(folder / "model"),
        "dataset": {
            "path": "csv",
            "data_files": {"train": str(folder / "train.csv"), "held_out": str(folder / "eval.csv")},
        },
        "text_columns": ["first", "second"],
        "label_column": "verdict",
        "eval_split": "held_out",
        "training": {"max_steps": 10, "learning_rate": 1e-3, "use_cpu": True, "per_device_eval_batch_size": 8},
        "optimizer": {"lr": 0.1, "eps": 1e-3},
        "approx": [{"method": "sparsification", "target_sparsity": 0.8}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_text_classification(config, tmp_path, processes):
    result = launch(RECIPE, "--config", config, "--output_dir", tmp_path, processes=processes)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["dense"]["sparsity"] == 0
    assert rows["compressed"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert rows["compressed"]["bytes"] < rows["compressed"]["dense_bytes"] < rows["dense"]["bytes"]
    for name, row in rows.items():
        assert row["reloaded_equal"] is True
        assert 0 <= row["accuracy"] <= 1
        assert f"{row['accuracy']:.4f}" in result.stdout
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert model.config.id2label == {0: "down", 1: "up"}


@pytest.mark.parametrize(("kinds", "halved"), [(["layer"], 1), (["head", "neuron"], 2)], ids=str)
def test_the_dense_size_counts_what_was_removed(config, tmp_path, kinds, halved):
    """Layers leave a plain model in its own dtype, BERT's heads one that is packed in half precision."""
    approx = [{"method": "sparsification", "granularity": kind, "target_sparsity": 0.5} for kind in kinds]
    options = ["--config", str(config), "--output_dir", str(tmp_path), "--set", f"approx={json.dumps(approx)}"]
    assert text_classification.main(options) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["compressed"]["dense_bytes"] == rows["dense"]["dense_bytes"] // halved
    assert rows["compressed"]["bytes"] < rows["compressed"]["dense_bytes"]
    assert rows["compressed"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert rows["compressed"]["reloaded_equal"] is True


def train_command(config, folder, *options):
    code = "from hf_approx.cli import main; main()"
    return python(code, "train", config, "--output_dir", folder, *options, check=False, cwd=folder)


NOISE = ("Loading weights", "Writing model shards", "LOAD REPORT", "were not passed", "pin_memory", "hashed")
"""What nobody can do anything about."""


def test_train_command_runs_a_recipe_with_overrides(config, tmp_path):
    options = ["baseline=false", "approx.0.target_sparsity=0.5", "training.use_cpu=false"]
    options = [part for option in options for part in ("--set", option)]
    result = train_command(config, tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert not [words for words in NOISE if words in result.stdout + result.stderr]
    assert f"hf-approx inspect {tmp_path}/compressed\n" in result.stdout
    assert f"hf-approx push {tmp_path}/compressed USER/NAME\n" in result.stdout
    rows = json.loads((tmp_path / "results.json").read_text())
    assert list(rows) == ["compressed"]
    assert rows["compressed"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_train_command_passes_smoke_and_resume_on(config, tmp_path):
    """Without `--smoke` it would train three epochs of 8 batches, without `--resume` the first steps again."""
    options = ["baseline=false", "training.max_steps=-1", "training.save_strategy=steps", "training.save_steps=3"]
    options = [part for option in options for part in ("--set", option)]
    arguments = ["--config", str(config), "--output_dir", str(tmp_path), *options]
    assert text_classification.main([*arguments, "--set", "training.num_train_epochs=1"]) == 0
    checkpoints = tmp_path / "compressed-checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    for step in (3, 8):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    result = train_command(config, tmp_path, "--smoke", "--resume", *options)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint-6", "checkpoint-8"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=x", "unknown option 'modle' (did you mean 'model'?); known: approx, "),
        ("text_columns=[title]", "no column 'title'; it has first, second, verdict"),
        (
            "eval_split=test",
            "no split 'test'; it has held_out, train: set eval_split, or give data_files a file for each",
        ),
        (
            "approx.0.method=magic",
            "got 'magic'",
        ),
        ("approx.0.target_sparsty=0.5", "unknown option 'target_sparsty' (did you mean 'target_sparsity'?)"),
        ("approx.0.target_sparsity=2", "target_sparsity must be between 0 and 1, got 2"),
        ("optimizer.lr=-1", "lr must be a finite number >= 0"),
        ("optimizer.lr=fast", "optimizer: "),
        ("training.max_steps=x", "training: max_steps must be an integer, got 'x'"),
        ("training.lr_scheduler_type=x", "training: x is not a valid SchedulerType"),
        (
            "training.optim=adafactor",
            "optimizer: AvaGrad is asked for, and training names the optim 'adafactor'; leave",
        ),
        ("training.nonsense=1", "TrainingArguments has no option 'nonsense'."),
        ("training.learning_rat=1", "has no option 'learning_rat' (did you mean 'learning_rate'?)."),
        ("max_train_samples=x", "max_train_samples must be an integer or null, got 'x'"),
        (
            "model=/no/such/model",
            "model: the folder '/no/such/model' does not exist; give the folder of a saved model",
        ),
        ("dataset.split=train", "leave out 'split'"),
        ("dataset={python: 5}", "dataset: cannot load 5"),
        ("dataset={}", "dataset: give path, for datasets.load_dataset, or python"),
        ("dataset={path: no/such, nonsense: 1}", "dataset: cannot load 'no/such': "),
        ("dataset.streaming=true", "dataset: this recipe cannot stream"),
        ("dataset={python: 'nowhere:load'}", "cannot load 'nowhere:load'"),
        ("approx.0.target_modules=[nowhere]", "No module of BertForSequenceClassification matches"),
        ("store_dtype=int4", "not 'int4'"),
        ("dtype=int8", "dtype must be one of float32, auto, bfloat16, float16, got 'int8'"),
        ("fold={layers: 0}", "fold: layers must be above 0, got 0"),
        ("fold={threshold: high}", "fold: threshold must be a number or null, got 'high'"),
        ("fold={layers: 1, threshold: 0.9}", "fold: give threshold or layers, not both"),
        ("fold={num_train_epochs: -1}", "fold: num_train_epochs must be >= 0, got -1"),
        ("fold={space: outer}", "fold: space must be coefficients or weights, got 'outer'"),
        ("fold={epochs: 1}", "fold: unknown option 'epochs'"),
        ("fold={layers: 1}", "fold: nothing to fold without the method 'sharing'"),
        ("model=package:no_such_package/x", "'no_such_package' is not installed"),
        ("model=package:hf_approx/nowhere", "model: the package 'hf_approx' has no folder 'nowhere'."),
        ("model=package:hf_approx/loops", "model: 'package:hf_approx/loops' has no config.json, so it is no saved"),
        ("model=no-such-model", "model: 'no-such-model' is no folder in /"),
        ("metric=acuracy", "metric: cannot load 'acuracy': "),
        ("training.report_to=[wandb]", "training: WandbCallback requires wandb to be installed."),
        ("approx.7.method=x", "no place 'approx.7.method': approx is a list of length 1"),
        ("approx.1.method=smol", "which --set cannot make longer; set the whole list, approx=[...]"),
        ("approx.1={method: smol}", "no place 'approx.1': approx is a list of length 1"),
        (
            "approx.target_sparsity=0.5",
            "approx is a list; say which entry, counted from 0: approx.0.target_sparsity=0.5.",
        ),
        ("text_columns.x=0", "text_columns is a list; say which entry, counted from 0: text_columns.0.x=0."),
        ("dataset.path.x=0", "no place 'dataset.path.x'"),
        ("card.licence=mit", "card: unknown option 'licence' (did you mean 'license'?); known: model_name, repo_id, "),
        ("nonsense", "--set needs KEY=VALUE"),
    ],
)
def test_a_wrong_config_is_one_line(config, tmp_path, capsys, override, message):
    code = text_classification.main(["--config", str(config), "--output_dir", str(tmp_path), "--set", override])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_config_of_another_recipe_is_told_which(config, tmp_path, capsys):
    options = {"dataset": {"path": "text", "data_files": {"train": "a.txt", "validation": "b.txt"}}, "approx": []}
    for name, more in {
        "language_modeling": {"model": {"type": "llama"}, "tokenizer": "bytes"},
        "image_classification": {"model": {"type": "vit"}, "flip": True},
    }.items():
        other = tmp_path / f"{name}.yaml"
        other.write_text(yaml.safe_dump({**options, **more}))
        assert text_classification.main(["--config", str(other)]) == 2
        assert f"It would be right for another recipe: --recipe {name}.\n" in capsys.readouterr().err
    assert text_classification.main(["--config", str(config), "--set", "txt=1"]) == 2
    assert "unknown option 'txt'" in (told := capsys.readouterr().err)
    assert "right for another" not in told


@pytest.mark.parametrize(("name", "loader"), [("rows.csv", "csv"), ("rows.jsonl", "json"), ("rows.txt", "text")])
def test_a_file_of_data_is_no_data_set(config, tmp_path, capsys, name, loader):
    path = tmp_path / name
    path.write_text("first,second,verdict\n")
    options = ["--config", str(config), "--output_dir", str(tmp_path / "out"), "--set", f"dataset={{path: {path}}}"]
    assert text_classification.main(options) == 2
    splits = f"{{train: {path}, held_out: ...}}"
    printed = capsys.readouterr().err
    assert printed == f"error: dataset: '{path}' is a file; write {{path: {loader}, data_files: {splits}}}.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("approx", ["approx=[]", "approx.0.target_sparsity=0.5"])
def test_sweep_of_the_text_recipe(config, tmp_path, approx):
    options = ["--set", f"config={config}", "--set", f"options={json.dumps([approx, 'training.max_steps=2'])}"]
    options += ["--set", "eps_decades=[-3,-3]", "--set", "lr_decades=[-2,-1]", "--set", "lrs_per_decade=1"]
    sweep = ROOT / "recipes" / "configs" / "sweep_words.yaml"
    assert optimizer_sweep.main(["--config", str(sweep), "--output_dir", str(tmp_path), *options]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    runs = {(run["optimizer"], run["lr"]): run for run in data["trainings"]}
    assert {lr for name, lr in runs if name == "avagrad"} == {0.01, 0.1, 1.0}
    assert len({run["loss"] for run in runs.values()}) == len(runs)
    assert all(run["gradient"] > 0 for run in runs.values())
    assert all(0 <= run["accuracy"] <= 1 for run in runs.values())


TICKETS = ROOT / "recipes" / "configs" / "tickets_digits.yaml"
SHORT = ["--set", "epochs=1", "--set", "rounds=2", "--set", "rewind_epoch=0"]


def test_ticket_search(tmp_path, capsys):
    options = ["--config", str(TICKETS), "--output_dir", str(tmp_path), *SHORT, "--set", "sparsity=0.7"]
    assert ticket_search.main(options) == 0
    rows = json.loads((tmp_path / "results-0.json").read_text())
    assert list(rows) == ["dense", "continuous", "magnitude"]
    printed = capsys.readouterr().out
    for name in ("continuous", "magnitude"):
        assert rows[name]["sparsity"] == pytest.approx(0.7, abs=1e-3)
        assert f"{rows[name]['accuracy']:.4f}" in printed


def test_ticket_search_from_several_initial_scores(tmp_path, capsys):
    config = TICKETS.with_name("tickets_digits_pareto.yaml")
    scores = "initial_scores=[-0.3, 0.3]"
    options = ["--config", str(config), "--output_dir", str(tmp_path), *SHORT, "--set", scores]
    assert ticket_search.main(options) == 0
    rows = json.loads((tmp_path / "results-0.json").read_text())
    dense, *front = rows
    assert dense == "dense"
    assert set(front) <= {"continuous, s0 = -0.3", "continuous, s0 = 0.3"}
    assert [rows[name]["sparsity"] for name in front] == sorted(rows[name]["sparsity"] for name in front)
    printed = capsys.readouterr().out
    assert all(name in printed for name in front)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewind_epoch=15", "rewind_epoch 15 lies beyond a round of 15 epochs"),
        ("methods=[movement]", "methods must be continuous or magnitude"),
        ("sparsity=null", "give sparsity or initial_scores"),
        ("initial_scores=[0.1]", "give sparsity or initial_scores"),
        ("sparsity=2", "target_sparsity must be between 0 and 1"),
        ("rounds=0", "rounds must be an integer >= 1"),
        ("mask_lr=-1", "mask_lr must be a finite number >= 0"),
        ("batch_size=none", "batch_size must be an integer, got 'none'"),
        ("lr=fast", "lr must be a number, got 'fast'"),
        ("sparsty=0.5", "unknown option 'sparsty'"),
    ],
)
def test_a_wrong_ticket_config_is_one_line(capsys, override, message):
    assert ticket_search.main(["--config", str(TICKETS), "--set", override]) == 2
    assert message in capsys.readouterr().err


def test_a_ticket_config_must_say_everything(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("{methods: [magnitude], rounds: 1, sparsity: 0.5}")
    assert ticket_search.main(["--config", str(path)]) == 2
    assert "batch_size, epochs, lr, mask_lr, rewind_epoch, seed, weight_decay must be given" in capsys.readouterr().err


def test_nothing_to_train_is_an_error(config, capsys):
    arguments = ["--config", str(config), "--set", "baseline=false", "--set", "approx=[]"]
    assert text_classification.main(arguments) == 2
    assert "nothing to train" in capsys.readouterr().err


def test_numbers_may_lack_a_point(config):
    options = read_yaml(RecipeConfig, config, ["optimizer.lr=1e-3", "approx.0.target_sparsity=9e-1"])
    assert options.avagrad().lr == 0.001
    assert options.methods()[0].target_sparsity == 0.9
    assert read_yaml(RecipeConfig, config, ["label_column=e3"]).label_column == "e3"


def test_both_splits_share_one_table_of_classes(tmp_path):
    for name, labels in (("train", ["bad", "good", "mixed"]), ("eval", ["mixed", "bad"]), ("odd", ["new"])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *[["x", label] for label in labels]])
    files = {split: str(tmp_path / f"{split}.csv") for split in ("train", "eval", "odd")}
    config = RecipeConfig("m", ["text"], dataset={"path": "csv", "data_files": files}, eval_split="eval")
    data = load_data(config)
    assert data["train"]["label"][:] == [0, 1, 2]
    assert data["validation"]["label"][:] == [2, 0]
    config.eval_split = "odd"
    message = r"odd\.csv: 1 of 1 rows have a class that training lacks, the first is row 1, 'new'"
    with pytest.raises(ConfigError, match=message):
        load_data(config)


def test_resuming_continues_from_the_checkpoints(config, tmp_path, capsys):
    arguments = ["--config", str(config), "--output_dir", str(tmp_path)]
    assert text_classification.main([*arguments, "--resume"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    saving = ["--set", "training.save_strategy=steps", "--set", "training.save_steps=4"]
    assert text_classification.main([*arguments, *saving]) == 0
    first = json.loads((tmp_path / "results.json").read_text())
    for name in ("dense", "compressed"):
        shutil.rmtree(tmp_path / f"{name}-checkpoints" / "checkpoint-10")
    assert text_classification.main([*arguments, *saving, "--resume"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    for name, row in first.items():
        assert {**again[name], "load_seconds": 0} == {**row, "load_seconds": 0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_config_ends_within_two_points_of_dense(tmp_path):
    config = ROOT / "recipes" / "configs" / "words_sparse90.yaml"
    launch(RECIPE, "--config", config, "--output_dir", tmp_path, timeout=1700)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["dense"]["accuracy"] > 0.92
    assert rows["compressed"]["accuracy"] > rows["dense"]["accuracy"] - 0.02
    assert rows["compressed"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert rows["compressed"]["bytes"] < 1.1 * rows["compressed"]["bound_bytes"]


def test_a_missing_config_is_one_line(tmp_path, capsys):
    assert text_classification.main(["--config", str(tmp_path / "no.yaml")]) == 2
    assert "Cannot read" in capsys.readouterr().err


def test_sharing_and_folding(config, tmp_path):
    data = yaml.safe_load(config.read_text())
    data["approx"] = [{"method": "sharing", "templates": 2}]
    data["fold"] = {"layers": 1, "num_train_epochs": 1}
    data["baseline"] = False
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    result = launch(RECIPE, "--config", path, "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert list(rows) == ["compressed", "folded", "folded-tuned"]
    assert rows["folded"]["parameters"] == rows["folded-tuned"]["parameters"] < rows["compressed"]["parameters"]
    assert rows["folded"]["bytes"] < rows["compressed"]["bytes"]
    assert all(row["reloaded_equal"] for row in rows.values())
    assert "encoder.layer: [A] x 2" in result.stdout

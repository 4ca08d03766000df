"""Data as people have them: what is wrong is one sentence before a model is loaded, what is only odd is taken."""

import csv
import dataclasses
import json
import logging

import evaluate
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import f1_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

import image_classification
import language_modeling
import loading
import text_classification
import translation
from common import RecipeConfig, metric_path
from config_files import ConfigError, read_yaml
from helpers import python
from hf_approx import attach_packing
from models import build
from splits import load_data

WORDS = ["good", "fine", "bad", "awful", "mixed", "plain"]
ROWS = [(f"very {WORDS[i % 6]} {i}", ("up", "down", "even")[i % 6 // 2]) for i in range(48)]


def write_csv(path, rows, header=("text", "label"), encoding="utf-8", **options):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, **options).writerows([header, *rows])


def write_json(path, rows):
    path.write_text("".join(json.dumps(dict(zip(("text", "label"), row, strict=False))) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with their tokenizers, and a config of good data."""
    folder = tmp_path_factory.mktemp("data")
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    two = build("bert")
    for name, model in (("two", two), ("body", build("bert").bert)):
        model.save_pretrained(folder / name)
        BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder / name)
    for name, special in (("endless", {"eos_token": "<end>", "unk_token": "<unk>"}), ("padless", {})):
        tokens = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / name)
        build("gpt2").save_pretrained(folder / name)
    write_csv(folder / "train.csv", ROWS)
    write_csv(folder / "good.csv", ROWS[:24])
    write_json(folder / "good.jsonl", ROWS[:24])
    config = {
        "model": str(folder / "body"),
        "dataset": {
            "path": "csv",
            "data_files": {"train": str(folder / "train.csv"), "validation": str(folder / "good.csv")},
        },
        "text_columns": ["text"],
        "training": {"max_steps": 2, "use_cpu": True},
        "approx": [{"method": "sparsification", "target_sparsity": 0.5}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def others():
    """What `datasets` says beside the errors it raises."""
    records, logger = [], logging.getLogger("datasets")
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def main(module, config, capsys, output, *sets):
    arguments = ["--config", str(config), "--output-dir", str(output)]
    code = module.main([*arguments, *(part for value in sets for part in ("--set", value))])
    printed = capsys.readouterr()
    return code, printed.out, [line for line in printed.err.replace("\r", "\n").splitlines() if "error:" in line]


def split_rows(rows, *numbers, text=None, label=None):
    """Rows of which some have another text or label."""
    return [
        (row[0] if text is None or i not in numbers else text, row[1] if label is None or i not in numbers else label)
        for i, row in enumerate(rows)
    ]


CSV_FAULTS = {
    "empty text": (
        lambda p: write_csv(p, split_rows(ROWS, 4, 9, text="")),
        "{file}: 2 of 48 rows have an empty 'text', the first is row 5, {{'text': None, 'label': 'even'}}; fill or",
    ),
    "blank text": (lambda p: write_csv(p, split_rows(ROWS, 7, text="  ")), "1 of 48 rows have an empty 'text'"),
    "NA as a word": (
        lambda p: write_csv(p, split_rows(ROWS, 0, text="None")),
        "the first is row 1, {{'text': None, 'label': 'up'}}; fill or remove them; dataset.keep_default_na=false",
    ),
    "empty label": (
        lambda p: write_csv(p, split_rows(ROWS, 47, label="")),
        "1 of 48 rows have an empty 'label', the first is row 48",
    ),
    "no labels": (
        lambda p: write_csv(p, [(text, "") for text, _ in ROWS]),
        "48 of 48 rows have an empty 'label', the first is row 1",
    ),
    "one label": (
        lambda p: write_csv(p, [(text, "up") for text, _ in ROWS]),
        "{file}: 'label' is 'up' in every row; a classifier needs two classes",
    ),
    "fractions": (
        lambda p: write_csv(p, [(text, i + 0.5 if i else 1) for i, (text, _) in enumerate(ROWS)]),
        "'label' is a fraction in 47 of 48 rows, the first is 1.5, and no class",
    ),
    "numbers as texts": (
        lambda p: write_csv(p, [(i, label) for i, (_, label) in enumerate(ROWS)]),
        "{file}: the column 'text' holds int64, no texts.",
    ),
    "numbers against names": (
        lambda p: write_csv(p, [(text, len(label)) for text, label in ROWS]),
        "good.csv: 24 of 24 rows have a class that training lacks, the first is row 1, 'up'.",
    ),
    "semicolons": (
        lambda p: write_csv(p, ROWS, delimiter=";"),
        '{file} has all in one column, \'text;label\'; its columns are separated by ";": write {{path: csv, sep: ";"',
    ),
    "tabs": (lambda p: write_csv(p, ROWS, delimiter="\t"), 'its columns are separated by "\\t"'),
    "semicolons beside commas": (
        lambda p: write_csv(p, [(f"{text}, really, yes", label) for text, label in ROWS], delimiter=";"),
        'its columns are separated by ";"',
    ),
    "twice": (
        lambda p: write_csv(p, [(*row, row[1]) for row in ROWS], ("text", "label", "label")),
        "{file} has the column 'label' twice; rename or remove one.",
    ),
    "no header": (
        lambda p: write_csv(p, ROWS[1:], ROWS[0]),
        "{file}: no column 'label'; it has very good 0, up; if the first line of the file is no header, name them: ",
    ),
    "latin-1": (
        lambda p: write_csv(p, [*ROWS[:5], ("très", "up")], encoding="latin-1"),
        "{file} is not UTF-8, the first other byte is in line 7; set dataset.encoding=latin-1",
    ),
    "utf-16": (lambda p: write_csv(p, ROWS, encoding="utf-16"), "set dataset.encoding=utf-16"),
    "header only": (lambda p: write_csv(p, []), "{file} has no rows, only the line 'text, label'."),
    "nothing": (lambda p: p.write_text(""), "{file} is empty."),
    "no file": (lambda p: None, "there is no file '{file}'."),
    "ragged": (
        lambda p: p.write_text("text,label\na,up\nb,down\nc,d,e,f\n"),
        "{file} cannot be read: Expected 2 fields in line 4, saw 4; a text with commas needs quotation marks around",
    ),
    "open quotation": (
        lambda p: p.write_text('text,label\na,up\n"b,down\nc,up\n'),
        "{file} cannot be read: the quotation mark that row 2 opens is never closed.",
    ),
}
JSON_FAULTS = {
    "no label in one row": (
        lambda p: write_json(p, [row if i != 7 else row[:1] for i, row in enumerate(ROWS)]),
        "{file}: 1 of 48 rows have an empty 'label', the first is row 8",
    ),
    "lists": (
        lambda p: write_json(p, [(text, [label]) for text, label in ROWS]),
        "{file}: the column 'label' holds List(Value('string')); a row has one class",
    ),
    "broken": (
        lambda p: p.write_text('{"text": "a", "label": "up"}\n{"text": "b", "la'),
        "{file} cannot be read: line 2, column 15 is no JSON: Unterminated string.",
    ),
    "broken in the middle": (
        lambda p: p.write_text('{"text": "a", "label": "up"}\n{"text": "b", "label":\n{"text": "c", "label": "up"}\n'),
        "{file} cannot be read: line 2, column 23 is no JSON: Expecting value.",
    ),
    "a list of rows, broken": (
        lambda p: p.write_text('[\n {"text": "a", "label": "up"},\n {"text": "b" "label": "down"}\n]\n'),
        "{file} cannot be read: line 3, column 15 is no JSON: Expecting ',' delimiter.",
    ),
    "rows under a name": (
        lambda p: p.write_text(json.dumps({"rows": [{"text": "a", "label": "up"}, {"text": "b", "label": "down"}]})),
        "no column 'label'; it has rows; if the rows are in a list under 'rows', say so: dataset.field=rows.",
    ),
    "labels of two kinds": (
        lambda p: write_json(p, [(text, i if i % 2 else label) for i, (text, label) in enumerate(ROWS)]),
        "{file}: the column 'label' holds values of several kinds; a row has one class",
    ),
}


@pytest.mark.parametrize("name", [*CSV_FAULTS, *JSON_FAULTS])
def test_bad_files_and_rows_are_one_line_before_anything_is_loaded(
    name, folder, tmp_path, capsys, monkeypatch, others
):
    monkeypatch.setattr(text_classification.AutoTokenizer, "from_pretrained", None)
    kind, write, message = ("csv", *CSV_FAULTS[name]) if name in CSV_FAULTS else ("json", *JSON_FAULTS[name])
    file = tmp_path / ("bad.csv" if kind == "csv" else "bad.jsonl")
    write(file)
    good = folder / ("good.csv" if kind == "csv" else "good.jsonl")
    data = f"dataset={{path: {kind}, data_files: {{train: {file}, validation: {good}}}}}"
    code, _, errors = main(text_classification, folder / "config.yaml", capsys, tmp_path / "out", data)
    assert code == 2
    assert len(errors) == 1
    assert message.format(file=file) in errors[0]
    assert errors[0].count("dataset: ") == 1
    assert others == []
    assert not (tmp_path / "out").exists()


def test_bars_are_for_what_takes_long(folder, tmp_path, capsys, monkeypatch):
    read = read_yaml(RecipeConfig, folder / "config.yaml")
    loading.quiet()
    # With another length each, since what was made before is only read.
    for length, rows, expected in ((5, len(ROWS) + 1, False), (6, len(ROWS), True)):
        monkeypatch.setattr("loading.LONG", rows)
        text_classification.Recipe(dataclasses.replace(read, max_length=length), str(tmp_path))
        shown = capsys.readouterr().err
        assert ("Map" in shown) == expected
        assert "Generating" not in shown


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["text_columns=[txt]"], "train.csv: no column 'txt'; it has text, label; if"),
        (["text_columns=[label]", "label_column=text"], "'text' has 48 different values in 48 rows, the first is"),
        (["text_columns=[a, b, c]"], "text_columns must be one column or two, got ['a', 'b', 'c']"),
        (["text_columns=[label]"], "text_columns: 'label' is the label_column"),
        (["dataset.encoding=klingon"], "encoding 'klingon' is none that Python knows"),
        (["dataset.data_files={train: nowhere.csv}"], "there is no file 'nowhere.csv' in /"),
        (["dataset.path=json"], "train.csv is not for path: json; write path: csv."),
        (["dataset.path=cvs"], "cannot load 'cvs' (did you mean 'csv'?): "),
        (["dataset.data_file=a.csv"], "dataset: 'csv' has no option 'data_file' (did you mean 'data_files'?)."),
    ],
)
def test_columns_and_options_that_cannot_be(folder, tmp_path, capsys, sets, message):
    code, _, errors = main(text_classification, folder / "config.yaml", capsys, tmp_path, *sets)
    assert code == 2
    assert message in errors[0]


def test_a_class_that_training_lacks(folder, tmp_path, capsys):
    file = tmp_path / "odd.csv"
    write_csv(file, split_rows(ROWS, 5, 6, label="new"))
    code, _, errors = main(
        text_classification, folder / "config.yaml", capsys, tmp_path / "out", f"dataset.data_files.validation={file}"
    )
    assert code == 2
    assert f"{file}: 2 of 48 rows have a class that training lacks, the first is row 6, 'new'." in errors[0]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([2, 10, 30], ["2", "10", "30"]),
        ([0.0, 1.0, 2.0], ["0", "1", "2"]),
        ([True, False, True], ["False", "True"]),
        ([-1, 0, 1], ["-1", "0", "1"]),
        (["10", "9", "x"], ["10", "9", "x"]),
    ],
    ids=str,
)
def test_labels_of_any_kind_become_numbers_from_zero(folder, tmp_path, labels, names):
    of = dict(zip(("up", "down", "even"), labels, strict=True))
    for name in ("train", "validation"):
        write_json(tmp_path / f"{name}.jsonl", [(text, of[label]) for text, label in ROWS])
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    config = RecipeConfig("m", ["text"], dataset={"path": "json", "data_files": files})
    data = load_data(config)
    for split in ("train", "validation"):
        assert data[split].features["label"].names == names
        rewritten = [int(x) if isinstance(x, float) else x for x in (of[label] for _, label in ROWS)]
        assert [names[number] for number in data[split]["label"]] == list(map(str, rewritten))


def test_odd_files_are_read_as_the_config_says(folder, tmp_path):
    write_csv(tmp_path / "bom.csv", ROWS, encoding="utf-8-sig")
    write_csv(tmp_path / "semicolons.csv", ROWS, delimiter=";", encoding="latin-1")
    write_csv(tmp_path / "bare.csv", ROWS[1:], ROWS[0])
    write_csv(tmp_path / "words.csv", split_rows(ROWS, 3, text="NA", label="None"))
    for name, options in (
        ("bom", {}),
        ("semicolons", {"sep": ";", "encoding": "latin-1"}),
        ("bare", {"column_names": ["text", "label"]}),
        ("words", {"keep_default_na": False}),
    ):
        files = dict.fromkeys(("train", "validation"), str(tmp_path / f"{name}.csv"))
        data = load_data(RecipeConfig("m", ["text"], dataset={"path": "csv", "data_files": files, **options}))
        assert len(data["train"]) == 48
        assert data["train"].column_names == ["text", "label"]


def test_files_may_differ_in_columns_of_no_use(folder, tmp_path):
    write_csv(tmp_path / "more.csv", [(*row, i) for i, row in enumerate(ROWS)], ("text", "label", "number"))
    files = {"train": str(tmp_path / "more.csv"), "validation": str(folder / "good.csv")}
    data = load_data(RecipeConfig("m", ["text"], dataset={"path": "csv", "data_files": files}))
    assert [len(data[split]) for split in ("train", "validation")] == [48, 24]


def recipe(folder, *sets):
    return text_classification.Recipe(read_yaml(RecipeConfig, folder / "config.yaml", sets), str(folder / "out"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_of_two_classes_gets_a_head_of_three(folder, tmp_path, packed):
    two = build("bert")
    two.config.problem_type = "multi_label_classification"
    if packed:
        with torch.no_grad():
            two.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0
        attach_packing(two, ["bert.encoder.layer.0.output.dense.weight"], "float32")
    two.save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder / "two").save_pretrained(tmp_path)
    model = recipe(folder, f"model={tmp_path}").model()
    assert model.classifier.weight.shape == (3, 32)
    assert model.config.id2label == {0: "down", 1: "even", 2: "up"}
    assert model.config.problem_type == "single_label_classification"
    for name, value in two.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value), name


def test_a_packed_head_of_other_classes_is_refused_with_the_way_out(folder, tmp_path):
    two = build("bert")
    with torch.no_grad():
        two.classifier.weight[:, ::2] = 0
    attach_packing(two, ["classifier.weight"], "float32")
    two.save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder / "two").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"'classifier.weight'.* first: hf-approx decompress {tmp_path} FOLDER\."):
        recipe(folder, f"model={tmp_path}").model()


def test_a_body_of_another_shape_is_refused(folder, tmp_path):
    build("bert").save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(folder / "two").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ConfigError, match=r"does not fit its own config: 'bert\..*' has another shape"):
        recipe(folder, f"model={tmp_path}").model()


def test_a_language_model_without_padding_trains_as_a_classifier(folder, tmp_path, capsys):
    code, out, errors = main(
        text_classification, folder / "config.yaml", capsys, tmp_path, f"model={folder / 'endless'}", "baseline=false"
    )
    assert (code, errors) == (0, [])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["compressed"]["reloaded_equal"] is True
    assert {"accuracy", "macro_f1"} <= rows["compressed"].keys()
    saved = json.loads((tmp_path / "compressed" / "config.json").read_text())
    assert saved["pad_token_id"] == 1
    assert out.endswith(
        f"Saved in {tmp_path}: results.json\n  {tmp_path}/compressed: {rows['compressed']['bytes']:,} bytes\n"
        f"Look at a model:  hf-approx inspect {tmp_path}/compressed\n"
        f"Publish it:       hf-approx push {tmp_path}/compressed USER/NAME\n"
    )


def test_a_tokenizer_that_cannot_pad_is_refused(folder):
    with pytest.raises(ConfigError, match="has no token to pad with, nor one for the end or for unknown words"):
        recipe(folder, f"model={folder / 'padless'}")


def test_inputs_are_cut_to_what_the_model_takes(folder, tmp_path):
    long = [(f"{text} " * 40, label) for text, label in ROWS]
    write_csv(tmp_path / "long.csv", long)
    data = recipe(folder, f"dataset.data_files.train={tmp_path / 'long.csv'}", "max_length=500").data
    assert max(map(len, data["train"]["input_ids"])) == 32


def test_a_second_run_reads_what_the_first_tokenized(folder):
    recipe(folder)
    text = {"model": str(folder / "endless"), "block_size": 8, "training": {"max_steps": 1, "use_cpu": True}}
    data = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "lm.yaml").write_text(yaml.safe_dump({**text, "dataset": data["dataset"], "approx": data["approx"]}))
    config = read_yaml(language_modeling.LanguageModelConfig, folder / "lm.yaml")
    first = language_modeling.LanguageModel(config, str(folder / "out")).data["train"]["input_ids"][:]
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
import language_modeling, text_classification
from config_files import read_yaml
from common import RecipeConfig

def never(self, batch):
    raise AssertionError("tokenized again")

text_classification.Tokenize.__call__ = language_modeling.Cut.__call__ = never
text_classification.Recipe(read_yaml(RecipeConfig, sys.argv[2] + "/config.yaml"), "out")
config = read_yaml(language_modeling.LanguageModelConfig, sys.argv[2] + "/lm.yaml")
print(json.dumps(language_modeling.LanguageModel(config, "out").data["train"]["input_ids"][:]))
"""
    again = python(code, text_classification.__file__.rpartition("/")[0], folder)
    assert json.loads(again.stdout.splitlines()[-1]) == first
    assert "hashed" not in again.stderr


def test_macro_f1_is_that_of_scikit_learn():
    metric = evaluate.load(metric_path("metrics/accuracy_f1.py"))
    generator = np.random.default_rng(0)
    for classes in (2, 3, 7):
        true, said = generator.integers(0, classes, 40), generator.integers(0, classes, 40)
        found = metric.compute(predictions=said, references=true)
        assert found["macro_f1"] == pytest.approx(f1_score(true, said, average="macro"))
        assert found["accuracy"] == pytest.approx((true == said).mean())
    lazy = metric.compute(predictions=[0] * 10, references=[0] * 9 + [1])
    assert (lazy["accuracy"], lazy["macro_f1"]) == (0.9, pytest.approx(0.9 / 1.9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "train" / "cat" / "bad.png").write_bytes(b"nope"),
            "1 of 9 images cannot be read, the first is",
        ),
        (lambda f: (f / "train" / "dog" / "empty.png").touch(), "train/dog/empty.png; remove or replace them."),
        (lambda f: (f / "validation").rename(f / "other"), "or put the images into folders train and validation."),
    ],
    ids=["broken", "empty", "one split"],
)
def test_folders_of_images(tmp_path, capsys, change, message):
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    change(tmp_path / "images")
    config = {
        "model": {"type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "dataset": {"path": "imagefolder", "data_dir": str(tmp_path / "images")},
        "image_size": 16,
        "approx": [{"method": "sparsification"}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, errors = main(image_classification, tmp_path / "config.yaml", capsys, tmp_path / "out")
    assert code == 2
    assert message in errors[0]


def test_missing_texts_of_the_other_recipes(folder, tmp_path, capsys):
    write_csv(tmp_path / "pairs.csv", [("one", "eins"), ("two", ""), ("", "")], ("source", "target"))
    dataset = {"path": "csv", "data_files": dict.fromkeys(("train", "validation"), str(tmp_path / "pairs.csv"))}
    config = {"model": {"type": "marian"}, "dataset": dataset, "approx": [{"method": "sparsification"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, errors = main(translation, tmp_path / "config.yaml", capsys, tmp_path / "out", "target_column=target")
    assert code == 2
    assert (
        "pairs.csv: 1 of 3 rows have no text in 'source', the first is row 3, None; fill or remove them." in errors[0]
    )
    config |= {"model": {"type": "llama"}, "tokenizer": "bytes", "text_column": "target"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, errors = main(language_modeling, tmp_path / "config.yaml", capsys, tmp_path / "out")
    assert code == 2
    assert "pairs.csv: 2 of 3 rows have no 'target', the first is row 2" in errors[0]

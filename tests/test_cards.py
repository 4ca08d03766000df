import json
import re
import shutil
import unicodedata

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from helpers import ROOT, make_trainer
from hf_approx import SharingConfig, SmolConfig, SparsificationConfig, UniformQuantizationConfig, attach_packing
from hf_approx.cards import auto_class, escape, one_line, render_card, task_of, write_card
from hf_approx.cli import main
from hf_approx.inspection import inspect_checkpoint
from hf_approx.layout import MARKER
from hf_approx.remote_code import loader_files
from models import build, dataset
from sharing import deep_bert

METHOD = {"label": "sparsification", "method": "sparsification", "target_sparsity": 0.5, "sparsity": 0.5}
REPORT = {
    "methods": [{**METHOD, "settings": {"preset": "paper", "target_sparsity": 0.5, "exclude": None}}],
    "kinds": {"query": {"weights": 2048, "sparsity": 0.5}, "key": {"weights": 2048, "sparsity": 0.25, "bits": 3.5}},
    "optimizer": {"method": "avagrad", "lr": 1.0},
    "evaluation": {"metrics": {"accuracy": 0.9375, "loss": float("inf")}, "samples": 64},
    "about": {
        "model_name": "tiny",
        "base_model": "someone/base",
        "license": "mit",
        "datasets": ["someone/words"],
        "dataset_name": "words",
        "steps": 7,
    },
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards") / "packed"
    model = build("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[::2] = 0
    attach_packing(model, ["bert.encoder.layer.0.output.dense.weight"], None)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "model")
    return tmp_path / "model"


def with_report(folder, report, labels=None):
    (folder / "approx_report.json").write_text(json.dumps(report))
    if labels is not None:
        config = json.loads((folder / "config.json").read_text())
        config["id2label"] = dict(enumerate(labels))
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def front_matter(card):
    return yaml.safe_load(REGEX_YAML_BLOCK.search(card).group(2))


def structure(card):
    """What markdown makes of the body: every element, without the texts."""
    shape = []
    for token in MarkdownIt("commonmark").enable("table").parse(card[REGEX_YAML_BLOCK.search(card).end() :]):
        children = [child.type for child in token.children or () if child.type not in ("text", "softbreak")]
        shape.append((token.type, token.tag, children, token.attrs.get("src")))
    return shape


def test_a_card_says_what_the_report_and_the_files_say(folder):
    card = render_card(with_report(folder, REPORT, ["good", "bad"]))
    data = ModelCard(card).data
    assert data.to_dict()["base_model"] == "someone/base"
    assert "\nA smaller version of someone/base, compressed with sparsification while it was trained" in card
    assert data.license == "mit"
    assert data.datasets == ["someone/words"]
    assert data.tags == ["hf_approx", "sparsification", "avagrad"]
    (result,) = data.eval_results  # an infinite loss is no result
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.9375)
    size, dense = (folder / "model.safetensors").stat().st_size, inspect_checkpoint(folder).dense_bytes
    assert f"| weight files on disk | {size:,} |" in card
    assert f"| {dense:,} |" in card
    assert "| kind of layer | weights | sparsity | bits |" in card
    assert "| query | 2,048 | 50.00% | - |" in card
    assert "| key | 2,048 | 25.00% | 3.5 |" in card
    assert "| accuracy | 0.9375 |" in card
    assert "| loss | inf |" in card
    assert "64 examples" in card
    assert "7 optimizer steps" in card
    assert "preset = paper, target_sparsity = 50.00%" in card
    assert "2 labels: good; bad" in card
    assert "savarese2020winning" in card
    assert "savarese2021domain" in card
    assert "savarese2022bits" not in card
    assert "layers.png" not in card
    assert "AutoModelForSequenceClassification" in card
    (folder / "layers.png").write_bytes(b"")
    assert "](layers.png)" in render_card(folder, "me/model")
    loading = render_card(folder, "me/model").split("## How to load")[1]
    assert "pip install hf-approx\n" in loading
    assert "\nimport hf_approx " in loading
    assert '.from_pretrained("me/model")\n' in loading
    assert '.from_pretrained("me/model", trust_remote_code=True)\n' in loading
    assert "PATH_OR_REPO" not in loading


def test_a_card_without_a_report(folder):
    card = render_card(folder)
    assert "No metric" in card
    assert "| output.dense | 2,048 | 50.00% |" in card
    assert "Citation" not in card
    assert front_matter(card)["tags"] == ["hf_approx"]
    assert "model-index" not in front_matter(card)


def test_a_plain_model_needs_no_hf_approx(tmp_path):
    build("llama").save_pretrained(tmp_path)
    card = render_card(tmp_path)
    assert "import hf_approx" not in card
    assert "pip install" not in card
    assert "trust_remote_code" not in card
    assert "AutoModelForCausalLM" in card
    assert front_matter(card)["pipeline_tag"] == "text-generation"


def test_a_class_that_transformers_lacks_has_no_code_to_load_it(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["GeneratorOfImages"]}
    (folder / "config.json").write_text(json.dumps(config))
    card = render_card(folder, "me/model")
    assert "import hf_approx" in card
    assert '", trust_remote_code=True)' not in card
    assert loader_files(folder) == {}


SENTENCES = {
    "compressed": "Compression can change",
    "zeros": "of the packed weights are zero",
    "kept": "Zeros stay zero in training",
    "packed": 'runtime="packed"',
    "bits": "bits on average",
    "rounds": "use `FixedPrecisionConfig`",
    "others": "Weights that are not quantized are stored in float16",
    "float16": "Weights are stored in float16",
    "shares": "fewer parameters in memory",
    "plain": "After `model.dequantize()` every layer has a weight of its own",
    "ours": "only hf_approx loads it",
    "sizes": "Its layers have sizes",
    "inputs": "Its layers quantize their input",
    "stops": "stops with a sentence that says what to import",
    "smaller": "times smaller",
    "before": "Weights that were compressed: ",
}
PACKED = {"compressed", "stops", "smaller", "before"}
QUANTIZED = PACKED | {"bits", "rounds", "others"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ((), set()),
        (SparsificationConfig(target_sparsity=0.8), PACKED | {"zeros", "kept", "packed", "float16"}),
        (UniformQuantizationConfig(bits=4), QUANTIZED),
        (SmolConfig(activations=True), QUANTIZED | {"ours", "inputs"}),
        (SharingConfig(), PACKED | {"shares", "plain", "float16"}),
        # BERT's config cannot express fewer heads, but fewer neurons.
        (
            SparsificationConfig(target_sparsity=0.5, granularity="head"),
            {"compressed", "before", "ours", "sizes", "float16"},
        ),
        (SparsificationConfig(target_sparsity=0.5, granularity="neuron"), {"compressed", "before"}),
    ],
    ids=["dense", "sparse", "quantized", "activations", "shared", "heads", "neurons"],
)
def test_a_card_says_of_each_kind_of_packing_what_is_true_of_it(tmp_path, config, expected):
    model = deep_bert() if isinstance(config, SharingConfig) else None
    trainer = make_trainer("bert", tmp_path, config, model, eval_dataset=dataset("bert", 8), max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    text = " ".join(card.split())
    assert {name for name, sentence in SENTENCES.items() if sentence in text} == expected
    assert ("compressed" in text) == ("compressed" in expected)
    assert "\n\n\n" not in card.split(MARKER)[1].strip()
    if "before" in expected:
        totals = trainer.approx_report["totals"]
        assert f"{totals['dense_bytes']:,} bytes before" in text
        assert f"{totals['packed_bytes']:,} bytes after" in text
    if "bits" in expected:
        assert f"take {inspect_checkpoint(tmp_path).bits:.2f} bits on average" in text
    if "shares" in expected:
        assert "| sharing, bank encoder-layer-output-dense | - | layers = 4, templates = 2 |" in card
        assert max(map(len, card.splitlines())) < 250


def test_a_card_written_by_hand_is_left_alone(folder, capsys):
    assert write_card(folder)
    assert MARKER in (folder / "README.md").read_text()
    assert write_card(folder, "me/model")
    (folder / "README.md").write_text("mine")
    for command in (["card", str(folder)], ["card", str(folder.parent / "nowhere")]):
        with pytest.raises(SystemExit) as exit_:
            main(command)
        assert exit_.value.code == 1
        assert capsys.readouterr().err.startswith("error: ")
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("report", [[], {"methods": [1]}, {"about": []}, {"kinds": {"a": 1}}, {"methods": [{}]}])
def test_a_damaged_report_is_one_error(folder, report):
    with pytest.raises(ValueError, match=r"approx_report\.json"):
        render_card(with_report(folder, report))


HOSTILE = [
    "a\n---\nlicense: mit\n",
    "\r---\r",
    "{{ 7 * 7 }}{% for x in y %}{#",
    "</script><img src=x onerror=alert(1)>",
    "[click](https://evil.example) ![x](y) <https://evil.example> https://evil.example www.evil.example",
    "a | b || c `code` ```\n# heading\n- item",
    "_a_ *b* **c** ~~d~~ &lt; \\",
    "\u202etxt\u2028\x00\x1b[31m\ud800\x85",
    "- 1. > # =",
    "'\"!!python/object/apply:os.system [x]",
    "&a *a : ? @ %TAG",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=40).filter(one_line))


def hostile_report(name, dataset, tag, method, kind, metric, note):
    about = {"model_name": name, "dataset_name": dataset, "tags": [tag], "note": note, "steps": 7}
    return {
        "methods": [{**METHOD, "method": method, "settings": {"preset": name, kind: tag}}],
        "kinds": {kind: {"weights": 5, "sparsity": 0.5, method: 1}},
        "evaluation": {"metrics": {metric: 0.5}, "samples": 2},
        "about": about,
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(texts, min_size=9, max_size=9))
def test_values_cannot_add_markup_or_fields(folder, values):
    expected = render_card(with_report(folder, hostile_report(*["word"] * 7), ["one", "two"]))
    card = render_card(with_report(folder, hostile_report(*values[:7]), values[7:]))
    data = front_matter(card)
    assert data.keys() == front_matter(expected).keys()
    name, dataset, tag, method, _, metric, _ = map(one_line, values[:7])
    assert data["tags"] == list(dict.fromkeys(["hf_approx", method, tag]))
    (index,) = data["model-index"]
    assert index["name"] == name
    (result,) = index["results"]
    assert result["dataset"]["name"] == dataset
    assert result["metrics"] == [{"type": metric, "value": 0.5}]
    assert structure(card) == structure(expected)


@pytest.mark.parametrize("value", HOSTILE)
def test_escaped_text_is_inert_and_reads_the_same(value):
    escaped = escape(value)
    visible = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in value)
    (paragraph,) = [t for t in MarkdownIt("commonmark").parse(f"Text {escaped}") if t.type == "inline"]
    assert {child.type for child in paragraph.children} == {"text"}
    assert "".join(child.content for child in paragraph.children).split() == ["Text", *visible.split()]
    assert not any(mark in escaped for mark in ("://", "www.", "<", "|", "\n"))


def test_a_path_is_no_base_model(folder):
    about = {**REPORT["about"], "base_model": "/home/me/base model"}
    card = render_card(with_report(folder, {**REPORT, "about": about}))
    assert "base_model" not in front_matter(card)
    assert '"me/x\n' not in render_card(folder, "me/x\n")


def test_classes_and_tasks():
    assert auto_class("GPT2LMHeadModel") == "AutoModelForCausalLM"
    assert auto_class("T5ForConditionalGeneration") == "AutoModelForSeq2SeqLM"
    assert auto_class("MarianMTModel") == "AutoModelForSeq2SeqLM"
    assert auto_class("Nonsense") == auto_class("ForPipeline") == "AutoModel"
    assert task_of("ViTForImageClassification") == "image-classification"
    assert task_of("Nonsense") is None


def test_the_cards_of_the_recipes_are_valid():
    cards = list((ROOT / "model_cards").glob("*/README.md"))
    assert cards
    for path in cards:
        text = path.read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
        assert pictures
        assert all((path.parent / picture).is_file() for picture in pictures)
        assert front_matter(str(ModelCard(text))) == front_matter(text)
        assert MARKER in text

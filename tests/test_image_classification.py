"""The image recipe on folders of drawn images."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

import hf_approx  # noqa: F401 - registers the packed format
import image_classification
from config_files import read_yaml
from digits import digits, load
from helpers import ROOT
from image_classification import ImageClassifier, ImageConfig, Inputs
from models import build

SIDE = 16
TINY = {
    "type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": 8,
}


def draw(folder):
    """Bright images are `day`, dark ones `night`; wider than high, in colour."""
    generator = np.random.default_rng(0)
    for split, size in (("train", 16), ("held_out", 8)):
        for name, low in (("day", 128), ("night", 0)):
            (folder / split / name).mkdir(parents=True)
            for i in range(size):
                pixels = generator.integers(low, low + 128, (SIDE, SIDE + 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw(folder)
    files = {split: str(folder / split / "**") for split in ("train", "held_out")}
    data = {
        "model": TINY,
        "dataset": {"path": "imagefolder", "data_files": files},
        "eval_split": "held_out",
        "crop": 0.5,
        "flip": True,
        "training": {"max_steps": 8, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True},
        "approx": [{"method": "sparsification", "target_sparsity": 0.8, "preset": "scratch"}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def pixels(config, processor):
    """What the model must see of the validation split, and its classes."""
    paths = sorted((config.parent / "held_out").rglob("*.png"))
    inputs = torch.stack([processor(Image.open(path), return_tensors="pt")["pixel_values"][0] for path in paths])
    return inputs, torch.tensor([path.parent.name == "night" for path in paths]).long()


def test_dense_and_compressed_in_one_run(config, tmp_path, capsys):
    assert image_classification.main(["--config", str(config), "--output_dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["compressed"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert rows["compressed"]["bytes"] < rows["compressed"]["dense_bytes"] < rows["dense"]["bytes"]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row["reloaded_equal"] is True
        assert f"{row['accuracy']:.4f}" in printed
        model = AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()
        assert model.config.id2label == {0: "day", 1: "night"}
        inputs, labels = pixels(config, AutoImageProcessor.from_pretrained(tmp_path / name))
        with torch.no_grad():
            right = (model(inputs).logits.argmax(-1) == labels).float().mean()
        assert row["accuracy"] == pytest.approx(float(right))


def test_a_convolutional_network_in_few_bits(config, tmp_path):
    model = "model={type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}"
    approx = "approx=[{method: smol, target_bits: 4, granularity: channel}]"
    options = [part for override in (model, "image_size=16", approx) for part in ("--set", override)]
    assert image_classification.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 0
    row = json.loads((tmp_path / "results.json").read_text())["compressed"]
    assert row["bits"] == pytest.approx(4, abs=0.02)
    assert row["reloaded_equal"] is True


def test_a_pretrained_model_keeps_its_body_and_processor(config, tmp_path):
    model = build("vit")
    model.config.id2label = {i: str(i) for i in range(5)}
    model.classifier = torch.nn.Linear(32, 5)
    model.bfloat16().save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.25] * 3)
    processor.save_pretrained(tmp_path / "model")
    recipe = ImageClassifier(read_yaml(ImageConfig, config, [f"model={tmp_path / 'model'}"]), str(tmp_path))
    found = recipe.model()
    assert {param.dtype for param in found.parameters()} == {torch.float32}
    assert torch.equal(found.vit.layernorm.weight, model.vit.layernorm.weight.float())
    assert torch.equal(found.vit.embeddings.cls_token, model.vit.embeddings.cls_token.float())
    assert found.classifier.weight.shape == (2, 32)
    inputs, labels = pixels(config, processor)
    found = recipe.data["validation"][:]
    assert torch.equal(torch.stack(found["pixel_values"]), inputs)
    assert torch.equal(torch.as_tensor(found["labels"]), labels)


def test_images_are_cut_and_mirrored():
    ramp = np.arange(SIDE, dtype=np.uint8)[None].repeat(SIDE, 0)
    same = ViTImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
    plain = Inputs(same, "RGB", "image", "label")
    batch = {"image": [Image.fromarray(ramp)] * 64, "label": [0] * 64}
    assert all(np.array_equal(found[0], ramp) for found in plain(batch)["pixel_values"])
    torch.manual_seed(0)
    mirrored = Inputs(same, "RGB", "image", "label", flip=True)(batch)["pixel_values"]
    turned = sum(np.array_equal(found[0], ramp[:, ::-1]) for found in mirrored)
    assert 16 < turned < 48
    assert turned + sum(np.array_equal(found[0], ramp) for found in mirrored) == 64
    cut = Inputs(same, "RGB", "image", "label", crop=0.5)
    firsts = set()
    for picture in batch["image"]:
        found = cut({"image": [picture], "label": [0]})["pixel_values"][0][0]
        height, width = found.shape
        assert SIDE / 2 <= height == width <= SIDE
        assert np.array_equal(found[0], np.arange(width) + int(found[0, 0]))
        firsts.add(int(found[0, 0]))
    assert len(firsts) > 4


def test_the_digits_as_pictures_are_the_digits():
    data = load()
    for split, tensors in zip(("train", "validation"), digits(torch.device("cpu")), strict=True):
        images, labels = tensors.tensors
        assert data[split]["label"][:] == labels.tolist()
        for i in (0, 7):
            found = np.asarray(data[split][i]["image"]) / 127.5 - 1
            assert np.abs(found - images[i, 0].numpy()).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("name", ["digits_vit_sparse80", "digits_resnet_bits4"])
def test_models_of_the_configs_fit_the_digits(tmp_path, name):
    recipe = ImageClassifier(read_yaml(ImageConfig, ROOT / "recipes" / "configs" / f"{name}.yaml"), str(tmp_path))
    trainer = recipe.trainer("compressed", compressed=True)
    assert trainer.model(**recipe.sample(trainer)).logits.shape == (8, 10)


def test_the_config_for_a_gpu_can_be_read():
    config = read_yaml(ImageConfig, ROOT / "recipes" / "configs" / "cifar10_vit_sparse80.yaml")
    assert config.methods()[0].target_sparsity == 0.8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.type=vitt"], "type must be one transformers knows, such as vit or resnet, got 'vitt'"),
        (["model.type=llama"], "such as vit or resnet, got 'llama'"),
        (["model.hiden_size=3"], "ViTConfig has no option 'hiden_size'"),
        (["model={type: resnet}"], "image_size must be given: resnet has none"),
        (["image_size=8"], "image_size: the model's is 16, got 8"),
        (["image_size=0"], "image_size must be a positive integer, got 0"),
        (["model=/no/such/model", "image_size=8"], "image_size: only for a model from scratch"),
        (["model=/no/such/model"], "/no/such/model"),
        (["crop=2"], "crop must be above 0 and at most 1, got 2"),
        (["image_column=picture"], "no column 'picture'; it has image, label"),
        (["image_column=label"], "the column 'label' holds no images"),
        (["dataset.streaming=true"], "this recipe cannot stream"),
        (["training.nonsense=1"], "TrainingArguments has no option 'nonsense'"),
        (["metrics=x"], "unknown option 'metrics'"),
    ],
)
def test_a_wrong_config_is_one_line(config, tmp_path, capsys, overrides, message):
    options = [part for override in overrides for part in ("--set", override)]
    assert image_classification.main(["--config", str(config), "--output_dir", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

"""Exports, as engines that know nothing of hf_approx read them."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import is_compressed_tensors_available

from helpers import make_trainer, python, target_modules
from hf_approx import SharingConfig, SmolConfig, SparsificationConfig, attach_packing, export_model
from hf_approx.cards import render_card
from hf_approx.cli import main
from hf_approx.exports import load_model, write_model
from hf_approx.inspection import inspect_checkpoint
from hf_approx.loops import round_weights
from hf_approx.metrics import Compression
from hf_approx.modules.activation import ActivationQuantizer, install
from hf_approx.packing import Grid
from models import batch, build

needs_package = pytest.mark.skipif(not is_compressed_tensors_available(), reason="compressed-tensors is missing")

AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY = "bert.encoder.layer.0.attention.self.key.weight"
OUTPUT = "bert.encoder.layer.1.output.dense.weight"

FRESH = """
import sys, torch, transformers
from safetensors.torch import save_file
from models import batch

folder, name, auto, output = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder).eval()
assert any(key.endswith("weight_packed") for key in model.state_dict())
with torch.no_grad():
    save_file({"logits": model(**batch(name)).logits}, output)
assert "hf_approx" not in sys.modules
"""


def compute(model, name):
    with torch.no_grad():
        return model.eval()(**batch(name)).logits


def size(folder):
    return (folder / "model.safetensors").stat().st_size


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def make_grids(model, bits=(1, 2, 3), parts="channel", scale="channel", dtype=torch.float16, spread=1.0):
    """Random precisions and scales for every default target; a group is 16 inputs, or a little less."""
    grids = {}
    for name in target_modules(model):
        weight = model.get_parameter(f"{name}.weight").detach().float()
        rows, columns = weight.shape
        groups = {
            "tensor": (1, 1),
            "channel": (rows, 1),
            "group": (rows, -(-columns // 16)),
            "weight": (rows, columns),
        }
        chosen = torch.tensor(bits, dtype=torch.uint8)[torch.randint(len(bits), groups[parts])]
        scales = spread * float(weight.abs().max()) * (0.5 + torch.rand(groups[scale]))
        grids[f"{name}.weight"] = Grid(chosen, scales.to(dtype))
    return grids


def save(model, folder, grids, names=(), zeros=0.0):
    """Pack a model, with its dtype for what has no grid."""
    with torch.no_grad():
        for key in grids:
            model.get_parameter(key).mul_(torch.rand(model.get_parameter(key).shape) >= zeros)
    attach_packing(model, names, None, grids)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """A Llama trained by SMOL to 4 bits on average, over groups of 16 weights that have a scale of their own."""
    folder = tmp_path_factory.mktemp("smol")
    config = SmolConfig(target_bits=4, bits=(2, 4, 6), group_size=16, scale_granularity="group")
    trainer = make_trainer("llama", folder / "run", [config], max_steps=4)
    trainer.train()
    trainer.save_model(folder / "packed")
    return folder / "packed"


@pytest.fixture
def packed(tmp_path):
    """A BERT in 3 bits or less, and its tokenizer."""
    torch.manual_seed(0)
    model = build("bert").eval()
    save(model, tmp_path / "packed", make_grids(model))
    (tmp_path / "vocabulary").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good"]))
    BertTokenizerFast(vocab=str(tmp_path / "vocabulary")).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@needs_package
def test_a_trained_llama_loads_in_a_process_without_hf_approx(smol, tmp_path):
    export_model(smol, tmp_path / "dense")
    result = export_model(smol, tmp_path / "integers", "compressed-tensors")
    assert (len(result.packed), result.bits, result.dense) == (14, 8, {})
    assert result.bytes < size(tmp_path / "integers") < 0.6 * size(tmp_path / "dense")
    python(FRESH, tmp_path / "integers", "llama", "AutoModelForCausalLM", tmp_path / "logits")
    expected = compute(AutoModelForCausalLM.from_pretrained(smol), "llama")
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)
    decode = CompressedTensorsConfig(dequantize=True)
    for folder, options in (("dense", {}), ("integers", {"quantization_config": decode})):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **options)
        assert torch.equal(compute(model, "llama"), expected)


@needs_package
def test_the_card_of_an_export(smol, tmp_path, capsys):
    """It says what was measured, how to load it, and not that integers are dense."""
    export_model(smol, tmp_path / "integers", "compressed-tensors")
    export_model(smol, tmp_path / "dense")
    card, plain = (render_card(tmp_path / name) for name in ("integers", "dense"))
    for text in (card, plain):
        assert "compressed with smol while it was trained, saved by hf_approx" in text
        assert "in the run that made these files" not in text
        assert "exported from a packed model with the same weights" in text
        assert "import hf_approx" not in text
    assert "Quantized weights are stored in the format compressed-tensors" in card
    assert "pip install compressed-tensors" in card
    assert "ordinary checkpoint" not in card
    assert "tensors dense" not in card
    assert "An ordinary checkpoint" in plain
    assert "tensors dense" in plain
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "integers")])
    printed = capsys.readouterr().out
    assert "bytes, quantized in the format compressed-tensors." in printed
    assert "dense" not in printed
    found = inspect_checkpoint(tmp_path / "integers").to_dict()
    assert found["format"] == "compressed-tensors"
    assert "dense_bytes" not in found["totals"]
    assert set(Compression(tmp_path / "integers").compute()) == {"sparsity", "bytes"}


@needs_package
def test_a_bert_loads_in_a_process_without_hf_approx(packed, tmp_path):
    export_model(packed, tmp_path / "integers", "compressed-tensors")
    python(FRESH, tmp_path / "integers", "bert", "AutoModelForSequenceClassification", tmp_path / "logits")
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], compute(model, "bert"))
    assert AutoTokenizer.from_pretrained(tmp_path / "integers").tokenize("good") == ["good"]


@needs_package
@pytest.mark.parametrize(
    ("dtype", "options", "zeros", "bits", "strategy"),
    [
        (torch.float32, {}, 0.0, 4, "channel"),
        (torch.float32, {"bits": (0, 1, 3)}, 0.0, 4, "channel"),
        (torch.float32, {"bits": (1, 4, 7), "parts": "weight", "dtype": torch.float32}, 0.3, 8, "channel"),
        (torch.float32, {"bits": (4,), "parts": "tensor", "scale": "tensor"}, 0.0, 8, "channel"),
        (torch.float32, {"parts": "group", "scale": "group"}, 0.5, 4, "group"),
        (torch.float16, {"parts": "group", "scale": "group"}, 0.0, 4, "group"),
        (torch.bfloat16, {"bits": (2, 7), "dtype": torch.bfloat16}, 0.5, 8, "channel"),
    ],
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_integers_decode_to_the_same_weights(tmp_path, name, dtype, options, zeros, bits, strategy):
    torch.manual_seed(1)
    model = build(name).to(dtype).eval()
    grids = make_grids(model, **options)
    save(model, tmp_path / "packed", grids, zeros=zeros)
    result = export_model(tmp_path / "packed", tmp_path / "integers", "compressed-tensors")
    assert (set(result.packed), result.bits, result.dense) == (set(grids), bits, {})
    config = quantization(tmp_path / "integers")
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == strategy
    assert config["quant_method"] == "compressed-tensors"
    assert "hf_approx" not in json.dumps(config)
    loaded, source = (AUTO[name].from_pretrained(tmp_path / folder) for folder in ("integers", "packed"))
    assert loaded.dtype == source.dtype == dtype
    assert torch.equal(compute(loaded, name), compute(source, name))
    for key in grids:
        assert torch.equal(loaded.get_parameter(key), source.get_parameter(key)), key


@needs_package
def test_groups_that_are_shorter_at_the_end_are_split(tmp_path):
    """40 inputs in groups of at most 16 are 14, 14 and 12; 2 divides them all."""
    torch.manual_seed(1)
    model = build("bert").eval()
    layer = model.bert.encoder.layer[1]
    layer.intermediate.dense, layer.output.dense = nn.Linear(32, 40), nn.Linear(40, 32)
    model.bert.encoder.layer[0].intermediate.dense = nn.Linear(32, 40)
    model.bert.encoder.layer[0].output.dense = nn.Linear(40, 32)
    model.config.intermediate_size = 40
    save(model, tmp_path / "packed", make_grids(model, parts="group", scale="group"))
    export_model(tmp_path / "packed", tmp_path / "integers", "compressed-tensors")
    assert quantization(tmp_path / "integers")["config_groups"]["group_0"]["weights"]["group_size"] == 2
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "integers")
    assert torch.equal(compute(loaded, "bert"), compute(model, "bert"))


@needs_package
@pytest.mark.parametrize("width", [96, 537])
def test_one_layer_of_odd_width_does_not_make_the_groups_of_all_small(tmp_path, width):
    """537 inputs in groups of at most 128 are four of 108 and one of 105."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=256, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    method = SmolConfig(target_bits=3, bits=(3,), group_size=128 if width == 537 else 32, scale_granularity="group")
    result = round_weights(model, method)
    attach_packing(model, result.names, None, result.grids)
    model.save_pretrained(tmp_path / "packed")
    exported = export_model(tmp_path / "packed", tmp_path / "integers", "compressed-tensors")
    down = "model.layers.0.mlp.down_proj.weight"
    odd = {down: "a scale for 108 of 537 inputs fits no groups of 32 or more"} if width == 537 else {}
    assert exported.dense == odd
    assert exported.group_size == (128 if width == 537 else 32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "integers")
    assert torch.equal(compute(loaded, "llama"), compute(model, "llama"))


@needs_package
def test_an_export_that_would_be_no_smaller_is_refused(tmp_path):
    model = build("llama").half()
    grids = {
        f"{name}.weight": Grid(torch.full((1, 1), 3, dtype=torch.uint8), torch.full(module.weight.shape, 0.1).half())
        for name, module in target_modules(model).items()
    }
    save(model, tmp_path / "packed", grids)
    with pytest.raises(ValueError, match=r"no smaller in compressed-tensors, with a scale for every 1 inputs"):
        export_model(tmp_path / "packed", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


@needs_package
def test_what_the_format_cannot_hold_stays_dense(tmp_path, capsys):
    torch.manual_seed(1)
    model = build("bert").eval()
    grids = make_grids(model)
    grids[QUERY] = Grid(torch.tensor([[8]], dtype=torch.uint8), torch.tensor([[0.05]]))
    words = "bert.embeddings.word_embeddings.weight"
    grids[words] = Grid(torch.tensor([[3]], dtype=torch.uint8), torch.tensor([[0.05]]))
    del grids[OUTPUT]
    with torch.no_grad():
        model.get_parameter(OUTPUT).mul_(torch.rand(32, 64) > 0.9)
    save(model, tmp_path / "packed", grids, [OUTPUT])
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(tmp_path / "packed"), str(tmp_path / "out"), "--format", "compressed-tensors"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "8 weights are integers of 4 bits" in printed
    assert f"Dense: '{QUERY}': some of its weights have 8 bits" in printed
    assert f"Dense: '{KEY}' and 1 more: engines merge it with 'query' beside it, which is dense" in printed
    assert f"Dense: '{words}': only linear layers can be packed, and this is Embedding" in printed
    assert f"Dense: '{OUTPUT}': compressed-tensors after 0.14 stores no sparse" in printed
    ignored = quantization(tmp_path / "out")["ignore"]
    assert {QUERY.removesuffix(".weight"), KEY.removesuffix(".weight"), "classifier"} <= set(ignored)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(compute(loaded, "bert"), compute(model, "bert"))


@needs_package
def test_scales_that_half_precision_cannot_hold_leave_the_weight_dense(tmp_path):
    """64 times smaller, as steps of 7 bits are, this scale has too few digits left in float16."""
    torch.manual_seed(1)
    model = build("bert").half().eval()
    grids = make_grids(model, bits=(7,))
    grids[OUTPUT] = Grid(grids[OUTPUT].bits, torch.full((32, 1), 1.2345e-4, dtype=torch.float16))
    save(model, tmp_path / "packed", grids)
    result = export_model(tmp_path / "packed", tmp_path / "integers", "compressed-tensors")
    assert result.dense == {OUTPUT: "its scales do not fit the model's float16"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "integers")
    assert torch.equal(compute(loaded, "bert"), compute(model, "bert"))


@needs_package
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "width"), [((1, 2, 3), 4), ((1, 4, 7), 8)])
def test_a_model_in_half_precision_has_scales_that_are_exact_in_it(tmp_path, dtype, bits, width):
    """Scales over four orders of magnitude, down to where float16 has few digits."""
    torch.manual_seed(1)
    model = build("llama").to(dtype).eval()
    with torch.no_grad():
        for name in target_modules(model):
            weight = model.get_parameter(f"{name}.weight")
            weight.mul_(10 ** torch.empty(len(weight), 1).uniform_(-3, 1))
    result = round_weights(model, SmolConfig(target_bits=sum(bits) / 3, bits=bits, group_size=16))
    attach_packing(model, result.names, None, result.grids)
    model.save_pretrained(tmp_path / "packed")
    exported = export_model(tmp_path / "packed", tmp_path / "integers", "compressed-tensors")
    assert (set(exported.packed), exported.bits) == (set(result.names), width)
    assert {grid.scale.dtype for grid in result.grids.values()} == {torch.float16}
    loaded, source = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("integers", "packed"))
    assert loaded.dtype == dtype
    assert torch.equal(compute(loaded, "llama"), compute(source, "llama"))
    for name in result.names:
        assert torch.equal(source.get_parameter(name), model.get_parameter(name)), name


@needs_package
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exports_in_another_dtype(tmp_path, dtype):
    """A model that computes in float32, whose scales and other weights are stored in float16."""
    torch.manual_seed(1)
    model = build("llama")
    result = round_weights(model, SmolConfig(target_bits=3, bits=(1, 2, 3)))
    attach_packing(model, result.names, "float16", result.grids)
    model.save_pretrained(tmp_path / "packed")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype)
    formats = {"dense": None, "compressed-tensors": 14} if dtype == "float16" else {"dense": None}
    for name, packed in formats.items():
        exported = export_model(tmp_path / "packed", tmp_path / name, name, dtype)
        assert len(exported.packed) == (packed or 0)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.dtype == getattr(torch, dtype)
        assert torch.equal(compute(loaded, "llama"), compute(wanted, "llama"))
        assert exported.bytes < 0.51 * export_model(tmp_path / "packed", tmp_path / f"{name}-32").bytes
    with pytest.raises(ValueError, match="not 'int4'"):
        export_model(tmp_path / "packed", tmp_path / "out", dtype="int4")


@needs_package
def test_a_class_that_transformers_cannot_load_from_the_format_is_refused(tmp_path):
    """T5 initializes the weights of its layers by name, and packed layers have none."""
    model = build("t5").eval()
    save(model, tmp_path / "packed", make_grids(model))
    with pytest.raises(ValueError, match=r"cannot load a T5ForConditionalGeneration from compressed-tensors.*dense"):
        export_model(tmp_path / "packed", tmp_path / "out", "compressed-tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@needs_package
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_a_sparse_llama_is_refused_and_exports_dense(tmp_path, granularity):
    method = SparsificationConfig(target_sparsity=0.5, granularity=granularity)
    trainer = make_trainer("llama", tmp_path / "run", [method], max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "packed")
    with pytest.raises(
        ValueError, match=r"no weight of .*'model.layers.0.*stores no sparse weights, 2:4 or other.*format dense"
    ):
        export_model(tmp_path / "packed", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    export_model(tmp_path / "packed", tmp_path / "dense", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(compute(plain, "llama"), compute(trainer.model, "llama"))


@needs_package
def test_a_sparse_llama_that_is_quantized_too_keeps_its_zeros(tmp_path):
    methods = [SparsificationConfig(target_sparsity=0.5, granularity="2:4"), SmolConfig(target_bits=3, bits=(1, 2, 3))]
    trainer = make_trainer("llama", tmp_path / "run", methods, max_steps=8)
    trainer.train()
    trainer.save_model(tmp_path / "packed")
    result = export_model(tmp_path / "packed", tmp_path / "integers", "compressed-tensors")
    assert (len(result.packed), result.bits, result.dense) == (14, 4, {})
    loaded, source = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("integers", "packed"))
    assert torch.equal(compute(loaded, "llama"), compute(source, "llama"))
    for name in result.packed:
        zeros = (loaded.get_parameter(name) == 0).reshape(-1, 4).sum(1)
        assert bool((zeros >= 2).all()), name


@needs_package
def test_shared_weights_are_refused(tmp_path):
    model = build("bert").eval()
    method = SharingConfig(templates=1).build()
    method.attach(model)
    attach_packing(model, method.finalize(), None)
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="mixed from shared templates"):
        export_model(tmp_path / "packed", tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize("format_", ["dense", pytest.param("compressed-tensors", marks=needs_package)])
def test_what_only_hf_approx_computes_is_refused(tmp_path, format_):
    model = build("bert").eval()
    grids = make_grids(model)
    quantizer = ActivationQuantizer(1, True)
    quantizer.bits.fill_(4.0)
    quantizer.limit.fill_(1.0)
    install(model.get_submodule(QUERY.removesuffix(".weight")), quantizer)
    save(model, tmp_path / "activations", grids)
    head = SparsificationConfig(target_sparsity=0.5, granularity="head")
    trainer = make_trainer("bert", tmp_path / "run", [head], max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "structure")
    build("bert").save_pretrained(tmp_path / "plain")
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, message in (
        ("activations", "quantize their input"),
        ("structure", "sizes that its architecture's config cannot express"),
        ("plain", "is not packed"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(tmp_path / source, tmp_path / "out", format_)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("format_", "message"),
    [("gguf", "convert_hf_to_gguf.py"), ("onnx", "optimum-cli export onnx"), ("zip", "no format 'zip'; choose dense")],
)
def test_other_formats_name_their_converter(packed, tmp_path, capsys, format_, message):
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(packed), str(tmp_path / "out"), "--format", format_])
    assert exit_.value.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"hf-approx\[export\]"):
        export_model(packed, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing(packed, tmp_path):
    (tmp_path / "here").mkdir()

    def fill_the_disk(folder):
        assert (folder / "model.safetensors").is_file()
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_model(load_model(packed), packed, tmp_path / "here" / "out", finish=fill_the_disk)
    assert list((tmp_path / "here").iterdir()) == []

"""Checkpoints with quantized weights and activations through `save_pretrained` and `from_pretrained`."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import edit_packing, python, target_modules
from hf_approx import ApproxConfig, PackedFormatError, attach_packing, keep_zeros
from hf_approx.checkpoint.activations import activations_of
from hf_approx.inspection import inspect_checkpoint
from hf_approx.modules import SparseLinear
from hf_approx.modules.activation import ActivationQuantizer, install
from hf_approx.packing import Grid, round_to_grid
from models import batch, build

KEY = "bert.encoder.layer.0.output.dense.weight"


def make_grids(model, extra=(), granularity="weight"):
    """A random grid of 1 to 5 bits for every default target."""
    generator = torch.Generator().manual_seed(1)
    grids = {}
    for name in [*(f"{name}.weight" for name in target_modules(model)), *extra]:
        weight = model.get_parameter(name).detach()
        channel = [weight.shape[0]] + [1] * (weight.dim() - 1)
        shape = list(weight.shape) if granularity == "weight" else channel
        bits = torch.randint(1, 6, shape, generator=generator).to(torch.uint8)
        scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 1.5 + 1e-3
        grids[name] = Grid(bits, scale.to(torch.float16))
    return grids


def save(name, folder, store_dtype="float16", dtype=torch.float32, extra=(), sparsity=0.0, **options):
    model = build(name).to(dtype).eval()
    grids = make_grids(model, extra, **options)
    with torch.no_grad():
        for key in grids:
            param = model.get_parameter(key)
            param.mul_(torch.rand_like(param.float()) >= sparsity)
    specs = attach_packing(model, [], store_dtype, grids)
    assert len(specs) == len(grids)
    model.save_pretrained(folder)
    return model, grids


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def logits(model, name="bert"):
    with torch.no_grad():
        return model.eval()(**batch(name)).logits


DIGEST = """
import hashlib, sys, torch, transformers, hf_approx
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
digest = hashlib.sha256()
for name, tensor in model.state_dict().items():
    digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def digest(model):
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(
    ("name", "extra", "sparsity"),
    [
        ("bert", ["bert.embeddings.word_embeddings.weight"], 0.0),
        ("gpt2", ["transformer.wte.weight"], 0.5),
        ("resnet", [], 0.0),
    ],
)
def test_a_fresh_process_loads_what_is_in_memory(tmp_path, name, extra, sparsity):
    model, _ = save(name, tmp_path, extra=extra, sparsity=sparsity)
    assert python(DIGEST, tmp_path, type(model).__name__).stdout.strip().endswith(digest(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16", None])
def test_weights_are_on_their_grid_in_every_dtype(tmp_path, dtype, store_dtype):
    before = {n: p.detach().to(dtype) for n, p in build("bert").named_parameters()}
    model, grids = save("bert", tmp_path, store_dtype, dtype, granularity="channel")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    params = dict(model.named_parameters())
    for name, param in loaded.named_parameters():
        assert torch.equal(param, params[name]), name
        if name in grids:
            assert torch.equal(param, round_to_grid(before[name], grids[name]))


@pytest.mark.parametrize("runtime", ["dense", "packed"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "t5"])
def test_saving_a_loaded_model_gives_the_same_bytes(tmp_path, name, runtime):
    model, _ = save(name, tmp_path / "a", sparsity=0.3)
    loaded = type(model).from_pretrained(tmp_path / "a", quantization_config=ApproxConfig(runtime=runtime))
    assert torch.equal(logits(loaded, name), logits(model, name))
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    model.save_pretrained(tmp_path / "c")
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_loading_in_another_dtype_saves_the_same_codes(tmp_path, caplog):
    save("bert", tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(*(load_file(tmp_path / x / "model.safetensors")[KEY] for x in "ab"))
    assert "grid" not in caplog.text


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    for folder, name in (("a", "transformer.wte.weight"), ("b", "lm_head.weight")):
        model, _ = save("gpt2", tmp_path / folder, extra=[name])
        assert "lm_head.weight" not in load_file(tmp_path / folder / "model.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_sparse_and_quantized_weights_in_one_file(tmp_path):
    model = build("bert").eval()
    grids = make_grids(model)
    sparse = "bert.encoder.layer.1.output.dense.weight"
    del grids[sparse]
    with torch.no_grad():
        model.get_parameter(sparse).mul_(torch.rand(32, 64) > 0.9)
    specs = attach_packing(model, [sparse, KEY], "float16", grids)
    assert {spec.kind for name, spec in specs.items() if name != sparse} == {"quantized"}
    assert specs[sparse].kind == "sparse"
    model.save_pretrained(tmp_path)
    for runtime in ("dense", "packed"):
        config = ApproxConfig(runtime=runtime)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
        assert sum(isinstance(m, SparseLinear) for m in loaded.modules()) == (runtime == "packed")


def test_training_on_is_rounded_again_and_said(tmp_path, caplog):
    _, grids = save("bert", tmp_path / "a", sparsity=0.5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").train()
    stepper = torch.optim.AdamW(model.parameters(), lr=1e-4)
    zero = model.get_parameter(KEY) == 0
    model(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    stepper.step()
    assert torch.equal(model.get_parameter(KEY) == 0, zero)
    model.save_pretrained(tmp_path / "b")
    assert "is no longer on the grid" in caplog.text
    assert "keep_zeros" not in caplog.text
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert torch.equal(again.get_parameter(KEY), round_to_grid(model.get_parameter(KEY).detach(), grids[KEY]))
    assert not torch.equal(again.get_parameter(KEY), model.get_parameter(KEY))


def test_a_copy_keeps_zeros_and_grids(tmp_path, caplog):
    save("bert", tmp_path / "a", sparsity=0.5)
    copied = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(tmp_path / "a"))
    copied.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    keep_zeros(copied)
    weight = copied.get_parameter(KEY)
    zero = weight == 0
    copied.train()(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert not weight.grad[zero].any()
    assert weight.grad[~zero].any()


def test_the_base_model_and_the_model_save_after_each_other(tmp_path):
    save("bert", tmp_path / "a", extra=["classifier.weight"])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    loaded.bert.save_pretrained(tmp_path / "b")
    base = AutoModel.from_pretrained(tmp_path / "b")
    expected = loaded.bert.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in base.state_dict().items())
    loaded.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    headless = AutoModel.from_pretrained(tmp_path / "a")
    assert torch.equal(headless.get_parameter(KEY.removeprefix("bert.")), loaded.get_parameter(KEY))


def test_dequantize_gives_a_plain_checkpoint(tmp_path):
    model, _ = save("bert", tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")), logits(model))


def test_what_does_not_fit_changes_nothing():
    model = build("bert").half()
    before = {n: p.clone() for n, p in model.named_parameters()}
    one = torch.ones(1, 1, dtype=torch.uint8)
    tied = build("gpt2")
    tied_grid = Grid(one, torch.ones(1, 1))
    for names, grids, message in (
        ([], {"nowhere": Grid(one, torch.ones(1, 1))}, "no parameter 'nowhere'"),
        ([], {KEY: Grid(one, torch.ones(1))}, f"'{KEY}': A grid of shape"),
        ([], {KEY: Grid(one, torch.full((1, 1), 1e6))}, f"a scale of '{KEY}' is too large or too small"),
        ([], {KEY: Grid(one, torch.full((1, 1), 1e-12))}, f"a scale of '{KEY}' is too large or too small"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_packing(model, names, "float16", grids)
    with pytest.raises(ValueError, match="two names of one tied weight"):
        attach_packing(tied, [], "float16", {"lm_head.weight": tied_grid, "transformer.wte.weight": tied_grid})
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not hasattr(model.config, "quantization_config")


def flip(packed):
    packed[len(packed) // 2] ^= 4
    return packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "is damaged: the bytes do not match their checksum"),
        (lambda t: t[:-1], "should be .* the file holds U8"),
        (lambda t: t.float(), "should be .* the file holds F32"),
        (lambda t: None, "is in config.json but in no weight file"),
    ],
    ids=["flipped", "shorter", "float", "missing"],
)
def test_damaged_bytes_are_named(tmp_path, change, message):
    save("bert", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[KEY] = change(tensors[KEY])
    save_file({n: t for n, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})
    with pytest.raises(PackedFormatError, match=f"'{KEY}' {message}"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["tensors"][KEY].update(kind="wavelet"), f"'{KEY}': kind 'wavelet' is unknown"),
        (lambda q: q["tensors"][KEY].pop("kind"), f"'{KEY}': its entry must have the fields"),
        (lambda q: q["tensors"][KEY].update(grid=[64, 32]), f"'{KEY}': grid .* does not fit"),
        (lambda q: q["tensors"][KEY]["rice"].append(1), f"'{KEY}': rice is"),
        (lambda q: q["tensors"][KEY]["weights"].reverse(), f"'{KEY}'"),
    ],
)
def test_hostile_entries_are_refused(tmp_path, change, message):
    save("bert", tmp_path)
    edit_packing(tmp_path, change)
    with pytest.raises(PackedFormatError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_size_is_within_five_percent_of_the_bound_at_the_size_of_real_layers(tmp_path):
    """All of the checkpoint's tensors: codes, maps, scales and the dense remainder."""
    torch.manual_seed(0)
    model = build("bert")
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = torch.nn.Linear(32, 8192), torch.nn.Linear(8192, 32)
    names = [f"bert.encoder.layer.0.{part}.dense.weight" for part in ("intermediate", "output")]
    bits = {n: torch.randint(1, 5, model.get_parameter(n).shape).to(torch.uint8) for n in names}
    specs = attach_packing(model, [], "float16", {n: Grid(b, torch.full((1, 1), 0.1)) for n, b in bits.items()})
    for name in names:
        shares = bits[name].reshape(-1).bincount(minlength=9).double() / bits[name].numel()
        entropy = float(-(shares[shares > 0] * shares[shares > 0].log2()).sum()) * bits[name].numel()
        assert 8 * specs[name].nbytes <= 1.05 * (float(bits[name].sum()) + entropy + 32)
        assert specs[name].bound_bytes == pytest.approx((float(bits[name].sum()) + entropy + 32) / 8)


def quantize_inputs(model, names):
    for i, name in enumerate(names):
        channels = 1 if i else model.get_submodule(name).in_features
        quantizer = ActivationQuantizer(channels, True)
        quantizer.bits.copy_(torch.full((channels,), 4.0))
        quantizer.limit.copy_(torch.linspace(1.0 + 1e-4, 2.0, channels))
        install(model.get_submodule(name), quantizer)


ACTIVATED = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self.query"]


@pytest.mark.parametrize("quantized", [True, False])
def test_activations_are_part_of_the_checkpoint(tmp_path, quantized):
    model = build("bert").eval()
    plain = logits(model)
    quantize_inputs(model, ACTIVATED)
    attach_packing(model, [], "float16", make_grids(model) if quantized else None)
    assert not torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["activations"] == {
        ACTIVATED[0]: {"channels": 64, "signed": True},
        ACTIVATED[1]: {"channels": 1, "signed": True},
    }
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with pytest.raises(ValueError, match="quantize their input"):
        loaded.dequantize()
    assert python(DIGEST, tmp_path / "a", type(model).__name__).stdout.strip().endswith(digest(model))


def test_packed_runtime_keeps_activations(tmp_path):
    model = build("bert").eval()
    names = [f"{name}.weight" for name in target_modules(model)]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(torch.rand_like(model.get_parameter(name)) > 0.9)
    quantize_inputs(model, ACTIVATED)
    attach_packing(model, names)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=ApproxConfig(runtime="packed")
    )
    assert sum(isinstance(m, SparseLinear) for m in loaded.modules()) == len(names) - len(ACTIVATED)
    assert set(activations_of(loaded)) == set(ACTIVATED)


def test_limits_of_activations_stay_in_float32(tmp_path):
    model = build("bert").half().eval()
    quantize_inputs(model, ACTIVATED)
    limits = model.get_buffer(f"{ACTIVATED[0]}.input_quantizer.limit").clone()
    assert not torch.equal(limits.half().float(), limits)
    attach_packing(model, [], "bfloat16", make_grids(model))
    model.save_pretrained(tmp_path)
    for dtype in ("auto", torch.float16, torch.bfloat16):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == (torch.float16 if dtype == "auto" else dtype)
        buffer = loaded.get_buffer(f"{ACTIVATED[0]}.input_quantizer.limit")
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, limits)


def test_a_base_model_takes_its_part_of_the_activations(tmp_path):
    model = build("bert").eval()
    quantize_inputs(model, [*ACTIVATED, "classifier"])
    attach_packing(model, [], "float16")
    model.save_pretrained(tmp_path / "a")
    base = AutoModel.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        expected = model.bert(**batch("bert")).pooler_output
        assert torch.equal(base(**batch("bert")).pooler_output, expected)
    base.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch("bert")).pooler_output, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(activations=[1]), "must map module names"),
        (lambda q: q["activations"].update({ACTIVATED[0]: 3}), "must have the fields channels, signed"),
        (lambda q: q["activations"][ACTIVATED[0]].update(channels=0), "channels is 0"),
        (lambda q: q["activations"][ACTIVATED[0]].update(signed=1), "signed is 1"),
        (lambda q: q["activations"].update(ghost={"channels": 1, "signed": True}), "'ghost' are in no weight file"),
    ],
)
def test_hostile_activations_are_refused(tmp_path, change, message):
    model = build("bert")
    quantize_inputs(model, ACTIVATED)
    attach_packing(model, [], "float16")
    model.save_pretrained(tmp_path)
    edit_packing(tmp_path, change)
    with pytest.raises(PackedFormatError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_damaged_activations_are_refused(tmp_path):
    model = build("bert")
    quantize_inputs(model, ACTIVATED)
    attach_packing(model, [], "float16")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    key = f"{ACTIVATED[0]}.input_quantizer.limit"
    edit_packing(tmp_path, lambda q: q.update(plain={}))
    save_file({**tensors, key: tensors[key] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(PackedFormatError, match="negative or not finite"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ghost = {n.replace(ACTIVATED[0], "ghost") if "input_quantizer" in n else n: t for n, t in tensors.items()}
    save_file(ghost, path, metadata={"format": "pt"})
    edit_packing(tmp_path, lambda q: q["activations"].update(ghost=q["activations"].pop(ACTIVATED[0])))
    with pytest.raises(PackedFormatError, match="'ghost': BertForSequenceClassification has no such module"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_inspection_counts_the_weights_of_every_precision(tmp_path):
    model, grids = save("bert", tmp_path, sparsity=0.25)
    inspection = inspect_checkpoint(tmp_path)
    expected = torch.zeros(9, dtype=torch.long)
    for name, grid in grids.items():
        zero = model.get_parameter(name) == 0
        expected += torch.where(zero, 0, grid.bits).long().reshape(-1).bincount(minlength=9)
    assert inspection.histogram == expected.tolist()
    stored = load_file(tmp_path / "model.safetensors")
    weights = sum(p.numel() for n, p in model.named_parameters() if n in grids)
    assert inspection.bits == pytest.approx(8 * sum(stored[n].numel() for n in grids) / weights)
    row = next(row for row in inspection.rows if row.name == KEY)
    assert row.bits == pytest.approx(8 * stored[KEY].numel() / model.get_parameter(KEY).numel())
    assert row.counts[0] == int((model.get_parameter(KEY) == 0).sum())
    totals = inspection.to_dict()["quantized"]
    assert totals["histogram"] == pytest.approx((expected / weights).tolist())
    assert totals["code_bits"] == pytest.approx(float((expected * torch.arange(9)).sum()) / weights)
    assert totals["code_bits"] < totals["bits"]

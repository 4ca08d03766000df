"""Packed checkpoints through the real `save_pretrained` and `from_pretrained`."""

import copy
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import assert_same_weights, edit_packing, python, target_modules, weights
from hf_approx import ApproxConfig, PackedFormatError, attach_packing, keep_zeros
from hf_approx.modules import SparseLinear
from models import ARCHITECTURES, batch, build


def sparsify(model, sparsity=0.9, extra=()):
    """Zero random weights of the default targets and attach packing, without any method."""
    names = [f"{name}.weight" for name in target_modules(model)] + list(extra)
    with torch.no_grad():
        for name in names:
            param = model.get_parameter(name)
            param.mul_(torch.rand_like(param.float()) >= sparsity)
    return names


def save(name, folder, store_dtype="float16", dtype=torch.float32, extra=(), **options):
    model = build(name).to(dtype).eval()
    attach_packing(model, iter(sparsify(model, extra=extra)), store_dtype)
    model.save_pretrained(folder, **options)
    return model


def logits(model, name="bert"):
    with torch.no_grad():
        return model.eval()(**batch(name)).logits


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16", None])
def test_round_trip_in_every_dtype(tmp_path, dtype, store_dtype):
    model = save("bert", tmp_path, store_dtype, dtype)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
        assert not torch.signbit(tensor[tensor == 0]).any()


@pytest.mark.parametrize("runtime", ["dense", "packed"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "t5"])
def test_saving_a_loaded_model_gives_the_same_bytes(tmp_path, name, runtime):
    model = save(name, tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a", quantization_config=ApproxConfig(runtime=runtime))
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_sharded_files(tmp_path):
    model = save("bert", tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(loaded))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = save("gpt2", tmp_path, extra=["transformer.wte.weight"])
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["transformer.wte.weight"].dtype == torch.uint8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(model, "gpt2"), logits(loaded, "gpt2"))


def test_a_tied_weight_may_be_named_either_way(tmp_path):
    save("gpt2", tmp_path, extra=["lm_head.weight"])
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].dtype == torch.uint8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert float((loaded.lm_head.weight == 0).float().mean()) > 0.8


def test_device_map_auto(tmp_path):
    model = save("llama", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(logits(model, "llama"), logits(loaded.to("cpu"), "llama"))


def test_disk_offload_is_refused(tmp_path):
    save("llama", tmp_path / "m")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    device_map |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(ValueError, match="offload"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "offload"
        )


def test_base_model_loads_from_a_model_with_a_head(tmp_path):
    model = save("bert", tmp_path / "a")
    base = AutoModel.from_pretrained(tmp_path / "a")
    assert torch.equal(base.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    base.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_runtime_computes_the_same(tmp_path, name):
    model = save(name, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=ApproxConfig(runtime="packed"))
    sparse = [m for m in loaded.modules() if isinstance(m, SparseLinear)]
    assert bool(sparse) == (name != "resnet")
    torch.testing.assert_close(logits(loaded, name), logits(model, name), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=["bert", "gpt2", "t5"])
def runtimes(request, tmp_path_factory):
    """The name of a model, the model, and a copy of it whose layers stay packed."""
    folder = tmp_path_factory.mktemp("packed")
    model = save(request.param, folder)
    return (
        request.param,
        model,
        type(model).from_pretrained(folder, quantization_config=ApproxConfig(runtime="packed")),
    )


def test_models_that_stay_packed_are_copied_and_pickled_whole(runtimes, tmp_path):
    name, _, packed = runtimes
    packed.save_pretrained(tmp_path / "a")
    torch.save(packed, tmp_path / "pickle")
    for k, copied in enumerate([copy.deepcopy(packed), torch.load(tmp_path / "pickle", weights_only=False)]):
        assert torch.equal(logits(copied, name), logits(packed, name))
        own = next(module for module in copied.modules() if isinstance(module, SparseLinear))
        own.values.zero_()
        assert not torch.equal(logits(copied, name), logits(packed, name))
        copied.save_pretrained(tmp_path / f"{k}")
        assert files(tmp_path / f"{k}") == files(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_that_stay_packed_are_cast_as_decoded_ones_are(runtimes, tmp_path, dtype):
    name, model, packed = runtimes
    model, cast = copy.deepcopy(model).to(dtype), copy.deepcopy(packed).to(dtype)
    assert cast.dtype == dtype
    assert {m.weight.dtype for m in cast.modules() if isinstance(m, SparseLinear)} == {dtype}
    result = logits(cast, name)
    assert result.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, logits(model, name), rtol=tolerance, atol=tolerance)
    cast.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=tolerance, atol=tolerance)


def test_weights_that_stay_packed_count_as_parameters_and_take_the_memory_of_their_nonzeros(runtimes):
    _, model, packed = runtimes
    for part, same in ((packed, model), (copy.deepcopy(packed), model), (packed.base_model, model.base_model)):
        assert part.num_parameters() == same.num_parameters()
        assert part.num_parameters(exclude_embeddings=True) == same.num_parameters(exclude_embeddings=True)
        assert part.num_parameters(only_trainable=True) == sum(p.numel() for p in part.parameters())
    assert packed.get_memory_footprint() < model.get_memory_footprint()


def test_layers_that_stay_packed_are_never_left_untrained_in_silence(runtimes):
    name, model, packed = runtimes
    packed.train()
    with pytest.raises(RuntimeError, match=r"runtime='dense' to train it, or call model\.eval"):
        packed(**batch(name))
    with torch.no_grad():
        packed(**batch(name))
    gradients = []
    for each in (packed.eval(), model.eval()):
        each.zero_grad()
        output = each(**batch(name)).logits
        if each is packed:
            with pytest.warns(UserWarning, match="their weights get none: load the model with runtime='dense'"):
                output.square().sum().backward()
        else:
            output.square().sum().backward()
        gradients.append(each.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            packed(**batch(name)).logits.sum().backward()
    assert sum("their weights get none" in str(warning.message) for warning in caught) == 1


def test_packed_runtime_decodes_layers_too_dense_for_csr(tmp_path):
    model = build("bert").eval()
    attach_packing(model, sparsify(model, sparsity=0.5))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=ApproxConfig(runtime="packed")
    )
    assert not any(isinstance(m, SparseLinear) for m in loaded.modules())
    assert torch.equal(logits(loaded), logits(model))


def test_process_without_hf_approx_fails_instead_of_loading_noise(tmp_path):
    save("bert", tmp_path)
    code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1]); print('loaded')"
    result = python(code, tmp_path, check=False)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "import hf_approx before from_pretrained" in result.stderr.splitlines()[-1]
    assert "loaded" in python("import hf_approx;" + code, tmp_path).stdout


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_a_loaded_model_keeps_its_zeros(tmp_path, optimizer):
    save("bert", tmp_path / "a")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").train()
    options = {"weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    stepper = optimizer(model.parameters(), lr=0.01, **options)
    weight = model.bert.encoder.layer[0].output.dense.weight
    before = weight.detach().clone()
    for _ in range(3):
        model(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        stepper.step()
        stepper.zero_grad()
    assert torch.equal(weight == 0, before == 0)
    assert not torch.equal(weight, before)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    restored = again.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(restored, weight.detach().half().float())


def test_the_base_model_of_a_loaded_model_saves_packed(tmp_path):
    save("bert", tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    loaded.bert.save_pretrained(tmp_path / "b")
    base = AutoModel.from_pretrained(tmp_path / "b")
    expected = loaded.bert.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in base.state_dict().items())
    loaded.save_pretrained(tmp_path / "c")
    assert files(tmp_path / "c") == files(tmp_path / "a")


def test_a_model_with_fewer_layers_saves(tmp_path):
    save("bert", tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    loaded.bert.encoder.layer = loaded.bert.encoder.layer[:1]
    loaded.config.num_hidden_layers = 1
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again), logits(loaded))


def test_parts_kept_in_float32_stay_so(tmp_path):
    model = save("t5", tmp_path, "float32")
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    plain = build("t5")
    plain.save_pretrained(tmp_path / "plain")
    dense = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float16)
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in dense.named_parameters()}
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_a_loaded_model_can_be_cast(tmp_path):
    save("bert", tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).half()
    assert loaded.dtype == torch.float16


def test_packed_runtime_under_autocast(tmp_path):
    model = save("bert", tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=ApproxConfig(runtime="packed")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0.1, atol=0.01)


def test_dequantize_gives_a_plain_checkpoint(tmp_path):
    model = save("bert", tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "b")
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(plain), logits(model))


def test_a_loaded_model_trained_past_half_precision_is_saved_in_its_own_dtype(tmp_path, caplog):
    save("bert", tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        loaded.classifier.bias[0] = 65504.0  # the largest number of float16
        loaded.save_pretrained(tmp_path / "b")
        assert "does not fit" not in caplog.text
        loaded.classifier.bias[0] = 1e9
        loaded.bert.pooler.dense.weight[0, 0] = 1 / 3
    loaded.save_pretrained(tmp_path / "b")
    assert "'classifier.bias' was trained to a value that does not fit float16: every weight" in caplog.text
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert_same_weights(weights(again), weights(loaded))


def test_weights_of_less_than_half_precision_are_stored_as_they_are(tmp_path):
    model = build("bert").eval()
    small = torch.nn.Parameter(torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_parameter("small", small)
    names = sparsify(model)
    with pytest.raises(ValueError, match="'small' is float8_e4m3fn, which is not packed; leave it out"):
        attach_packing(model, [*names, "small"])
    attach_packing(model, names)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["small"].dtype == torch.float8_e4m3fn


def test_attach_packing_refuses_and_changes_nothing():
    model = build("bert")
    model.classifier.bias.data[0] = 1e9
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"classifier.bias' has a value .* fit float16; pass store_dtype='bfloat16'"):
        attach_packing(model, sparsify(model, sparsity=0.0))
    with pytest.raises(ValueError, match="no parameter 'nowhere'"):
        attach_packing(model, ["nowhere"])
    with pytest.raises(ValueError, match="attach_packing: Linear is no PreTrainedModel; pass the transformers model"):
        attach_packing(model.classifier, ["weight"])
    with pytest.raises(ValueError, match="not packed"):
        keep_zeros(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not hasattr(model.config, "quantization_config")


def test_dense_weights_are_not_packed(tmp_path):
    model = build("bert")
    assert attach_packing(model, sparsify(model, sparsity=0.0)) == {}
    model.save_pretrained(tmp_path)
    assert python(
        "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1]); print('loaded')",
        tmp_path,
    ).stdout.endswith("loaded\n")


KEY = "bert.encoder.layer.0.output.dense.weight"


def tamper(folder, change):
    """Rewrite the weight file with one packed tensor changed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[KEY] = change(tensors[KEY])
    if tensors[KEY] is None:
        del tensors[KEY]
    save_file(tensors, path, metadata={"format": "pt"})


def flip(packed):
    packed[len(packed) // 2] ^= 4
    return packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "is damaged: the bytes do not match their checksum"),
        (lambda t: t[:-1], "should be .* the file holds U8"),
        (lambda t: torch.cat([t, t]), "should be .* the file holds U8"),
        (lambda t: t.float(), "should be .* the file holds F32"),
        (lambda t: t[None], r"should be .* the file holds U8 \[1, "),
        (lambda t: None, "is in config.json but in no weight file"),
    ],
    ids=["flipped", "shorter", "longer", "float", "two-dimensional", "missing"],
)
@pytest.mark.parametrize("runtime", ["dense", "packed"])
def test_damaged_bytes_are_named(tmp_path, change, message, runtime):
    save("bert", tmp_path)
    tamper(tmp_path, change)
    with pytest.raises(PackedFormatError, match=f"'{KEY}' {message}"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=ApproxConfig(runtime=runtime))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=4), "format version 4; this hf_approx reads versions 1 to 3"),
        (lambda q: q.update(format_version=True), "format version True"),
        (lambda q: q.update(format_version="1; rm"), "format version"),
        (lambda q: q["tensors"][KEY].update(nnz=10**9), "nnz is 1000000000"),
        (lambda q: q["tensors"][KEY].update(shape=[2**31, 2**31]), "larger than any weight"),
        (lambda q: q["tensors"][KEY].update(shape=[64, 32]), "the model has"),
        (lambda q: q["tensors"][KEY].update(dtype="float8"), "dtype 'float8' is unknown"),
        (lambda q: q["tensors"][KEY].pop("crc32"), "must have the fields"),
        (lambda q: q["tensors"].update(ghost=q["tensors"].pop(KEY)), "'ghost' is in config.json but in no"),
        (lambda q: q.update(tensors=[1]), "must map parameter names"),
        (lambda q: q.update(store_dtype="int4"), "not 'int4'"),
    ],
)
def test_hostile_config_is_refused(tmp_path, change, message):
    save("bert", tmp_path)
    edit_packing(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_packed_weight_the_architecture_lacks_is_refused(tmp_path):
    save("bert", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["ghost.weight"] = tensors.pop(KEY)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_packing(tmp_path, lambda q: q["tensors"].update({"ghost.weight": q["tensors"].pop(KEY)}))
    with pytest.raises(PackedFormatError, match=r"'ghost\.weight' does not exist in BertForSequence"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_base_model_leaves_out_a_packed_head(tmp_path):
    model = save("bert", tmp_path / "a", extra=["classifier.weight"])
    base = AutoModel.from_pretrained(tmp_path / "a")
    base.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b")
    expected = dict(model.bert.named_parameters())
    assert all(torch.equal(p, expected[n]) for n, p in again.named_parameters() if "pooler" not in n)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_file_uses_the_names_in_the_config(tmp_path, name):
    """Some architectures (ViT) are otherwise saved under the names of their first release."""
    model = save(name, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(config["tensors"]) == {k for k, t in stored.items() if t.dtype == torch.uint8}
    assert set(stored) <= set(model.state_dict())


def test_truncated_file_is_refused(tmp_path):
    save("bert", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"incomplete|truncated|not fully covered|InvalidHeader|invalid"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_compressing_while_loading_is_refused(tmp_path):
    build("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot compress a dense model while loading"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=ApproxConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "fast"}, "runtime must be"),
        ({"runtim": "packed"}, "unknown option 'runtim'"),
        ({"store_dtype": ["float16"]}, "not \\['float16'\\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ApproxConfig(**options)


def test_file_holds_nothing_but_safetensors_and_json(tmp_path):
    save("bert", tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_slice(KEY).get_dtype() == "U8"

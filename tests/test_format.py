"""The format: what is in the files, that nothing in them can change unnoticed, and that older files load."""

import copy
import itertools
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import edit_packing, target_modules
from hf_approx import ApproxConfig, PackedFormatError, SharingConfig, attach, attach_packing
from hf_approx.checkpoint.checksums import config_checksum
from hf_approx.inspection import inspect_checkpoint
from hf_approx.modules import ActivationQuantizer, install
from hf_approx.packing import Grid
from models import build

DATA = Path(__file__).parent / "data"
KINDS = ("sparse", "quantized", "shared", "activations")


def small(kind):
    """A Llama of two layers, packed in one way; that with quantized activations is sparse too."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    modules = target_modules(model)
    names, grids = [f"{name}.weight" for name in modules], {}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
        if kind in ("sparse", "activations"):
            for module in modules.values():
                module.weight.mul_(torch.rand_like(module.weight) < 0.2)
        if kind == "activations":
            for i, module in enumerate(modules.values()):
                quantizer = ActivationQuantizer(module.in_features if i % 2 else 1, i % 3 == 0)
                quantizer.limit.uniform_(0.5, 2)
                install(module, quantizer)
        if kind == "quantized":
            for i, module in enumerate(modules.values()):
                rows, columns = module.weight.shape
                bits = torch.randint(0, 5, (rows, columns // 4 if i % 2 else 1), dtype=torch.uint8)
                grids[names[i]] = Grid(bits, torch.rand(rows, 1) * 0.02 + 0.01)
    if kind == "shared":
        attach(model, SharingConfig(templates=1)).bake()
    attach_packing(model, () if kind == "shared" else names, grids=grids)
    return model


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A folder with a saved model, and the weights that loading it gives."""
    folder = tmp_path_factory.mktemp(request.param)
    small(request.param).save_pretrained(folder)
    return folder, loaded(folder)


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model"), saved[1]


def loaded(folder):
    """All that a loaded model computes with: plain weights in the place of shared ones, bits, limits and signs."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if "parametrizations" not in name}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state[f"{name}.weight"] = module.weight.detach()
        if isinstance(module, ActivationQuantizer):
            state[f"{name}.signed"] = torch.tensor(module.signed)
    return state


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def refuses(folder, message):
    """Loading and inspecting say the same."""
    with pytest.raises(PackedFormatError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(PackedFormatError, match=message):
        inspect_checkpoint(folder)


def packing(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def rewrite(folder, change):
    """Change the tensors of the weight file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [path.name for path in sorted(DATA.glob("version_*"))])
def test_files_of_earlier_versions_load_as_they_did(name, tmp_path):
    """Files that earlier releases wrote, with what those releases read from them."""
    folder = shutil.copytree(DATA / name, tmp_path / name)
    expected = load_file(folder / "expected.safetensors")
    assert packing(folder)["format_version"] == int(name.split("_")[1])
    state = loaded(folder)
    assert expected.keys() <= state.keys()
    assert same({key: state[key] for key in expected}, expected)
    assert inspect_checkpoint(folder, verify=True).packed_bytes >= 0
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert packing(tmp_path / "again")["format_version"] == 3
    assert same(loaded(tmp_path / "again"), state)


def test_checksums_are_those_of_the_bytes_and_of_what_the_config_says(saved):
    """Computed here from the files alone, as another reader of the format would."""

    def short(data):
        return zlib.crc32(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())

    folder, _ = saved
    data = packing(folder)
    assert data["format_version"] == 3
    blob = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    dtypes = {"F16": "torch.float16", "F32": "torch.float32"}
    assert {*data["tensors"], *data["plain"]} == {*header} - {"__metadata__"}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        of_bytes = zlib.crc32(blob[8 + size + start : 8 + size + end])
        if name in data["plain"]:
            assert data["plain"][name] == of_bytes ^ short([name, dtypes[about["dtype"]], about["shape"]])
        else:
            entry = dict(data["tensors"][name])
            assert entry.pop("crc32") == of_bytes ^ short([name, entry])
    assert data.pop("checksum") == short(data)


def leaves(data, path=()):
    """The path of everything in JSON data."""
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield (*path, key)
            yield from leaves(value, (*path, key))


def mutations(data, path):
    """Copies of the data with one thing changed: its value, its type, exchanged with the next, or left out."""
    *parents, key = path
    values = ("float16", "bfloat16", "float32", "sparse", "quantized", "shared")

    def at(whole):
        for step in parents:
            whole = whole[step]
        return whole

    old = at(data)[key]
    if isinstance(old, bool):
        new = [not old, int(old), str(old)]
    elif isinstance(old, int):
        new = [old + 1, old - 1, float(old), str(old), None]
    elif isinstance(old, str):
        new = [*(value for value in values if value != old), old + "x", old[:-1], 1, [old]]
    else:
        new = [None, 0, [], {}, "x", [old]]
        new = [value for value in new if value != old]
    for value in new:
        changed = copy.deepcopy(data)
        at(changed)[key] = value
        yield changed
    keys = list(at(data)) if isinstance(at(data), dict) else list(range(len(at(data))))
    other = keys[(keys.index(key) + 1) % len(keys)]
    if at(data)[other] != old:
        changed = copy.deepcopy(data)
        at(changed)[key], at(changed)[other] = at(changed)[other], at(changed)[key]
        yield changed
    changed = copy.deepcopy(data)
    del at(changed)[key]
    yield changed


def test_no_change_of_the_config_goes_unnoticed(saved):
    """Every value in the packing part changed in every way: transformers reads the config through `from_dict`."""
    data = packing(saved[0])
    tried = 0
    for path in leaves(data):
        for changed in mutations(data, path) if path != ("quant_method",) else ():  # then it is none of ours
            tried += 1
            with pytest.raises(PackedFormatError):
                ApproxConfig.from_dict(changed)
    assert tried > 1000


def test_no_change_of_an_entry_fits_the_bytes(copied):
    """The same, of one entry, where the config's own checksum is made to fit: that of the weight still does not."""
    folder, expected = copied
    path = folder / "config.json"
    config = json.loads(path.read_text())
    data, tried = config["quantization_config"], 0
    for part in ("tensors", "plain"):
        name = sorted(data[part])[0]
        other = sorted(data[part])[1]
        paths = [(part, name), *leaves(data[part][name], (part, name))]
        for changed in (changed for p in paths for changed in mutations(data, p)):
            if changed[part].keys() != data[part].keys():
                continue  # an entry that is not there means another file
            changed["checksum"] = config_checksum(changed)
            try:
                ApproxConfig.from_dict(changed)
            except PackedFormatError:
                continue
            tried += 1
            path.write_text(json.dumps({**config, "quantization_config": changed}))
            with pytest.raises(PackedFormatError):
                loaded(folder)
        changed = copy.deepcopy(data)
        changed[part][name], changed[part][other] = data[part][other], data[part][name]
        changed["checksum"] = config_checksum(changed)
        path.write_text(json.dumps({**config, "quantization_config": changed}))
        with pytest.raises(PackedFormatError):
            loaded(folder)
    assert tried > 3
    path.write_text(json.dumps(config))
    assert same(loaded(folder), expected)


def test_no_byte_of_any_tensor_changes_unnoticed(copied):
    folder, expected = copied
    path = folder / "model.safetensors"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    generator = torch.Generator().manual_seed(0)
    for name, about in header.items():
        first, last = about.get("data_offsets", (0, 0))
        if first == last:
            continue
        blob = bytearray(good)
        blob[start + int(torch.randint(first, last, (), generator=generator))] ^= 1 << int(torch.randint(8, ()))
        path.write_bytes(blob)
        with pytest.raises(PackedFormatError, match=f"'{name}'"):
            loaded(folder)
        with pytest.raises(PackedFormatError, match=f"'{name}'"):
            inspect_checkpoint(folder, verify=True)
        inspect_checkpoint(folder)  # reads headers only
    path.write_bytes(good)
    assert same(loaded(folder), expected)


def test_tensors_of_equal_shape_that_changed_places_are_noticed(copied):
    folder, _ = copied
    tensors = load_file(folder / "model.safetensors")
    pairs = [
        (a, b)
        for a, b in itertools.combinations(tensors, 2)
        if tensors[a].dtype == tensors[b].dtype
        and tensors[a].shape == tensors[b].shape
        and not torch.equal(tensors[a], tensors[b])
    ][:4]
    assert pairs
    good = (folder / "model.safetensors").read_bytes()
    for a, b in pairs:
        (folder / "model.safetensors").write_bytes(good)

        def swap(tensors, a=a, b=b):
            tensors[a], tensors[b] = tensors[b], tensors[a]

        rewrite(folder, swap)
        with pytest.raises(PackedFormatError, match="damaged"):
            loaded(folder)


def test_every_tensor_that_was_saved_must_be_there(copied):
    folder, _ = copied
    good = (folder / "model.safetensors").read_bytes()
    for name in load_file(folder / "model.safetensors"):
        (folder / "model.safetensors").write_bytes(good)
        rewrite(folder, lambda tensors, name=name: tensors.pop(name))
        refuses(folder, "in no weight file")


@pytest.mark.parametrize("name", [path.name for path in sorted(DATA.glob("version_*"))])
def test_what_the_config_implies_must_be_there_in_old_files_too(name, tmp_path):
    """Packed weights, templates, bits and limits, of the right shape and numbers."""
    folder = shutil.copytree(DATA / name, tmp_path / name)
    good = (folder / "model.safetensors").read_bytes()
    parts = ("hf_approx_banks", "input_quantizer")
    implied = [n for n in load_file(folder / "model.safetensors") if n in packing(folder)["tensors"]]
    implied += [n for n in load_file(folder / "model.safetensors") if any(part in n for part in parts)]
    assert implied
    for key in implied:
        for change, message in (
            (lambda t, k=key: t.pop(k), "in no weight file"),
            (lambda t, k=key: t.update({k: t[k].to(torch.int32)}), "the file holds"),
            (lambda t, k=key: t.update({k: torch.cat([t[k], t[k]])}), "the file holds"),
        ):
            (folder / "model.safetensors").write_bytes(good)
            rewrite(folder, change)
            refuses(folder, message)


def test_what_is_added_to_a_file_changes_nothing(copied):
    folder, expected = copied
    rewrite(folder, lambda tensors: tensors.update({"mine": torch.ones(3)}))
    assert same(loaded(folder), expected)


@pytest.mark.parametrize("name", ["t5", "gpt2", "resnet", "bert"])
@pytest.mark.parametrize("shards", ["50GB", "5KB"])
def test_what_has_a_checksum_is_what_is_written(name, shards, tmp_path):
    """Tied weights under one name, buffers, several files; a model of another class reads less of them."""
    model = build(name)
    names = [f"{n}.weight" for n in target_modules(model)]
    with torch.no_grad():
        for key in names:
            model.get_parameter(key).mul_(torch.rand_like(model.get_parameter(key)) < 0.1)
    model._keys_to_ignore_on_save = [[n for n, _ in model.named_parameters() if n not in names][-1]]
    attach_packing(model, names)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    stored = set()
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= set(file.keys())
    data = packing(tmp_path)
    assert {*data["plain"], *data["tensors"]} == stored
    inspect_checkpoint(tmp_path, verify=True)
    for cls in (type(model), AutoModel):
        for dtype in (torch.float32, torch.bfloat16):
            assert cls.from_pretrained(tmp_path, dtype=dtype).dtype == dtype
    (tmp_path / "variant").mkdir()
    model.save_pretrained(tmp_path / "variant", variant="small", max_shard_size=shards)
    type(model).from_pretrained(tmp_path / "variant", variant="small")


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


def test_an_index_and_its_files_must_agree(tmp_path):
    small("sparse").save_pretrained(tmp_path / "good", max_shard_size=300)
    files = sorted(path.name for path in (tmp_path / "good").glob("*.safetensors"))
    assert len(files) > 2
    key = "model.norm.weight"
    home = json.loads((tmp_path / "good" / "model.safetensors.index.json").read_text())["weight_map"][key]
    other = next(name for name in files if name != home)

    def twice(folder):
        tensors = load_file(folder / other)
        save_file({**tensors, key: torch.ones(8)}, folder / other, metadata={"format": "pt"})

    cases = {
        "model.norm.weight' is not in": lambda folder: index(folder, lambda m: m.update({key: other})),
        "in two weight files": twice,
        "missing|has no file": lambda folder: (folder / other).unlink(),
        "ghost' is not in": lambda folder: index(folder, lambda m: m.update(ghost=other)),
    }
    for i, (message, change) in enumerate(cases.items()):
        folder = shutil.copytree(tmp_path / "good", tmp_path / str(i))
        change(folder)
        with pytest.raises(PackedFormatError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises((PackedFormatError, FileNotFoundError), match=message):
            inspect_checkpoint(folder)
    for wrong in ("../other.safetensors", "pytorch_model.bin", 3):
        folder = shutil.copytree(tmp_path / "good", tmp_path / "index", dirs_exist_ok=True)
        index(folder, lambda m, wrong=wrong: m.update({key: wrong}))
        with pytest.raises(PackedFormatError, match=r"index\.json is damaged"):
            inspect_checkpoint(folder)


def test_hostile_names_and_numbers_are_one_short_sentence(tmp_path):
    """Of entries whose checksums fit, as whoever makes a file to do harm would write them."""
    folder = tmp_path / "model"

    def entry(**fields):
        return lambda q: next(iter(q["tensors"].values())).update(fields)

    def entry_name(name):
        return lambda q: q["tensors"].update({name: q["tensors"].pop(next(iter(q["tensors"])))})

    def layer(name):
        old = "model.layers.0.mlp.up_proj"
        buffers = ("bits", "limit")

        def change(q):
            q["activations"][name] = q["activations"].pop(old)
            for buffer in buffers if name.isprintable() else ():
                del q["plain"][f"{old}.input_quantizer.{buffer}"]
                key = f"{name}.input_quantizer.{buffer}"
                rewrite(folder, lambda t, k=key, b=buffer: t.update({k: t.pop(f"{old}.input_quantizer.{b}")}))

        return change

    def bank(name):
        return lambda q: [one.update(bank=name) for one in q["tensors"].values()]

    def crowd(q):
        q["plain"].update({f"x{i}": 1 for i in range(1 << 17)})

    banks = ["keys", "items", "pop", "type", "training", "", "a.b", "a/b", "a\n", "\x1b[2J", "x" * 10**6, 7, None]
    layers = ["model.layers.0.mlp.act_fn", "model.embed_tokens", "model.norm", "model", "layers.0.mlp.gate_proj"]
    cases = [
        *(("shared", bank(name), "not the name of a bank") for name in banks),
        *(("activations", layer(name), "input is not quantized") for name in layers[:-1]),
        ("activations", layer(layers[-1]), "two entries"),
        ("activations", layer("model.ghost"), "no such module"),
        ("activations", layer("\x1b[2J"), "not the name of"),
        ("activations", lambda q: q.update(activations=[]), "must map module names"),
        *(("sparse", entry(shape=shape), "list of positive") for shape in ([-8, -8], [8.0, 8], [True, 8], [[8], 8])),
        ("sparse", entry(shape=[2**62] * 10**5), "list of positive"),
        ("sparse", entry(shape=[2**40, 2**40]), "larger than any weight"),
        *(("sparse", entry(nnz=nnz), "nnz is") for nnz in (10**4000, -1, 1.0, True, "1", None, float("nan"))),
        *(("sparse", entry_name(name), "not the name of") for name in ("\x1b[2J", "\ud800", "", "x" * 10**6)),
        ("sparse", entry_name("model.nowhere.weight"), "in no weight file"),
        ("sparse", lambda q: q.update(store_dtype="x" * 10**6), "stored as"),
        ("sparse", lambda q: q.update(training=1), "training must be"),
        ("sparse", lambda q: q.update(self=1), "no field 'self'"),
        ("sparse", lambda q: q.update(runtime="packed"), "no field 'runtime'"),
        ("sparse", crowd, "more than 131,072 entries"),
    ]
    for kind in KINDS[0], KINDS[2], KINDS[3]:
        small(kind).save_pretrained(tmp_path / kind)
    for kind, change, message in cases:
        shutil.copytree(tmp_path / kind, folder, dirs_exist_ok=True)
        edit_packing(folder, change)
        with pytest.raises(PackedFormatError, match=message) as error:
            AutoModelForCausalLM.from_pretrained(folder)
        assert len(str(error.value)) < 500
        assert str(error.value).isprintable()


def test_templates_cannot_be_mixed_from_themselves(tmp_path):
    small("shared").save_pretrained(tmp_path)
    entries = packing(tmp_path)["tensors"]
    bank = next(iter(entries.values()))["bank"]
    name = f"model.hf_approx_banks.{bank}.0.weight"
    row = load_file(tmp_path / "model.safetensors")[next(iter(entries))]

    def change(q):
        q["tensors"][name] = next(iter(q["tensors"].values()))
        del q["plain"][name]

    edit_packing(tmp_path, change)
    rewrite(tmp_path, lambda tensors: tensors.update({name: row}))
    refuses(tmp_path, "mixed from themselves")


def test_files_of_another_kind_are_named(tmp_path):
    small("sparse").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PackedFormatError, match=r"pytorch_model\.bin is no safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"weights in 'pytorch_model\.bin', not in safetensors"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    refuses(tmp_path, r"model\.safetensors is damaged")

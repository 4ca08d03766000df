"""What folders may hold that nobody would put there with good intent, or that went wrong."""

import contextlib
import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_approx.cards import CARD_FILE
from torture.folders import read_tensors, write_tensors

SECRET = b"the-key-that-nobody-may-see"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ARCHITECTURE = "numbers of the architecture"
Build = Callable[[Path, Path], None]
"""Changes a good folder; the second path is a folder beside it with a secret in it."""
Add = Callable[..., None]


def folders() -> dict[str, tuple[str, str, Build]]:
    """Kind, base and what makes it, by name."""
    found: dict[str, tuple[str, str, Build]] = {}

    def add(kind: str, name: str, build: Build, *bases: str) -> None:
        for base in bases or ("dense", "packed"):
            found[f"{name} {base}".replace(" ", "-")] = (kind, base, build)

    _links(add)
    _special(add)
    _pickles(add)
    _json(add)
    _numbers(add)
    _names(add)
    _headers(add)
    _indexes(add)
    _foreign(add)
    return found


BESIDE = (CONFIG, WEIGHTS, CARD_FILE, "vocab.txt", "tokenizer.json", "tokenizer_config.json", "approx_report.json")


def _links(add: Add) -> None:
    def to_file(name: str, folder: Path, outside: Path) -> None:
        path = folder / name
        target = outside / "secret.txt"
        if name in (CONFIG, WEIGHTS):  # what it links to would load
            target = outside / name
            target.write_bytes(path.read_bytes())
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def to_theirs(folder: Path, outside: Path) -> None:
        (folder / CARD_FILE).unlink()
        (folder / CARD_FILE).symlink_to(outside / "theirs.md")

    def to_new(folder: Path, outside: Path) -> None:
        (folder / CARD_FILE).unlink()
        (folder / CARD_FILE).symlink_to(outside / "new.md")

    def to_our_card(folder: Path, outside: Path) -> None:
        (outside / "ours.md").write_bytes((folder / CARD_FILE).read_bytes())
        (folder / CARD_FILE).unlink()
        (folder / CARD_FILE).symlink_to(outside / "ours.md")

    def to_folder(folder: Path, outside: Path) -> None:
        (outside / "tools.jinja").write_bytes(SECRET)
        (folder / "additional_chat_templates").symlink_to(outside)

    def in_templates(folder: Path, outside: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tools.jinja").symlink_to(outside / "secret.txt")

    def loop(name: str, folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    def hard(folder: Path, outside: Path) -> None:
        (folder / CARD_FILE).unlink()
        os.link(outside / "theirs.md", folder / CARD_FILE)

    def relative(folder: Path, outside: Path) -> None:
        (folder / "merges.txt").symlink_to("../outside/secret.txt")

    for name in (*BESIDE, "credentials.json", "id.txt", "chat_template.jinja", "training.png"):
        add("links", f"link {name}", partial(to_file, name))
    for name in BESIDE[:3]:
        add("links", f"loop {name}", partial(loop, name))
    add("links", "card of others", to_theirs)
    add("links", "card to nowhere", to_new)
    add("links", "card of ours elsewhere", to_our_card)
    add("links", "card hard", hard)
    add("links", "templates elsewhere", to_folder)
    add("links", "template link", in_templates)
    add("links", "relative", relative)


def _special(add: Add) -> None:
    def make(name: str, what: str, folder: Path, outside: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "device":
            path.symlink_to("/dev/zero")
        else:
            with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as server:
                server.bind(name)

    for name in (CONFIG, WEIGHTS, CARD_FILE, "vocab.txt", "tokenizer_config.json", "approx_report.json", INDEX):
        for what in ("pipe", "folder", "device", "socket"):
            add("special files", f"{what} {name}", partial(make, name, what))


class _Canary:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> Any:
        return (open, ("outside/executed", "w"))


def _pickles(add: Add) -> None:
    def only(folder: Path, outside: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary()))

    def beside(folder: Path, outside: Path) -> None:
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.pkl", "adapter_model.bin"):
            (folder / name).write_bytes(pickle.dumps(_Canary()))

    def under_name(folder: Path, outside: Path) -> None:
        (folder / WEIGHTS).write_bytes(pickle.dumps(_Canary()))

    def state(folder: Path, outside: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")

    add("pickles", "pickle only", only)
    add("pickles", "pickles beside", beside)
    add("pickles", "pickle as safetensors", under_name)
    add("pickles", "torch only", state)


def _json(add: Add) -> None:
    texts = {
        "brackets": b"[" * 100_000,
        "closed brackets": b"[" * 100_000 + b"]" * 100_000,
        "braces": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "huge": b'{"x": "' + b"x" * 200_000_000 + b'"}',
        "empty": b"",
        "list": b"[]",
        "number": b"1",
        "null": b"null",
        "not utf-8": b'{"\xff": 1}',
        "utf-16": '{"a": 1}'.encode("utf-16"),
        "digits": b'{"x": ' + b"9" * 100_000 + b"}",
        "cut": b'{"model_type": "gpt2", ',
        "nul": b"\0" * 4096,
    }

    def put(name: str, data: bytes, folder: Path, outside: Path) -> None:
        (folder / name).write_bytes(data)

    for kind, data in texts.items():
        for name in (CONFIG, "approx_report.json", INDEX, "tokenizer_config.json"):
            # Tokenizers are read by nobody here, and reports only for cards.
            add("damaged JSON", f"{kind} {name}", partial(put, name, data), "packed" if name != CONFIG else "dense")
        add("damaged JSON", f"{kind} {CONFIG}", partial(put, CONFIG, data), "packed")

    def inside(value: Any, field: str, folder: Path, outside: Path) -> None:
        _edit(folder, lambda config: config.update({field: value}))

    for field, value in {
        "quantization_config": 7,
        "architectures": "x" * 100_000,
        "id2label": {"0": "x" * 100_000},
        "model_type": ["gpt2"],
        "torch_dtype": "float7",
    }.items():
        add("damaged JSON", f"field {field}", partial(inside, value, field))
    for value in (
        {"about": 7},
        {"about": {"tags": 7}},
        {"methods": {"a": 1}},
        {"evaluation": {"metrics": [1]}},
        {"kinds": 1},
    ):
        data = json.dumps(value).encode()
        add(
            "damaged JSON",
            f"report {next(iter(value))} {len(data)}",
            partial(put, "approx_report.json", data),
            "packed",
        )


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def _numbers(add: Add) -> None:
    def put(field: str, value: Any, folder: Path, outside: Path) -> None:
        _edit(folder, lambda config: config.update({field: value}))

    for field in ("n_head", "n_embd", "n_layer", "vocab_size", "n_positions"):
        for value in (0, -1, 10**30, 10**12, 1.5, "x", None, True):
            add(ARCHITECTURE, f"{field} {value}", partial(put, field, value), "dense")
    for field in ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "head_dim"):
        for value in (0, -1, 10**30, 10**12, "x"):
            add(ARCHITECTURE, f"{field} {value}", partial(put, field, value), "packed")

    def entry(field: str, value: Any, folder: Path, outside: Path) -> None:
        def change(config: dict[str, Any]) -> None:
            next(iter(config["quantization_config"]["tensors"].values()))[field] = value

        _edit(folder, change)

    for field in ("nbytes", "shape", "grid", "scale", "weights", "entries", "masked", "rice", "crc32"):
        for value in (-1, 10**30, [10**30], [10**9, 10**9], [], [[1]], 1e300, None):
            add("numbers", f"entry {field} {value}", partial(entry, field, value), "packed")

    def version(value: Any, folder: Path, outside: Path) -> None:
        _edit(folder, lambda config: config["quantization_config"].update(format_version=value))

    for value in (0, 99, 10**30, -1, None, "2", [2], 2.0):
        add("numbers", f"version {value}", partial(version, value), "packed")


EVIL = "\x1b[31m\x1b]0;title\x07[red]x[/red]\u202e\n\r\x9b2J<b>"


def _names(add: Add) -> None:
    def tensor(name: str, folder: Path, outside: Path) -> None:
        stored, metadata = read_tensors((folder / WEIGHTS).read_bytes())
        first = next(iter(stored))
        stored[name] = stored[first]
        (folder / WEIGHTS).write_bytes(write_tensors(stored, metadata))

    for label, name in {
        "codes": EVIL,
        "long": "x" * 200_000,
        "empty": "",
        "path": "../../x",
        "class": "__class__",
    }.items():
        add("names", f"tensor {label}", partial(tensor, name))

    def renamed(table: str, name: str, folder: Path, outside: Path) -> None:
        def change(config: dict[str, Any]) -> None:
            entries = config["quantization_config"][table]
            entries[name] = entries.pop(next(iter(entries)))

        _edit(folder, change)

    for table in ("tensors", "activations"):
        for name in (EVIL, "", ".", "..", "model", "model.norm", "__class__", "forward", "model.layers.0", "lm_head"):
            label = "codes" if name == EVIL else name or "empty"
            base = "packed" if table == "tensors" else "active"
            add("names", f"{table} {label}", partial(renamed, table, name), base)

    def bank(name: str, folder: Path, outside: Path) -> None:
        def change(config: dict[str, Any]) -> None:
            entries = config["quantization_config"]["tensors"].values()
            own = next(entry["bank"] for entry in entries)
            for entry in entries:
                entry["bank"] = name if entry["bank"] == own else entry["bank"]

        _edit(folder, change)

    for name in ("keys", "items", "values", "training", "forward", "__class__", "..", "", EVIL, "a.b", "type", "0"):
        label = "codes" if name == EVIL else name or "empty"
        add("names", f"bank {label}", partial(bank, name), "shared")

    def field(path: str, value: Any, folder: Path, outside: Path) -> None:
        _edit(folder, lambda config: config.update({path: value}))

    for value in ("os.system", "../../x", "PreTrainedModel", "torch", EVIL, "GPT2Config", "pipeline", ""):
        label = "codes" if value == EVIL else value or "empty"
        add("names", f"architecture {label}", partial(field, "architectures", [value]))
    add("names", "labels", partial(field, "id2label", {"0": EVIL, "1": "![x](http://evil/x.png)"}))
    add("names", "model type", partial(field, "model_type", EVIL))
    add("names", "base model", partial(field, "_name_or_path", EVIL))


def _headers(add: Add) -> None:
    def put(data: bytes, folder: Path, outside: Path) -> None:
        (folder / WEIGHTS).write_bytes(data)

    def file(header: Any, body: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers = {
        "longest": struct.pack("<Q", 2**64 - 1) + b"{}",
        "beyond": struct.pack("<Q", 10**6) + b"{}",
        "zero": struct.pack("<Q", 0),
        "short": b"\1\0\0",
        "nested": file(b'{"x":' * 50_000),
        "list": file([1]),
        "shape": file({"x": {**entry, "shape": [10**18, 10**18]}}, bytes(8)),
        "wide": file({"x": {**entry, "shape": [0, 10**18], "data_offsets": [0, 0]}}),
        "negative": file({"x": {**entry, "shape": [-2]}}, bytes(8)),
        "offsets": file({"x": {**entry, "data_offsets": [8, 0]}}, bytes(8)),
        "overlap": file({"x": entry, "y": entry}, bytes(8)),
        "gap": file({"x": {**entry, "data_offsets": [8, 16]}}, bytes(16)),
        "dtype": file({"x": {**entry, "dtype": "F7"}}, bytes(8)),
        "metadata": file({"__metadata__": {"x": {"y": 1}}, "x": entry}, bytes(8)),
        "none": file({}),
        "others": file({"x": entry}, bytes(8)),
        "zip": b"PK\3\4" + bytes(100),
    }
    for name, data in headers.items():
        add("headers", f"header {name}", partial(put, data))


def _indexes(add: Add) -> None:
    def put(table: Any, folder: Path, outside: Path) -> None:
        (outside / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        names = read_tensors((folder / "model-00001-of-00002.safetensors").read_bytes())[0]
        if isinstance(table, str):
            table = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, table)}
        (folder / INDEX).write_text(json.dumps(table))

    shard = "model-00001-of-00002.safetensors"
    tables = {
        "outside": f"../outside/{WEIGHTS}",
        "absolute": "/etc/passwd",
        "missing": "model-00002-of-00002.safetensors",
        "pickle": "pytorch_model.bin",
        "config": CONFIG,
        "codes": EVIL,
        "empty name": "",
        "dot": ".",
        "no map": {"metadata": {}},
        "empty map": {"metadata": {}, "weight_map": {}},
        "list": {"metadata": {}, "weight_map": [shard]},
        "number": {"metadata": {}, "weight_map": {"x": 7}},
        "nested": {"metadata": {}, "weight_map": {"x": {"y": shard}}},
        "ghost": {"metadata": {}, "weight_map": {"ghost": shard}},
        "many": {"metadata": {}, "weight_map": {f"x{i}": f"{i}.safetensors" for i in range(100_000)}},
        "no metadata": {"weight_map": {"lm_head.weight": shard}},
        "top": [1],
    }
    for name, table in tables.items():
        add("index files", f"index {name}", partial(put, table))


def _foreign(add: Add) -> None:
    def quantization(value: Any, folder: Path, outside: Path) -> None:
        _edit(folder, lambda config: config.update(quantization_config=value))

    methods = ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "quanto", "torchao", "hqq", "mxfp4", EVIL)
    for method in methods:
        label = "codes" if method == EVIL else method
        add("foreign quantization", f"{label}", partial(quantization, {"quant_method": method}))
    for label, value in {
        "none": {},
        "list": [1],
        "text": "hf_approx",
        "number": 3,
        "no method": {"bits": 4},
        "method list": {"quant_method": ["hf_approx"]},
        "method null": {"quant_method": None, "tensors": {}},
        "ours empty": {"quant_method": "hf_approx"},
        "ours null": {"quant_method": "hf_approx", "tensors": None},
        "ours list": {"quant_method": "hf_approx", "tensors": [1]},
        "ours more": {"quant_method": "hf_approx", "tensors": {}, "x": 1},
        "ours training": {"quant_method": "hf_approx", "tensors": {}, "training": True},
    }.items():
        add("foreign quantization", f"config {label}", partial(quantization, value))

    def code(folder: Path, outside: Path) -> None:
        (folder / "evil.py").write_text("open('outside/executed', 'w').write('x')\n")
        names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
        _edit(folder, lambda config: config.update(auto_map=dict.fromkeys(names, "evil.Evil")))

    def unknown(folder: Path, outside: Path) -> None:
        code(folder, outside)
        _edit(folder, lambda config: config.update(model_type="evil", architectures=["Evil"]))

    add("foreign code", "auto map", code)
    add("foreign code", "auto map, unknown type", unknown)

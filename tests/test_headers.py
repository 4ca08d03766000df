"""Headers of safetensors files, which anyone may have made."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_approx import PackedFormatError
from hf_approx.cli import main
from hf_approx.headers import BITS, PREFIX, header_length, parse_header, read_header, weight_map
from hf_approx.inspection import inspect_checkpoint
from models import build

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def content(header, size=24):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + bytes(size)


def test_what_safetensors_writes_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    tensors["d"] = torch.zeros(5, dtype=torch.bool)
    save_file(tensors, path, metadata={"format": "pt"})
    assert read_header(path) == {"a": ("F32", (2, 3)), "b": ("BF16", ()), "c": ("F32", (0, 4)), "d": ("BOOL", (5,))}


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "dtype": "F99"},
        {**GOOD, "dtype": "\x1b[31mF32"},
        {**GOOD, "dtype": None},
        {**GOOD, "dtype": ["F32"]},
        {**GOOD, "shape": [-2, -3]},
        {**GOOD, "shape": [2, -3]},
        {**GOOD, "shape": [2.0, 3]},
        {**GOOD, "shape": [True, 6]},
        {**GOOD, "shape": "23"},
        {**GOOD, "shape": [2, "3"]},
        {**GOOD, "shape": [1 << 40, 1 << 40]},
        {**GOOD, "shape": [1 << 64]},
        {**GOOD, "shape": [0, 1 << 62, 1 << 62]},
        {**GOOD, "shape": [3, 3]},
        {**GOOD, "shape": None},
        {**GOOD, "data_offsets": [24, 0]},
        {**GOOD, "data_offsets": [-24, 0]},
        {**GOOD, "data_offsets": [0, 24, 48]},
        {**GOOD, "data_offsets": [0.0, 24.0]},
        {**GOOD, "data_offsets": [8, 32]},
        {**GOOD, "data_offsets": "024"},
        {"dtype": "F32", "shape": [2, 3]},
        {},
        [],
        None,
        7,
    ],
)
def test_impossible_tensors(tmp_path, entry):
    path = tmp_path / "model.safetensors"
    for header in ({"a": entry}, {"a": entry, "b": {"dtype": "U8", "shape": [0], "data_offsets": [24, 24]}}):
        path.write_bytes(content(header))
        with pytest.raises(PackedFormatError, match=r"model\.safetensors is damaged") as error:
            read_header(path)
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        content(b"[]", 0),
        content(b"null", 0),
        content(b"{", 0),
        content(b"\xff\xfe", 0),
        content(b"[" * 100_000, 0),
        content(b'{"a":' * 100_000, 0),
        content(b'{"__metadata__": 3}', 0),
        content(b'{"a": 1e999}', 0),
        content(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 24]}}' % (b"9" * 5000)),
        content({"a": GOOD}, 23),
        content({"a": GOOD}, 25),
        content({"a": GOOD, "b": GOOD}),
        content({"a": GOOD, "b": {**GOOD, "data_offsets": [28, 52]}}, 52),
        content(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2)),
    ],
)
def test_damaged_files(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(PackedFormatError, match=r"model\.safetensors is damaged") as error:
        read_header(path)
    assert len(str(error.value)) < 200 + len(str(path))


def test_random_damage_is_never_another_error():
    random = np.random.default_rng(0)
    whole = content({"a": GOOD, "b": {"dtype": "F4", "shape": [2], "data_offsets": [24, 25]}, "__metadata__": {}}, 25)
    read = 0
    for _ in range(4000):
        data = bytearray(whole)
        for place in random.integers(PREFIX, len(whole) - 25, random.integers(1, 3)):
            data[place] = random.integers(0, 256)
        try:
            length = header_length(bytes(data[:PREFIX]), len(data), "x")
            for dtype, shape in parse_header(bytes(data[PREFIX : PREFIX + length]), len(data), "x").values():
                assert sum(shape) < 100
                assert dtype in BITS
                read += 1
        except PackedFormatError:
            pass
    assert read > 20  # names may be any


EVIL = "\x1b]0;owned\x07[bold red]x[/]\n\u202e$\\frac{1}{0}$ <script>|`a`"


def test_names_of_tensors_are_shown_as_text(tmp_path, capsys):
    model = build("bert")
    model.save_pretrained(tmp_path)
    save_file({EVIL: torch.zeros(2)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": EVIL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for args in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_:
            main(["inspect", str(tmp_path), *args])
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert all(line.isprintable() for line in out.splitlines())
        assert "\x1b" not in out
    assert json.loads(out)["tensors"][0]["name"] == EVIL
    assert json.loads(out)["format"] == EVIL
    assert inspect_checkpoint(tmp_path).rows[0].name == EVIL


def test_names_of_layers_are_drawn_as_text(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from hf_approx.inspection import Inspection, Row
    from hf_approx.plots import plot_layers
    from hf_approx.report_plots import plot_training
    from hf_approx.similarity_plots import plot_similarity

    counts = (2, *[0] * 3, 2, *[0] * 4)
    rows = [Row(f"{i}.{EVIL}{'x' * 5000}", (2, 2), "float16", True, 0.5, 4.0, 4, 8, counts) for i in range(3)]
    plot_layers(Inspection(rows, 12, 12.0), tmp_path / "layers.svg")
    # As many pixels as a picture can have.
    monkeypatch.setattr("hf_approx.plots.MAX_PIXELS", 200)
    plot_similarity({EVIL: [[1.0]]}, tmp_path / "similarity.png")
    assert max(struct.unpack(">II", (tmp_path / "similarity.png").read_bytes()[16:24])) <= 200
    report = {
        "methods": [{"label": EVIL, "target_sparsity": 0.5}],
        "history": [{"step": 1, f"{EVIL}/sparsity": 0.5, "masks": {}}],
    }
    plot_training(report, tmp_path / "training.png")
    with pytest.raises(ValueError, match="Format 'xyz'"):
        plot_similarity({EVIL: [[1.0]]}, tmp_path / "similarity.xyz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.svg", "similarity.png", "training.png"]


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": {"a": "a.safetensors"}}, {"weight_map": {"a": "a.safetensors"}, "metadata": None}],
    ids=["empty", "no metadata", "null"],
)
def test_an_index_that_transformers_would_not_read_is_damaged(index):
    with pytest.raises(PackedFormatError, match=r"^the index is damaged\.$"):
        weight_map(index, "the index")
    assert weight_map({**index, "metadata": {}, "weight_map": {"a": "b.safetensors"}}, "the index") == {
        "a": "b.safetensors"
    }

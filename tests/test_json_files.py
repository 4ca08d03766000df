"""Reading JSON that anyone may have made."""

import os

import pytest

from hf_approx import PackedFormatError
from hf_approx.json_files import MAX_BYTES, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' * 101 + "{}" + "}" * 101, "nested too deeply"),
        ("[]", "not a JSON object"),
        ("", "not JSON"),
        ('{"a": 1', "not JSON"),
        ('{"a": %s}' % ("9" * 5000), "not JSON"),
        ("null", "not a JSON object"),
    ],
)
def test_one_sentence_with_the_name_of_the_file(tmp_path, text, message):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(PackedFormatError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 100 + len(str(path))


def test_what_is_read(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('{"a": [0.0, Infinity], "b": {"c": "\\u00e9"}, "b": 1}', encoding="utf-8")
    assert read_json(path) == {"a": [0.0, float("inf")], "b": 1}  # as transformers writes and reads it
    with pytest.raises(PackedFormatError, match="same key twice"):
        read_json(path, unique_keys=True)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(PackedFormatError, match="not JSON"):
        read_json(path)


def test_files_that_are_too_large_or_none(tmp_path):
    path = tmp_path / "some.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PackedFormatError, match="67,108,865 bytes; more than 67,108,864"):
        read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(PackedFormatError, match="is no file"):
        read_json(path)
    with pytest.raises(OSError, match="other"):
        read_json(tmp_path / "other.json")

"""What is wrong with files and rows of data, found before a model is loaded and said in one sentence."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, features
from PIL import Image as Picture

from config_files import ConfigError
from hf_approx.loops.calibration_data import READERS

CHUNK = 1 << 20
"""Bytes of a file, and at most so many rows, that are checked at a time."""

IMAGES = 10_000
"""Of a split, so many are opened before training."""

SEPARATORS = {";": '";"', "\t": r'"\t"', "|": '"|"'}
"""Of columns, beside the comma, as YAML writes them."""

JSON = getattr(features, "Json", ())
"""What `datasets` has from version 5 on for a column of a JSON file whose values are of several kinds."""

MANY = 20
"""Classes that a data set may have however few its rows are."""


def files_of(options: dict[str, Any]) -> dict[str, list[str]]:
    """The files of each split, as `data_files` of `load_dataset` names them."""
    files = options.get("data_files") or {}
    by_split = files if isinstance(files, dict) else {"train": files}
    return {split: [names] if isinstance(names, str) else list(names) for split, names in by_split.items()}


def source(options: dict[str, Any], split: str) -> str:
    """Where the rows of a split are from, to begin a message with."""
    names = files_of(options).get(split, [])
    return f"dataset: {names[0]}" if len(names) == 1 else f"dataset: split {split!r}"


def check_files(options: dict[str, Any]) -> None:
    """Raise `ConfigError` for a file on disk that is missing or empty, or that `load_dataset` would misread."""
    folder = Path(options.get("data_dir") or ".")
    for name in (name for names in files_of(options).values() for name in names):
        path = folder / name
        if _is_elsewhere(name):
            continue
        if not path.is_file():
            where = "" if path.is_absolute() else f" in {folder.resolve()}"
            raise ConfigError(f"dataset: there is no file {name!r}{where}.")
        if path.stat().st_size == 0:
            raise ConfigError(f"dataset: {name} is empty.")
        loader = READERS.get(path.suffix)
        if options["path"] in ("csv", "json", "parquet") and loader not in (None, "text", options["path"]):
            raise ConfigError(f"dataset: {name} is not for path: {options['path']}; write path: {loader}.")
        if options["path"] in ("csv", "json", "text") and path.suffix in (".csv", ".tsv", ".json", ".jsonl", ".txt"):
            _check_encoding(path, name, options.get("encoding") or "utf-8")
        if options["path"] == "csv":
            _check_header(path, name, options)


def _is_elsewhere(name: str) -> bool:
    """Whether a name stands for a file on another machine, or for several files."""
    return "://" in name or any(sign in name for sign in "*?[")


def fault(options: dict[str, Any], split: str) -> str | None:
    """The first place in a split's files where they are no JSON, if that is what is wrong with them."""
    if options["path"] != "json":
        return None
    for name in files_of(options)[split]:
        path = Path(options.get("data_dir") or ".") / name
        if _is_elsewhere(name) or not path.is_file():
            continue
        with open(path, encoding=options.get("encoding") or "utf-8-sig") as file:
            found = _json_fault(file)
        if found is not None:
            return found
    return None


def _json_fault(file: TextIO) -> str | None:
    """Of lines that each hold a row, if the first one does; of one list of rows otherwise."""
    whole = True
    for number, line in enumerate(file, 1):
        try:
            if line.strip():
                json.loads(line.strip())
                whole = False
        except json.JSONDecodeError as error:
            if not whole:
                return _no_json(number, error)
            break
    file.seek(0)
    try:
        if whole:
            json.load(file)
    except json.JSONDecodeError as error:
        return _no_json(error.lineno, error)
    return None


def _no_json(line: int, error: json.JSONDecodeError) -> str:
    return f"line {line}, column {error.colno} is no JSON: {error.msg.removesuffix(' starting at')}"


def _check_encoding(path: Path, name: str, encoding: str) -> None:
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise ConfigError(f"dataset: encoding {encoding!r} is none that Python knows.") from None
    line, start = 1, b""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            start = start or chunk[:2]
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += chunk[: error.start].count(b"\n")
                guess = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
                raise ConfigError(
                    f"dataset: {name} is not {encoding.upper()}, the first other byte is in line {line}; set "
                    f"dataset.encoding={guess}, or what it was saved in."
                ) from None
            line += chunk.count(b"\n")


def _check_header(path: Path, name: str, options: dict[str, Any]) -> None:
    """Of a file with columns: that they are several where they seem to be, have different names, and have rows."""
    if any(options.get(key) is not None for key in ("column_names", "names", "header", "skiprows")):
        return
    given = options.get("sep") or options.get("delimiter")
    if path.suffix not in (".csv", ".tsv", ".txt") or (given is not None and len(given) != 1):
        return
    with open(path, encoding=options.get("encoding") or "utf-8-sig", newline="") as file:
        rows = (row for row in csv.reader(file, delimiter=given or ",") if row)
        try:
            header, first = next(rows, []), next(rows, None)
        except csv.Error as error:
            raise ConfigError(f"dataset: {name} cannot be read as CSV: {error}.") from None
    other = next((sign for sign in SEPARATORS if len(header) == 1 and sign in header[0] and sign != given), None)
    if other is not None:
        raise ConfigError(
            f"dataset: {name} has all in one column, {header[0]!r}; its columns are separated by {SEPARATORS[other]}: "
            f"write {{path: csv, sep: {SEPARATORS[other]}, data_files: ...}}."
        )
    double = sorted({column for column in header if header.count(column) > 1})
    if double:
        raise ConfigError(f"dataset: {name} has the column {double[0]!r} twice; rename or remove one.")
    if first is None:
        raise ConfigError(f"dataset: {name} has no rows, only the line {', '.join(header)!r}.")


def reason(error: Exception) -> str:
    """Why `load_dataset` failed, in one sentence: what it says itself is that it did."""
    cause = error.__cause__ if "while generating the dataset" in str(error) and error.__cause__ else error
    text = " ".join(str(cause).split()).rstrip(".").removeprefix("Error tokenizing data. C error: ")
    if text.startswith("Expected ") and " fields in line " in text:
        text += "; a text with commas needs quotation marks around it"
    opened = re.fullmatch(r"EOF inside string starting at row (\d+)", text)
    return text if opened is None else f"the quotation mark that row {opened[1]} opens is never closed"


def check_columns(options: dict[str, Any], split: str, there: list[str], columns: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a column that a split has not."""
    for column in columns:
        if column not in there:
            hint = ""
            if options.get("path") == "csv" and "column_names" not in options:
                hint = "; if the first line of the file is no header, name them: dataset.column_names=[...]"
            if options.get("path") == "json" and "field" not in options and len(there) == 1:
                hint = f"; if the rows are in a list under {there[0]!r}, say so: dataset.field={there[0]}"
            if options.get("path") == "imagefolder" and column == "label":
                hint = "; put the images of each class into a folder of its name"
            raise ConfigError(f"{source(options, split)}: no column {column!r}; it has {', '.join(there)}{hint}.")


def _kind(feature: Any) -> str:
    """What a column holds, in words where there are any."""
    if isinstance(feature, JSON):
        return "values of several kinds"
    return feature.dtype if isinstance(feature, Value) else str(feature)


def _batches(data: Dataset, column: str) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """Values of a column with the number of the first, a piece at a time."""
    start = 0
    for table in data.select_columns([column]).with_format("arrow").iter(10_000):
        yield start, table[column]
        start += len(table)


def _count(data: Dataset, column: str, is_bad: Any) -> tuple[int, int]:
    """How many values of a column are bad, and the number of the first such row."""
    count, first = 0, -1
    for start, values in _batches(data, column):
        bad = pc.fill_null(is_bad(values), True)
        if count == 0:
            first = start + pc.index(bad, True).as_py()
        count += pc.sum(bad).as_py() or 0
    return count, first


def _blank(values: pa.ChunkedArray) -> Any:
    """Where values are missing or text without a letter."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pc.equal(pc.utf8_trim_whitespace(values), "")
    return pc.is_null(values)


def _missing(options: dict[str, Any], data: Dataset, column: str, bad: tuple[int, int], what: str) -> str:
    count, first = bad
    row = str(data[first])
    hint = ""
    if options.get("path") == "csv":
        hint = "; dataset.keep_default_na=false keeps words such as NA and None, which mean nothing to CSV"
    return (
        f"{count} of {len(data)} rows have {what} {column!r}, the first is row {first + 1}, "
        f"{row if len(row) < 120 else row[:117] + '...'}; fill or remove them{hint}."
    )


def check_texts(
    options: dict[str, Any], data: DatasetDict, splits: dict[str, str], *columns: str, empty: bool = False
) -> None:
    """Raise `ConfigError` for a column that holds no texts, or rows without one.

    Args:
        options: Of the data set.
        data: `train` and `validation`.
        splits: What those are called in the data set.
        columns: Names of columns.
        empty: Whether a text may be empty; none may be missing.
    """
    for split, rows in data.items():
        where = source(options, splits[split])
        if not len(rows):
            raise ConfigError(f"{where} has no rows.")
        for column in columns:
            kind = _kind(rows.features[column])
            if kind not in ("string", "large_string", "null"):
                raise ConfigError(f"{where}: the column {column!r} holds {kind}, no texts.")
            bad = _count(rows, column, pc.is_null if empty else _blank)
            if bad[0]:
                raise ConfigError(f"{where}: {_missing(options, rows, column, bad, 'no' if empty else 'an empty')}")


def check_images(options: dict[str, Any], data: DatasetDict, splits: dict[str, str], column: str) -> None:
    """Raise `ConfigError` for a column that holds no images, or rows whose image is missing or cannot be read.

    Only the beginning of each of the first `IMAGES` is read.
    """
    for split, rows in data.items():
        where = source(options, splits[split])
        if not isinstance(rows.features[column], Image):
            raise ConfigError(f"{where}: the column {column!r} holds no images.")
        raw = rows.select(range(min(IMAGES, len(rows)))).select_columns([column])
        bad: list[tuple[int, str]] = []
        for i, row in enumerate(raw.cast_column(column, Image(decode=False))):
            name = (row[column] or {}).get("path") or "no image"
            try:
                content = (row[column] or {}).get("bytes")
                Picture.open(name if content is None else BytesIO(content)).close()
            except (OSError, ValueError):
                bad.append((i, name))
        if bad:
            first, name = bad[0]
            raise ConfigError(
                f"{where}: {len(bad)} of {len(raw)} images cannot be read, the first is row {first + 1}, {name}; "
                "remove or replace them."
            )


def number_labels(options: dict[str, Any], data: DatasetDict, splits: dict[str, str], column: str) -> DatasetDict:
    """The data with class numbers and names in the label column, whatever it held: names, numbers with gaps, truths.

    Args:
        options: Of the data set.
        data: `train` and `validation`.
        splits: What those are called in the data set.
        column: Of the labels.

    Raises:
        ConfigError: A row has no class, the values are no classes, or validation has one that training lacks.
    """
    values: dict[str, list[Any]] = {}
    for split, rows in data.items():
        where = source(options, splits[split])
        if not len(rows):
            raise ConfigError(f"{where} has no rows.")
        feature = rows.features[column]
        if not isinstance(feature, Value | ClassLabel):
            raise ConfigError(
                f"{where}: the column {column!r} holds {_kind(feature)}; a row has one class, a name or a number."
            )
        classes = isinstance(feature, ClassLabel)
        bad = _count(rows, column, (lambda found: pc.less(found, 0)) if classes else _blank)
        if bad[0]:
            what = "no class in" if classes else "an empty"
            raise ConfigError(f"{where}: {_missing(options, rows, column, bad, what)}")
        values[split] = [value for _, found in _batches(rows, column) for value in found.to_pylist()]
        if isinstance(feature, ClassLabel):
            values[split] = [feature.names[number] for number in values[split]]
        else:
            parts = [value for value in values[split] if isinstance(value, float) and not value.is_integer()]
            if parts:
                raise ConfigError(
                    f"{where}: {column!r} is a fraction in {len(parts)} of {len(rows)} rows, the first is "
                    f"{parts[0]!r}, and no class; give each class a name or a whole number."
                )
            values[split] = [str(int(value) if isinstance(value, float) else value) for value in values[split]]
    where = source(options, splits["train"])
    feature = data["train"].features[column]
    found = set(values["train"])
    names = feature.names if isinstance(feature, ClassLabel) else sorted(found, key=_by_value(found))
    if len(found) < 2:
        raise ConfigError(f"{where}: {column!r} is {names[0]!r} in every row; a classifier needs two classes or more.")
    if len(found) > max(MANY, len(values["train"]) // 2):
        raise ConfigError(
            f"{where}: {column!r} has {len(found)} different values in {len(values['train'])} rows, the first is "
            f"{values['train'][0]!r}: these are no classes; set label_column."
        )
    unknown = [i for i, value in enumerate(values["validation"]) if value not in found]
    if unknown:
        where, first = source(options, splits["validation"]), unknown[0]
        raise ConfigError(
            f"{where}: {len(unknown)} of {len(values['validation'])} rows have a class that training lacks, the first "
            f"is row {first + 1}, {values['validation'][first]!r}."
        )
    if isinstance(feature, ClassLabel) and data["validation"].features[column] == feature:
        return data
    numbers = {name: number for number, name in enumerate(names)}
    return DatasetDict(
        {
            split: rows.remove_columns(column).add_column(
                column, [numbers[value] for value in values[split]], feature=ClassLabel(names=names)
            )
            for split, rows in data.items()
        }
    )


def _by_value(names: set[str]) -> Any:
    """Numbers are sorted as such, 2 before 10."""
    return int if all(name.removeprefix("-").isdecimal() for name in names) else str

"""Damage to a saved model: to its bytes, to what its config says, and to which tensor is which."""

import copy
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from torture.folders import Files, Stored, read_tensors, write_tensors

CONFIG = "config.json"
PACKING = "quantization_config"
KNOWN = {
    "dtype": ("float32", "float16", "bfloat16"),
    "scale_dtype": ("float32", "float16", "bfloat16"),
    "store_dtype": ("float32", "float16", "bfloat16", None),
    "kind": ("sparse", "quantized", "shared"),
    "quant_method": ("hf_approx", "gptq", "bitsandbytes"),
}
DTYPES = {
    1: ("U8", "I8", "BOOL"),
    2: ("F16", "BF16", "I16", "U16"),
    4: ("F32", "I32", "U32"),
    8: ("F64", "I64", "U64"),
}
HUGE = (10**30, 2**63, 2**63 - 1, 2**32, 2**31, 2**31 - 1, 10**9, 2**24, 10**400)
Path = tuple[Any, ...]


def mutate(random: Random, files: Files, only: Sequence[str] = ()) -> tuple[str, str]:
    """Damage the files, in place; returns the kind of damage and what it was, empty if there was nothing to damage."""
    kinds = list(only or KINDS)
    kind = random.choices(kinds, [KINDS[k][0] for k in kinds])[0]
    before = dict(files)
    for _ in range(20):
        try:
            note = KINDS[kind][1](random, files)
        except (LookupError, TypeError, AttributeError, ValueError, struct.error):
            note = ""  # an earlier damage left nothing that this one fits
        if note and files != before:
            return kind, note
        files.clear()
        files.update(before)
    return kind, ""


def _weights(random: Random, files: Files) -> str:
    return random.choice([name for name in sorted(files) if name.endswith(".safetensors")])


def _span(data: bytes) -> int:
    """Where the tensors begin in a safetensors file."""
    return 8 + struct.unpack("<Q", data[:8])[0]


def _damage(random: Random, data: bytes, start: int, end: int) -> tuple[bytes, str]:
    """Flip bits, or overwrite a run of bytes, between two places."""
    changed = bytearray(data)
    if random.random() < 0.6:
        places = [random.randrange(start, end) for _ in range(random.choice((1, 1, 1, 2, 8)))]
        for place in places:
            changed[place] ^= 1 << random.randrange(8)
        return bytes(changed), f"bits flipped at {places}"
    place = random.randrange(start, end)
    length = min(random.choice((1, 2, 4, 16, 64, 512)), end - place)
    filling = random.choice((b"\0" * length, b"\xff" * length, random.randbytes(length)))
    changed[place : place + length] = filling
    return bytes(changed), f"{length} bytes overwritten at {place}"


def payload(random: Random, files: Files) -> str:
    name = _weights(random, files)
    files[name], note = _damage(random, files[name], _span(files[name]), len(files[name]))
    return f"{name}: {note}"


def header(random: Random, files: Files) -> str:
    name = _weights(random, files)
    files[name], note = _damage(random, files[name], 0, _span(files[name]))
    return f"{name}, header: {note}"


def length(random: Random, files: Files) -> str:
    """Shorter, longer, empty or no files."""
    name = random.choice(sorted(files))
    data = files[name]
    what = random.choice(("cut", "cut", "longer", "empty", "gone", "doubled"))
    if what == "cut":
        files[name] = data[: random.randrange(len(data))]
    elif what == "longer":
        files[name] = data + random.choice((b"\0", b" ", random.randbytes(random.choice((1, 8, 4096)))))
    elif what == "doubled":
        files[name] = data + data
    elif what == "empty":
        files[name] = b""
    else:
        del files[name]
    return f"{name}: {what}"


def text(random: Random, files: Files) -> str:
    """Bytes of the packing part of the config."""
    data = files[CONFIG]
    start = data.index(PACKING.encode()) + len(PACKING) + 3
    # Sorted keys put it in the middle: what follows is no longer its own.
    end = start + len(json.dumps(json.loads(data)[PACKING], indent=2).replace("\n", "\n  ").encode())
    files[CONFIG], note = _damage(random, data, start, min(end, len(data)))
    return f"{CONFIG}: {note}"


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place in nested JSON but the top, containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key), each
        yield from _leaves(each, (*path, key))


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _edit(files: Files, change: Callable[[dict[str, Any]], str]) -> str:
    config = json.loads(files[CONFIG])
    note = change(config[PACKING])
    if not note:
        return ""
    files[CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    return f"{CONFIG}: {note}"


def leaf(random: Random, files: Files) -> str:
    """One value of the packing part becomes another."""

    def change(packing: dict[str, Any]) -> str:
        leaves = list(_leaves(packing))
        path, value = random.choice(leaves)
        place, key = _at(packing, path[:-1]), path[-1]
        what = random.choice(("other", "other", "swap", "type", "gone", "more", "key"))
        new: Any = None
        if what == "other":
            new = _other(random, key, value)
        elif what == "swap":  # with the value that another entry has there
            others = [
                other for other, v in leaves if other[-1:] == path[-1:] and len(other) == len(path) and v != value
            ]
            if not others:
                return ""
            other = random.choice(others)
            new, _at(packing, other[:-1])[key] = _at(packing, other), value
        elif what == "type":
            new = random.choice((None, True, 1.5, float("nan"), -1, "", str(value), [value], {"x": value}, [], {}))
        elif what == "gone":
            del place[key]
        elif what == "more" and isinstance(place, list):
            place.insert(random.randrange(len(place) + 1), value)
        elif what == "more":
            place[f"{key}_"] = value
        elif isinstance(place, dict):
            place[str(key)[:-1] or "x"] = place.pop(key)
        else:
            random.shuffle(place)
        if what in ("other", "swap", "type"):
            place[key] = new
        return f"{'.'.join(map(str, path))} {what}: {_short(value)} -> {_short(new)}"

    return _edit(files, change)


def _short(value: Any) -> str:
    try:
        shown = json.dumps(value)
    except ValueError:
        shown = f"an integer of {value.bit_length()} bits"
    return shown if len(shown) < 80 else f"{shown[:80]}..."


def _other(random: Random, key: Any, value: Any) -> Any:
    """Another value of the same kind."""
    if key in KNOWN:
        return random.choice([each for each in KNOWN[key] if each != value])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, 2 * value, value // 2, -value, 0, 1, random.choice(HUGE)))
    if isinstance(value, float):
        return random.choice((-value, 2 * value, 1e300, float("inf")))
    if isinstance(value, str):
        return random.choice(
            (value[:-1], value + "x", value.upper(), "", "keys", "../x", "\x1b[31m", "a.b", "x" * 9999)
        )
    if isinstance(value, list):
        shuffled = random.sample(value, len(value))
        return random.choice(
            (value[::-1], shuffled, value[:-1], value[1:], [1, *value], [*value, 1], [0] * len(value))
        )
    if isinstance(value, dict):
        keys = random.sample(list(value), len(value))
        return random.choice(({}, dict(list(value.items())[1:]), dict(zip(keys, value.values(), strict=True))))
    return random.choice((0, "", [], {}, "float16"))


def entries(random: Random, files: Files) -> str:
    """Whole entries of the config exchanged, renamed, repeated or left out."""

    def change(packing: dict[str, Any]) -> str:
        tables = [table for table in ("tensors", "activations") if packing.get(table)]
        if not tables:
            return ""
        name = random.choice(tables)
        table = packing[name]
        a = random.choice(list(table))
        alike = [b for b in table if b != a and table[b] != table[a]] or list(table)
        b = random.choice(alike)
        what = random.choice(("exchange", "exchange", "copy", "move", "gone", "order", "ghost", "repeat"))
        if what == "exchange":
            table[a], table[b] = table[b], table[a]
        elif what == "copy":
            table[b] = copy.deepcopy(table[a])
        elif what == "move":
            table[b] = table.pop(a)
        elif what == "gone":
            del table[a]
        elif what == "order":
            packing[name] = dict(random.sample(list(table.items()), len(table)))
        elif what == "ghost":
            table[f"{a}x"] = table.pop(a)
        else:
            table[f"x.{a}"] = table[a]
        return f"{name} {what}: {a}, {b}"

    return _edit(files, change)


def banks(random: Random, files: Files) -> str:
    """A weight mixed from another bank, a bank renamed; where there are none, an entry under another's kind."""

    def change(packing: dict[str, Any]) -> str:
        tensors = packing["tensors"]
        shared = [name for name, entry in tensors.items() if entry.get("kind") == "shared"]
        if not shared:
            return ""
        name = random.choice(shared)
        own = tensors[name]["bank"]
        alike = {e["bank"] for e in (tensors[n] for n in shared) if e["shape"] == tensors[name]["shape"]} - {own}
        what = random.choice(("other", "exchange", "all", "name"))
        other = random.choice(sorted(alike)) if alike else f"{own}x"
        if what == "name":
            other = random.choice(("keys", "items", "training", "forward", "..", "a.b", "", "0", own.upper()))
        for each in [name] if what == "other" else shared:
            if tensors[each]["bank"] == own:
                tensors[each]["bank"] = other
            elif tensors[each]["bank"] == other and what == "exchange":
                tensors[each]["bank"] = own
        return f"bank {what} of {name}: {own} -> {other}"

    return _edit(files, change)


def tensors(random: Random, files: Files) -> str:
    """Tensors of the weight file exchanged, renamed, left out, or said to be of another dtype or shape."""
    name = _weights(random, files)
    stored, metadata = read_tensors(files[name])
    note = _change_tensors(random, stored, lambda entry: True)
    files[name] = write_tensors(stored, metadata)
    return f"{name}: {note}" if note else ""


def plain(random: Random, files: Files) -> str:
    """The same to the tensors that are not packed, and flips in them."""
    name = _weights(random, files)
    stored, metadata = read_tensors(files[name])
    own = [key for key, (dtype, _, data) in stored.items() if dtype != "U8" and data]
    if not own:
        return ""
    if random.random() < 0.5:
        key = random.choice(own)
        dtype, shape, data = stored[key]
        data, note = _damage(random, data, 0, len(data))
        stored[key], note = (dtype, shape, data), f"{key}: {note}"
    else:
        note = _change_tensors(random, stored, lambda entry: entry[0] != "U8")
    files[name] = write_tensors(stored, metadata)
    return f"{name}: {note}" if note else ""


def _change_tensors(random: Random, stored: Stored, chosen: Callable[[tuple[str, list[int], bytes]], bool]) -> str:
    names = [name for name, entry in stored.items() if chosen(entry)]
    if not names:
        return ""
    a = random.choice(names)
    dtype, shape, data = stored[a]
    alike = [b for b in names if b != a and stored[b][:2] == (dtype, shape) and stored[b][2] != data]
    what = random.choice(("exchange", "exchange", "copy", "gone", "name", "more", "dtype", "shape", "flat", "empty"))
    b = random.choice(alike or names)
    if what == "exchange":
        stored[a], stored[b] = stored[b], stored[a]
    elif what == "copy":
        stored[b] = stored[a]
    elif what == "gone":
        del stored[a]
    elif what == "name":
        stored[random.choice((f"{a}x", b, a.rpartition(".")[2], f"model.{a}"))] = stored.pop(a)
    elif what == "more":
        stored[random.choice((f"{a}.copy", "x", f"x.{a}", "__class__"))] = stored[a]
    elif what == "dtype":
        width = len(data) // max(1, _product(shape))
        stored[a] = (random.choice([d for d in DTYPES.get(width, ("F32",)) if d != dtype]), shape, data)
    elif what == "shape":
        stored[a] = (dtype, random.choice((shape[::-1], [1, *shape], [*shape, 1])), data)
    elif what == "flat":
        stored[a] = (dtype, [_product(shape)], data)
    else:
        stored[a] = (dtype, [0], b"")
    return f"{what}: {a}, {b}"


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def index(random: Random, files: Files) -> str:
    """What the index of several weight files says."""
    name = "model.safetensors.index.json"
    if name not in files:
        return ""
    data = json.loads(files[name])
    table = data["weight_map"]
    key = random.choice(list(table))
    what = random.choice(("other", "gone", "missing", "all", "one", "outside", "size"))
    shards = sorted(set(table.values()))
    if what == "other":
        table[key] = random.choice(shards)
    elif what == "gone":
        del table[key]
    elif what == "missing":
        table[key] = "model-00099-of-00099.safetensors"
    elif what == "all":
        data["weight_map"] = {}
    elif what == "one":
        gone = random.choice(shards)
        data["weight_map"] = {k: v for k, v in table.items() if v != gone}
    elif what == "outside":
        table[key] = f"../{table[key]}"
    else:
        data["metadata"]["total_size"] = random.choice((0, -1, 10**30, "x"))
    files[name] = json.dumps(data).encode()
    return f"{name}: {what} {key}"


KINDS: dict[str, tuple[float, Callable[[Random, Files], str]]] = {
    "payload": (12, payload),
    "header": (6, header),
    "length": (4, length),
    "config text": (8, text),
    "config value": (30, leaf),
    "config entries": (10, entries),
    "banks": (6, banks),
    "tensors": (8, tensors),
    "plain tensors": (12, plain),
    "index": (4, index),
}
"""How often each is tried, and what does it. One that finds nothing to damage in a folder gives way to a flip."""

"""The fuzzer: a damaged folder loads as what was saved, bit for bit, or is refused in one sentence.

Checksums find nearly all damage before anything else looks at it. What is behind them is tried by configs that were
changed and sealed anew, as someone would who means harm: what these load is up to their writer, but they must load or
be refused all the same.
"""

import functools
import json
from pathlib import Path
from random import Random

from hf_approx.checkpoint.checksums import FIELD, config_checksum, entry_checksum
from hf_approx.inspection import inspect_checkpoint
from torture.engine import MISMATCH, Case, WrongError, problem, theirs
from torture.folders import CODECS, Good, difference, good, write
from torture.mutations import CONFIG, PACKING, mutate, payload

OURS = b'"quant_method": "hf_approx"'
MEANT = ("config value", "config entries", "banks")


@functools.cache
def _goods(codec: str) -> list[Good]:
    return [good(codec, variant) for variant in CODECS[codec]]


def cases(count: int, seed: int) -> list[Case]:
    """`count` damaged folders of each codec."""
    found = []
    for codec in CODECS:
        variants = _goods(codec)  # made before workers are forked
        for i in range(count):
            trial = _Trial(codec, i % len(variants), f"{seed}/{codec}/{i}")
            found.append(Case(f"fuzz/{codec}/{i}", f"fuzz, {codec}", trial, trial.describe))
    for i in range(count):
        codec = list(CODECS)[i % len(CODECS)]
        trial = _Sealed(codec, i // len(CODECS) % len(_goods(codec)), f"{seed}/sealed/{i}")
        found.append(Case(f"fuzz/sealed/{i}", "fuzz, sealed anew", trial, trial.describe))
    return found


class _Trial:
    """One damaged folder. Its damage is drawn when it is run, so that many trials are cheap to list."""

    def __init__(self, codec: str, variant: int, seed: str) -> None:
        self.codec, self.variant, self.seed = codec, variant, seed

    def _damaged(self) -> tuple[Good, dict[str, bytes], str]:
        original = _goods(self.codec)[self.variant]
        random = Random(self.seed)
        files = dict(original.files)
        notes = []
        for _ in range(random.choice((1, 1, 1, 1, 2))):
            kind, note = mutate(random, files)
            if note:
                notes.append(f"{kind}, {note}")
        if not notes:
            notes.append(f"payload, {payload(random, files)}")
        return original, files, "; ".join(notes)

    def describe(self) -> str:
        original, _, note = self._damaged()
        return f"{original.name}: {note}"

    def __call__(self, folder: Path) -> None:
        original, files, _ = self._damaged()
        write(files, folder)
        _inspect(folder)
        try:
            model = original.cls.from_pretrained(folder)
        except Exception as error:
            if theirs(error) or OURS not in files.get("config.json", b""):
                raise ValueError("transformers stops before it asks hf_approx.") from None
            raise
        found = difference(original.truth, model)
        if found is not None:
            raise WrongError(f"loaded as something else: {found}")


class _Sealed(_Trial):
    """One config that says something else, with checksums that say it is right."""

    def _damaged(self) -> tuple[Good, dict[str, bytes], str]:
        original = _goods(self.codec)[self.variant]
        random = Random(self.seed)
        files = {**original.files, CONFIG: sealed(original.files[CONFIG], False)}
        found = (mutate(random, files, MEANT) for _ in range(random.choice((1, 1, 2))))
        notes = [f"{kind}, {note}" for kind, note in found if note]
        files[CONFIG] = sealed(files[CONFIG], True)
        return original, files, "; ".join(notes)

    def __call__(self, folder: Path) -> None:
        original, files, _ = self._damaged()
        write(files, folder)
        _inspect(folder)
        try:
            original.cls.from_pretrained(folder)
        except Exception as error:
            if theirs(error) or MISMATCH in str(error):
                raise ValueError("transformers stops by itself.") from None
            raise


def sealed(config: bytes, closed: bool) -> bytes:
    """A `config.json` with the checksums that its packing part should have, or with those of the bytes alone."""
    data = json.loads(config)
    packing = data[PACKING]
    entries = packing.get("tensors")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and type(entry.get("crc32")) is int:
            # Exclusive or: the same function takes the part of the fields out and puts it in.
            entry["crc32"] = entry_checksum(name, entry, entry["crc32"])
    if closed:
        packing[FIELD] = config_checksum(packing)
    return json.dumps(data).encode()


def _inspect(folder: Path) -> None:
    try:
        inspect_checkpoint(folder)
    except Exception as error:
        found = problem(error)
        if found is not None:
            raise WrongError(f"inspecting: {found}") from None

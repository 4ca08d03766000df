"""The fuzzer: a damaged folder loads as what was saved, bit for bit, or is refused in one sentence."""

import functools
from pathlib import Path
from random import Random

from hf_approx.inspection import inspect_checkpoint
from torture.engine import Case, WrongError, problem, theirs
from torture.folders import CODECS, Good, difference, good, write
from torture.mutations import mutate, payload

OURS = b'"quant_method": "hf_approx"'


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
            found.append(Case(f"fuzz/{codec}/{i}", f"fuzz {codec}", trial, trial.describe))
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


def _inspect(folder: Path) -> None:
    try:
        inspect_checkpoint(folder)
    except Exception as error:
        found = problem(error)
        if found is not None:
            raise WrongError(f"inspecting: {found}") from None

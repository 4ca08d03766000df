"""Real parallel text that a Python package brings along: the translations of its messages."""

import re
import zlib
from importlib.metadata import PackageNotFoundError, files

from babel.messages.mofile import read_mo
from datasets import Dataset, DatasetDict

FEWEST_LETTERS = 3
"""Messages with fewer are symbols and formats, not language."""

PLACEHOLDER = re.compile(r"%(\(\w*\)|[-+#0]*\d*(\.\d+)?[a-zA-Z]\b)|\{[^{}]*\}|\$[A-Za-z_]|</?\w[^>]*>")
"""Where a program puts a value, in the notations of Python, C and templates, and tags."""

MNEMONIC = re.compile(r"_(?=\w)")
"""The mark of a keyboard shortcut."""


def load(package: str = "gramps", language: str = "de", most_words: int = 40) -> DatasetDict:
    """English messages of an installed package and their translations; an eighth is held out.

    Which ones are held out is decided by a checksum of the English message, so that none is on both sides. Messages
    with placeholders are for training only: copying those is no translation, and would lift any score.

    Args:
        package: Name of the distribution whose compiled catalogues (`.../LANGUAGE/LC_MESSAGES/*.mo`) are read. That of
            the default, a program for genealogy, has about 7,000 messages in each of 40 languages.
        language: As the catalogues name it.
        most_words: Longer messages are left out.

    Returns:
        `train` and `validation` with the columns `source` (English) and `target`.

    Raises:
        ImportError: The package is not installed.
        TypeError: It has no catalogue of that language.
    """
    try:
        paths = [file for file in files(package) or [] if file.match(f"{language}/LC_MESSAGES/*.mo")]
    except PackageNotFoundError:
        raise ImportError(f"the package {package!r} is not installed; install hf-approx[translation]") from None
    if not paths:
        raise TypeError(f"the package {package!r} has no catalogue of {language!r}")
    pairs: dict[str, str] = {}
    for path in sorted(paths, key=str):
        with open(str(path.locate()), "rb") as catalogue:
            pairs |= read_pairs(catalogue, most_words)
    plain = [source for source in pairs if not PLACEHOLDER.search(source)]
    held_out = {source for source in plain if zlib.crc32(source.casefold().encode()) % 8 == 0}
    splits = {"train": sorted(set(pairs) - held_out), "validation": sorted(held_out)}
    return DatasetDict(
        {
            split: Dataset.from_dict({"source": sources, "target": [pairs[source] for source in sources]})
            for split, sources in splits.items()
        }
    )


def read_pairs(catalogue: object, most_words: int) -> dict[str, str]:
    """English to translation, of one compiled catalogue opened in binary mode.

    Singular and plural are pairs of their own where the language has just these two. Marks of keyboard shortcuts are
    taken out. Left out are messages without words, of several paragraphs, that are not translated or that say the
    same as in English.
    """
    pairs = {}
    for message in read_mo(catalogue):  # type: ignore[arg-type]
        sources = [message.id] if isinstance(message.id, str) else list(message.id)
        targets = [message.string] if isinstance(message.string, str) else list(message.string or ())
        for source, target in zip(sources, targets, strict=False) if len(targets) <= 2 else []:
            source, target = _plain(source), _plain(target)
            words = len(source.split())
            letters = sum(map(str.isalpha, source))
            if target and source != target and words <= most_words and letters >= FEWEST_LETTERS:
                pairs[source] = target
    return pairs


def _plain(text: str) -> str:
    """One line without marks of shortcuts; empty for several paragraphs."""
    if "\n\n" in text.strip():
        return ""
    line = " ".join(text.split())
    return line if "%(" in line or "{" in line else MNEMONIC.sub("", line)

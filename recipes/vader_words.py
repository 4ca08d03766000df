"""Polarity of single words: the human-rated lexicon of the `vaderSentiment` package as a data set."""

from importlib.resources import files

from datasets import Dataset, DatasetDict

SPLIT_SEED = 0


def load() -> DatasetDict:
    """About 7,500 words and emoticons, split 80 / 20.

    Returns:
        `train` and `validation` with columns `text` and `label` (1: rated above zero).

    Raises:
        ModuleNotFoundError: The `demo` extra is not installed.
    """
    lexicon = files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8")
    rows = [line.split("\t")[:2] for line in lexicon.splitlines() if line.strip()]
    data = Dataset.from_dict(
        {"text": [word for word, _ in rows], "label": [int(float(score) > 0) for _, score in rows]}
    )
    split = data.train_test_split(test_size=0.2, seed=SPLIT_SEED)
    return DatasetDict(train=split["train"], validation=split["test"])

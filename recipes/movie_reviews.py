"""Polarity of sentences from film reviews, from two CSV files with the columns `text` and `score`."""

from pathlib import Path

from datasets import ClassLabel, DatasetDict, load_dataset


def load(folder: str, least_score: float = 0.5) -> DatasetDict:
    """Sentences whose mean human rating, from -4 to 4, is clear enough to be called positive or negative.

    Args:
        folder: Where `movie_reviews_train.csv` and `movie_reviews_validation.csv` are. They can be made from the
            `hutto_ICWSM_2014` files in the source distribution of the package `vaderSentiment`.
        least_score: Sentences rated closer to zero are left out.

    Returns:
        `train` and `validation` with columns `text` and `label` (1: rated above zero).

    Raises:
        FileNotFoundError: A file is missing.
    """
    files = {split: str(Path(folder) / f"movie_reviews_{split}.csv") for split in ("train", "validation")}
    for file in files.values():
        if not Path(file).is_file():
            raise FileNotFoundError(f"movie_reviews: there is no {file}; set dataset.folder.")
    data = load_dataset("csv", data_files=files)
    clear = data.filter(lambda row: abs(row["score"]) > least_score)
    labels = clear.map(lambda row: {"label": int(row["score"] > 0)}, remove_columns=["score"])
    return labels.cast_column("label", ClassLabel(names=["negative", "positive"]))

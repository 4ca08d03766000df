"""Accuracy and macro-F1 as a local `evaluate` module, so that no network is needed."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = (
    "Share of predictions equal to their reference, and the mean over classes of the harmonic mean of precision and "
    "recall: a model that always says the most frequent class has a low one, however rare the others are."
)


class AccuracyF1(evaluate.Metric):
    """Accuracy, and F1 averaged over the classes that there are among references or predictions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions and references: class numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        said, true = np.asarray(predictions), np.asarray(references)
        scores = []
        for number in np.union1d(said, true):
            both = np.sum((said == number) & (true == number))
            scores.append(2 * both / (np.sum(said == number) + np.sum(true == number)))
        return {"accuracy": float(np.mean(said == true)), "macro_f1": float(np.mean(scores))}

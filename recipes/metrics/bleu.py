"""BLEU and chrF of sacreBLEU as a local `evaluate` module, so that no network is needed."""

import datasets
import evaluate
import sacrebleu


class Bleu(evaluate.Metric):
    """Corpus BLEU and chrF2, from 0 to 100, with sacreBLEU's defaults."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU and chrF2, from 0 to 100, with sacreBLEU's defaults.",
            citation="Post (2018): A Call for Clarity in Reporting BLEU Scores.",
            inputs_description="predictions: translations; references: one for each.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {
            "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
            "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
        }

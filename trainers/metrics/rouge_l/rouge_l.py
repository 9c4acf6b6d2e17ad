"""ROUGE-L without a download: the metric of CommonGen and ELI5.

For the `evaluate` library: `evaluate.load(metric_path("rouge_l"))`.
"""

import datasets
import evaluate

from trainers.tasks.rouge import rouge_l


class RougeL(evaluate.Metric):
    """Mean F1 measure of the longest common subsequence of words (Lin 2004); of several references the best counts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: generated texts. references: lists of good texts.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"rouge_l": sum(rouge_l(text, good) for text, good in pairs) / len(references)}

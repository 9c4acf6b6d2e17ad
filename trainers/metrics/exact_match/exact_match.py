"""Equal texts, apart from case, spacing and punctuation at the ends: the metric of named columns.

For the `evaluate` library: `evaluate.load(metric_path("exact_match"))`.
"""

import datasets
import evaluate

from trainers.tasks.answers import plain_text


class ExactMatch(evaluate.Metric):
    """Share of texts that equal the reference, or one of several, apart from case, spacing and outer punctuation."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: generated texts. references: lists of good answers.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        right = sum(plain_text(text) in map(plain_text, good) for text, good in pairs)
        return {"accuracy": right / len(references)}

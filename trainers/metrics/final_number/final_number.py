"""The final number of a text, compared by its exact value: the metric of GSM8K.

For the `evaluate` library: `evaluate.load(metric_path("final_number"))`.
"""

import datasets
import evaluate

from trainers.tasks.answers import read_number


class FinalNumber(evaluate.Metric):
    """Share of texts whose final number (after "####" where that stands, else the last) has the reference's value."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: generated texts. references: texts that hold the right number.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        parsed = [read_number(text) for text in predictions]
        gold = [read_number(text) for text in references]
        if None in gold:
            raise ValueError(f"reference {gold.index(None)} holds no number: {references[gold.index(None)]!r}")
        right = sum(found == number for found, number in zip(parsed, gold, strict=True))
        return {"accuracy": right / len(gold), "unparseable": parsed.count(None)}

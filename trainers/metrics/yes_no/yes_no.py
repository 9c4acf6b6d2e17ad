"""Yes or no: the metric of StrategyQA.

For the `evaluate` library: `evaluate.load(metric_path("yes_no"))`.
"""

import datasets
import evaluate

from trainers.tasks.answers import read_yes_no


class YesNo(evaluate.Metric):
    """Share of texts whose first whole word "yes" or "no", in any case, is that of the reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: generated texts. references: texts that hold the right word.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        parsed = [read_yes_no(text) for text in predictions]
        gold = [read_yes_no(text) for text in references]
        if None in gold:
            raise ValueError(f"reference {gold.index(None)} holds neither yes nor no: {references[gold.index(None)]!r}")
        right = sum(found == word for found, word in zip(parsed, gold, strict=True))
        return {"accuracy": right / len(gold), "unparseable": parsed.count(None)}

"""The letter of an option: the metric of LogiQA, CommonsenseQA and ARC.

For the `evaluate` library: `evaluate.load(metric_path("option_letter"))`.
"""

import datasets
import evaluate

from trainers.tasks.answers import read_option_letter


class OptionLetter(evaluate.Metric):
    """Share of texts whose first capital letter that stands alone, of the letters there are, is the right one."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions: generated texts. references: right letters.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], letters: str = "ABCDE") -> dict[str, float]:
        for index, letter in enumerate(references):
            if len(letter) != 1 or letter not in letters:
                raise ValueError(f"reference {index} is {letter!r}, which is none of the letters {letters}")
        parsed = [read_option_letter(text, letters) for text in predictions]
        right = sum(found == letter for found, letter in zip(parsed, references, strict=True))
        return {"accuracy": right / len(references), "unparseable": parsed.count(None)}

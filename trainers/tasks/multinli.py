"""MultiNLI: does a premise entail a hypothesis? (Williams, Nangia and Bowman 2018, arXiv:1704.05426)"""

from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .answers import read_label
from .base import Example, Score
from .choice import one_line
from .loading import Row, StoredTask

LABELS = ("entailment", "neutral", "contradiction")


@strict
@dataclass(kw_only=True)
class MultiNLIOptions:
    """Options of the MultiNLI task."""

    test: Literal["matched", "mismatched"] = field(
        default="matched",
        metadata={"help": "Test on genres that occur in train (matched), or on other ones (mismatched)."},
    )


class MultiNLI(StoredTask):
    """Premise and hypothesis, each on a line of its own -> "entailment", "neutral" or "contradiction".

    The test splits' labels are not public: `validation_matched` or `validation_mismatched` is taken as the test, and a
    share of train is held out for validation. Fields: `premise`, `hypothesis` (text), `label` (0, 1, 2 in the order
    above, or the word itself), optional `pairID` and `genre` (text). The genre is the difficulty. Two rows with the
    same premise count as the same question, since train has each premise with several hypotheses. A long pair loses the
    beginning of its premise. A prediction is read by [`~trainers.tasks.answers.read_label`].
    """

    name = "multinli"
    license = "mixed: CC BY 3.0, CC BY-SA 3.0, MIT and the licence of the Open American National Corpus"
    hub_id = "nyu-mll/multi_nli"
    id_field = "pairID"
    max_source_length = 256
    max_target_length = 16
    options_class = MultiNLIOptions

    def __init__(self, arguments: Any):
        super().__init__(arguments)
        test = f"validation_{self.options.test}"
        self.hub_splits = {"train": "train", "test": test}  # type: ignore[misc]
        self.local_names = {"train": ("train",), "validation": ("validation",), "test": (test,)}  # type: ignore[misc]

    def parse(self, row: Row) -> Example:
        label = row.values.get("label")
        if label not in LABELS:
            position = row.get("label", int, f"0, 1 or 2, or one of {', '.join(LABELS)}")
            if not 0 <= position < len(LABELS):
                raise row.error("label", f"must be 0 ({LABELS[0]}), 1 ({LABELS[1]}) or 2 ({LABELS[2]}), got {position}")
            label = LABELS[position]
        return Example(
            id=row.text(self.id_field) if self.id_field in row.values else row.name,
            prompt=f"premise: {one_line(row.text('premise'))}\nhypothesis: {one_line(row.text('hypothesis'))}",
            target=label,
            answer=label,
            difficulty=row.text("genre") if "genre" in row.values else None,
        )

    def question(self, example: Example) -> str:
        return example.prompt.split("\n")[0]

    def score(self, prediction: str, example: Example) -> Score:
        parsed = read_label(prediction, LABELS)
        return Score(correct=parsed == example.answer, parsed=parsed)

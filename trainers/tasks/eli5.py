"""ELI5: open questions with long answers (Fan et al. 2019, arXiv:1907.09190)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.dataclasses import strict

from .base import Example, Score, TrivialPredictor, tokenize
from .choice import one_line
from .free_text import free_text_predictor, score_free_text
from .loading import Row, StoredTask


@strict
@dataclass(kw_only=True)
class ELI5Options:
    """Options of the ELI5 task."""

    max_references: int = field(
        default=1,
        metadata={"help": "Score against so many of a question's answers, those with the most votes."},
    )

    def validate_ranges(self) -> None:
        if self.max_references < 1:
            raise ValueError(f"max_references is {self.max_references}; it must be at least 1")


class ELI5(StoredTask):
    """Question, and what its author adds to it -> an answer of one or more paragraphs.

    The original release is no longer offered on the Hub. The default is a public copy of its
    explainlikeimfive part; local files have the same fields: `title` (text), `answers` (an object of lists, `text` and
    `score`), optional `q_id` and `selftext` (text). The answer with the most votes is the target. A target that is too
    long loses its end; the score is against the whole of it. The metric is ROUGE-L, see
    [`~trainers.tasks.free_text.score_free_text`].
    """

    name = "eli5"
    metric = "rouge_l"
    license = "not stated"
    hub_id = "vblagoje/lfqa"
    hub_has_validation = True
    id_field = "q_id"
    max_source_length = 256
    max_target_length = 256
    options_class = ELI5Options

    def parse(self, row: Row) -> Example:
        answers = row.get("answers", dict, "an object with text and score")
        texts, votes = answers.get("text"), answers.get("score")
        if not isinstance(texts, list) or not texts:
            raise row.error("answers.text", "must be a list with at least one text")
        if not isinstance(votes, list) or not all(type(vote) is int for vote in votes):
            raise row.error("answers.score", "must be a list of whole numbers")
        if len(votes) != len(texts):
            raise row.error("answers.score", f"has {len(votes)} numbers for {len(texts)} texts")
        checked = [row.check_text(f"answers.text[{index}]", text) for index, text in enumerate(texts)]
        best = [text for _, text in sorted(zip(votes, checked, strict=True), key=lambda pair: -pair[0])]
        extra = row.values.get("selftext")
        lines = [row.text("title"), *([row.check_text("selftext", extra)] if extra else [])]
        return Example(
            id=row.text(self.id_field) if self.id_field in row.values else row.name,
            prompt="\n".join(map(one_line, lines)),
            target=best[0],
            answer=best[0],
            references=tuple(best[: self.options.max_references]),
        )

    def shorten(self, example: Example, room: int, tokenizer: Any) -> list[int]:
        # The question stands first, what its author adds behind it.
        return tokenize(example.prompt, tokenizer)[:room]

    def shorten_target(self, example: Example, labels: list[int]) -> list[int]:
        return [*labels[: self.target_limit - 1], labels[-1]]

    def score(self, prediction: str, example: Example) -> Score:
        return score_free_text(prediction, example)

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        return free_text_predictor(train)

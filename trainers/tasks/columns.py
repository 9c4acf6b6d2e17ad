"""Any data set of questions and answers, by the names of its columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedTokenizerBase

from .answers import canonical_number, parse_number, plain_text, read_number
from .base import SPLITS, Example, Score, TaskArguments, TrivialPredictor
from .choice import LETTERS, one_line, score_choice, shorten_choice
from .free_text import free_text_predictor, score_free_text
from .loading import Row, StoredTask


@strict
@dataclass(kw_only=True)
class ColumnsOptions:
    """Options of the columns task. A column inside an object is named with a point: `choices.text`."""

    question: str = field(default="question", metadata={"help": "Column of the question."})
    answer: str = field(
        default="answer",
        metadata={
            "help": "Column of the answer: text, number, truth value (learned as Yes or No), or a list of good answers "
            "of which the first is learned. For the metric choice: a label, a letter, the text or the position of an "
            "option, counted from 0."
        },
    )
    context: str | None = field(default=None, metadata={"help": "Column of a text that goes before the question."})
    options: str | None = field(default=None, metadata={"help": "Column of the list of options, for choice."})
    labels: str | None = field(default=None, metadata={"help": "Column of the list of the options' labels."})
    difficulty: str | None = field(default=None, metadata={"help": "Column that groups examples in reports."})
    id: str | None = field(default=None, metadata={"help": "Column of a unique id; default is split and row number."})
    metric: Literal["exact_match", "number", "choice", "rouge_l"] = field(
        default="exact_match",
        metadata={
            "help": "exact_match: equal apart from case, spacing and punctuation at the ends; number: the final number "
            "by value; choice: the letter of an option; rouge_l: overlap with the answer's order of words."
        },
    )
    long_options: Literal["refuse", "shorten"] = field(
        default="refuse", metadata={"help": "What to do when question and options alone exceed max_source_length."}
    )
    splits: dict = field(
        default_factory=dict,
        metadata={
            "help": "Name of the file or Hub split of train, validation and test, where it differs. A validation split "
            "on the Hub is used only if it is named here."
        },
    )
    license: str = field(default="not stated", metadata={"help": "Licence of the data, for the card."})

    def validate_columns(self) -> None:
        if self.metric == "choice" and self.options is None:
            raise ValueError("metric is choice, but options names no column")
        for name in ("options", "labels"):
            if self.metric != "choice" and getattr(self, name) is not None:
                raise ValueError(f"{name} names a column, but metric is {self.metric}; it is read for choice only")
        for split, name in self.splits.items():
            if split not in SPLITS or not isinstance(name, str):
                raise ValueError(f"splits maps {split!r} to {name!r}; it must map {', '.join(SPLITS)} to names")


class Columns(StoredTask):
    """Context and question, and the lettered options if there are any, each on a line of its own -> the answer.

    The data are `data_dir` (`<split>.jsonl` or `.json`) or `hub_id`. Which column is what, and the metric, are options;
    see [`ColumnsOptions`]. The metric is called accuracy, or rouge_l.
    """

    name = "columns"
    hub_id = None
    max_source_length = 256
    max_target_length = 64
    options_class = ColumnsOptions

    def __init__(self, arguments: TaskArguments):
        super().__init__(arguments)
        names = {split: self.options.splits.get(split, split) for split in SPLITS}
        self.hub_splits = names  # type: ignore[misc]
        self.local_names = {split: (name,) for split, name in names.items()}  # type: ignore[misc]
        self.hub_has_validation = "validation" in self.options.splits  # type: ignore[misc]
        self.id_field = self.options.id or "id"  # type: ignore[misc]
        self.metric = "rouge_l" if self.options.metric == "rouge_l" else "accuracy"
        self.license = self.options.license

    @property
    def source(self) -> str:
        return super().source if self.arguments.data_dir is None else "local files"

    def parse(self, row: Row) -> Example:
        options, question = self.options, _text(row, self.options.question)
        lines = [_text(row, options.context), question] if options.context else [question]
        name = _text(row, options.id) if options.id else row.name
        difficulty = self._difficulty(row)
        if options.metric == "choice":
            return self._choice(row, name, lines, difficulty)
        found = _value(row, options.answer)
        answers = [_answer(row, options.answer, value) for value in (found if isinstance(found, list) else [found])]
        if not answers:
            raise row.error(options.answer, "must hold at least one answer")
        if options.metric == "number":
            values = [parse_number(answer) for answer in answers]
            for answer, value in zip(answers, values, strict=True):
                if value is None:
                    raise row.error(options.answer, f"must be one number for the metric number, got {answer!r}")
            answers = [canonical_number(value) for value in values if value is not None]
        return Example(
            id=name,
            prompt="\n".join(lines),
            target=answers[0],
            answer=plain_text(answers[0]) if options.metric == "exact_match" else answers[0],
            difficulty=difficulty,
            references=tuple(answers) if len(answers) > 1 else (),
        )

    def _choice(self, row: Row, name: str, lines: Sequence[str], difficulty: int | str | None) -> Example:
        column = self.options.options
        texts = _value(row, column)
        if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
            raise row.error(column, f"must be a list of 2 to {len(LETTERS)} options")
        texts = [one_line(_answer(row, f"{column}[{index}]", text)) for index, text in enumerate(texts)]
        labels = None
        if self.options.labels:
            labels = _value(row, self.options.labels)
            if not isinstance(labels, list) or len(labels) != len(texts):
                raise row.error(self.options.labels, f"must be a list of {len(texts)} labels, one for each option")
        correct = _position(row, self.options.answer, texts, labels)
        shown = [f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False)]
        letter = LETTERS[correct]
        return Example(
            id=name,
            prompt="\n".join([*map(one_line, lines), *shown]),
            target=letter,
            answer=letter,
            difficulty=difficulty,
            num_options=len(texts),
        )

    def _difficulty(self, row: Row) -> int | str | None:
        column = self.options.difficulty
        if column is None:
            return None
        value = _value(row, column)
        if type(value) is int:
            return value
        return row.check_text(column, value)

    def shorten(self, example: Example, room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if example.num_options:
            return shorten_choice(example, room, tokenizer, self.options.long_options)
        return super().shorten(example, room, tokenizer)

    def shorten_target(self, example: Example, labels: list[int]) -> list[int]:
        if self.options.metric != "rouge_l":
            return super().shorten_target(example, labels)
        return [*labels[: self.target_limit - 1], labels[-1]]

    def score(self, prediction: str, example: Example) -> Score:
        metric = self.options.metric
        if metric == "choice":
            return score_choice(prediction, example)
        if metric == "rouge_l":
            return score_free_text(prediction, example)
        if metric == "number":
            number = read_number(prediction)
            return Score(correct=number in example.answers, parsed=number)
        text = plain_text(prediction)
        # Punctuation alone is an answer only where the gold answer is punctuation too.
        parsed = text if any(map(str.isalnum, text)) or text in map(plain_text, example.answers) else None
        return Score(correct=parsed is not None and parsed in map(plain_text, example.answers), parsed=parsed)

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        return free_text_predictor(train) if self.metric == "rouge_l" else super().trivial_predictor(train)


def _value(row: Row, column: str) -> Any:
    """The value of a column, which may lie inside an object."""
    value: Any = row.values
    for depth, part in enumerate(column.split(".")):
        if not isinstance(value, dict) or part not in value:
            where = ".".join(column.split(".")[:depth]) or "the row"
            has = ", ".join(map(str, value)) if isinstance(value, dict) else "no columns"
            raise row.error(column, f"missing; {where} has {has or 'no columns'}")
        value = value[part]
    return value


def _text(row: Row, column: str) -> str:
    return row.check_text(column, _value(row, column))


def _answer(row: Row, column: str, value: Any) -> str:
    """An answer as text: a truth value is Yes or No, a number its usual spelling."""
    if isinstance(value, bool):
        return "Yes" if value else "No"
    if isinstance(value, int | float):
        return str(value)
    return row.check_text(column, value)


def _position(row: Row, column: str, texts: Sequence[str], labels: Sequence[Any] | None) -> int:
    """Which option the answer column means: by label, or else by position, text or letter."""
    value = _value(row, column)
    if labels is not None:
        if value not in labels:
            raise row.error(column, f"is {value!r}, which is none of the labels {', '.join(map(str, labels))}")
        return list(labels).index(value)
    if type(value) is int:
        if not 0 <= value < len(texts):
            raise row.error(column, f"is {value}, but the {len(texts)} options are counted from 0 to {len(texts) - 1}")
        return value
    text = one_line(_answer(row, column, value))
    if texts.count(text) == 1:
        return texts.index(text)
    letter = text.strip("().").upper()
    if letter and len(letter) == 1 and letter in LETTERS[: len(texts)]:
        return LETTERS.index(letter)
    raise row.error(
        column, f"is {text!r}, which is neither one of the options nor a letter from A to {LETTERS[len(texts) - 1]}"
    )

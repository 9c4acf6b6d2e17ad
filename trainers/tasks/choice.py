"""Multiple choice: a question, its options as (A), (B), ... on lines of their own -> the letter of the right one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .answers import read_option_letter
from .base import Example, Score, tokenize
from .loading import Row, StoredTask

LETTERS = ascii_uppercase


@strict
@dataclass(kw_only=True)
class ChoiceOptions:
    """Options of a multiple-choice task."""

    long_options: Literal["refuse", "shorten"] = field(
        default="refuse",
        metadata={"help": "What to do when question and options alone exceed max_source_length."},
    )


class ChoiceTask(StoredTask):
    """A task whose prompts end in one question and its options, each on a line of its own.

    A prompt that is too long loses its beginning, never its question or options. Options are cut only where the
    question and they alone are too long and the option `long_options: shorten` says so: then the longest ones lose
    their ends, down to a common length. A prediction is read by [`~trainers.tasks.answers.read_option_letter`]; a
    letter beyond the last option is no answer.
    """

    most_options: ClassVar[int] = len(LETTERS)
    max_target_length: ClassVar[int] = 8
    options_class = ChoiceOptions

    def choice_example(
        self,
        row: Row,
        name: str,
        lines: Sequence[str],
        options: Sequence[str],
        correct: int,
        difficulty: int | str | None = None,
    ) -> Example:
        """The example of a question.

        Args:
            row: where it was read.
            name: its id.
            lines: what stands before the options, each on a line of its own; the last one is the question.
            options: their texts.
            correct: position of the right one, counted from 0.
        """
        shown = [f"({letter}) {one_line(text)}" for letter, text in zip(LETTERS, options, strict=False)]
        return Example(
            id=name,
            prompt="\n".join([*map(one_line, lines), *shown]),
            target=LETTERS[correct],
            answer=LETTERS[correct],
            difficulty=difficulty,
            num_options=len(options),
        )

    def check_options(self, row: Row, field: str, options: Sequence[object]) -> list[str]:
        """The texts of a list of 2 to `most_options` options."""
        if not 2 <= len(options) <= self.most_options:
            raise row.error(field, f"must be 2 to {self.most_options} texts, got {len(options)}")
        return [row.check_text(f"{field}[{index}]", text) for index, text in enumerate(options)]

    def shorten(self, example: Example, room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return shorten_choice(example, room, tokenizer, self.options.long_options)

    def score(self, prediction: str, example: Example) -> Score:
        return score_choice(prediction, example)


class LabelledChoiceTask(ChoiceTask):
    """Questions whose options carry labels of their own; the prompt shows (A), (B), ... in their order.

    Fields: `id` (text, optional), `question` (text), `choices` (an object of two lists, `label` and `text`),
    `answerKey` (one of the labels).
    """

    def parse(self, row: Row) -> Example:
        choices = row.get("choices", dict, "an object with label and text")
        for name in ("label", "text"):
            if not isinstance(choices.get(name), list):
                raise row.error(f"choices.{name}", "must be a list")
        options = self.check_options(row, "choices.text", choices["text"])
        labels = [row.check_text(f"choices.label[{index}]", label) for index, label in enumerate(choices["label"])]
        if len(labels) != len(options):
            raise row.error("choices.label", f"has {len(labels)} labels for {len(options)} texts")
        if len(set(labels)) < len(labels):
            raise row.error("choices.label", f"holds a label twice: {', '.join(labels)}")
        key = row.text("answerKey")
        if key not in labels:
            raise row.error("answerKey", f"is {key!r}, which is none of the labels {', '.join(labels)}")
        name = row.text("id") if "id" in row.values else row.name
        return self.choice_example(row, name, [row.text("question")], options, labels.index(key))


def score_choice(prediction: str, example: Example) -> Score:
    """Read a letter of the example's options out of a prediction and compare it with the answer."""
    parsed = read_option_letter(prediction, LETTERS[: example.num_options])
    return Score(correct=parsed == example.answer, parsed=parsed)


def shorten_choice(
    example: Example, room: int, tokenizer: PreTrainedTokenizerBase, long_options: Literal["refuse", "shorten"]
) -> list[int]:
    """Token ids of a multiple-choice prompt, cut to at most `room` as [`ChoiceTask`] tells.

    Raises:
        UserError: if question and options do not fit and may not be shortened, or not that far.
    """
    lines = example.prompt.split("\n")
    first_kept = len(lines) - example.num_options - 1
    context, kept = "\n".join(lines[:first_kept]), lines[first_kept:]
    # Without a context nothing stands before the question.
    parts = [tokenize(f"\n{line}" if context or index else line, tokenizer) for index, line in enumerate(kept)]
    needed = sum(map(len, parts))
    if needed > room:
        question, *options = parts
        letter_length = max(len(tokenize(f"\n({letter}) ", tokenizer)) for letter in LETTERS[: example.num_options])
        share = _common_length([len(option) for option in options], room - len(question))
        if long_options == "refuse" or share <= letter_length:
            other = " or set task.options.long_options to shorten" if long_options == "refuse" else ""
            raise UserError(
                f"task.max_source_length: {room + 1}, but question and options of example {example.id} need "
                f"{needed + 1} tokens; raise it{other}"
            )
        parts = [question, *(option[:share] for option in options)]
        needed = sum(map(len, parts))
    context_ids = tokenize(context, tokenizer) if context else []
    start = max(len(context_ids) + needed - room, 0)
    return [*context_ids[start:], *(token for part in parts for token in part)]


def one_line(text: str) -> str:
    """A text with every run of white space, line breaks included, as one space."""
    return " ".join(text.split())


def _common_length(lengths: list[int], room: int) -> int:
    """The largest length such that lists cut to it fit into `room` together; 0 if there is none."""
    fitting = (cut for cut in range(max(lengths) + 1) if sum(min(length, cut) for length in lengths) <= room)
    return max(fitting, default=0)

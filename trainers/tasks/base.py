"""What a task is: checked examples, their encoding, the rule that scores a prediction, the trivial score to beat."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError, did_you_mean

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        id: unique within the task; it names the row that the example was read from.
        prompt: what the model reads.
        target: what the model learns to write.
        answer: the gold answer in the canonical form that [`Task.score`] compares.
        difficulty: a label that groups examples in reports, for instance a number of hops, or `None`.
        references: all answers that count as good, where there are several; `answer` is one of them. Empty otherwise.
        num_options: number of options of a multiple-choice question; 0 for any other.
    """

    id: str
    prompt: str
    target: str
    answer: str
    difficulty: int | str | None = None
    references: tuple[str, ...] = ()
    num_options: int = 0

    @property
    def answers(self) -> tuple[str, ...]:
        """Every good answer: the references, or the one answer where there are none."""
        return self.references or (self.answer,)


@dataclass(frozen=True)
class Score:
    """How good a prediction is, and the answer read from it.

    Attributes:
        correct: whether the answer is right; `None` under a metric that knows only degrees.
        parsed: the answer read from the prediction, or `None` if it holds none.
        degree: how good the answer is, from 0 to 1, under a metric that knows degrees.
    """

    correct: bool | None
    parsed: str | None
    degree: float | None = None

    @property
    def value(self) -> float:
        """What the metric averages: the degree, or 1 for a right answer and 0 for any other."""
        return float(bool(self.correct)) if self.degree is None else self.degree


@dataclass(frozen=True)
class TrivialPredictor:
    """A rule that needs no model. Its predictions pass through the same [`Task.score`] as a model's.

    Attributes:
        name: the rule in words, with how it was chosen.
        predict: from an example's prompt to a prediction; it never looks at the target or answer.
    """

    name: str
    predict: Callable[[Example], str]


@dataclass(frozen=True)
class SplitReport:
    """What happened to the rows of a split.

    Attributes:
        examples: number of examples that [`Task.rows`] returns.
        leaked: examples dropped because their question also occurs in a later split (validation or test).
        repeated: examples, kept, whose question occurs earlier in the same split.
        near_leaked: examples dropped because their question is nearly one of a later split; see
            `TaskArguments.near_duplicate_similarity`.
        without_teacher: training examples dropped because no answer of a teacher was found for them, or a wrong one;
            see `TaskArguments.teacher_answers`.
    """

    examples: int
    leaked: int = 0
    repeated: int = 0
    near_leaked: int = 0
    without_teacher: int = 0


@strict
@dataclass(kw_only=True)
class TaskArguments:
    """The `task` section of a recipe. A field left at `None` takes the task's own default; see [`Task.arguments`]."""

    name: str = field(metadata={"help": "Name of the task."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the data as <split>.jsonl or <split>.json, used instead of the Hub."},
    )
    hub_id: str | None = field(default=None, metadata={"help": "Dataset on the Hub with the same fields and splits."})
    hub_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on a random subset of this size, drawn by split_seed."}
    )
    max_validation_samples: int | None = field(default=None, metadata={"help": "The same for validation."})
    max_test_samples: int | None = field(default=None, metadata={"help": "The same for the test."})
    validation_fraction: float | int = field(
        default=0.1,
        metadata={"help": "Share of train that is held out for validation when the data has no validation split."},
    )
    test_fraction: float | int | None = field(
        default=None,
        metadata={"help": "Share of train that is held out for the test; only for data without a test split."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the held-out share and of random subsets."})
    near_duplicate_similarity: float | int | None = field(
        default=None,
        metadata={
            "help": "Drop an example whose question is at least so similar to one of a later split: the Jaccard "
            "similarity, in (0, 1], of their five-character pieces. 1 leaves all but equal questions."
        },
    )
    teacher_answers: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl file with id and prediction, as trainers.evaluate --split train writes it: the answers "
            "of another model, learned in the place of the gold targets."
        },
    )
    teacher_filter: Literal["all", "correct"] = field(
        default="all", metadata={"help": "Learn all answers of the teacher, or those that the metric counts as right."}
    )
    max_source_length: int | None = field(
        default=None, metadata={"help": "Longest input in tokens, <eos> included; longer ones lose their beginning."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Longest target in tokens, <eos> included; a longer one is an error."}
    )
    options: dict = field(default_factory=dict, metadata={"help": "Options of the task itself, as a mapping."})

    def validate_ranges(self) -> None:
        for name, least in {
            "max_train_samples": 1,
            "max_validation_samples": 1,
            "max_test_samples": 1,
            "split_seed": 0,
            "max_source_length": 2,
            "max_target_length": 2,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}; it must lie between 0 and 1")
        similarity = self.near_duplicate_similarity
        if similarity is not None and not 0 < similarity <= 1:
            raise ValueError(f"near_duplicate_similarity is {similarity}; it must lie above 0 and be at most 1")
        if self.teacher_filter != "all" and self.teacher_answers is None:
            raise ValueError(f"teacher_filter is {self.teacher_filter}, but teacher_answers names no file")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")

    def max_samples(self, split: str) -> int | None:
        """The requested size of a split, or `None` for all of it."""
        return getattr(self, f"max_{split}_samples")


@strict
@dataclass(kw_only=True)
class NoOptions:
    """The options of a task that has none."""


class Task(ABC):
    """Data, encoding and metric of one task.

    Args:
        arguments: the recipe's `task` section.

    Attributes:
        arguments: the same with every default of the task filled in, ready to be recorded.
        options: the task's own options, checked.

    Raises:
        UserError: if an option is unknown or breaks a rule.
    """

    name: ClassVar[str]
    metric: str = "accuracy"
    """What the mean of [`Score.value`] is called: "accuracy" for right or wrong, else for example "rouge_l"."""
    license: str
    """Licence of the data as its source states it."""
    options_class: ClassVar[type] = NoOptions

    def __init__(self, arguments: TaskArguments):
        self.options = build_options(self.options_class, arguments.options)
        defaults = {name: value for name, value in self.default_arguments().items() if getattr(arguments, name) is None}
        self.arguments = dataclasses.replace(arguments, options=dataclasses.asdict(self.options), **defaults)
        self._truncated: set[str] = set()

    def default_arguments(self) -> dict[str, Any]:
        """Values for the arguments that were left at `None`."""
        return {}

    @property
    def source_limit(self) -> int:
        """Longest input in tokens, `<eos>` included: `max_source_length`, given or the task's default."""
        return _given("max_source_length", self.arguments.max_source_length)

    @property
    def target_limit(self) -> int:
        """Longest target in tokens, `<eos>` included: `max_target_length`, given or the task's default."""
        return _given("max_target_length", self.arguments.max_target_length)

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the data comes from, in words."""

    @property
    def dataset_id(self) -> str | None:
        """Id of the dataset on the Hub that the rows were loaded from, or `None`."""
        return None

    @abstractmethod
    def rows(self, split: str) -> Sequence[Example]:
        """The checked examples of a split, in a fixed order.

        Args:
            split: "train", "validation" or "test". No question occurs in two of them.

        Raises:
            UserError: if the data is missing or a row is malformed; the message names file, row (counted from 1), field
                and rule.
        """

    def report(self, split: str) -> SplitReport:
        """What was kept and dropped on the way to [`rows`]."""
        return SplitReport(examples=len(self.rows(split)))

    @abstractmethod
    def score(self, prediction: str, example: Example) -> Score:
        """Compare a prediction with the gold answer. An empty prediction is never right."""

    def difficulty(self, example: Example) -> int | str | None:
        """The group an example falls into in reports, or `None` if the data has no such label."""
        return example.difficulty

    def component(self, example: Example) -> str | None:
        """The part of a mixture that an example belongs to, or `None` if the task is no mixture."""
        return None

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        """The best rule without a model, chosen on training examples only: here, the most frequent answer."""
        answer = most_frequent([example.answer for example in train])
        return TrivialPredictor(
            name=f'always "{answer}" (most frequent answer of the training split)', predict=lambda example: answer
        )

    @abstractmethod
    def build_tokenizer(self, train_examples: Sequence[Example], vocab_size: int) -> PreTrainedTokenizerFast:
        """A new tokenizer with `<pad>`=0, `<bos>`=1, `<eos>`=2, `<unk>`=3 that ends every text with `<eos>`.

        Args:
            train_examples: the examples it may learn from.
            vocab_size: largest number of tokens; fewer are made where the examples hold no more.
        """

    def shorten(self, example: Example, room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of a prompt that is too long, cut to at most `room`: the end stays, since it holds the question.

        Raises:
            UserError: in tasks that refuse to cut what an answer needs.
        """
        return tokenize(example.prompt, tokenizer)[-room:]

    def shorten_target(self, example: Example, labels: list[int]) -> list[int]:
        """At most `max_target_length` of the labels of a target that is too long; here, an error.

        Raises:
            UserError: naming the example and its length.
        """
        raise UserError(
            f"task.max_target_length: {self.target_limit}, but the target of example {example.id} "
            f"has {len(labels)} tokens"
        )

    def encode_source(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of the prompt and `<eos>`, at most `max_source_length` of them.

        A longer prompt loses tokens, as told by [`shorten`]; such examples are counted, see [`truncated`].

        Raises:
            UserError: if the task refuses to shorten the prompt that far.
        """
        room = self.source_limit - 1
        token_ids = tokenize(example.prompt, tokenizer)
        if len(token_ids) > room:
            token_ids = self.shorten(example, room, tokenizer)
            self._truncated.add(example.id)
        return [*token_ids, tokenizer.eos_token_id]

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """An example as `{"input_ids", "labels"}`: prompt and target as token ids, each with `<eos>` at the end.

        Raises:
            UserError: if the target is longer than `max_target_length` and the task does not shorten targets (few do:
                an exact answer is never cut), or if it refuses to shorten the prompt.
        """
        labels = [*tokenize(example.target, tokenizer), tokenizer.eos_token_id]
        if len(labels) > self.target_limit:
            labels = self.shorten_target(example, labels)
        return {"input_ids": self.encode_source(example, tokenizer), "labels": labels}

    def truncated(self, examples: Sequence[Example]) -> int:
        """How many of these examples have lost tokens in [`encode`] or [`encode_source`] so far."""
        return sum(example.id in self._truncated for example in examples)


def _given(name: str, value: int | None) -> int:
    if value is None:
        raise UserError(f"task.{name} is missing, and the task has no default for it")
    return value


@strict
@dataclass(kw_only=True)
class GeneratedOptions:
    """Options that all tasks of generated questions and answers have."""

    least: ClassVar[Mapping[str, int]] = {}
    """Smallest values of a task's further options."""

    num_train: int = field(default=20000, metadata={"help": "Training examples."})
    num_validation: int = field(default=1000, metadata={"help": "Validation examples."})
    num_test: int = field(default=1000, metadata={"help": "Test examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the examples; independent of the training seed."})

    def validate_least(self) -> None:
        bounds = {**self.least, "num_train": 1, "num_validation": 1, "num_test": 1, "seed": 0}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def build_options(options_class: type, values: Mapping[str, Any]) -> Any:
    """Build a task's options from a mapping.

    Raises:
        UserError: naming an unknown option with the nearest known one, or the rule that a value breaks.
    """
    known = [option.name for option in dataclasses.fields(options_class)]
    for name in values:
        if name not in known:
            rule = f"known options: {', '.join(known)}" if known else "this task has no options"
            raise UserError(f"task.options: unknown option {name!r}{did_you_mean(str(name), known)}; {rule}")
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise UserError(f"task.options: {name} is {values[name]}; it must be a finite number")
        if isinstance(values[name], int) and abs(values[name]) >= 2**63:  # more than a sequence can hold
            raise UserError(f"task.options: {name} is {values[name]}; it must be a number of at most 63 bits")
    try:
        return options_class(**values)
    except StrictDataclassError as error:
        raise UserError(f"task.options: {' '.join(str(error.__cause__ or error).split())}") from error


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is one of train, validation, test."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")


def most_frequent(answers: Sequence[str]) -> str:
    """The most frequent string; of several, the first in alphabetical order.

    Raises:
        ValueError: if there are none.
    """
    counts = Counter(answers)
    if not counts:
        raise ValueError("no training examples to choose the most frequent answer from")
    return min(counts, key=lambda answer: (-counts[answer], answer))


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, without special tokens and without a warning about its length."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

"""What a task for models that think in ticks is: inputs and classes as tensors, by seed and index."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ...errors import UserError
from ..base import NoOptions, build_options, check_split

# How many training examples the trivial predictor counts the classes of.
MOST_COUNTED = 5000


@strict
@dataclass(kw_only=True)
class ThoughtTaskArguments:
    """The `task` section of a recipe for a model that thinks in ticks."""

    name: str = field(metadata={"help": "Name of the task."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the images, for tasks that can read them from files."}
    )
    hub_id: str | None = field(default=None, metadata={"help": "Data set on the Hub, for the task `images`."})
    hub_config: str | None = field(default=None, metadata={"help": "Configuration of the data set on the Hub."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on a random subset of this size, drawn by split_seed."}
    )
    max_validation_samples: int | None = field(default=None, metadata={"help": "The same for validation."})
    max_test_samples: int | None = field(default=None, metadata={"help": "The same for the test."})
    validation_fraction: float | int = field(
        default=0.1,
        metadata={"help": "Share of train that is held out for validation when the data has no validation split."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of held-out shares and of random subsets."})
    options: dict = field(default_factory=dict, metadata={"help": "Options of the task itself, as a mapping."})

    def validate_ranges(self) -> None:
        for name in ("max_train_samples", "max_validation_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.split_seed < 0:
            raise ValueError(f"split_seed is {self.split_seed}; it must be at least 0")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")

    def max_samples(self, split: str) -> int | None:
        """The requested size of a split, or `None` for all of it."""
        return getattr(self, f"max_{split}_samples")


class ThoughtExamples(Dataset, ABC):
    """The examples of a split: map-style, each a function of the task's options, the split and the index alone."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """
        Returns:
            The model's input under the task's `input_name`, without a batch axis, and `labels`: classes of shape
            `positions`, -100 where there is none; a scalar for one class per example.
        """

    @abstractmethod
    def labels(self, index: int) -> np.ndarray:
        """The `labels` of an example as an array of int64."""

    @abstractmethod
    def identity(self, index: int) -> str:
        """Name of an example, unique within the task."""

    def difficulty(self, index: int) -> int | str | None:
        """The group that an example falls into in reports, or `None` if the task has no such measure."""
        return None

    def picture(self, index: int) -> np.ndarray | None:
        """What is to be seen of an example: an image as uint8 of shape `(height, width, 3)`, or `None`."""
        return None


class ThoughtTask(ABC):
    """Data, classes and difficulty of one task.

    Args:
        arguments: the recipe's `task` section.

    Attributes:
        arguments: the same with every default of the task filled in, ready to be recorded.
        options: the task's own options, checked.

    Raises:
        UserError: if an option is unknown or breaks a rule.
    """

    name: ClassVar[str]
    license: ClassVar[str]
    """Licence of the data as its source states it."""
    metric: ClassVar[str] = "accuracy"
    """Share of examples with every position right."""
    options_class: ClassVar[type] = NoOptions
    head: ClassVar[Literal["image", "token"]]
    """Whether an example has one class or one for every position."""
    input_name: ClassVar[str] = "pixel_values"
    """The argument of the model's `forward` that its input goes to."""
    loss: ClassVar[Literal["ticks", "ctc"]] = "ticks"
    """Whether each tick gives a whole answer, or the ticks together spell one."""

    def __init__(self, arguments: ThoughtTaskArguments):
        self.options = build_options(self.options_class, arguments.options)
        self.arguments = dataclasses.replace(arguments, options=dataclasses.asdict(self.options))

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the data comes from, in words."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the classes."""

    @property
    def num_positions(self) -> int:
        """Classes that an answer consists of."""
        return 1

    @abstractmethod
    def examples(self, split: str) -> ThoughtExamples:
        """The checked examples of "train", "validation" or "test". Nothing occurs in two of them.

        Raises:
            UserError: if the data is missing or malformed; the message names file or row, field and rule.
        """

    def config_values(self) -> dict[str, Any]:
        """Fields of the model's configuration that the task decides."""
        shape = [len(self.classes)] if self.head == "image" else [self.num_positions, len(self.classes)]
        names = dict(enumerate(self.classes))
        return {
            "prediction_reshaper": shape,
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
        }

    def image_processor(self) -> BaseImageProcessor | None:
        """What turns an image into the model's input, if the input is one."""
        return None

    def reading(self, classes: np.ndarray, labels: np.ndarray) -> str:
        """An answer in words: the names of the classes at the positions that have a label."""
        classes, labels = np.atleast_1d(classes), np.atleast_1d(labels)
        return " ".join(self.classes[number] for number in classes[labels != -100])

    def extra_scores(self, classes: np.ndarray, labels: np.ndarray) -> dict[str, bool]:
        """Further yes-or-no measures of one answer, by name; both of shape `(num_positions,)`."""
        return {}

    def trivial_prediction(self, train: ThoughtExamples) -> tuple[str, np.ndarray]:
        """
        The best answer without a look at the input: at each position the most frequent class of the training split, or
        of its beginning.

        Returns:
            The rule in words, and its answer to every example, of shape `(num_positions,)`.
        """
        counted = range(min(len(train), MOST_COUNTED))
        labels = np.stack([np.atleast_1d(train.labels(index)) for index in counted])
        answer = np.zeros(labels.shape[1], dtype=np.int64)
        for position, column in enumerate(labels.T):
            found = column[column != -100]
            answer[position] = np.bincount(found).argmax() if len(found) else 0
        what = "class" if len(answer) == 1 else "class of each position"
        return f"always the most frequent {what} of the training split", answer

    def fingerprint_rows(self, splits: dict[str, ThoughtExamples]) -> Iterator[Any]:
        """What identifies the data, as values that JSON can hold, in a fixed order."""
        for split, examples in splits.items():
            for index in range(len(examples)):
                yield [split, examples.identity(index), examples.labels(index).tolist()]


class GeneratedTask(ThoughtTask):
    """
    A task whose examples are drawn by `options.seed`, with split sizes `options.num_train`, `num_validation` and
    `num_test`.
    """

    license = "not applicable (generated)"
    refused: ClassVar[tuple[str, ...]] = ("data_dir", "hub_id", "hub_config", "hub_revision")
    """Arguments that have no meaning for it."""

    def __init__(self, arguments: ThoughtTaskArguments):
        super().__init__(arguments)
        for name in self.refused:
            if getattr(arguments, name) is not None:
                raise UserError(f"task.{name}: the task {self.name} does not read it; leave it out")

    def size(self, split: str) -> int:
        """Number of examples of a split."""
        check_split(split)
        size = getattr(self.options, f"num_{split}")
        return min(size, self.arguments.max_samples(split) or size)

    def fingerprint_rows(self, splits: dict[str, ThoughtExamples]) -> Iterator[Any]:
        # Each example follows from these; the first ones show a change in how they are drawn.
        yield [self.name, dataclasses.asdict(self.options)]
        for split, examples in splits.items():
            yield [split, len(examples)]
            for index in range(min(len(examples), 10)):
                example = examples[index]
                yield [example[self.input_name].double().sum().item(), examples.labels(index).tolist()]


def check_at_least(options: Any, **least: int) -> None:
    """Raises `ValueError` naming an option that lies below its least value."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} is {value}; it must be at least {bound}")


class Cached(ThoughtExamples):
    """
    Examples that are made when they are first looked at, and then kept.

    Args:
        size: number of examples.
        make: from an index to an example in its compact form.
    """

    def __init__(self, size: int, make: Callable[[int], Any]):
        self._made: list[Any] = [None] * size
        self._make = make

    def __len__(self) -> int:
        return len(self._made)

    def compact(self, index: int) -> Any:
        """What `make` returns for an index."""
        index = range(len(self._made))[index]
        if self._made[index] is None:
            self._made[index] = self._make(index)
        return self._made[index]

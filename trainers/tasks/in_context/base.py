"""What tasks of in-context learning share: prompts of numbers, generated as a pure function of seed and index."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch.utils.data import Dataset

from ..base import build_options, check_split
from .streams import Streams


@strict
@dataclass(kw_only=True)
class InContextTaskArguments:
    """The `task` section of a recipe for in-context learning."""

    name: str = field(metadata={"help": "Name of the task."})
    prompts_seed: int = field(default=0, metadata={"help": "Seed of the validation and the test prompts."})
    num_validation: int = field(default=1000, metadata={"help": "Prompts of the validation split."})
    num_test: int = field(default=2000, metadata={"help": "Prompts of the test split."})
    curriculum: dict = field(
        default_factory=dict,
        metadata={
            "help": "Options that grow while training, each a mapping with start, increment and interval (in update "
            "steps): {n_dims: {start: 5, increment: 1, interval: 2000}}. They end at the task's own options."
        },
    )
    options: dict = field(default_factory=dict, metadata={"help": "Options of the task itself, as a mapping."})

    def validate_ranges(self) -> None:
        for name, least in {"prompts_seed": 0, "num_validation": 1, "num_test": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class InContextTask(ABC):
    """A task whose prompts are generated.

    Args:
        options: the task's own options; see its `options_class`.
        seed: seed of the prompts.

    Attributes:
        options: the same, checked, with every default filled in.
        arguments: the recipe's section that the task was made from, if it was; see [`get_in_context_task`].

    Raises:
        UserError: if an option is unknown or breaks a rule.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    license: ClassVar[str] = "none (generated)"
    options_class: ClassVar[type]
    curriculum_variables: ClassVar[tuple[str, ...]]
    """Options that [`batch`] takes other values of, for a curriculum."""

    def __init__(self, options: Mapping[str, Any] | None = None, seed: int = 0):
        self.options = build_options(self.options_class, dict(options or {}))
        self.seed = seed
        self.arguments: InContextTaskArguments | None = None

    @property
    def source(self) -> str:
        """Where the data comes from, in words."""
        settings = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self.options).items())
        return f"generated on the fly by a rule ({settings}; seed {self.seed})"

    def streams(self, split: str, indices: Sequence[int] | np.ndarray, purpose: str = "prompts") -> Streams:
        """The random streams of these prompts; splits and purposes are independent of each other.

        Raises:
            ValueError: for an unknown split.
        """
        check_split(split)
        return Streams(self.seed, f"{self.name}/{split}/{purpose}", np.asarray(indices, dtype=np.int64))

    def with_seed(self, seed: int) -> Self:
        """The same task with other prompts."""
        return type(self)(dataclasses.asdict(self.options), seed)

    def check_stage(self, **stage: Any) -> None:
        """Raises `UserError` unless [`batch`] takes these values."""
        self.batch("train", [0], **stage)

    @abstractmethod
    def batch(self, split: str, indices: Sequence[int], **stage: Any) -> dict[str, torch.Tensor]:
        """The prompts with these indices, as the arguments of a model's `forward`, and what reports need besides.

        Prompt `i` of a split is always the same, whatever the others of its batch.

        Args:
            stage: values of some of the `curriculum_variables`.

        Raises:
            UserError: if a value of the stage is out of range.
        """

    def dataset(self, split: str, size: int) -> "GeneratedPrompts":
        """The first `size` prompts of a split as a map-style data set."""
        return GeneratedPrompts(self, split, size)


class GeneratedPrompts(Dataset):
    """Prompts of a task, made when they are looked at. A data loader fetches a whole batch in one call."""

    def __init__(self, task: InContextTask, split: str, size: int):
        check_split(split)
        self.task, self.split, self.size = task, split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([range(self.size)[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        batch = self.task.batch(self.split, indices)
        return [{name: values[row] for name, values in batch.items()} for row in range(len(indices))]

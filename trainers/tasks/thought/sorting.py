"""Sorting: the order of random numbers, spelt over the ticks and read by connectionist temporal classification."""

from dataclasses import dataclass, field

import numpy as np
import torch
from huggingface_hub.dataclasses import strict

from .base import GeneratedTask, ThoughtExamples, check_at_least


@strict
@dataclass(kw_only=True)
class SortingOptions:
    """Options of the sorting task."""

    length: int = field(default=8, metadata={"help": "Numbers to sort."})
    num_train: int = field(default=100000, metadata={"help": "Training examples."})
    num_validation: int = field(default=1000, metadata={"help": "Validation examples."})
    num_test: int = field(default=1000, metadata={"help": "Test examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the examples; independent of the training seed."})

    def validate_ranges(self) -> None:
        check_at_least(self, length=2, num_train=1, num_validation=1, num_test=1, seed=0)


class Sorting(GeneratedTask):
    """
    Numbers drawn from the standard normal distribution, and their indices in ascending order (Darlow et al.,
    "Continuous Thought Machines", arXiv 2505.05522; its sorting task). At each tick the model names an index or
    nothing; the answer is what remains when repetitions and nothings are taken out (Graves et al. 2006), and is right
    if it is the whole order. The paper's machine reads the numbers directly; here each number is a token of its value
    and its index in one-hot form, which attention looks at. Class 0 is nothing.
    """

    name = "sorting"
    options_class = SortingOptions
    head = "token"
    input_name = "input_features"
    loss = "ctc"

    @property
    def source(self) -> str:
        return f"generated: {self.options.length} standard normal numbers, seed {self.options.seed}"

    @property
    def classes(self) -> list[str]:
        return ["nothing", *(str(index) for index in range(self.options.length))]

    @property
    def num_positions(self) -> int:
        return self.options.length

    def config_values(self):
        return {
            **super().config_values(),
            "prediction_reshaper": [self.options.length + 1],
            "num_channels": self.options.length + 1,
        }

    def examples(self, split: str) -> "SortingExamples":
        return SortingExamples(self, split, self.size(split))

    def numbers(self, split: str, index: int) -> np.ndarray:
        """The numbers of an example, of shape `(length,)`."""
        place = ("train", "validation", "test").index(split)
        return np.random.default_rng([self.options.seed, place, index]).standard_normal(self.options.length)


class SortingExamples(ThoughtExamples):
    """Lists of numbers of one split."""

    def __init__(self, task: Sorting, split: str, size: int):
        self.task, self.split, self.size = task, split, size

    def __len__(self) -> int:
        return self.size

    def numbers(self, index: int) -> np.ndarray:
        return self.task.numbers(self.split, range(self.size)[index])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        numbers = torch.from_numpy(self.numbers(index)).float()
        features = torch.cat((numbers.unsqueeze(0), torch.eye(len(numbers))))
        return {"input_features": features, "labels": torch.from_numpy(self.labels(index))}

    def labels(self, index: int) -> np.ndarray:
        return self.numbers(index).argsort() + 1

    def identity(self, index: int) -> str:
        return f"{self.split}-{range(self.size)[index]}"

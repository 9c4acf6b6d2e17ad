"""Parity: after each sign of a sequence, whether the number of negative ones so far is odd. Generated."""

from dataclasses import dataclass, field

import numpy as np
import torch
from huggingface_hub.dataclasses import strict

from ...errors import UserError
from ..pointer_chase import CYCLE, PLACES, permute
from .base import GeneratedTask, ThoughtExamples, ThoughtTaskArguments, check_at_least


@strict
@dataclass(kw_only=True)
class ParityOptions:
    """Options of the parity task."""

    length: int = field(default=64, metadata={"help": "Signs in a sequence."})
    num_train: int | None = field(
        default=None, metadata={"help": "Training examples; by default all there are, at most 1,000,000."}
    )
    num_validation: int = field(default=1000, metadata={"help": "Validation examples."})
    num_test: int = field(default=1000, metadata={"help": "Test examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the examples; independent of the training seed."})

    def validate_ranges(self) -> None:
        check_at_least(self, length=1, num_train=1, num_validation=1, num_test=1, seed=0)


class Parity(GeneratedTask):
    """
    A sequence of signs, 1 and -1, and for each position the parity of the number of -1 up to and including it (Darlow
    et al., "Continuous Thought Machines", arXiv 2505.05522; its parity task). An answer is right if all positions are.

    All sequences of a length are numbered; a keyed permutation of the numbers puts them into a random order, in which
    every tenth is for the test, its neighbour for validation, and the others for training. So no sequence occurs twice,
    in one split or in two. The difficulty of a sequence is its number of -1.
    """

    name = "parity"
    options_class = ParityOptions
    head = "token"
    input_name = "input_values"
    most_train = 1_000_000

    def __init__(self, arguments: ThoughtTaskArguments):
        super().__init__(arguments)
        self.num_sequences = 2**self.options.length
        for split, places in PLACES.items():
            cycles, rest = divmod(self.num_sequences, CYCLE)
            available = cycles * len(places) + sum(place < rest for place in places)
            wanted = getattr(self.options, f"num_{split}")
            if wanted is None:
                self.options.num_train = wanted = min(available, self.most_train)
                self.arguments.options["num_train"] = wanted
            if wanted > available:
                raise UserError(
                    f"task.options: num_{split} is {wanted}, but length {self.options.length} gives only {available} "
                    f"different {split} examples"
                )

    @property
    def source(self) -> str:
        return f"generated: sequences of {self.options.length} signs, seed {self.options.seed}"

    @property
    def classes(self) -> list[str]:
        return ["even", "odd"]

    @property
    def num_positions(self) -> int:
        return self.options.length

    def examples(self, split: str) -> "ParityExamples":
        return ParityExamples(self, split, self.size(split))

    def signs(self, split: str, index: int) -> np.ndarray:
        """The sequence behind an example, of shape `(length,)` with entries 1 and -1."""
        places = PLACES[split]
        position = index // len(places) * CYCLE + places[index % len(places)]
        number = permute(position, self.num_sequences, key=f"{self.name}:{self.options.seed}".encode())
        return np.array([1 - 2 * (number >> place & 1) for place in range(self.options.length)], dtype=np.int64)


class ParityExamples(ThoughtExamples):
    """Sequences of one split."""

    def __init__(self, task: Parity, split: str, size: int):
        self.task, self.split, self.size = task, split, size

    def __len__(self) -> int:
        return self.size

    def signs(self, index: int) -> np.ndarray:
        return self.task.signs(self.split, range(self.size)[index])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        signs = self.signs(index)
        return {"input_values": torch.from_numpy(signs).float(), "labels": torch.from_numpy(parities(signs))}

    def labels(self, index: int) -> np.ndarray:
        return parities(self.signs(index))

    def identity(self, index: int) -> str:
        return f"{self.split}-{range(self.size)[index]}"

    def difficulty(self, index: int) -> int:
        return int((self.signs(index) == -1).sum())


def parities(signs: np.ndarray) -> np.ndarray:
    """For signs of shape `(length,)`, 1 where the number of -1 up to and including a position is odd, else 0."""
    return (signs == -1).cumsum() % 2

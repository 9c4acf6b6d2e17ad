"""Several tasks as one: trained on together in stated shares, measured apart."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError, did_you_mean
from .base import SPLITS, Example, Score, SplitReport, Task, TaskArguments, TrivialPredictor, check_split
from .duplicates import question_key
from .tokenization import byte_level_bpe

SEPARATOR = "/"
REFUSED = ("data_dir", "hub_id", "hub_config", "hub_revision", "teacher_answers", "test_fraction")


@strict
@dataclass(kw_only=True)
class MixtureOptions:
    """Options of the mixture task."""

    components: list = field(
        default_factory=list,
        metadata={
            "help": "The tasks: each a mapping like a recipe's task section, with weight (1 if left out) and, where a "
            "task occurs twice, label."
        },
    )
    num_train: int | None = field(
        default=None, metadata={"help": "Training examples in all; default is the sum of the components'."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order and of what is repeated or left out."})

    def validate_ranges(self) -> None:
        if self.num_train is not None and self.num_train < 1:
            raise ValueError(f"num_train is {self.num_train}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")


class Mixture(Task):
    """Training examples of several tasks in the shares that their weights give; all test examples of each.

    Train. Of `num_train` examples each component gives the share `weight / sum of weights`, by largest remainders. Its
    examples are taken in a seeded order, each once before any is taken again (then with `#2` behind its id), and all
    are shuffled together. Validation and test are the components' own, one after the other. A train example whose
    question occurs in validation or test of another component is dropped and counted as leaked, and so is a validation
    example whose question occurs in a test.

    Scores are by the rule of the example's component, and reports give one for each component beside the whole. The
    metric is the components' own if they share it, else "mean_score", the mean of unlike metrics over examples: look
    at the components then. The trivial predictor answers by each component's own.

    An example's id begins with its component's label. The tokenizer is a byte-level BPE over all components.
    """

    name = "mixture"
    license = ""
    options_class = MixtureOptions

    def __init__(self, arguments: TaskArguments, build: Callable[[TaskArguments], Task]):
        """
        Args:
            arguments: the recipe's `task` section.
            build: makes a component from its arguments.
        """
        super().__init__(arguments)
        for name in REFUSED:
            if getattr(arguments, name) is not None:
                raise UserError(f"task.{name}: belongs to the components of a mixture; write it there")
        if len(self.options.components) < 2:
            raise UserError("task.options.components: a mixture needs at least two tasks")
        self.components: dict[str, Task] = {}
        self.weights: dict[str, float] = {}
        for index, values in enumerate(self.options.components):
            self._add(f"task.options.components[{index}]", values, build)
        tasks = list(self.components.values())
        self.license = "; ".join(f"{label}: {task.license}" for label, task in self.components.items())
        metrics = {task.metric for task in tasks}
        self.metric = metrics.pop() if len(metrics) == 1 else "mean_score"
        self.arguments = dataclasses.replace(
            self.arguments,
            max_source_length=self.arguments.max_source_length or max(task.source_limit for task in tasks),
            max_target_length=self.arguments.max_target_length or max(task.target_limit for task in tasks),
        )
        self._rows: dict[str, list[Example]] = {}
        self._leaked = dict.fromkeys(SPLITS, 0)

    def _add(self, place: str, values: Any, build: Callable[[TaskArguments], Task]) -> None:
        if not isinstance(values, dict) or "name" not in values:
            raise UserError(f"{place}: must be a mapping with the name of a task")
        values = dict(values)
        label, weight = values.pop("label", values["name"]), values.pop("weight", 1)
        known = [item.name for item in dataclasses.fields(TaskArguments)]
        for name in values:
            if name not in known:
                raise UserError(
                    f"{place}: unknown field {name!r}{did_you_mean(str(name), [*known, 'weight', 'label'])}"
                )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"{place}.weight: must be a number above 0, got {weight!r}")
        if values["name"] == self.name:
            raise UserError(f"{place}.name: a mixture cannot hold another")
        if not isinstance(label, str) or not label or SEPARATOR in label:
            raise UserError(f"{place}.label: must be text without {SEPARATOR!r}, got {label!r}")
        if label in self.components:
            raise UserError(f"{place}.label: {label!r} occurs twice; give one of them a label of its own")
        try:
            self.components[label] = build(TaskArguments(**values))
        except StrictDataclassError as error:
            raise UserError(f"{place}: {' '.join(str(error.__cause__ or error).split())}") from error
        self.weights[label] = float(weight)

    @property
    def source(self) -> str:
        total = sum(self.weights.values())
        parts = (
            f"{label}, {100 * self.weights[label] / total:.3g} % of training ({task.source})"
            for label, task in self.components.items()
        )
        return f"mixture of {'; '.join(parts)}"

    def rows(self, split: str) -> list[Example]:
        check_split(split)
        if split not in self._rows:
            rows = self._mixed() if split == "train" else self._all(split)
            self._rows[split] = self._subset(split, rows)
        return self._rows[split]

    def report(self, split: str) -> SplitReport:
        examples = len(self.rows(split))
        reports = [task.report(split) for task in self.components.values()]
        return SplitReport(
            examples=examples,
            leaked=sum(report.leaked for report in reports) + self._leaked[split],
            repeated=examples - len({self._key(example) for example in self.rows(split)}),
            near_leaked=sum(report.near_leaked for report in reports),
            without_teacher=sum(report.without_teacher for report in reports),
        )

    def _all(self, split: str) -> list[Example]:
        """The components' examples, one after the other, without what a later split of any of them holds."""
        found = [self._named(label, e) for label, task in self.components.items() for e in task.rows(split)]
        later = {self._key(e) for after in SPLITS[SPLITS.index(split) + 1 :] for e in self._all(after)}
        kept = [example for example in found if self._key(example) not in later]
        self._leaked[split] = len(found) - len(kept)
        return kept

    def _mixed(self) -> list[Example]:
        pools: dict[str, list[Example]] = {label: [] for label in self.components}
        for example in self._all("train"):
            pools[self.component(example)].append(example)
        for label, pool in pools.items():
            if not pool:
                raise UserError(f"mixture: every train question of {label} occurs in a later split; nothing is left")
            pool.sort(key=lambda example: self._shuffled(example.id))
        total = self.options.num_train or sum(map(len, pools.values()))
        mixed = []
        for label, count in largest_remainders(self.weights, total).items():
            for index in range(count):
                round_, place = divmod(index, len(pools[label]))
                example = pools[label][place]
                mixed.append(dataclasses.replace(example, id=f"{example.id}#{round_ + 1}") if round_ else example)
        return sorted(mixed, key=lambda example: self._shuffled(f"order:{example.id}"))

    def _subset(self, split: str, rows: list[Example]) -> list[Example]:
        most = self.arguments.max_samples(split)
        if most is None or most >= len(rows):
            return rows
        chosen = set(sorted((example.id for example in rows), key=self._shuffled)[:most])
        return [example for example in rows if example.id in chosen]

    def _shuffled(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.options.seed}:{name}".encode()).digest()

    def _key(self, example: Example) -> bytes:
        return question_key(example.prompt)

    def _named(self, label: str, example: Example) -> Example:
        return dataclasses.replace(example, id=f"{label}{SEPARATOR}{example.id}")

    def component(self, example: Example) -> str:
        return example.id.split(SEPARATOR, 1)[0]

    def _task(self, example: Example) -> Task:
        return self.components[self.component(example)]

    def difficulty(self, example: Example) -> int | str | None:
        """None: the components' levels have nothing in common."""
        return None

    def score(self, prediction: str, example: Example) -> Score:
        return self._task(example).score(prediction, example)

    def shorten(self, example: Example, room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return self._task(example).shorten(example, room, tokenizer)

    def shorten_target(self, example: Example, labels: list[int]) -> list[int]:
        task = self._task(example)
        return task.shorten_target(example, labels)[: self.target_limit - 1] + labels[-1:]

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        predictors = {}
        for label, task in self.components.items():
            own = [example for example in train if self.component(example) == label]
            predictors[label] = task.trivial_predictor(own or task.rows("train"))
        return TrivialPredictor(
            name="; ".join(f"{label}: {predictor.name}" for label, predictor in predictors.items()),
            predict=lambda example: predictors[self.component(example)].predict(example),
        )

    def build_tokenizer(self, train_examples: Sequence[Example], vocab_size: int) -> PreTrainedTokenizerFast:
        texts = (text for example in train_examples for text in (example.prompt, example.target))
        return byte_level_bpe(texts, vocab_size, model_max_length=self.source_limit)


def largest_remainders(weights: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the proportions of the weights that add up to `total` (Hamilton's method).

    What is left after rounding down goes to the largest fractions, of equal ones to the earlier.
    """
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts

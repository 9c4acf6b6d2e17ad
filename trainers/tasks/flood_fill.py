"""Flood fill: mark what can be reached on a small map. Generated, with a known number of needed steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, overload

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError
from .base import Example, GeneratedOptions, Score, SplitReport, Task, TaskArguments, TrivialPredictor, check_split
from .tokenization import word_level

WALL, OPEN, START = "#", ".", "S"
REACHED, NOT_REACHED = "+", "-"
# Examples are made in blocks; a block is a function of the options, the split and its number.
BLOCK = 512
CANDIDATES = 8192
KEPT_BLOCKS = 4
# A block is given up after so many rounds of candidates without a map of a wanted distance.
PATIENCE = 200
# Share of all maps that belong to a split, in tenths; the map itself decides which.
TENTHS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}


@strict
@dataclass(kw_only=True)
class FloodFillOptions(GeneratedOptions):
    """Options of the flood fill task."""

    least: ClassVar = {"height": 1, "width": 1, "min_distance": 0}

    height: int = field(default=5, metadata={"help": "Rows of the map."})
    width: int = field(default=5, metadata={"help": "Columns of the map."})
    min_distance: int = field(default=1, metadata={"help": "Smallest distance from the start to a reachable cell."})
    max_distance: int = field(
        default=8,
        metadata={"help": "Largest such distance. The farthest cell's distance is uniform between the two."},
    )
    min_walls: float | int = field(default=0.25, metadata={"help": "Smallest share of walls before selection."})
    max_walls: float | int = field(default=0.55, metadata={"help": "Largest share; it is uniform between the two."})
    step_targets: Literal["answer", "settled", "rounds"] = field(
        default="answer",
        metadata={
            "help": "What a model with deep supervision learns to say after its t-th step. answer: the answer; "
            "settled: the answer from the step on at which t rounds of the flood have found it, and nothing before; "
            "rounds: what t rounds have reached."
        },
    )
    num_test: int = field(default=2000, metadata={"help": "Test examples."})

    def validate_ranges(self) -> None:
        if self.max_distance < self.min_distance:
            raise ValueError(f"max_distance is {self.max_distance}; it must be at least min_distance")
        if self.max_distance >= self.height * self.width:
            raise ValueError(
                f"max_distance is {self.max_distance}; on a map of {self.height * self.width} cells it must be below"
                " their number"
            )
        if not 0 <= self.min_walls <= self.max_walls < 1:
            raise ValueError(
                f"min_walls is {self.min_walls} and max_walls {self.max_walls}; they must lie in [0, 1), in this order"
            )


class Maps(NamedTuple):
    """Several maps of one size.

    Attributes:
        walls (`np.ndarray` of shape `(maps, height, width)`, bool): where the walls are.
        starts (`np.ndarray` of shape `(maps,)`): the start's cell, counted along the rows.
    """

    walls: np.ndarray
    starts: np.ndarray


def spread(walls: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Reached cells and their open neighbours above, below, left and right: arrays `(maps, height, width)`, bool."""
    larger = reached.copy()
    larger[:, 1:] |= reached[:, :-1]
    larger[:, :-1] |= reached[:, 1:]
    larger[:, :, 1:] |= reached[:, :, :-1]
    larger[:, :, :-1] |= reached[:, :, 1:]
    return larger & ~walls


def flood(maps: Maps, rounds: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Spread from the start until nothing changes, or for a number of rounds.

    Returns:
        Reached cells `(maps, height, width)`, and the number of rounds that changed something `(maps,)`, which is the
        distance of the farthest reached cell.
    """
    reached = np.zeros_like(maps.walls)
    reached.reshape(len(maps.starts), -1)[np.arange(len(maps.starts)), maps.starts] = True
    distances = np.zeros(len(maps.starts), dtype=np.int64)
    while rounds is None or rounds > 0:
        larger = spread(maps.walls, reached)
        changed = (larger != reached).any(axis=(1, 2))
        if not changed.any():
            break
        reached, distances = larger, distances + changed
        rounds = None if rounds is None else rounds - 1
    return reached, distances


class FloodFill(Task):
    """A map with walls and a start -> for each cell, whether a walk along open cells leads there from the start.

    The prompt has one token for each cell, row after row: `#` wall, `.` open, `S` start. The target says `+` for a cell
    that can be reached and `-` for any other. On a map of two rows and three columns, `S # . . # .` has the target
    `+ - - + - -`. Steps go up, down, left and right. The difficulty is the distance of the farthest cell that can be
    reached: spreading "reached" to the neighbours takes as many rounds, and then nothing changes any more. All
    difficulties from `min_distance` to `max_distance` are equally frequent. The problem is connectivity on grids, as in
    Minsky and Papert (Perceptrons, 1969), where no local rule of bounded depth decides it.

    Examples. A share of walls is drawn for each map, then the walls and the start. Which split a map belongs to is
    decided by a hash of the map itself, so that no map occurs in two splits; within one a map may occur twice. An
    example is a function of (seed, split, index) and of the options that shape a map.

    With the option `step_targets` other than `answer` an encoded example has a field of that name, one row for each
    round up to `max_distance`, for models that read it (see `ConnectionTransformerForMaskedLM`); others never see it.

    A prediction must be one mark for each cell, and is right only if all marks are.
    """

    name = "flood_fill"
    license = "not applicable (generated)"
    options_class = FloodFillOptions

    def __init__(self, arguments: TaskArguments):
        super().__init__(arguments)
        for argument in ("data_dir", "hub_id", "hub_config", "hub_revision", "teacher_answers", "test_fraction"):
            if getattr(arguments, argument) is not None:
                raise UserError(f"task.{argument}: {self.name} is generated and reads no data; leave it out")
        self.num_cells = self.options.height * self.options.width
        for name in ("max_source_length", "max_target_length"):
            if getattr(self.arguments, name) <= self.num_cells:
                raise UserError(
                    f"task.{name}: {getattr(self.arguments, name)}, but a map of {self.num_cells} cells needs "
                    f"{self.num_cells + 1} tokens"
                )
        self._blocks: dict[tuple[str, int], tuple[Maps, np.ndarray, np.ndarray]] = {}

    def default_arguments(self) -> dict[str, Any]:
        cells = self.options.height * self.options.width
        return {"max_source_length": cells + 1, "max_target_length": cells + 1}

    @property
    def source(self) -> str:
        options = self.options
        return (
            f"generated: maps of {options.height} x {options.width} cells, farthest reachable cell at a distance of "
            f"{options.min_distance} to {options.max_distance}, seed {options.seed}"
        )

    def rows(self, split: str) -> Sequence[Example]:
        """As [`Task.rows`].

        Raises:
            UserError: if no map with one of the wanted distances is found.
        """
        check_split(split)
        size = getattr(self.options, f"num_{split}")
        return _Rows(self, split, min(size, self.arguments.max_samples(split) or size))

    def report(self, split: str) -> SplitReport:
        rows = self.rows(split)
        return SplitReport(examples=len(rows), repeated=len(rows) - len({example.prompt for example in rows}))

    def split_of(self, maps: Maps) -> np.ndarray:
        """In which tenth of all maps each lies, `(maps,)` in [0, 10): a hash of walls and start, chosen by the seed."""
        rng = np.random.default_rng([self.options.seed, 0])
        factors = rng.integers(0, 2**63, size=(2, self.num_cells), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        walls = maps.walls.reshape(len(maps.starts), -1).astype(np.uint64)
        mixed = (walls * factors[0]).sum(axis=1) + factors[1][maps.starts]
        # The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(10)).astype(np.int64)

    def _block(self, split: str, number: int) -> tuple[Maps, np.ndarray, np.ndarray]:
        """[`_make_block`], with the last few blocks kept."""
        if (split, number) not in self._blocks:
            if len(self._blocks) == KEPT_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[split, number] = self._make_block(split, number)
        return self._blocks[split, number]

    def _make_block(self, split: str, number: int) -> tuple[Maps, np.ndarray, np.ndarray]:
        """The maps of one block, the cells that are reached, and the distances; place p has the p-th distance."""
        options = self.options
        levels = options.max_distance - options.min_distance + 1
        # Each block begins with another distance, so that a short split misses none of them.
        wanted = options.min_distance + (number * BLOCK + np.arange(BLOCK)) % levels
        walls = np.zeros((BLOCK, options.height, options.width), dtype=bool)
        starts, reached = np.zeros(BLOCK, dtype=np.int64), np.zeros_like(walls)
        missing = {int(level): list(np.flatnonzero(wanted == level)) for level in np.unique(wanted)}
        rng = np.random.default_rng([options.seed, 1 + list(TENTHS).index(split), number])
        for _ in range(PATIENCE):
            share = rng.uniform(options.min_walls, options.max_walls, size=(CANDIDATES, 1, 1))
            maps = Maps(
                rng.random((CANDIDATES, options.height, options.width)) < share,
                rng.integers(0, self.num_cells, size=CANDIDATES),
            )
            maps.walls.reshape(CANDIDATES, -1)[np.arange(CANDIDATES), maps.starts] = False
            maps = Maps(*(part[np.isin(self.split_of(maps), TENTHS[split])] for part in maps))
            marks, distances = flood(maps)
            for level, places in missing.items():
                found = np.flatnonzero(distances == level)[: len(places)]
                filled, places[:] = places[: len(found)], places[len(found) :]
                walls[filled], starts[filled], reached[filled] = maps.walls[found], maps.starts[found], marks[found]
            if not any(missing.values()):
                return Maps(walls, starts), reached, wanted
        level = next(level for level, places in missing.items() if places)
        raise UserError(
            f"task.options: among {PATIENCE * CANDIDATES} maps of {options.height} x {options.width} cells too few "
            f"have their farthest reachable cell at a distance of {level}; lower max_distance or change the share of "
            "walls"
        )

    def instance(self, split: str, index: int) -> tuple[np.ndarray, int, np.ndarray, int]:
        """Walls `(height, width)`, the start's cell, reached cells `(height, width)`, the farthest one's distance."""
        number, place = divmod(index, BLOCK)
        maps, reached, distances = self._block(split, number)
        return maps.walls[place], int(maps.starts[place]), reached[place], int(distances[place])

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        encoded: dict[str, Any] = super().encode(example, tokenizer)
        if self.options.step_targets == "answer":
            return encoded
        maps = self.read_prompt(example.prompt)
        reached, rounds = flood(maps, 0)[0], []
        for _ in range(max(1, self.options.max_distance)):
            reached = spread(maps.walls, reached)
            rounds.append(reached.ravel())
        *marks, end = encoded["labels"]
        if self.options.step_targets == "rounds":
            yes, no = (tokenizer.convert_tokens_to_ids(mark) for mark in (REACHED, NOT_REACHED))
            encoded["step_targets"] = [[*row, end] for row in np.where(rounds, yes, no).tolist()]
        else:
            nothing = [-100] * len(encoded["labels"])
            settled = (np.array(rounds) == rounds[-1]).all(axis=1)
            encoded["step_targets"] = [[*marks, end] if done else nothing for done in settled]
        return encoded

    def score(self, prediction: str, example: Example) -> Score:
        marks = prediction.split()
        whole = len(marks) == self.num_cells and set(marks) <= {REACHED, NOT_REACHED}
        parsed = " ".join(marks) if whole else None
        return Score(correct=parsed == example.answer, parsed=parsed)

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        """The rule with the most right answers on the training examples.

        The rules: every open cell; the start alone; the start and its open neighbours.
        """

        def after(rounds: int):
            return lambda example: answer_of(flood(self.read_prompt(example.prompt), rounds)[0][0])

        rules = {
            "every open cell": lambda example: answer_of(~self.read_prompt(example.prompt).walls[0]),
            "the start alone": after(0),
            "the start and its open neighbours": after(1),
        }
        train = train[: min(len(train), 2000)]
        right = {name: sum(rule(example) == example.answer for example in train) for name, rule in rules.items()}
        best = max(right, key=right.__getitem__)
        return TrivialPredictor(
            name=f"{best}; best of {len(rules)} rules on {len(train)} examples of the training split",
            predict=rules[best],
        )

    def read_prompt(self, prompt: str) -> Maps:
        """The one map that a prompt describes."""
        cells = np.array(prompt.split())
        shape = (1, self.options.height, self.options.width)
        return Maps((cells == WALL).reshape(shape), np.flatnonzero(cells == START))

    def build_tokenizer(self, train_examples: Sequence[Example], vocab_size: int) -> PreTrainedTokenizerFast:
        """A word-level tokenizer with exactly the words of the task. The training examples play no part."""
        words = [WALL, OPEN, START, REACHED, NOT_REACHED]
        tokenizer = word_level(words, model_max_length=self.source_limit)
        if len(tokenizer) > vocab_size:
            raise UserError(f"tokenizer.vocab_size: {vocab_size}, but {self.name} needs {len(tokenizer)} tokens")
        return tokenizer


def answer_of(reached: np.ndarray) -> str:
    """The answer that marks the reached cells, an array `(height, width)`."""
    return " ".join(np.where(reached.ravel(), REACHED, NOT_REACHED))


class _Rows(Sequence[Example]):
    """The examples of a split, made when they are looked at."""

    def __init__(self, task: FloodFill, split: str, size: int):
        self.task, self.split, self.size = task, split, size

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        position = range(self.size)[index]
        walls, start, reached, distance = self.task.instance(self.split, position)
        cells = np.where(walls.ravel(), WALL, OPEN)
        cells[start] = START
        answer = answer_of(reached)
        return Example(
            id=f"{self.split}-{position}",
            prompt=" ".join(cells),
            target=answer,
            answer=answer,
            difficulty=distance,
        )

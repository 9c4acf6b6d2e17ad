"""Pointer chasing: follow a random function a given number of times. Generated, with a known number of needed steps."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, overload

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .base import Example, GeneratedOptions, Score, Task, TaskArguments, TrivialPredictor, check_split, most_frequent
from .tokenization import word_level

# Of every ten consecutive instances the first is for the test, the second for validation, the others for training.
CYCLE = 10
PLACES = {"test": (0,), "validation": (1,), "train": tuple(range(2, CYCLE))}
FEISTEL_ROUNDS = 6
# The number of functions, about n^n, is counted exactly; beyond this size that takes longer than the training.
MAX_SYMBOLS = 1000


@strict
@dataclass(kw_only=True)
class PointerChaseOptions(GeneratedOptions):
    """Options of the pointer chase task."""

    least: ClassVar = {"num_symbols": 2, "max_hops": 1}

    num_symbols: int = field(default=5, metadata={"help": "Number of symbols n; the function maps 0..n-1 to itself."})
    max_hops: int = field(default=3, metadata={"help": "The number of hops is uniform over 1..max_hops."})
    functions: Literal["any", "permutation", "cycle"] = field(
        default="any",
        metadata={
            "help": "Draw from all functions, from those that are one-to-one, or from those that are one cycle through "
            "all symbols. Chases in random functions soon run in circles, so wrong numbers of hops often end right; in "
            "a cycle they never do while max_hops is below num_symbols."
        },
    )
    layout: Literal["pairs", "table"] = field(
        default="pairs",
        metadata={"help": "Write f as one token for each argument and value (0>3), or as the values in order (3)."},
    )

    def validate_ranges(self) -> None:
        if self.num_symbols > MAX_SYMBOLS:
            raise ValueError(f"num_symbols is {self.num_symbols}; it must be at most {MAX_SYMBOLS}")


class Instance(NamedTuple):
    """One chase: apply `function` (a table) `hops` times to `start`."""

    hops: int
    start: int
    function: tuple[int, ...]

    def end(self, hops: int | None = None) -> int:
        """The symbol reached after `hops` applications, by default after the asked number."""
        symbol = self.start
        for _ in range(self.hops if hops is None else hops):
            symbol = self.function[symbol]
        return symbol


class PointerChase(Task):
    """Number of hops k, start s and the table of a function f on n symbols -> f applied k times to s.

    The prompt has one token for each word. With `layout: pairs` it is `k-hop s : 0>f(0) 1>f(1) ...`, so that
    `2-hop 0 : 0>3 1>0 2>1 3>2` has the target `2` (0 -> 3 -> 2); with `layout: table` the same is `2-hop 0 : 3 0 1 2`.
    In pairs each token is a whole fact; in a table a fact is a token at a position, and an encoder that only adds token
    and position embeddings must first bind the two. The difficulty is k. The problem is the pointer chasing of
    communication complexity (Papadimitriou and Sipser 1984), given as one sequence.

    Examples. All instances (k, s, f) are numbered; a keyed permutation of the numbers (a Feistel network with cycle
    walking, after Black and Rogaway 2002) puts them into a random order, in which every tenth is for the test, its
    neighbour for validation, and the others for training. So an example is a function of (seed, split, index) alone, no
    instance occurs twice, in one split or in two, and the size of one split does not change another. Keep `seed` fixed
    when runs with different training seeds are compared.

    A prediction must be exactly one symbol.
    """

    name = "pointer_chase"
    license = "not applicable (generated)"
    options_class = PointerChaseOptions

    def __init__(self, arguments: TaskArguments):
        super().__init__(arguments)
        for argument in ("data_dir", "hub_id", "hub_config", "hub_revision", "teacher_answers", "test_fraction"):
            if getattr(arguments, argument) is not None:
                raise UserError(f"task.{argument}: {self.name} is generated and reads no data; leave it out")
        words = self.options.num_symbols + 3
        if self.source_limit <= words:
            raise UserError(
                f"task.max_source_length: {self.source_limit}, but a prompt with "
                f"{self.options.num_symbols} symbols needs {words + 1} tokens"
            )
        size = self.options.num_symbols
        num_functions = {"any": size**size, "permutation": math.factorial(size), "cycle": math.factorial(size - 1)}
        self._num_instances = self.options.max_hops * size * num_functions[self.options.functions]
        for split, places in PLACES.items():
            wanted = getattr(self.options, f"num_{split}")
            cycles, rest = divmod(self._num_instances, CYCLE)
            available = cycles * len(places) + sum(place < rest for place in places)
            if wanted > available:
                raise UserError(
                    f"task.options: num_{split} is {wanted}, but {self.options.num_symbols} symbols and "
                    f"{self.options.max_hops} hops give only {available} different {split} examples"
                )

    def default_arguments(self) -> dict[str, Any]:
        return {"max_source_length": self.options.num_symbols + 4, "max_target_length": 2}

    @property
    def source(self) -> str:
        options = self.options
        kind = {"any": "any functions", "permutation": "permutations", "cycle": "cycles"}[options.functions]
        return f"generated: {kind} of {options.num_symbols} symbols, 1 to {options.max_hops} hops, seed {options.seed}"

    def rows(self, split: str) -> Sequence[Example]:
        check_split(split)
        size = getattr(self.options, f"num_{split}")
        return _Rows(self, split, min(size, self.arguments.max_samples(split) or size))

    def instance(self, split: str, index: int) -> Instance:
        """The instance behind an example, a function of the options, split and index (counted from 0)."""
        places = PLACES[split]
        position = index // len(places) * CYCLE + places[index % len(places)]
        number = permute(position, self._num_instances, key=f"{self.name}:{self.options.seed}".encode())
        number, hops = divmod(number, self.options.max_hops)
        number, start = divmod(number, self.options.num_symbols)
        return Instance(hops + 1, start, self._function(number))

    def _function(self, number: int) -> tuple[int, ...]:
        """The table with this number: its digits to base n, or the Lehmer code of a permutation or a cycle."""
        size = self.options.num_symbols
        if self.options.functions == "any":
            return tuple(number // size**symbol % size for symbol in range(size))
        if self.options.functions == "permutation":
            return tuple(_arrangement(number, list(range(size))))
        order = [0, *_arrangement(number, list(range(1, size)))]
        successors = dict(zip(order, order[1:] + order[:1], strict=True))
        return tuple(successors[symbol] for symbol in range(size))

    def score(self, prediction: str, example: Example) -> Score:
        symbol = prediction.strip()
        parsed = symbol if symbol in self._symbols() else None
        return Score(correct=parsed == example.answer, parsed=parsed)

    def trivial_predictor(self, train: Sequence[Example]) -> TrivialPredictor:
        """The rule with the most right answers on the training examples.

        The rules: the most frequent answer; the start; the symbol after j hops, for one j whatever the question asks.
        """
        train = list(train)
        answer = most_frequent([example.answer for example in train])
        rules = {f'always "{answer}" (most frequent answer)': lambda example: answer, "always the start": _after(0)}
        for hops in range(1, self.options.max_hops + 1):
            rules[f"always {hops} hop{'s' if hops > 1 else ''}"] = _after(hops)
        right = {name: sum(rule(example) == example.answer for example in train) for name, rule in rules.items()}
        best = max(right, key=right.__getitem__)
        return TrivialPredictor(name=f"{best}; best of {len(rules)} rules on the training split", predict=rules[best])

    def build_tokenizer(self, train_examples: Sequence[Example], vocab_size: int) -> PreTrainedTokenizerFast:
        """A word-level tokenizer with exactly the words of the prompts. The training examples play no part."""
        symbols = self._symbols()
        words = [*symbols, *(f"{hops}-hop" for hops in range(1, self.options.max_hops + 1)), ":"]
        if self.options.layout == "pairs":
            words += [f"{argument}>{value}" for argument in symbols for value in symbols]
        tokenizer = word_level(words, model_max_length=self.source_limit)
        if len(tokenizer) > vocab_size:
            raise UserError(f"tokenizer.vocab_size: {vocab_size}, but {self.name} needs {len(tokenizer)} tokens")
        return tokenizer

    def _symbols(self) -> list[str]:
        return [str(symbol) for symbol in range(self.options.num_symbols)]


class _Rows(Sequence[Example]):
    """The examples of a split, made when they are looked at."""

    def __init__(self, task: PointerChase, split: str, size: int):
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
        instance = self.task.instance(self.split, position)
        table = [str(value) for value in instance.function]
        if self.task.options.layout == "pairs":
            table = [f"{argument}>{value}" for argument, value in enumerate(table)]
        answer = str(instance.end())
        return Example(
            id=f"{self.split}-{position}",
            prompt=f"{instance.hops}-hop {instance.start} : {' '.join(table)}",
            target=answer,
            answer=answer,
            difficulty=instance.hops,
        )


def read_prompt(prompt: str) -> Instance:
    """The instance that a prompt describes."""
    hops, start, _, *function = prompt.split()
    return Instance(int(hops.removesuffix("-hop")), int(start), tuple(int(word.split(">")[-1]) for word in function))


def _arrangement(number: int, symbols: list[int]) -> list[int]:
    """The arrangement of the symbols with this number, in [0, len(symbols)!)."""
    arrangement = []
    while symbols:
        number, choice = divmod(number, len(symbols))
        arrangement.append(symbols.pop(choice))
    return arrangement


def permute(value: int, size: int, key: bytes) -> int:
    """A pseudorandom permutation of `range(size)`, chosen by `key`.

    A Feistel network permutes the smallest square power of two that holds `size`; values outside are sent through it
    again until one falls inside (cycle walking), on average less than four times.
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask, num_bytes = (1 << half) - 1, (half + 7) // 8
    while True:
        left, right = value >> half, value & mask
        for round_ in range(FEISTEL_ROUNDS):
            digest = hashlib.shake_256(key + bytes([round_]) + right.to_bytes(num_bytes)).digest(num_bytes)
            left, right = right, left ^ int.from_bytes(digest) & mask
        value = left << half | right
        if value < size:
            return value


def _after(hops: int):
    return lambda example: str(read_prompt(example.prompt).end(hops))

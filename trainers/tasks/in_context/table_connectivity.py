"""Are two columns connected? Tables share columns; does a chain of tables join the two that are asked for?"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub.dataclasses import strict

from ...errors import UserError
from .base import InContextTask
from .streams import Streams

UNREACHABLE = -1
IGNORED = -100
NUM_TAIL_TOKENS = 3
# Graphs drawn without one that offers both kinds of pairs, before the options are said not to allow any: if one graph
# in 500 did, all of these would miss it once in 10^17 times.
HOPELESS = 20_000
# Attempts that a prompt has random numbers for, and graphs that are drawn at once for prompts that need many attempts.
MAX_ATTEMPTS = 2**20
GRAPHS_AT_ONCE = 1024
ONE_SIDED = 0.9


@strict
@dataclass(kw_only=True)
class TableConnectivityOptions:
    """Options of the table connectivity task."""

    num_tables: int = field(default=8, metadata={"help": "Tables in a prompt (V)."})
    num_columns: int = field(default=2, metadata={"help": "Columns of a table (C)."})
    rho: float | int = field(
        default=0.2, metadata={"help": "Probability that a table hands one of its columns to a given later table."}
    )
    n_dims: int = field(default=28, metadata={"help": "Coordinates of a name."})
    balanced: bool = field(
        default=True,
        metadata={
            "help": "Keep graphs with both kinds of pairs of tables only, and ask as often for one kind as for the "
            "other: then the label is a fair coin given the graph. If false, the two tables are drawn freely."
        },
    )
    path_length: int | None = field(
        default=None,
        metadata={"help": "Tables on the shortest path between connected columns; by default any. Needs balanced."},
    )
    max_path_length: int | None = field(
        default=None, metadata={"help": "The same, but every length from 0 to this one. Needs balanced."}
    )
    min_tables: int | None = field(
        default=None,
        metadata={"help": "Every prompt has a random number of tables from this one to num_tables; by default V."},
    )
    autoregressive: bool = field(
        default=False,
        metadata={
            "help": "Ask for the path table by table: a prompt shows the question, or a table on the way in the place "
            "of the first column, and the blocks' labels say which tables come next on a shortest path."
        },
    )
    names: Literal["orthogonal", "random"] = field(
        default="orthogonal", metadata={"help": "Names are orthogonal vectors of length sqrt(n_dims), or normal ones."}
    )
    max_tables: int | None = field(
        default=None,
        metadata={"help": "Names for this many tables and their columns, of which a prompt draws some; default V."},
    )
    names_seed: int = field(default=0, metadata={"help": "Seed of the names."})

    def validate_ranges(self) -> None:
        for name, least in {"num_tables": 2, "num_columns": 1, "n_dims": 1, "names_seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho is {self.rho}; it must lie in [0, 1]")
        if self.max_tables is not None and self.max_tables < self.num_tables:
            raise ValueError(f"max_tables is {self.max_tables}; it must be at least num_tables={self.num_tables}")
        if self.vocabulary_tables * self.num_columns > 2**16:
            raise ValueError(f"{self.vocabulary_tables} tables of {self.num_columns} columns; at most 65536 columns")
        if self.names == "orthogonal" and self.num_names > self.n_dims:
            raise ValueError(
                f"n_dims is {self.n_dims}; {self.num_names} orthogonal names (V tables with C columns each) need at "
                f'least as many, or names="random"'
            )
        for name in ("path_length", "max_path_length"):
            length = getattr(self, name)
            if length is not None and not self.balanced:
                raise ValueError(f"{name} needs balanced=true")
            if length is not None and not 0 <= length <= self.num_tables:
                raise ValueError(f"{name} is {length}; it must lie in [0, num_tables={self.num_tables}]")
        if self.path_length is not None and self.max_path_length is not None:
            raise ValueError("path_length and max_path_length are both set; one of them says which paths there are")
        if self.autoregressive and self.min_tables is not None:
            raise ValueError("autoregressive and min_tables are both set; paths are asked for in prompts of one size")
        if self.min_tables is not None and not 2 <= self.min_tables <= self.num_tables:
            raise ValueError(f"min_tables is {self.min_tables}; it must lie in [2, num_tables={self.num_tables}]")

    @property
    def vocabulary_tables(self) -> int:
        """Number of tables that there are names for."""
        return self.num_tables if self.max_tables is None else self.max_tables

    @property
    def num_names(self) -> int:
        """Number of names: of the columns, then of the tables."""
        return self.vocabulary_tables * (self.num_columns + 1)


class Questions(NamedTuple):
    """A batch of B sets of tables, each with a question and its answer.

    Attributes:
        columns: `(B, V, C)`. Tables that hold one in common are neighbours.
        query: `(B, 2)`, the columns asked for.
        query_tables: `(B, 2)`, the tables from which they were picked.
        connected: `(B,)`, whether the two lie in one component: the label.
        path_length: `(B,)`, tables on the shortest path between the two, or -1.
        tables_connected: `(B, V)`, whether each table is connected to the first column asked for.
    """

    columns: torch.Tensor
    query: torch.Tensor
    query_tables: torch.Tensor
    connected: torch.Tensor
    path_length: torch.Tensor
    tables_connected: torch.Tensor


def hand_over(initial_columns: torch.Tensor, rows: np.ndarray, writes: np.ndarray) -> torch.Tensor:
    """Lets tables hand columns to later tables.

    Args:
        initial_columns: `(B, V, C)`.
        rows: `(W,)`, the batch row of every write, in order of the writes within each row.
        writes: `(W, 4)`, each `u, v, s, t` with u < v: slot s of table v becomes what slot t of table u is then. The
            writes of a row come in order of u, so that a table is final before it hands anything over, and a later
            write replaces an earlier one.

    Returns:
        `(B, V, C)`.
    """
    batch_size, num_tables, num_columns = initial_columns.shape
    written = np.tile(np.arange(num_tables * num_columns), (batch_size, 1))
    source, target, slot, source_slot = np.moveaxis(writes, -1, 0)
    # Of several values for one place, numpy keeps the last.
    written[rows, target * num_columns + slot] = source * num_columns + source_slot
    pointers = torch.from_numpy(written)
    # A slot points to a slot of an earlier table, which may point on.
    for _ in range(math.ceil(math.log2(num_tables))):
        pointers = pointers.gather(1, pointers)
    return initial_columns.flatten(1).gather(1, pointers).view_as(initial_columns)


def smallest(values: torch.Tensor) -> torch.Tensor:
    """Minimum over the last, short dimension; one at a time is far faster than a reduction."""
    return functools.reduce(torch.minimum, values.unbind(-1))


def components(columns: torch.Tensor, num_ids: int) -> torch.Tensor:
    """The smallest number of a table in the component of each table.

    Args:
        columns: `(B, V, C)`, ids in [0, num_ids).

    Returns:
        `(B, V)`.
    """
    batch_size, num_tables, num_columns = columns.shape
    flat = columns.flatten(1)
    labels = torch.arange(num_tables).expand(batch_size, -1)
    while True:
        of_columns = torch.full((batch_size, num_ids), num_tables)
        of_columns.scatter_reduce_(1, flat, labels.repeat_interleave(num_columns, dim=1), "amin")
        lower = smallest(of_columns.gather(1, flat).view_as(columns))
        # A table may take over the label of the table whose number it has.
        lower = torch.minimum(lower, lower.gather(1, lower))
        if torch.equal(lower, labels):
            return labels
        labels = lower


def distances(columns: torch.Tensor, start: torch.Tensor, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of tables on the shortest paths that begin at a column.

    Args:
        columns: `(B, V, C)`, ids in [0, num_ids).
        start: `(B,)`, ids of columns.

    Returns:
        `(B, V)`, to each table with itself counted, and `(B, num_ids)`, to each column; -1 where there is no path.
    """
    batch_size, num_tables, num_columns = columns.shape
    flat, far = columns.flatten(1), num_tables + 1
    to_columns = torch.full((batch_size, num_ids), far).scatter_(1, start[:, None], 0)
    while True:
        to_tables = (smallest(to_columns.gather(1, flat).view_as(columns)) + 1).clamp(max=far)
        nearer = to_columns.scatter_reduce(1, flat, to_tables.repeat_interleave(num_columns, dim=1), "amin")
        if torch.equal(nearer, to_columns):
            break
        to_columns = nearer
    return to_tables.masked_fill(to_tables >= far, UNREACHABLE), to_columns.masked_fill(to_columns >= far, UNREACHABLE)


def shortest_paths(columns: torch.Tensor, query: torch.Tensor, num_ids: int) -> torch.Tensor:
    """A shortest path between the two columns of each query, for models that write it out step by step.

    Args:
        columns: `(B, V, C)`, ids in [0, num_ids).
        query: `(B, 2)`.

    Returns:
        `(B, 2 * L + 1)`, where L is the largest number of tables on a path here: column, table, column, and so on,
        from the first column to the second; -1 behind its end, and everywhere if there is no path. Of several paths
        the one with the lowest places in each step.
    """
    to_tables, to_columns = distances(columns, query[:, 1], num_ids)
    rows = torch.arange(len(columns))
    column = query[:, 0]
    left = to_columns[rows, column]
    longest = int(left.max().clamp(min=0))
    paths = torch.full((len(columns), 2 * longest + 1), UNREACHABLE)
    paths[:, 0] = torch.where(left == UNREACHABLE, UNREACHABLE, column)
    for step in range(longest):
        goes_on = left > 0
        fits = (columns == column[:, None, None]).any(dim=2) & (to_tables == left[:, None])
        table = fits.int().argmax(dim=1)
        held = columns[rows, table]
        place = (to_columns.gather(1, held) == left[:, None] - 1).int().argmax(dim=1)
        column = torch.where(goes_on, held[rows, place], column)
        paths[:, 2 * step + 1] = torch.where(goes_on, table, UNREACHABLE)
        paths[:, 2 * step + 2] = torch.where(goes_on, column, UNREACHABLE)
        left = left - goes_on.long()
    return paths


def choose(allowed: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """For each row one place where `allowed`, `(B, n)`, is positive, with probability in proportion to it.

    Args:
        uniform: `(B,)`, in [0, 1).
    """
    counts = allowed.long().cumsum(dim=1)
    rank = (torch.from_numpy(uniform) * counts[:, -1]).floor().long()
    return (counts <= rank[:, None]).sum(dim=1).clamp(max=allowed.shape[1] - 1)


def neighbours(columns: torch.Tensor) -> torch.Tensor:
    """Whether two tables hold a column in common, `(B, V, V)`; every table does with itself.

    Args:
        columns: `(B, V, C)`.
    """
    return (columns[:, :, None, :, None] == columns[:, None, :, None, :]).any(dim=(-2, -1))


class TableConnectivity(InContextTask):
    """V tables with C columns each -> do two columns lie in one component?

    A prompt is one block for each table, its name and its columns, then a separator and the two columns: N = V (C + 1)
    + 3 tokens, as [`LowRankInContextTransformerModel`] reads them. First all columns are different; then, for every
    two tables u < v in order, with probability rho one slot of v becomes one of u's columns. A later write may
    destroy an earlier link, so labels come from the final columns. The difficulty is the number of tables on the
    shortest path.
    """

    name = "table_connectivity"
    metric = "accuracy"
    options_class = TableConnectivityOptions
    curriculum_variables = ("num_tables", "rho", "path_length", "max_path_length")

    def __init__(self, options=None, seed: int = 0):
        super().__init__(options, seed)
        self.names = self._make_names()
        self._variants: dict[tuple, TableConnectivity] = {}

    def variant(self, **changed: Any) -> "TableConnectivity":
        """The task with other values of some options, and the same names.

        Raises:
            UserError: if a value breaks a rule, or there are no names for so many tables.
        """
        key = tuple(sorted(changed.items()))
        if key not in self._variants:
            options = dataclasses.asdict(self.options) | {"max_tables": self.options.vocabulary_tables} | changed
            self._variants[key] = TableConnectivity(options, self.seed)
        return self._variants[key]

    def _make_names(self) -> torch.Tensor:
        """Vectors of the columns' names, of the tables' names, and zeros for the separator."""
        options = self.options
        generator = torch.Generator().manual_seed(options.names_seed)
        if options.names == "random":
            names = torch.randn(options.num_names, options.n_dims, generator=generator)
        else:
            square = torch.randn(options.n_dims, options.n_dims, generator=generator, dtype=torch.float64)
            names = torch.linalg.qr(square).Q[: options.num_names].float() * math.sqrt(options.n_dims)
        return torch.cat((names, torch.zeros(1, options.n_dims)))

    @property
    def num_columns_named(self) -> int:
        """Number of column ids."""
        return self.options.vocabulary_tables * self.options.num_columns

    def graphs(self, streams: Streams) -> torch.Tensor:
        """Random sets of tables, one for each stream: their final columns, `(B, V, C)`."""
        num_tables, num_columns = self.options.num_tables, self.options.num_columns
        ids = torch.from_numpy(streams.subset(self.num_columns_named, num_tables * num_columns))
        initial_columns = ids.view(len(streams), num_tables, num_columns)
        source, target = np.triu_indices(num_tables, k=1)
        bits = streams.bits(len(source))
        rows, pairs = np.nonzero((bits >> np.uint64(32)) < np.uint64(round(self.options.rho * 2**32)))
        drawn = bits[rows, pairs]
        slots = [
            ((drawn >> np.uint64(shift) & np.uint64(0xFFFF)) * np.uint64(num_columns) >> np.uint64(16)).astype(np.int64)
            for shift in (0, 16)
        ]
        writes = np.stack((source[pairs], target[pairs], *slots), axis=-1)
        return hand_over(initial_columns, rows, writes)

    def questions(self, split: str, indices: Sequence[int]) -> Questions:
        """The graphs and questions with these indices.

        Raises:
            UserError: if no graph offers what the options ask for.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        # Of indices 2k and 2k + 1 one asks for a connected pair and the other does not.
        coins = self.streams(split, numbers // 2, "labels").integers(2)
        wanted = torch.from_numpy((coins ^ (numbers & 1)).astype(bool))
        columns = torch.empty(len(numbers), self.options.num_tables, self.options.num_columns, dtype=torch.long)
        slots = torch.empty(len(numbers), 2, dtype=torch.long)
        left, attempt = torch.arange(len(numbers)), 0
        while len(left) > 0:
            drawn_in_vain = attempt * len(left) if len(left) == len(numbers) else 0
            if drawn_in_vain >= HOPELESS or attempt == MAX_ATTEMPTS:
                raise UserError(
                    f"task.options: {max(drawn_in_vain, attempt)} graphs with num_tables={self.options.num_tables}, "
                    f"num_columns={self.options.num_columns} and rho={self.options.rho} offer no pairs of both kinds"
                    + ("" if self.options.path_length is None else f" for path_length={self.options.path_length}")
                )
            # The fewer prompts are left, the more attempts are made for each at once.
            count = max(1, max(len(numbers), min(attempt, GRAPHS_AT_ONCE)) // len(left))
            count = min(count, MAX_ATTEMPTS - attempt)
            rows = left.repeat_interleave(count)
            attempts = attempt + np.tile(np.arange(count), len(left))
            streams = self.streams(split, numbers[rows.numpy()] * MAX_ATTEMPTS + attempts, "graphs")
            drawn = self.graphs(streams)
            picked, kept = self._pick(drawn, wanted[rows], streams)
            kept = kept.view(len(left), count)
            chosen = torch.arange(len(left)) * count + kept.int().argmax(dim=1)
            found = kept.any(dim=1)
            columns[left[found]], slots[left[found]] = drawn[chosen[found]], picked[chosen[found]]
            left, attempt = left[~found], attempt + count
        query = columns.flatten(1).gather(1, slots)
        to_tables, to_columns = distances(columns, query[:, 0], self.num_columns_named)
        path_length = to_columns.gather(1, query[:, 1:]).squeeze(1)
        return Questions(
            columns=columns,
            query=query,
            query_tables=slots // self.options.num_columns,
            connected=path_length != UNREACHABLE,
            path_length=path_length,
            tables_connected=to_tables != UNREACHABLE,
        )

    def _pick(self, columns: torch.Tensor, wanted: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        """Two slots to ask for, `(B, 2)`, and whether the graph is kept, `(B,)`. What is kept depends on no label."""
        options = self.options
        num_tables, num_columns = options.num_tables, options.num_columns
        # For the first table, the second, and a slot of each.
        uniform = streams.uniform(4)
        if options.path_length is not None or options.max_path_length is not None:
            first = torch.from_numpy((uniform[:, 0] * num_tables * num_columns).astype(np.int64))
            flat = columns.flatten(1)
            _, to_columns = distances(columns, flat.gather(1, first[:, None]).squeeze(1), self.num_columns_named)
            lengths = to_columns.gather(1, flat)
            apart = lengths == UNREACHABLE
            if options.path_length is not None:
                near = lengths == options.path_length
            else:
                near = ~apart & (lengths <= options.max_path_length)
                near.scatter_(1, first[:, None], False)
            second = choose(torch.where(wanted[:, None], near, apart), uniform[:, 1])
            return torch.stack((first, second), dim=1), near.any(dim=1) & apart.any(dim=1)

        rows = torch.arange(len(columns))
        if not options.balanced:
            first = torch.from_numpy((uniform[:, 0] * num_tables).astype(np.int64))
            second = torch.from_numpy((uniform[:, 1] * (num_tables - 1)).astype(np.int64))
            second = second + (second >= first).long()
            kept = torch.ones(len(columns), dtype=torch.bool)
        else:
            labels = components(columns, self.num_columns_named)
            sizes = torch.zeros_like(labels).scatter_add_(1, labels, torch.ones_like(labels)).gather(1, labels)
            kept = (sizes > 1).any(dim=1) & (sizes[:, 0] < num_tables)
            partners = torch.where(wanted[:, None], sizes - 1, num_tables - sizes)
            first = choose(partners, uniform[:, 0])
            allowed = (labels == labels.gather(1, first[:, None])) == wanted[:, None]
            allowed[rows, first] = False
            second = choose(allowed, uniform[:, 1])
        within = torch.from_numpy((uniform[:, 2:] * num_columns).astype(np.int64))
        return torch.stack((first, second), dim=1) * num_columns + within, kept

    def token_ids(self, questions: Questions, streams: Streams) -> torch.Tensor:
        """Names in a prompt, `(B, N)`, as rows of `names`."""
        options = self.options
        tables = torch.from_numpy(streams.subset(options.vocabulary_tables, options.num_tables))
        blocks = torch.cat((tables[:, :, None] + self.num_columns_named, questions.columns), dim=2)
        separator = torch.full((len(tables), 1), options.num_names)
        return torch.cat((blocks.flatten(1), separator, questions.query), dim=1)

    def batch(self, split: str, indices: Sequence[int], **stage: Any) -> dict[str, torch.Tensor]:
        """`input_values` `(B, N, n_dims)`, `labels` `(B,)` and `block_targets` `(B, V)`, both 1 or -1, and
        `path_length` `(B,)`.

        With `min_tables` prompts differ in their number of tables: V is the largest that is possible, smaller prompts
        have blocks of zeros behind their own, whose targets are -100, and `attention_mask` `(B, V)` is 0 there.
        """
        if stage:
            return self.variant(**stage).batch(split, indices)
        if self.options.min_tables is not None:
            return self._batch_of_sizes(split, np.asarray(indices, dtype=np.int64))
        questions = self.questions(split, indices)
        ids = self.token_ids(questions, self.streams(split, indices, "names of tables"))
        block_targets, path_length = questions.tables_connected, questions.path_length
        if self.options.autoregressive:
            ids, block_targets, path_length = self.on_the_way(questions, ids, self.streams(split, indices, "steps"))
        return {
            "input_values": self.names[ids],
            "labels": questions.connected.long() * 2 - 1,
            "block_targets": block_targets.long() * 2 - 1,
            "path_length": path_length,
        }

    def on_the_way(
        self, questions: Questions, ids: torch.Tensor, streams: Streams
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The questions after a random number of steps along a shortest path.

        Args:
            ids: as [`token_ids`] returns them.
            streams: from which the numbers of steps are drawn.

        Returns:
            The ids with the table that was reached in the place of the first column, `(B, N)`; which tables come next
            on a shortest path, `(B, V)`; and the tables left on it, `(B,)`, -1 if there is none.
        """
        rows = torch.arange(len(ids))
        steps = (torch.from_numpy(streams.uniform()) * questions.path_length.clamp(min=0)).long()
        paths = shortest_paths(questions.columns, questions.query, self.num_columns_named)
        begins = steps == 0
        # Columns and tables take turns on a path, beginning with a column.
        table = torch.where(begins, UNREACHABLE, paths[rows, (2 * steps - 1).clamp(min=0)])
        ids = ids.clone()
        named = ids[rows, table.clamp(min=0) * (self.options.num_columns + 1)]
        ids[:, -2] = torch.where(begins, ids[:, -2], named)
        left = torch.where(questions.path_length > 0, questions.path_length - steps, questions.path_length)
        to_goal, _ = distances(questions.columns, questions.query[:, 1], self.num_columns_named)
        nexts = self.next_tables(questions, table)
        return ids, nexts & (to_goal == left[:, None]) & (left > 0)[:, None], left

    def next_tables(self, questions: Questions, table: torch.Tensor) -> torch.Tensor:
        """The tables that a path may go on to, `(B, V)`.

        Args:
            table: `(B,)`, the table reached last, or -1 at the beginning, where the next holds the first column.
        """
        holds = (questions.columns == questions.query[:, :1, None]).any(dim=2)
        beside = neighbours(questions.columns)[torch.arange(len(table)), table.clamp(min=0)]
        return torch.where((table == UNREACHABLE)[:, None], holds, beside)

    def _batch_of_sizes(self, split: str, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """A batch whose prompts have `min_tables` to `num_tables` tables."""
        least, most = self.options.min_tables, self.options.num_tables
        sizes = least + self.streams(split, indices, "sizes").integers(most - least + 1)
        block_size = self.options.num_columns + 1
        batch = {
            "input_values": torch.zeros(len(indices), most * block_size + NUM_TAIL_TOKENS, self.options.n_dims),
            "labels": torch.empty(len(indices), dtype=torch.long),
            "block_targets": torch.full((len(indices), most), IGNORED),
            "path_length": torch.empty(len(indices), dtype=torch.long),
            "attention_mask": torch.zeros(len(indices), most, dtype=torch.long),
        }
        for size in np.unique(sizes).tolist():
            rows = torch.from_numpy(np.nonzero(sizes == size)[0])
            part = self.variant(num_tables=size, min_tables=None).batch(split, indices[rows.numpy()])
            blocks, tail = part["input_values"].tensor_split([size * block_size], dim=1)
            batch["input_values"][rows, : size * block_size] = blocks
            batch["input_values"][rows, most * block_size :] = tail
            batch["block_targets"][rows, :size] = part["block_targets"]
            batch["attention_mask"][rows, :size] = 1
            for name in ("labels", "path_length"):
                batch[name][rows] = part[name]
        return batch

    def warning(self, labels: torch.Tensor) -> str | None:
        """What to tell a user whose labels are nearly all alike: then always saying so is nearly always right."""
        share = max((labels > 0).double().mean().item(), (labels <= 0).double().mean().item())
        if share <= ONE_SIDED:
            return None
        return f"{share:.1%} of the labels are alike: a constant answer is as often right; balanced=true avoids that"


def majority(labels: torch.Tensor) -> int:
    """The rule without a model: the most frequent label of the training prompts, 1 or -1, and 1 if there is a tie."""
    return 1 if (labels > 0).sum() * 2 >= len(labels) else -1


def at_most(questions: Questions, num_tables: int) -> torch.Tensor:
    """The rule that says yes when a path of at most so many tables joins the columns: what so many steps can see.

    Returns:
        `(B,)` of bool.
    """
    return (questions.path_length != UNREACHABLE) & (questions.path_length <= num_tables)


def within_hops(questions: Questions, hops: int) -> torch.Tensor:
    """The rule that says yes when the two tables that the columns were picked from are at most `hops` tables apart:
    with 1 they share a column.

    Returns:
        `(B,)` of bool.
    """
    shared = neighbours(questions.columns).float()
    first, second = questions.query_tables.unbind(dim=1)
    rows = torch.arange(len(shared))
    reached = shared[rows, first]
    for _ in range(hops - 1):
        reached = (reached[:, None] @ shared).squeeze(1).clamp(max=1)
    return reached[rows, second] > 0

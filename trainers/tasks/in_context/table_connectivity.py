"""Are two columns connected? Tables share columns; does a chain of tables join the two that are asked for?"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub.dataclasses import strict

from ...errors import UserError
from .base import InContextTask
from .streams import BLOCK, Streams

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
# Tables whose set is one number.
BITS = 64


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


def hand_over(initial_columns: np.ndarray, writes: Iterable[Sequence[np.ndarray]]) -> np.ndarray:
    """Lets tables hand columns to later tables.

    Args:
        initial_columns: `(V, C, B)`.
        writes: blocks of five arrays of the same length: b, u, v, s and t with u < v: in the b-th set of tables, slot s
            of table v becomes what slot t of table u is then. The writes of a set come in order of u, so that a table
            is final before it hands anything over, and a later write replaces an earlier one.

    Returns:
        `(V, C, B)`.
    """
    num_tables, num_columns, batch_size = initial_columns.shape
    origins: np.ndarray = np.arange(initial_columns.size)
    for row, source, target, slot, source_slot in writes:
        # Of several values for one place, numpy keeps the last.
        origins[(target * num_columns + slot) * batch_size + row] = (
            source * num_columns + source_slot
        ) * batch_size + row
    origins = origins.reshape(initial_columns.shape)
    columns = initial_columns.copy()
    for table in range(1, num_tables):
        columns[table] = columns.take(origins[table])
    return columns


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


def adjacency(columns: np.ndarray, num_ids: int) -> np.ndarray:
    """Which tables hold a column in common, as sets: bit w of entry v stands for the tables v and w.

    Args:
        columns: `(V, C, B)`, ids in [0, num_ids), with V at most 64.

    Returns:
        `(V, B)` of the smallest unsigned type with V bits.
    """
    num_tables, _, batch_size = columns.shape
    places = columns * batch_size + np.arange(batch_size)
    holders = np.zeros(num_ids * batch_size, dtype=np.min_scalar_type(2**num_tables - 1))
    for table in range(num_tables):
        holders[places[table]] |= holders.dtype.type(1 << table)
    return np.bitwise_or.reduce(holders.take(places), axis=1)


def members(sets: np.ndarray, num_tables: int) -> np.ndarray:
    """Sets of tables, `(B,)`, entry by entry: `(V, B)` of the same type, 1 for members and 0 for others."""
    return sets >> np.arange(num_tables, dtype=sets.dtype)[:, None] & sets.dtype.type(1)


def closure(neighbours_of: np.ndarray) -> np.ndarray:
    """The tables that each one is connected to, as sets, from those it holds a column in common with (Warshall 1962).

    Args:
        neighbours_of: `(V, B)`, as from [`adjacency`].

    Returns:
        The same, `(V, B)`.
    """
    reached = neighbours_of.copy()
    one = reached.dtype.type(1)
    for table in range(len(reached)):
        reached |= (reached >> reached.dtype.type(table) & one) * reached[table]
    return reached


def search(columns: np.ndarray, query: np.ndarray, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Breadth first from the first column of each query: what [`distances`] says of the query, by sets of tables.

    Args:
        columns: `(V, C, B)`, ids in [0, num_ids), with V at most 64.
        query: `(2, B)`.

    Returns:
        `(B,)`, tables on the shortest path between the two columns, -1 if there is none; and `(V, B)` of bool, whether
        there is a path to each table.
    """
    num_tables = len(columns)
    neighbours_of = adjacency(columns, num_ids)
    number = np.arange(num_tables, dtype=neighbours_of.dtype)[:, None]
    held = (columns == query[:, None, None]).any(axis=2).astype(neighbours_of.dtype) << number
    reached, goal = np.bitwise_or.reduce(held, axis=1)
    length = np.where(query[0] == query[1], 0, UNREACHABLE)
    for tables_passed in range(1, num_tables + 1):
        length[(length == UNREACHABLE) & (reached & goal > 0)] = tables_passed
        further = reached | np.bitwise_or.reduce(members(reached, num_tables) * neighbours_of, axis=0)
        if np.array_equal(further, reached):
            break
        reached = further
    return length, members(reached, num_tables).astype(bool)


def choose(allowed: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """In each set of the batch one place where `allowed`, `(n, B)`, is positive, with probability in proportion to it.

    Args:
        uniform: `(B,)`, in [0, 1).
    """
    rank = (uniform * allowed.sum(axis=0, dtype=np.int64)).astype(np.int64)
    place, passed = np.zeros_like(rank), np.zeros_like(rank)
    # One after the other is far faster than a cumulative sum.
    for row in allowed[:-1]:
        passed += row
        place += passed <= rank
    return place


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
        self._pairs = np.triu_indices(self.options.num_tables, k=1)
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

    def graphs(self, streams: Streams) -> np.ndarray:
        """Random sets of tables, one for each stream: their final columns, `(V, C, B)`."""
        num_tables, num_columns = self.options.num_tables, self.options.num_columns
        ids = streams.subset(self.num_columns_named, num_tables * num_columns)
        initial_columns = np.ascontiguousarray(ids.T).reshape(num_tables, num_columns, len(streams))
        return hand_over(initial_columns, self._writes(streams))

    def _writes(self, streams: Streams) -> Iterator[Sequence[np.ndarray]]:
        """Random writes, as [`hand_over`] takes them."""
        source, target = self._pairs
        num_columns, low = np.uint64(self.options.num_columns), np.uint64(0xFFFF)
        bits = streams.bits(len(source)).reshape(-1)
        # Bits 32 to 63 decide whether a pair is drawn, 16 to 31 the slot of the source, 0 to 15 that of the target.
        limit = round(self.options.rho * 2**32) << 32
        for start in range(0, len(bits), BLOCK):
            block = bits[start : start + BLOCK]
            drawn = np.flatnonzero(block < np.uint64(limit)) if limit < 2**64 else np.arange(len(block))
            block = block[drawn]
            drawn += start
            row = drawn // len(source)
            drawn -= row * len(source)
            slot, source_slot = (
                ((block >> shift & low) * num_columns >> np.uint64(16)).astype(np.int64)
                for shift in (np.uint64(0), np.uint64(16))
            )
            yield row, source[drawn], target[drawn], slot, source_slot

    def questions(self, split: str, indices: Sequence[int]) -> Questions:
        """The graphs and questions with these indices.

        Raises:
            UserError: if no graph offers what the options ask for.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        # Of indices 2k and 2k + 1 one asks for a connected pair and the other does not.
        coins = self.streams(split, numbers // 2, "labels").integers(2)
        wanted = (coins ^ (numbers & 1)).astype(bool)
        shapes = (0,), (self.options.num_tables, self.options.num_columns, 0), (2, 0)
        done = [tuple(np.empty(shape, dtype=np.int64) for shape in shapes)]
        left, attempt = np.arange(len(numbers)), 0
        while len(left) > 0:
            drawn_in_vain = attempt * len(left) if len(left) == len(numbers) else 0
            if drawn_in_vain >= HOPELESS or attempt == MAX_ATTEMPTS:
                raise UserError(
                    f"task.options: {max(drawn_in_vain, attempt)} graphs with num_tables={self.options.num_tables}, "
                    f"num_columns={self.options.num_columns} and rho={self.options.rho} offer no pairs of both kinds"
                    + ("" if self.options.path_length is None else f" for path_length={self.options.path_length}")
                )
            # The fewer prompts are left, the more attempts are made for each at once.
            count = max(1, max(len(numbers) // 4, min(attempt, GRAPHS_AT_ONCE)) // len(left))
            count = min(count, MAX_ATTEMPTS - attempt)
            rows = left.repeat(count)
            attempts = attempt + np.tile(np.arange(count), len(left))
            streams = self.streams(split, numbers[rows] * MAX_ATTEMPTS + attempts, "graphs")
            drawn = self.graphs(streams)
            picked, kept = self._pick(drawn, wanted[rows], streams)
            kept = kept.reshape(len(left), count)
            chosen = np.arange(len(left)) * count + kept.argmax(axis=1)
            found = kept.any(axis=1)
            done.append((left[found], *(part.take(chosen[found], axis=-1) for part in (drawn, picked))))
            left, attempt = left[~found], attempt + count
        places, columns, slots = (np.concatenate(parts, axis=-1) for parts in zip(*done, strict=True))
        order = places.argsort()
        return self._answered(columns.take(order, axis=-1), slots.take(order, axis=-1))

    def _answered(self, columns: np.ndarray, slots: np.ndarray) -> Questions:
        """The questions for the columns in these slots, `(2, B)`, of tables with these columns, `(V, C, B)`."""
        query_tables = slots // self.options.num_columns
        query = columns[query_tables, slots - query_tables * self.options.num_columns, np.arange(slots.shape[1])]
        batch_first = torch.from_numpy(np.ascontiguousarray(columns.transpose(2, 0, 1)))
        if len(columns) <= BITS:
            length, reached = search(columns, query, self.num_columns_named)
            path_length, tables_connected = torch.from_numpy(length), torch.from_numpy(np.ascontiguousarray(reached.T))
        else:
            first, second = torch.from_numpy(query)
            to_tables, to_columns = distances(batch_first, first, self.num_columns_named)
            path_length = to_columns.gather(1, second[:, None]).squeeze(1)
            tables_connected = to_tables != UNREACHABLE
        return Questions(
            columns=batch_first,
            query=torch.from_numpy(np.ascontiguousarray(query.T)),
            query_tables=torch.from_numpy(np.ascontiguousarray(query_tables.T)),
            connected=path_length != UNREACHABLE,
            path_length=path_length,
            tables_connected=tables_connected,
        )

    def _components(self, columns: np.ndarray) -> np.ndarray:
        """Numbers, `(V, B)`, that are the same for tables in one component and differ otherwise."""
        if len(columns) > BITS:
            labels = components(torch.from_numpy(columns).permute(2, 0, 1), self.num_columns_named)
            return np.ascontiguousarray(labels.T.numpy())
        connected = closure(adjacency(columns, self.num_columns_named))
        # The set of the component's first table.
        return connected & -connected

    def _pick(self, columns: np.ndarray, wanted: np.ndarray, streams: Streams) -> tuple[np.ndarray, np.ndarray]:
        """Two slots to ask for, `(2, B)`, and whether the graph is kept, `(B,)`. What is kept depends on no label."""
        options = self.options
        num_tables, num_columns = options.num_tables, options.num_columns
        # For the first table, the second, and a slot of each.
        uniform = streams.uniform(4).T
        if options.path_length is not None or options.max_path_length is not None:
            first = (uniform[0] * num_tables * num_columns).astype(np.int64)
            batch_first = torch.from_numpy(columns).permute(2, 0, 1)
            flat = batch_first.flatten(1)
            start = flat.gather(1, torch.from_numpy(first)[:, None]).squeeze(1)
            _, to_columns = distances(batch_first, start, self.num_columns_named)
            lengths = to_columns.gather(1, flat).T.numpy()
            apart = lengths == UNREACHABLE
            if options.path_length is not None:
                near = lengths == options.path_length
            else:
                near = ~apart & (lengths <= options.max_path_length)
                near[first, np.arange(len(first))] = False
            second = choose(np.where(wanted, near, apart), uniform[1])
            return np.stack((first, second)), near.any(axis=0) & apart.any(axis=0)

        if not options.balanced:
            first = (uniform[0] * num_tables).astype(np.int64)
            second = (uniform[1] * (num_tables - 1)).astype(np.int64)
            second += second >= first
            kept = np.ones(len(first), dtype=bool)
        else:
            labels, rows = self._components(columns), np.arange(len(wanted))
            sizes = np.zeros(labels.shape, dtype=np.min_scalar_type(num_tables))
            for label in labels:
                sizes += labels == label
            kept = (sizes > 1).any(axis=0) & (sizes[0] < num_tables)
            first = choose(np.where(wanted, sizes - 1, num_tables - sizes), uniform[0])
            allowed = (labels == labels[first, rows]) == wanted
            allowed[first, rows] = False
            second = choose(allowed, uniform[1])
        within = (uniform[2:] * num_columns).astype(np.int64)
        return np.stack((first, second)) * num_columns + within, kept

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
            "input_values": self.names.index_select(0, ids.flatten()).view(*ids.shape, self.options.n_dims),
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

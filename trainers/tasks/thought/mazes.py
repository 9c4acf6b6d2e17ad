"""Mazes: the moves from start to goal, from a picture alone. Generated, or read from folders of PNG files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import networkx as nx
import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from transformers import BaseImageProcessor

from ...errors import UserError
from ..base import check_split
from .base import Cached, GeneratedTask, ThoughtExamples, ThoughtTask, ThoughtTaskArguments, check_at_least
from .images import plain_processor

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
WAIT = len(MOVES)
COLOURS = {
    "wall": (0, 0, 0),
    "free": (255, 255, 255),
    "start": (255, 0, 0),
    "goal": (0, 255, 0),
    "route": (0, 0, 255),
}
# A share of mazes for each split, by the hash of their walls.
SHARES = {"test": range(0, 1), "validation": range(1, 2), "train": range(2, 10)}
MOST_DRAWS = 10_000
# Names of a split's folder; the first is ours, the others are seen elsewhere.
FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


@strict
@dataclass(kw_only=True)
class MazeOptions:
    """Options of the maze task."""

    cells: int = field(default=5, metadata={"help": "Cells along a side; a picture has 2 cells + 1 pixels."})
    min_moves: int = field(default=2, metadata={"help": "Shortest route of a generated maze, in pixels."})
    max_moves: int | None = field(
        default=None, metadata={"help": "Longest route of a generated maze; by default as long as they come."}
    )
    route_length: int | None = field(
        default=None, metadata={"help": "Moves in an answer; by default max_moves, or what the largest maze can need."}
    )
    long_routes: Literal["refuse", "cut"] = field(
        default="refuse",
        metadata={"help": "What to do with a route of more moves than an answer has: an error, or its beginning only."},
    )
    num_train: int = field(default=50000, metadata={"help": "Generated training examples."})
    num_validation: int = field(default=1000, metadata={"help": "Generated validation examples."})
    num_test: int = field(default=1000, metadata={"help": "Generated test examples."})
    seed: int = field(default=0, metadata={"help": "Seed of the mazes; independent of the training seed."})

    def validate_ranges(self) -> None:
        check_at_least(
            self,
            cells=4,
            min_moves=2,
            max_moves=2,
            route_length=1,
            num_train=1,
            num_validation=1,
            num_test=1,
            seed=0,
        )
        if self.max_moves is not None and self.max_moves < self.min_moves:
            raise ValueError(f"max_moves is {self.max_moves}; it must be at least min_moves = {self.min_moves}")
        if self.min_moves > self.longest_moves:
            raise ValueError(f"min_moves is {self.min_moves}; {self.cells} cells give at most {self.longest_moves}")

    @property
    def longest_moves(self) -> int:
        """Moves of a route through every cell of a generated maze."""
        return 2 * (self.cells**2 - 1)


class Maze(NamedTuple):
    """
    A maze and the route through it.

    Args:
        free (`np.ndarray` of shape `(height, width)`): Which pixels are no wall.
        route (`np.ndarray` of shape `(moves + 1, 2)`): Row and column of each pixel of the way, start and goal
            included.
    """

    free: np.ndarray
    route: np.ndarray

    @property
    def moves(self) -> np.ndarray:
        """The moves of the route, as numbers of `MOVES`, of shape `(moves,)`."""
        steps = list(MOVES.values())
        return np.array([steps.index(tuple(step)) for step in np.diff(self.route, axis=0).tolist()], dtype=np.int64)

    def picture(self, with_route: bool = False) -> np.ndarray:
        """The image in `COLOURS`, uint8 of shape `(height, width, 3)`; the route is painted if that is asked for."""
        image = np.where(self.free[..., None], np.uint8(255), np.uint8(0)) * np.ones(3, dtype=np.uint8)
        if with_route:
            image[tuple(self.route.T)] = COLOURS["route"]
        image[tuple(self.route[0])], image[tuple(self.route[-1])] = COLOURS["start"], COLOURS["goal"]
        return image

    def walk(self, moves: Iterable[int]) -> list[tuple[int, int]]:
        """Pixels visited from the start by the moves, until the first wait or step into a wall."""
        here = tuple(self.route[0].tolist())
        visited = [here]
        steps = list(MOVES.values())
        for move in moves:
            if move == WAIT:
                break
            here = (here[0] + steps[move][0], here[1] + steps[move][1])
            if not (0 <= here[0] < self.free.shape[0] and 0 <= here[1] < self.free.shape[1] and self.free[here]):
                break
            visited.append(here)
        return visited


def draw_maze(cells: int, rng: np.random.Generator, min_moves: int, max_moves: int, share: range | None = None) -> Maze:
    """
    Draw a maze without loops: a minimum spanning tree of the grid of cells under random weights, and two of its cells.

    Args:
        cells: cells along a side.
        rng: source of randomness.
        min_moves, max_moves: bounds on the length of the route in pixels, two for each step between cells.
        share: which tenths of all mazes, by a hash of their walls, may be drawn; default all.

    Raises:
        ValueError: if no such maze is found.
    """
    grid = nx.grid_2d_graph(cells, cells)
    side = 2 * cells + 1
    for _ in range(MOST_DRAWS):
        nx.set_edge_attributes(grid, dict(zip(grid.edges, rng.random(grid.number_of_edges()), strict=True)), "weight")
        tree = nx.Graph(nx.minimum_spanning_edges(grid, data=False))
        free = np.zeros((side, side), dtype=bool)
        free[1::2, 1::2] = True
        for (row, column), (other_row, other_column) in tree.edges:
            free[row + other_row + 1, column + other_column + 1] = True
        if share is not None and hashlib.sha256(np.packbits(free).tobytes()).digest()[0] % 10 not in share:
            continue
        for start in rng.permutation(cells * cells):
            paths = nx.single_source_shortest_path(tree, divmod(int(start), cells))
            fitting = [path for _, path in sorted(paths.items()) if min_moves <= 2 * (len(path) - 1) <= max_moves]
            if fitting:
                corners = 2 * np.array(fitting[rng.integers(len(fitting))]) + 1
                route = np.empty((2 * len(corners) - 1, 2), dtype=np.int64)
                route[::2], route[1::2] = corners, (corners[:-1] + corners[1:]) // 2
                return Maze(free, route)
    raise ValueError(f"found no maze with a route of {min_moves} to {max_moves} moves in {MOST_DRAWS:,} draws")


def read_maze(image: np.ndarray) -> Maze:
    """
    Read a maze from its picture: black walls, one red start, one green goal, the route between them blue, else white.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): The picture, uint8.

    Raises:
        ValueError: if it is no such picture; the message states the rule that is broken.
    """
    found = {name: (image == np.array(colour)).all(axis=-1) for name, colour in COLOURS.items()}
    known = np.logical_or.reduce(list(found.values()))
    if not known.all():
        row, column = np.argwhere(~known)[0]
        raise ValueError(
            f"the pixel in row {row}, column {column} is {tuple(image[row, column].tolist())}; a maze has only black, "
            "white, red, green and blue"
        )
    ends = {}
    for name, colour in (("start", "red"), ("goal", "green")):
        places = np.argwhere(found[name])
        if len(places) != 1:
            raise ValueError(f"{len(places)} {colour} pixels; a maze has one, its {name}")
        ends[name] = tuple(places[0].tolist())
    way = nx.Graph()
    on_route = {tuple(place) for name in ("start", "goal", "route") for place in np.argwhere(found[name]).tolist()}
    way.add_nodes_from(on_route)
    for row, column in on_route:
        way.add_edges_from(((row, column), near) for near in ((row + 1, column), (row, column + 1)) if near in on_route)
    try:
        route = nx.shortest_path(way, ends["start"], ends["goal"])
    except nx.NetworkXNoPath as error:
        raise ValueError("no blue route leads from the red start to the green goal") from error
    return Maze(~found["wall"], np.array(route, dtype=np.int64))


class Mazes(GeneratedTask):
    """
    Pictures of mazes, and the moves from start to goal: up, down, left, right, and wait once the goal is reached
    (Darlow et al., "Continuous Thought Machines", arXiv 2505.05522; its maze task). The picture has black walls, white
    ways, a red start and a green goal; its values are brought to [-1, 1]. An answer is right if all of its moves are,
    the waiting included.

    Generated mazes are minimum spanning trees of a grid under random weights: there is one way between any two cells.
    A hash of the walls decides the split, so the test's mazes occur in training neither with these ends nor with
    others. With `data_dir`, mazes are read from PNG files below its folders `train`, `test` and, if there is one,
    `validation`, in the same colours with the route in blue, as the paper's are. The difficulty is the number of moves.
    """

    name = "mazes"
    options_class = MazeOptions
    head = "token"
    refused = ("hub_id", "hub_config", "hub_revision")

    def __init__(self, arguments: ThoughtTaskArguments):
        super().__init__(arguments)
        options = self.options
        self.max_moves = options.max_moves or options.longest_moves
        if options.route_length is None:
            options.route_length = self.arguments.options["route_length"] = self.max_moves
        if self.arguments.data_dir is None and options.long_routes == "refuse" and self.max_moves > self.num_positions:
            raise UserError(
                f"task.options: routes of up to {self.max_moves} moves do not fit route_length = {self.num_positions}; "
                "set max_moves, or long_routes: cut"
            )
        self._files: dict[str, list[Path]] | None = None

    @property
    def license(self) -> str:  # type: ignore[override]
        return GeneratedTask.license if self.arguments.data_dir is None else "as the source of the files states it"

    @property
    def source(self) -> str:
        if self.arguments.data_dir is not None:
            return "local PNG files of mazes"
        options = self.options
        return (
            f"generated: mazes of {options.cells} by {options.cells} cells, {options.min_moves} to {self.max_moves} "
            f"moves, seed {options.seed}"
        )

    @property
    def classes(self) -> list[str]:
        return [*MOVES, "wait"]

    @property
    def num_positions(self) -> int:
        return self.options.route_length

    def image_processor(self) -> BaseImageProcessor:
        return plain_processor()

    def examples(self, split: str) -> "MazeExamples":
        check_split(split)
        if self.arguments.data_dir is None:
            names = [f"{split}-{index}" for index in range(self.size(split))]
            return MazeExamples(self, names, lambda index: self.maze(split, index))
        files = self._chosen_files()[split]
        root = Path(self.arguments.data_dir).expanduser()
        examples = MazeExamples(
            self, [file.relative_to(root).as_posix() for file in files], lambda index: self._read(files[index])
        )
        shapes = {examples.maze(index).free.shape: files[index] for index in range(len(examples))}
        if len(shapes) > 1:
            (size, file), (other_size, other) = list(shapes.items())[:2]
            raise UserError(
                f"{other}: the picture has {other_size[0]}x{other_size[1]} pixels, {file} has {size[0]}x{size[1]}; all "
                "mazes must be of one size"
            )
        return examples

    def maze(self, split: str, index: int) -> Maze:
        """The maze behind a generated example, a function of the options, split and index."""
        options = self.options
        rng = np.random.default_rng([options.seed, list(SHARES).index(split), index])
        try:
            return draw_maze(options.cells, rng, options.min_moves, self.max_moves, SHARES[split])
        except ValueError as error:
            raise UserError(f"task.options: {error}") from error

    def moves(self, maze: Maze) -> np.ndarray:
        """The answer: the moves of the route and then waiting, of shape `(route_length,)`."""
        moves = maze.moves[: self.num_positions]
        return np.concatenate((moves, np.full(self.num_positions - len(moves), WAIT, dtype=np.int64)))

    def extra_scores(self, classes: np.ndarray, labels: np.ndarray) -> dict[str, bool]:
        """`reaches_goal`: all moves up to the goal are right, whatever follows."""
        on_the_way = labels != WAIT
        return {"reaches_goal": bool((classes == labels)[on_the_way].all())}

    def fingerprint_rows(self, splits: dict[str, ThoughtExamples]) -> Iterator[Any]:
        from_files = self.arguments.data_dir is not None
        return ThoughtTask.fingerprint_rows(self, splits) if from_files else super().fingerprint_rows(splits)

    def _read(self, file: Path) -> Maze:
        try:
            with Image.open(file) as image:
                maze = read_maze(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, SyntaxError) as error:  # the last by the decoder of PNG
            raise UserError(f"{file}: {' '.join(str(error).split())}") from error
        moves = len(maze.route) - 1
        if moves > self.num_positions and self.options.long_routes == "refuse":
            raise UserError(
                f"{file}: the route has {moves} moves, task.options route_length is {self.num_positions}; raise it, or "
                "set long_routes: cut"
            )
        return maze

    def _chosen_files(self) -> dict[str, list[Path]]:
        """The files of each split; a training maze that is also in a later split is dropped."""
        if self._files is not None:
            return self._files
        root = Path(str(self.arguments.data_dir)).expanduser()
        found: dict[str, list[Path]] = {}
        for split, names in FOLDERS.items():
            folder = next((root / name for name in names if (root / name).is_dir()), None)
            found[split] = sorted(folder.rglob("*.png")) if folder is not None else []
            if not found[split] and split != "validation":
                raise UserError(f"task.data_dir: {root} has no folder {names[0]!r} with PNG files")
        keys = {file: hashlib.sha256(file.read_bytes()).hexdigest() for files in found.values() for file in files}
        seed = self.arguments.split_seed

        def rank(file: Path) -> float:
            """A number in [0, 1) that depends on the picture and the seed alone."""
            return int(hashlib.sha256(f"{seed}:{keys[file]}".encode()).hexdigest()[:12], 16) / 16**12

        in_test = {keys[file] for file in found["test"]}
        found["train"] = [file for file in found["train"] if keys[file] not in in_test]
        if found["validation"]:
            found["validation"] = [file for file in found["validation"] if keys[file] not in in_test]
            later = {keys[file] for file in found["validation"]}
            found["train"] = [file for file in found["train"] if keys[file] not in later]
        else:
            fraction = self.arguments.validation_fraction
            found["validation"] = [file for file in found["train"] if rank(file) < fraction]
            found["train"] = [file for file in found["train"] if rank(file) >= fraction]
        for split, files in found.items():
            if not files:
                raise UserError(f"task.data_dir: {root} leaves no mazes for {split}")
            most = self.arguments.max_samples(split)
            if most is not None:
                chosen = set(sorted(files, key=rank)[:most])
                found[split] = [file for file in files if file in chosen]
        self._files = found
        return found


class MazeExamples(Cached):
    """Mazes of one split."""

    def __init__(self, task: Mazes, names: Sequence[str], make: Callable[[int], Maze]):
        super().__init__(len(names), make)
        self.task, self.names = task, names

    def maze(self, index: int) -> Maze:
        """The maze of an example."""
        return self.compact(index)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = torch.from_numpy(self.maze(index).picture()).permute(2, 0, 1)
        return {"pixel_values": picture.float() / 127.5 - 1, "labels": torch.from_numpy(self.labels(index))}

    def labels(self, index: int) -> np.ndarray:
        return self.task.moves(self.maze(index))

    def identity(self, index: int) -> str:
        return self.names[index]

    def difficulty(self, index: int) -> int:
        return len(self.maze(index).route) - 1

    def picture(self, index: int) -> np.ndarray:
        return self.maze(index).picture()

"""The tasks of models that think in ticks: one file per task, all behind one interface.

| name | data | input -> answer |
|---|---|---|
| `parity` | generated | signs -> parity of the -1 up to each position |
| `mazes` | generated, or PNG files | picture -> moves from start to goal |
| `images` | any image data set of the Hub, or a folder | picture -> class |
| `digits` | with scikit-learn | picture of 8 by 8 pixels -> digit |
| `sorting` | generated | numbers -> their indices in ascending order, spelt over the ticks |
"""

from ...errors import UserError, did_you_mean
from .base import ThoughtExamples, ThoughtTask, ThoughtTaskArguments
from .images import Digits, Images
from .mazes import Maze, MazeExamples, Mazes, draw_maze, read_maze
from .parity import Parity
from .sorting import Sorting

THOUGHT_TASKS: dict[str, type[ThoughtTask]] = {task.name: task for task in (Parity, Mazes, Images, Digits, Sorting)}


def get_thought_task(arguments: ThoughtTaskArguments) -> ThoughtTask:
    """Build the task that `arguments.name` names. Reads no data yet.

    Raises:
        UserError: for an unknown name, an unknown option, or an argument that the task cannot take.
    """
    if arguments.name not in THOUGHT_TASKS:
        raise UserError(
            f"task.name: unknown task {arguments.name!r}{did_you_mean(arguments.name, list(THOUGHT_TASKS))}; known "
            f"tasks: {', '.join(THOUGHT_TASKS)}"
        )
    return THOUGHT_TASKS[arguments.name](arguments)


__all__ = [
    "THOUGHT_TASKS",
    "Digits",
    "Images",
    "Maze",
    "MazeExamples",
    "Mazes",
    "Parity",
    "Sorting",
    "ThoughtExamples",
    "ThoughtTask",
    "ThoughtTaskArguments",
    "draw_maze",
    "get_thought_task",
    "read_maze",
]

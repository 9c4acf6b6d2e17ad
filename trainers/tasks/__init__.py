"""The tasks that models are trained and measured on: one file per task, all behind one interface.

| name | data | prompt -> target | metric |
|---|---|---|---|
| `strategyqa` | StrategyQA | question -> "Yes" or "No" | accuracy |
| `logiqa` | LogiQA | context, question, options -> letter | accuracy |
| `gsm8k` | GSM8K | problem -> number, or worked solution and number | accuracy |
| `commonsenseqa` | CommonsenseQA | question, options -> letter | accuracy |
| `arc_easy`, `arc_challenge` | ARC | question, options -> letter | accuracy |
| `multinli` | MultiNLI | premise, hypothesis -> label | accuracy |
| `commongen` | CommonGen | concepts -> sentence | ROUGE-L |
| `eli5` | ELI5 | question -> long answer | ROUGE-L |
| `pointer_chase` | generated | number of hops, start, function table -> end of the chase | accuracy |
| `flood_fill` | generated | map with walls and a start -> which cells can be reached | accuracy |
| `columns` | any | named columns -> answer | exact match, number, choice or ROUGE-L |
| `mixture` | several of these | theirs | theirs |
| a path ending in `.py` | a task of your own | see README.md in this folder | |
"""

import functools
import importlib.util
import inspect
from pathlib import Path

from ..errors import UserError, did_you_mean
from .arc import ARCChallenge, ARCEasy
from .base import Example, Score, SplitReport, Task, TaskArguments, TrivialPredictor
from .columns import Columns
from .commongen import CommonGen
from .commonsenseqa import CommonsenseQA
from .eli5 import ELI5
from .flood_fill import FloodFill
from .gsm8k import GSM8K
from .loading import Row, StoredTask
from .logiqa import LogiQA
from .mixture import Mixture
from .multinli import MultiNLI
from .pointer_chase import PointerChase
from .strategyqa import StrategyQA

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        StrategyQA,
        LogiQA,
        GSM8K,
        CommonsenseQA,
        ARCEasy,
        ARCChallenge,
        MultiNLI,
        CommonGen,
        ELI5,
        PointerChase,
        FloodFill,
        Columns,
        Mixture,
    )
}


def get_task(arguments: TaskArguments) -> Task:
    """Build the task that `arguments.name` names. Reads no data yet.

    Raises:
        UserError: for an unknown name, an unknown option, or an argument that the task cannot take.
    """
    if arguments.name.endswith(".py"):
        return task_of_file(Path(arguments.name).expanduser())(arguments)
    if arguments.name not in TASKS:
        raise UserError(
            f"task.name: unknown task {arguments.name!r}{did_you_mean(arguments.name, list(TASKS))}; "
            f"known tasks: {', '.join(TASKS)}"
        )
    if arguments.name == Mixture.name:
        return Mixture(arguments, get_task)
    return TASKS[arguments.name](arguments)


@functools.cache
def task_of_file(path: Path) -> type[Task]:
    """The one task that a Python file defines; running the file is what finds it.

    Raises:
        UserError: if the file does not exist, fails, or does not define exactly one subclass of [`Task`] with a name.
    """
    if not path.is_file():
        raise UserError(f"task.name: {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        reason = " ".join(str(error).split())
        raise UserError(f"task.name: {path} fails: {type(error).__name__}: {reason}") from error
    tasks = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    tasks = [task for task in tasks if not inspect.isabstract(task) and isinstance(getattr(task, "name", None), str)]
    if len(tasks) != 1:
        found = ", ".join(task.__name__ for task in tasks) or "none"
        raise UserError(f"task.name: {path} must define one task with a name and all methods; it has {found}")
    return tasks[0]


__all__ = [
    "ELI5",
    "GSM8K",
    "TASKS",
    "ARCChallenge",
    "ARCEasy",
    "Columns",
    "CommonGen",
    "CommonsenseQA",
    "Example",
    "FloodFill",
    "LogiQA",
    "Mixture",
    "MultiNLI",
    "PointerChase",
    "Row",
    "Score",
    "SplitReport",
    "StoredTask",
    "StrategyQA",
    "Task",
    "TaskArguments",
    "TrivialPredictor",
    "get_task",
]

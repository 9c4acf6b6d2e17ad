"""Tasks of in-context learning: prompts of numbers, generated on the fly.

| name | prompt -> target |
|---|---|
| `table_connectivity` | tables with columns, two columns -> whether shared columns connect them |
| `linear_regression` and the other function classes | x_1, f(x_1), ..., x -> f(x) |
"""

import dataclasses

from ...errors import UserError, did_you_mean
from .base import GeneratedPrompts, InContextTask, InContextTaskArguments
from .baselines import BASELINES, Baseline
from .curriculum import Curriculum, CurriculumPrompts, Schedule
from .function_classes import FUNCTION_CLASSES, FunctionClass
from .prompts import CHANGES, Prompts, make_prompts
from .table_connectivity import TableConnectivity

IN_CONTEXT_TASKS: dict[str, type[InContextTask]] = {TableConnectivity.name: TableConnectivity, **FUNCTION_CLASSES}


def get_in_context_task(arguments: InContextTaskArguments) -> InContextTask:
    """Build the task that `arguments.name` names.

    Raises:
        UserError: for an unknown name, an unknown option, or a value that breaks a rule.
    """
    if arguments.name not in IN_CONTEXT_TASKS:
        raise UserError(
            f"task.name: unknown task {arguments.name!r}{did_you_mean(arguments.name, list(IN_CONTEXT_TASKS))}; known "
            f"tasks: {', '.join(IN_CONTEXT_TASKS)}"
        )
    task = IN_CONTEXT_TASKS[arguments.name](arguments.options, arguments.prompts_seed)
    Curriculum.read(arguments.curriculum, task)
    task.arguments = dataclasses.replace(arguments, options=dataclasses.asdict(task.options))
    return task


__all__ = [
    "BASELINES",
    "CHANGES",
    "FUNCTION_CLASSES",
    "IN_CONTEXT_TASKS",
    "Baseline",
    "Curriculum",
    "CurriculumPrompts",
    "FunctionClass",
    "GeneratedPrompts",
    "InContextTask",
    "InContextTaskArguments",
    "Prompts",
    "Schedule",
    "TableConnectivity",
    "get_in_context_task",
    "make_prompts",
]

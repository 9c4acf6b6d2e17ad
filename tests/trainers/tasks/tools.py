"""What the tests of tasks share."""

from pathlib import Path

from trainers.tasks import TASKS, StoredTask, Task, TaskArguments, get_task

DATA = Path(__file__).parents[2] / "data"
FOLDERS = {"arc_easy": "arc", "arc_challenge": "arc", "columns": "commonsenseqa"}
COLUMNS = {
    "answer": "answerKey",
    "options": "choices.text",
    "labels": "choices.label",
    "metric": "choice",
    "splits": {"test": "validation", "validation": "held_out"},
}


def make_task(name: str, **arguments) -> Task:
    """A task on the small local files, unless `data_dir` says otherwise."""
    if issubclass(TASKS[name], StoredTask):
        arguments.setdefault("data_dir", str(DATA / FOLDERS.get(name, name)))
    return get_task(TaskArguments(name=name, **arguments))

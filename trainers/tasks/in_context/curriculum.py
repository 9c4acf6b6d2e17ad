"""A curriculum: tasks that grow with training, as a pure function of the update step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ...errors import UserError, did_you_mean
from .base import InContextTask

SCHEDULE_FIELDS = ("start", "increment", "interval")


@dataclass(frozen=True)
class Schedule:
    """One variable's way from a first to a last value (Garg et al. 2022, arXiv:2208.01066, appendix A.2).

    Attributes:
        start: value at step 0.
        end: value that is kept once it is reached: the task's own option.
        increment: what is added every `interval` update steps; negative if `end` lies below `start`.
        interval: update steps between two changes.
    """

    start: float | int
    end: float | int
    increment: float | int
    interval: int

    def at(self, step: int) -> float | int:
        """The value at an update step."""
        value = self.start + step // self.interval * self.increment
        return min(self.end, value) if self.increment > 0 else max(self.end, value)


class Curriculum:
    """The values that a task's options take in the course of training.

    Args:
        schedules: variable -> its [`Schedule`].
    """

    def __init__(self, schedules: Mapping[str, Schedule]):
        self.schedules = dict(schedules)

    @classmethod
    def read(cls, values: Mapping[str, Any], task: InContextTask) -> "Curriculum":
        """A curriculum as a recipe writes it: `{n_dims: {start: 5, increment: 1, interval: 2000}}`.

        Every variable ends at the task's own option.

        Raises:
            UserError: for an unknown variable or field, or values that the task does not take or that never arrive.
        """
        schedules = {}
        for name, fields in values.items():
            place = f"task.curriculum.{name}"
            if name not in task.curriculum_variables:
                raise UserError(
                    f"{place}: unknown variable{did_you_mean(name, task.curriculum_variables)}; {task.name} has "
                    f"{', '.join(task.curriculum_variables)}"
                )
            if not isinstance(fields, Mapping) or set(fields) != set(SCHEDULE_FIELDS):
                raise UserError(f"{place}: must be a mapping with the fields {', '.join(SCHEDULE_FIELDS)}")
            end = getattr(task.options, name)
            if end is None:
                raise UserError(f"{place}: the last value is task.options.{name}, which is not set")
            for field in SCHEDULE_FIELDS:
                takes_fractions = isinstance(end, float) and field != "interval"
                number = fields[field]
                if isinstance(number, bool) or not isinstance(number, (int, float) if takes_fractions else int):
                    kind = "a number" if takes_fractions else "a whole number"
                    raise UserError(f"{place}.{field}: must be {kind}, got {number!r}")
            schedule = Schedule(fields["start"], end, fields["increment"], fields["interval"])
            if schedule.interval < 1:
                raise UserError(f"{place}.interval is {schedule.interval}; it must be at least 1")
            if schedule.increment == 0 or (schedule.end - schedule.start) * schedule.increment < 0:
                raise UserError(
                    f"{place}: an increment of {schedule.increment} never leads from start={schedule.start} to "
                    f"task.options.{name}={end}"
                )
            schedules[name] = schedule
        curriculum = cls(schedules)
        if schedules:
            try:
                task.check_stage(**curriculum.at(0))
            except UserError as error:
                raise UserError(f"task.curriculum: at the start: {error}") from error
        return curriculum

    def at(self, step: int) -> dict[str, float | int]:
        """The value of every variable at an update step."""
        return {name: schedule.at(step) for name, schedule in self.schedules.items()}

    @property
    def length(self) -> int:
        """Update steps after which nothing changes any more."""
        return max(
            (
                math.ceil(round((schedule.end - schedule.start) / schedule.increment, 9)) * schedule.interval
                for schedule in self.schedules.values()
            ),
            default=0,
        )


class CurriculumPrompts(Dataset):
    """The training prompts of a whole run, in the order in which they are used.

    Prompt `i` belongs to update step `i // prompts_per_update`, which decides the curriculum's values. So a prompt
    depends on its index alone: a resumed run, a data loader that reads ahead and several processes all see the same.

    Args:
        task: where the prompts come from.
        curriculum: the values of its variables.
        prompts_per_update: prompts of all processes and micro-batches in one update.
        num_updates: update steps of the run.
    """

    def __init__(self, task: InContextTask, curriculum: Curriculum, prompts_per_update: int, num_updates: int):
        self.task, self.curriculum = task, curriculum
        self.prompts_per_update, self.num_updates = prompts_per_update, num_updates

    def __len__(self) -> int:
        return self.prompts_per_update * self.num_updates

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        prompts: list[dict[str, torch.Tensor]] = []
        start = 0
        while start < len(indices):
            stage = self.curriculum.at(indices[start] // self.prompts_per_update)
            end = start + 1
            while end < len(indices) and self.curriculum.at(indices[end] // self.prompts_per_update) == stage:
                end += 1
            batch = self.task.batch("train", indices[start:end], **stage)
            prompts += [{name: values[row] for name, values in batch.items()} for row in range(end - start)]
            start = end
        return prompts

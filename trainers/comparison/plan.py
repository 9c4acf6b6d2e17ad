"""What a comparison recipe says, checked, and the cells it stands for.

    models:
      connection: {recipe: ../connection_transformer/strategyqa/small.yaml}
      vanilla: {matched_to: connection, model: {model_type: vanilla_transformer}}
    tasks:
      strategyqa: {recipe: ../connection_transformer/strategyqa/small.yaml}
    seeds: [0, 1, 2, 3, 4]
    training: {max_steps: 500}

A cell's recipe is put together from the task's entry (its `recipe` without the model, then its own sections) and the
sections that all share, the model's entry, and the seed. Everything but the model is the same for all models: data,
their order, budget, batch, schedule. A model may only bring settings of its own that cost no budget (`TUNABLE`), and
answers of a teacher to learn from (`TEACHING`), which the report then says.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub.dataclasses import strict

from ..arguments import kind_of, load_yaml, merge, user_errors_from_validation
from ..errors import UserError, did_you_mean
from ..recipe_files import named_recipe, read_yaml
from ..tasks.base import SPLITS
from .cells import Cell

# Training settings in which models of one comparison may differ.
TUNABLE = (
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "step_cost_start",
    "step_cost_ramp",
)
# What a model may learn in the place of a task's gold targets.
TEACHING = ("teacher_answers", "teacher_filter")
# Fewer runs than this say too little about the chance of training for a verdict.
LEAST_SEEDS = 5
DEBUG_SEEDS, DEBUG_STEPS, DEBUG_SAMPLES = 2, 2, 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@strict
@dataclass(kw_only=True)
class ModelEntry:
    """A model of the comparison.

    Attributes:
        recipe: a training recipe whose `model` section it takes.
        matched_to: another model of the comparison; sizes are solved so that both have as many trainable parameters.
        model: fields of the configuration, over those of `recipe`.
        training: settings of its own, of those in `TUNABLE`.
        task: answers of a teacher that it learns from, by the fields in `TEACHING`.
        tasks: the tasks it takes part in; all by default.
    """

    recipe: str | None = None
    matched_to: str | None = None
    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)
    tasks: list[str] | None = None


@strict
@dataclass(kw_only=True)
class TaskEntry:
    """A task of the comparison: sections of a recipe, over those of `recipe`.

    Attributes:
        model: fields of the configuration for all models, below those of a model's own entry.
        models: by model, fields for this task, above all others.
    """

    recipe: str | None = None
    model: dict = field(default_factory=dict)
    models: dict = field(default_factory=dict)
    task: dict = field(default_factory=dict)
    tokenizer: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)


@strict
@dataclass(kw_only=True)
class Others:
    """Numbers that others published or claimed; they stand beside the measured ones and are never compared with them.

    Attributes:
        source: who says so, and where.
        url: its address.
        note: what is known about how the numbers came about.
        results: name of a model -> score by task; a name of its own for a task is fine.
    """

    source: str
    url: str | None = None
    note: str | None = None
    results: dict


@strict
@dataclass(kw_only=True)
class Plan:
    """A comparison.

    Attributes:
        models: name -> entry, in the order of tables.
        tasks: name -> entry.
        seeds: of training; each gives one run of every model on every task.
        against: the model the others are compared with; the last one by default.
        train_sizes: train also on so many examples, for the learning curve over data; `max_train_samples` or all
            examples is always run.
        tokenizer, training, evaluation: for all cells.
        parameters: `matched` refuses models whose trainable parameters differ by more than `tolerance`; `free` states
            the difference. Only text models built from a configuration are counted before training; the report marks
            the others that are not matched.
        tolerance: largest relative difference in trainable parameters.
        confidence: level of intervals; 1 minus it is the level of the tests.
        resamples: bootstrap samples and permutations.
        difference: a difference worth finding, in the score's unit, for the numbers of seeds in the report.
        keep_checkpoints: leave the checkpoints of finished runs.
        published, claimed: numbers of others, measured by them or only stated.
    """

    models: dict
    tasks: dict
    seeds: list[int] = field(default_factory=lambda: list(range(LEAST_SEEDS)))
    against: str | None = None
    train_sizes: list[int] = field(default_factory=list)
    tokenizer: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    parameters: Literal["matched", "free"] = "matched"
    tolerance: float | int = 0.01
    confidence: float | int = 0.95
    resamples: int = 4000
    difference: float | int = 0.05
    keep_checkpoints: bool = False
    published: list[dict] = field(default_factory=list)
    claimed: list[dict] = field(default_factory=list)

    def validate_ranges(self) -> None:
        if not self.models or not self.tasks:
            raise ValueError("a comparison needs models and tasks")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; it must name different numbers that are not negative")
        if any(size < 1 for size in self.train_sizes) or len(set(self.train_sizes)) != len(self.train_sizes):
            raise ValueError(f"train_sizes is {self.train_sizes}; it must name different numbers of at least 1")
        for name in ("tolerance", "difference"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in (0, 1]")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; it must lie between 0 and 1")
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 100")


T = TypeVar("T")


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping of a recipe.

    Raises:
        UserError: for what is no mapping, an unknown or missing field, or a value that breaks a rule.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a mapping of field names to values, got {values!r}")
    fields = {option.name: option for option in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown field {name!r}{did_you_mean(str(name), fields)}")
    for name, option in fields.items():
        required = option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: {name} is missing")
    with user_errors_from_validation(where):
        return cls(**values)


@dataclass
class Comparison:
    """A plan with its entries built and its recipes found.

    Attributes:
        name: of the file it came from.
        plan: as read.
        models, tasks: built entries.
        published, claimed: numbers of others.
        model_sections: of each model, the `model` section of its recipe; empty for one without.
        task_sections: of each task, the sections of its recipe; empty for one without.
    """

    name: str
    plan: Plan
    models: dict[str, ModelEntry]
    tasks: dict[str, TaskEntry]
    published: list[Others]
    claimed: list[Others]
    model_sections: dict[str, dict[str, Any]]
    task_sections: dict[str, dict[str, dict[str, Any]]]

    @property
    def against(self) -> str:
        return self.plan.against or list(self.models)[-1]

    @property
    def sizes(self) -> list[int | None]:
        """Training sizes, small ones first; `None`, all examples of the task's entry, last."""
        return [*sorted(self.plan.train_sizes), None]

    def takes_part(self, model: str, task: str) -> bool:
        tasks = self.models[model].tasks
        return tasks is None or task in tasks

    def recipe(self, model: str, task: str, size: int | None, seed: int) -> dict[str, dict[str, Any]]:
        """The sections of one cell's recipe."""
        sections = self.task_sections[task]
        common = {name: content for name, content in sections.items() if name != "model"}
        for name in ("tokenizer", "training", "evaluation"):
            shared = merge(getattr(self.plan, name), getattr(self.tasks[task], name))
            if shared:
                common[name] = merge(common.get(name, {}), shared)
        common["task"] = merge(common.get("task", {}), self.tasks[task].task)
        if size is not None:
            common["task"]["max_train_samples"] = size
        own = self.models[model]
        common["task"] |= own.task
        common["training"] = merge(common.get("training", {}), own.training) | {"seed": seed, "disable_tqdm": True}
        entry = self.tasks[task]
        fields = merge(merge(self.model_sections[model], entry.model), own.model)
        return {"model": merge(fields, entry.models.get(model) or {}), **common}

    def cell_name(self, model: str, task: str, size: int | None, seed: int) -> str:
        return f"{task if size is None else f'{task}@{size}'}/{model}/seed-{seed}"

    def cells(self) -> dict[tuple[str, str, int | None, int], Cell]:
        """(model, task, training size, seed) -> cell. Seeds change slowest, so that a part already is a comparison."""
        found = {}
        for seed in self.plan.seeds:
            for task in self.tasks:
                for size in self.sizes:
                    for model in self.models:
                        if self.takes_part(model, task):
                            key = (model, task, size, seed)
                            name = self.cell_name(*key)
                            found[key] = Cell(name, self.recipe(*key), group=(task, str(size), model))
        return found


def read_comparison(path: Path) -> Comparison:
    """Read and check a comparison recipe and the recipes it names.

    Raises:
        UserError: naming the file and field.
    """
    values = read_yaml(path)
    plan = build(Plan, values, str(path))
    models = {name: build(ModelEntry, entry, f"{path}: models.{name}") for name, entry in plan.models.items()}
    tasks = {name: build(TaskEntry, entry or {}, f"{path}: tasks.{name}") for name, entry in plan.tasks.items()}
    for what, names in (("models", models), ("tasks", tasks)):
        for name in names:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UserError(f"{path}: {what}: {name!r} names a folder: letters, digits, '_', '.' and '-' only")
    if plan.against is not None and plan.against not in models:
        raise UserError(f"{path}: against: no model {plan.against!r}{did_you_mean(plan.against, models)}")
    for name, task in tasks.items():
        for model_name in task.models:
            if model_name not in models:
                raise UserError(
                    f"{path}: tasks.{name}.models: no model {model_name!r}{did_you_mean(model_name, models)}"
                )
    for name, model in models.items():
        for field_name in model.training:
            if field_name not in TUNABLE:
                raise UserError(
                    f"{path}: models.{name}.training.{field_name}: all models train with the same budget and data; "
                    f"a model may set {', '.join(TUNABLE)}"
                )
        for field_name in model.task:
            if field_name not in TEACHING:
                raise UserError(
                    f"{path}: models.{name}.task.{field_name}: all models have the same task; a model may set "
                    f"{', '.join(TEACHING)}"
                )
        for wanted in model.tasks or ():
            if wanted not in tasks:
                raise UserError(f"{path}: models.{name}.tasks: no task {wanted!r}{did_you_mean(str(wanted), tasks)}")
        matched = model.matched_to
        if matched is not None:
            if matched not in models or matched == name:
                raise UserError(f"{path}: models.{name}.matched_to: no other model {matched!r}")
            if models[matched].matched_to is not None:
                raise UserError(f"{path}: models.{name}.matched_to: {matched} is itself matched to another model")

    def sections_of(what: str, entry: ModelEntry | TaskEntry) -> dict[str, dict[str, Any]]:
        return load_yaml(named_recipe(path, f"{what}.recipe", entry.recipe)) if entry.recipe else {}

    model_sections = {name: sections_of(f"models.{name}", entry).get("model", {}) for name, entry in models.items()}
    for name, entry in models.items():
        if "model_type" not in merge(model_sections[name], entry.model):
            raise UserError(f"{path}: models.{name}: model.model_type is missing")
    task_sections = {name: sections_of(f"tasks.{name}", entry) for name, entry in tasks.items()}
    for name, sections in task_sections.items():
        if "name" not in merge(sections.get("task", {}), tasks[name].task):
            raise UserError(f"{path}: tasks.{name}: task.name is missing")
    return Comparison(
        name=path.stem,
        plan=plan,
        models=models,
        tasks=tasks,
        published=[build(Others, entry, f"{path}: published") for entry in plan.published],
        claimed=[build(Others, entry, f"{path}: claimed") for entry in plan.claimed],
        model_sections=model_sections,
        task_sections=task_sections,
    )


def apply_data_dirs(comparison: Comparison, given: Sequence[str]) -> None:
    """Tell the tasks where their local files are.

    Args:
        given: `TASK=FOLDER` for single tasks, or one `FOLDER` with a folder named like each task that reads files.

    Raises:
        UserError: if a task or folder does not exist.
    """
    for word in given:
        name, equals, folder = word.partition("=")
        if equals:
            if name not in comparison.tasks:
                raise UserError(f"--data_dir {word}: no task {name!r}{did_you_mean(name, comparison.tasks)}")
            if not Path(folder).is_dir():
                raise UserError(f"--data_dir {word}: no folder {folder}")
            comparison.tasks[name].task["data_dir"] = folder
            continue
        root = Path(word)
        if not root.is_dir():
            raise UserError(f"--data_dir: no folder {word}")
        for entry_name, entry in comparison.tasks.items():
            task = merge(comparison.task_sections[entry_name].get("task", {}), entry.task)
            for candidate in (root / entry_name, root / str(task["name"])):
                if candidate.is_dir():
                    entry.task["data_dir"] = str(candidate)
                    break


def sample_limits(sections: Mapping[str, Mapping[str, Any]], most: int) -> dict[str, int]:
    """Fields of the `task` section of a recipe with which every split has at most so many examples.

    Raises:
        UserError: if that leaves none, or the recipe's architecture is unknown.
    """
    if most < 1:
        raise UserError(f"--max_samples is {most}; it must be at least 1")
    kind = kind_of(str(sections.get("model", {}).get("model_type")))
    fields = {option.name: option for option in dataclasses.fields(kind.sections["task"])}
    # Tasks whose training prompts never end have sizes of the other splits, and no bound on them.
    limits = {}
    for name in (f"{form}_{split}{end}" for form, end in (("max", "_samples"), ("num", "")) for split in SPLITS):
        if name in fields:
            value = sections.get("task", {}).get(name, fields[name].default)
            limits[name] = min(most, value) if isinstance(value, int) else most
    return limits


def limit_samples(comparison: Comparison, most: int) -> None:
    """Use at most so many examples of every split of every task; see [`sample_limits`]."""
    for name, entry in comparison.tasks.items():
        task = merge(comparison.task_sections[name].get("task", {}), entry.task)
        for model in comparison.models:
            if comparison.takes_part(model, name):
                fields = merge(comparison.model_sections[model], comparison.models[model].model)
                entry.task |= sample_limits({"model": fields, "task": task}, most)
    comparison.plan.train_sizes = [size for size in comparison.plan.train_sizes if size < most]


def rehearse(comparison: Comparison) -> None:
    """Make the comparison so small that every part is tried in minutes: two seeds, two updates, few examples."""
    comparison.plan.seeds = comparison.plan.seeds[:DEBUG_SEEDS]
    comparison.plan.train_sizes = []
    limit_samples(comparison, DEBUG_SAMPLES)
    for entry in comparison.tasks.values():
        entry.training["max_steps"] = DEBUG_STEPS

"""From recipe to run folder: what a training run of any kind does, whatever it trains.

A kind of run (see [`Kind`][trainers.arguments.Kind]) is a subclass of [`TrainingRun`] that says how data, model and
Trainer are built and how the finished model is measured.
"""

import contextlib
import hashlib
import json
import os
import pickle
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import yaml
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from model_cards.card import write_card

from . import __version__
from .arguments import DISPLAY_FIELDS, Recipe, precision_of, user_errors_from_validation
from .distributed import on_main_process
from .errors import UserError, one_line, plain
from .files import LOCK_NAME, json_text, only_user_of, remove_leftovers, write_records, write_text
from .hub import NO_PICKLES
from .loading import load_model, pickled_weights
from .recipe_files import parse_yaml
from .redaction import known_tokens, redact
from .run_trainer import RunTrainer, last_complete_checkpoint
from .tracking import make_tracker, write_internals
from .tracking.tracker import FOLDER

# Fields that may name a place on this machine: of the task, and with their sections of models and tokenizers.
DATA_FIELDS = ("data_dir", "teacher_answers")
MODEL_FIELDS = (
    ("model", "pretrained"),
    ("model", "embeddings_from"),
    ("model", "reader"),
    ("tokenizer", "name_or_path"),
)


@dataclass(frozen=True)
class Evaluation:
    """What a finished model was measured to do.

    Attributes:
        validation, test: those sections of `metrics.json`, of one shape.
        records: the lines of `predictions.jsonl`, one per test example.
        example: a `prompt` and a `target` of the validation split, for the card, or `None` if they are no text.
    """

    validation: dict[str, Any]
    test: dict[str, Any]
    records: Sequence[dict[str, Any]]
    example: dict[str, str] | None = None


class TrainingClock(TrainerCallback, ExportableState):
    """Counts the seconds of training; checkpoints carry the count, so that a resumed run knows what came before."""

    def __init__(self):
        self.seconds = 0.0
        self._started: float | None = None

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds, self._started = self._elapsed(), None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self._elapsed()}}


def hardware(training: TrainingArguments) -> str:
    """The devices a run computes on, in words."""
    if training.device.type == "cuda":
        return f"{training.world_size} x {torch.cuda.get_device_name(training.device)}"
    processes = f"{training.world_size} processes on " if training.world_size > 1 else ""
    return f"{processes}{platform.machine()} CPU, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """What a result was computed with: name -> version."""
    return {
        "adaptive_reasoners": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def git_revision() -> str | None:
    """Commit of the source tree the code runs from, with `+changes` if files differ; `None` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]  # a kill in between would leave the lock
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def say(message: str = "") -> None:
    """Print a line on the main process: what a command tells its user."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(plain(message), flush=True)


def prepare_output_dir(recipe: Recipe, stack: contextlib.ExitStack) -> bool:
    """Create the output folder and claim it, or check the one that is there against what the command line asked for.

    Args:
        recipe: the recipe.
        stack: holds the claim: no other run enters the folder before it is closed.

    Returns:
        `True` if it already holds a finished run of this recipe and `--resume` asked to continue it.

    Raises:
        UserError: if the folder cannot be written, holds something else, or a run that neither `--resume` nor
            `--overwrite` mentions, or one of another recipe.
    """
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        stack.enter_context(only_user_of(folder))
        for place in (folder / FOLDER, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            remove_leftovers(place, below=True)
        held = [entry.name for entry in folder.iterdir() if entry.name != LOCK_NAME]
    except FileExistsError as error:
        raise UserError(f"{folder}: the output folder is a file") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{folder}: cannot write to the output folder: {reason}") from error
    if not held:
        return False
    if "recipe.yaml" not in held:
        raise UserError(f"{folder}: the output folder holds files that are no run; choose another --output_dir")
    record = read_record(folder / "recipe.yaml")
    if recipe.overwrite:
        return False  # the old run goes once the new one is known to start
    if not recipe.resume:
        raise UserError(
            f"{folder}: the output folder holds a run; --resume continues it, --overwrite replaces it, "
            "--output_dir names another"
        )
    check_same_recipe(recipe, record)
    return finished(folder)


def finished(folder: Path) -> bool:
    """Whether a run folder is complete: results written and card rendered."""
    return (folder / "metrics.json").exists() and (folder / "README.md").exists()


def read_record(path: Path) -> dict[str, Any]:
    """The `recipe.yaml` of a run folder.

    Raises:
        UserError: if it cannot be read, or was not written by a run.
    """
    try:
        record = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read the recipe of the run: {one_line(error)}") from error
    provenance = record.get("provenance") if isinstance(record, dict) else None
    if not isinstance(provenance, dict) or "data_fingerprint" not in provenance:
        raise UserError(
            f"{path}: not the record of a run (no provenance.data_fingerprint); choose another --output_dir"
        )
    return record


def empty_folder(folder: Path, last: str = "recipe.yaml") -> None:
    """Delete what a folder holds, but for the lock of a process.

    The file by which the folder is known as finished goes first, and that by which it is known as ours last: whenever
    this is interrupted, what is left is an unfinished folder of ours.
    """
    for entry in sorted(folder.iterdir(), key=lambda entry: (entry.name == last, entry.name != "metrics.json")):
        if entry.name == LOCK_NAME:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a run folder, in the order of [`empty_folder`]."""
    empty_folder(folder)
    shutil.rmtree(folder)


def check_same_recipe(recipe: Recipe, record: dict[str, Any]) -> None:
    """Refuse to resume under a recipe that differs in anything that shapes the result.

    Raises:
        UserError: naming the first field that differs, with both values.
    """
    now = _without_places(recipe.as_dict())
    then = {section: record.get(section) or {} for section in now}
    difference = first_difference(now, _without_places(then))
    if difference is not None:
        field, ours, theirs = difference
        raise UserError(f"--resume: {field} is {ours!r} but the run was started with {theirs!r}")


def first_difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two recipes differ in anything that shapes the result, with both values.

    Where the data are and how a run is shown do not count: the fingerprint of the data is compared instead.
    """
    for section in {**now, **then}:
        ours, theirs = now.get(section) or {}, then.get(section) or {}
        for name in sorted({*ours, *theirs} - {*DISPLAY_FIELDS, *DATA_FIELDS}):
            if ours.get(name) != theirs.get(name):
                return f"{section}.{name}", ours.get(name), theirs.get(name)
    return None


def record_recipe(recipe: Recipe, argv: Sequence[str], data_fingerprint: str) -> None:
    """Write `recipe.yaml`: the resolved recipe, where it came from, and a fingerprint of the data it trains on."""
    provenance = {
        "data_fingerprint": data_fingerprint,
        "recipe": recipe.path.as_posix() if not recipe.path.is_absolute() else recipe.path.name,
        "command": f"accelerate launch -m trainers.train {shown_command(argv)}",
        "package_version": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "git_revision": git_revision(),
    }
    content = _without_places(recipe.as_dict()) | {"provenance": provenance}
    write_text(recipe.output_dir / "recipe.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def shown_command(argv: Sequence[str]) -> str:
    """A command line as it may be shown to others: without the folders of this machine and without a token."""
    return redact(shlex.join(_without_folders(word) for word in argv), *known_tokens())


def _without_places(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A recipe's sections with no more than the last part of every absolute path in them."""

    def data(value: Any) -> Any:
        # The components of a mixture are task sections too, and a task's name may be that of a Python file.
        if isinstance(value, dict):
            places = {name for name in (*DATA_FIELDS, "name") if isinstance(value.get(name), str)}
            return {
                name: _without_folders(content) if name in places else data(content) for name, content in value.items()
            }
        return [data(content) for content in value] if isinstance(value, list) else value

    stripped = {section: data(content or {}) for section, content in sections.items()}
    for section, name in MODEL_FIELDS:
        place = stripped.get(section, {}).get(name)
        if place is not None and os.path.isabs(place):
            stripped[section][name] = f"./{Path(place).name}"  # never taken for a name on the Hub
    return stripped


def _without_folders(word: str) -> str:
    """An absolute path on the command line tells only about one machine; its last part is enough for the record."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if os.path.isabs(value) else value)


def changed_hyperparameters(training: TrainingArguments, values: dict[str, Any]) -> dict[str, Any]:
    """The training fields that differ from the library's defaults, as the card lists them."""
    defaults = TrainingArguments(output_dir="unused", use_cpu=training.use_cpu)
    skip = {"output_dir", "use_cpu", "report_to", "run_name", "disable_tqdm", "logging_steps", "save_total_limit"}
    skip |= {"restore_callback_states_from_checkpoint", "eval_strategy", "eval_steps", "save_strategy", "save_steps"}
    names = {*values, "learning_rate", "per_device_train_batch_size", "num_train_epochs", "warmup_steps", "seed"} - skip
    changed = {}
    for name in sorted(names):
        value = getattr(training, name)
        value = getattr(value, "value", value)
        if not hasattr(defaults, name) or value != getattr(defaults, name):
            changed[name] = value
    if training.max_steps > 0:
        changed.pop("num_train_epochs", None)
    return changed


class TrainingRun(ABC):
    """One recipe from data to run folder. The parts are built in `__init__`, so that every mistake shows early.

    Args:
        recipe: as [`parse_recipe`][trainers.arguments.parse_recipe] returns it.
        task: as [`make_task`] returns it.

    Attributes:
        model, trainer: set by [`build`].
        train_examples: number of training examples, set by [`build`].
        truncated_inputs: number of training examples whose input was cut, or `None` where nothing is ever cut.

    Raises:
        UserError: for a mistake in recipe or data.
    """

    loss_parts: ClassVar[tuple[str, ...]] = ()
    """Parts of the loss that the Trainer logs, in the order the card shows them."""

    model: PreTrainedModel
    trainer: RunTrainer
    train_examples: int
    truncated_inputs: int | None = None

    def __init__(self, recipe: Recipe, task: Any):
        self.recipe, self.task = recipe, task
        set_seed(recipe.training.seed)
        say(f"task      {task.name}: {task.source}")
        self.build()
        training = recipe.training
        say(f"device    {hardware(training)}, {precision_of(training)}; seed {training.seed}")
        batch = training.train_batch_size * training.world_size
        if training.dataloader_drop_last and self.train_examples < batch:
            raise UserError(
                f"training.dataloader_drop_last: {self.train_examples} train examples fill no batch of {batch}"
            )
        self.trainer.add_callback(TrainingClock())
        probe = None if recipe.tracking.every is None else self.probe_batch(recipe.tracking.probe_examples)
        tokenizer = getattr(self, "tokenizer", None)
        self.tracker = make_tracker(recipe.tracking, self.model, probe, tokenizer, recipe.output_dir)
        if self.tracker is not None:
            self.trainer.add_callback(self.tracker)
        if training.early_stopping_patience is not None:
            self.trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
        with user_errors_from_validation("training"):
            # A rehearsal: options of optimizer and schedule are first looked at when these are built.
            self.trainer.create_optimizer_and_scheduler(num_training_steps=1)
        self.trainer.optimizer = self.trainer.lr_scheduler = None

    @staticmethod
    @abstractmethod
    def make_task(arguments: Any) -> Any:
        """The task that the recipe's `task` section names. Reads no data yet.

        Returns:
            An object with the texts `name`, `source`, `license` and `metric`, and with `arguments`: the section with
            every default of the task filled in, ready to be recorded.

        Raises:
            UserError: for an unknown task or option.
        """

    @abstractmethod
    def build(self) -> None:
        """Build data, `model` and `trainer`, and say in a line each what they are."""

    @abstractmethod
    def fingerprint_rows(self) -> Iterable[Any]:
        """What identifies the data of all splits, as values that JSON can hold, in a fixed order."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Measure the finished model on the validation and the test split."""

    def probe_batch(self, examples: int) -> dict[str, torch.Tensor] | None:
        """The first validation examples, at most so many, as one batch with labels: what tracking looks at in depth."""
        validation: Any = self.trainer.eval_dataset
        first: list[Any] = [validation[index] for index in range(min(examples, len(validation)))]
        return dict(self.trainer.data_collator(first))

    @staticmethod
    @abstractmethod
    def results_table(metrics: dict[str, Any]) -> str:
        """The test results of `metrics.json` as aligned text below a line that says what they are."""

    def write_reports(self, folder: Path, metrics: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Write what the kind has to show besides the numbers, below `folder / "internals"`. Here: nothing.

        It is called on the main process alone, with the whole model in `self.model`.
        """

    @property
    def sharded(self) -> bool:
        """Whether the processes may hold the model together, each a part of it."""
        return self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled

    def data_fingerprint(self) -> str:
        """SHA-256 over the data of all splits, in order."""
        digest = hashlib.sha256()
        for row in self.fingerprint_rows():
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def begin(self, argv: Sequence[str]) -> None:
        """Record the recipe in the run folder, or check that a run to be resumed had the same data.

        Raises:
            UserError: if it had other data.
        """
        folder, fingerprint = self.recipe.output_dir, self.data_fingerprint()
        recorded = folder / "recipe.yaml"
        if self.recipe.overwrite:
            empty_folder(folder)
        if not recorded.exists():
            record_recipe(self.recipe, argv, fingerprint)
        elif read_record(recorded)["provenance"]["data_fingerprint"] != fingerprint:
            raise UserError("--resume: the training data differ from those the run was started with")

    def train(self) -> float:
        """Train, from the last complete checkpoint if there is one. Returns the seconds, all sessions together.

        Raises:
            UserError: if the checkpoint holds what only a program that runs code from it could read.
        """
        checkpoint = on_main_process(lambda: last_complete_checkpoint(self.recipe.output_dir))
        if checkpoint is not None:
            say(f"resuming  from {Path(checkpoint).name}")
        if checkpoint is not None and pickled_weights(Path(checkpoint)):
            raise UserError(f"--resume: {NO_PICKLES.format(checkpoint)}")
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint)
        except pickle.UnpicklingError as error:
            # The state of optimizer, schedule and random generators is read as plain data: no code in it runs.
            raise UserError(
                f"--resume: a file of {checkpoint} holds more than numbers, or is damaged, and is not read; delete the "
                "folder to go on from the checkpoint before it"
            ) from error
        self.trainer.stop_if_weights_are_broken()
        self.trainer.delete_old_checkpoints()  # a kill may have come between the last one and this
        # Restoring a checkpoint puts a new clock in the place of the one given to the trainer.
        clocks = (
            callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, TrainingClock)
        )
        return next(clocks).seconds

    def metrics(self, seconds: float, evaluation: Evaluation) -> dict[str, Any]:
        """The content of `metrics.json`."""
        training, state = self.recipe.training, self.trainer.state
        losses = [entry for entry in state.log_history if "loss" in entry]
        shown = ("step", "loss", *self.loss_parts, "eval_loss", *(f"eval_{name}" for name in self.recipe.kind.metrics))
        best = state.best_global_step if training.load_best_model_at_end else None
        train = {
            "examples": self.train_examples,
            "steps": state.global_step,
            "epochs": round(float(state.epoch or 0), 3),
            "seconds": round(seconds, 1),
            "hardware": hardware(training),
            "precision": precision_of(training),
            "final_loss": losses[-1]["loss"] if losses else None,
            "loss_parts": {name: losses[-1][name] for name in self.loss_parts if losses and name in losses[-1]},
            "best_step": best,
            "hyperparameters": changed_hyperparameters(training, self.recipe.training_values),
        }
        if self.truncated_inputs is not None:
            train["truncated_inputs"] = self.truncated_inputs
        return {
            "schema_version": 1,
            "status": "finished",
            "model_type": self.model.config.model_type,
            "architecture": type(self.model).__name__,
            "task": {name: getattr(self.task, name) for name in ("name", "source", "license", "metric")},
            "seed": training.seed,
            "parameters": {
                "total": self.model.num_parameters(),
                "trainable": self.model.num_parameters(only_trainable=True),
            },
            "train": train,
            "validation": evaluation.validation,
            "test": evaluation.test,
            **({} if evaluation.example is None else {"example": evaluation.example}),
            "versions": versions(),
            "loss_history": [
                {name: value for name, value in entry.items() if name in shown}
                for entry in state.log_history
                if "loss" in entry or "eval_loss" in entry
            ],
        }

    def finish(self, seconds: float) -> dict[str, Any]:
        """Evaluate on validation and test, and write everything a finished run holds. Returns the metrics."""
        folder = self.recipe.output_dir
        say("evaluating the validation and the test split")
        evaluation = self.evaluate()
        metrics = self.metrics(seconds, evaluation)
        self.trainer.save_model(str(folder))
        if self.tracker is not None:
            write_internals(self.tracker, folder, self.trainer.state.log_history)
        if self.trainer.is_world_process_zero():
            # A pickle that only `Trainer` itself reads, and only from checkpoints.
            (folder / "training_args.bin").unlink(missing_ok=True)
            write_records(folder / "predictions.jsonl", evaluation.records)
            if self.sharded:
                # One process alone cannot run what all of them hold together: it would wait for the others.
                device = self.recipe.training.device
                self.model, _ = load_model(str(folder), needs_tokenizer=False, device=device)
            self.write_reports(folder, metrics)
            write_text(folder / "metrics.json", json_text(metrics))
            write_card(folder)
        return metrics

"""Runs of in-context models: prompts of numbers, generated as they are used, and scores by what a prompt holds."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from model_cards.words import aligned, thin

from ..arguments import EvaluationArguments, Kind, user_errors_from_validation
from ..errors import UserError, did_you_mean
from ..figures import new_figure, save_with_numbers
from ..pretrained import pretrained_model
from ..run import Evaluation, TrainingRun, say
from ..tasks.in_context import (
    BASELINES,
    CHANGES,
    Curriculum,
    CurriculumPrompts,
    FunctionClass,
    InContextTask,
    InContextTaskArguments,
    TableConnectivity,
    get_in_context_task,
)
from ..tasks.in_context.table_connectivity import NUM_TAIL_TOKENS
from .evaluation import (
    evaluate_prompts,
    evaluate_questions,
    follow_paths,
    summarise_curve,
)
from .figures import (
    WIDTHS,
    curve_figure,
    mask_figure,
    mask_numbers,
    path_length_figure,
    prompts_figure,
    tables_figure,
)
from .trainer import (
    LOSS_PARTS,
    InContextTrainer,
    InContextTrainingArguments,
    longest_prompt_metric,
)

DENSE, LOW_RANK = "in_context_transformer", "low_rank_in_context_transformer"
# Prompts of each split that the data's fingerprint is taken over, and training prompts that the constant answer and
# the balance of labels are judged by.
FINGERPRINTED = 8
LABELS_COUNTED = 1000
# Places in a prompt whose losses are logged, at most.
MOST_LEVELS = 6


@strict
@dataclass(kw_only=True)
class InContextEvaluationArguments(EvaluationArguments):
    """What is measured besides the validation and the test split.

    The first three are for function classes, the others for table connectivity.
    """

    baselines: list | None = field(
        default=None,
        metadata={"help": "Predictors without a model that are scored beside it; default: all that are installed."},
    )
    slow_baseline_prompts: int = field(
        default=64, metadata={"help": "Prompts that predictors are scored on which fit a model at every place; or 0."}
    )
    prompts: list | None = field(
        default=None, metadata={"help": "Kinds of prompts that differ from those of training; default: all."}
    )
    prompts_of_each_kind: int = field(default=500, metadata={"help": "Test prompts of each such kind."})
    num_tables: list | None = field(
        default=None,
        metadata={"help": "Numbers of tables at which the model is measured too; task.options.max_tables bounds them."},
    )
    rho: list | None = field(
        default=None,
        metadata={
            "help": "task.options.rho for each of num_tables; default: the task's times its num_tables over this one, "
            "which keeps the expected number of links of a table."
        },
    )
    questions_of_each_size: int = field(default=1000, metadata={"help": "Test questions for each of num_tables."})

    def validate_choices(self) -> None:
        for name, known in (("baselines", BASELINES), ("prompts", CHANGES)):
            for choice in getattr(self, name) or ():
                if choice not in known:
                    raise ValueError(
                        f"{name}: {choice!r} is unknown{did_you_mean(str(choice), list(known))}; known: "
                        f"{', '.join(known)}"
                    )
        for choice in self.baselines or ():
            if not BASELINES[choice].is_available:
                raise ValueError(f"baselines: {choice!r} needs the package {BASELINES[choice].package}")

    def validate_sizes(self) -> None:
        for name, least in {"slow_baseline_prompts": 0, "prompts_of_each_kind": 2, "questions_of_each_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.slow_baseline_prompts == 1:
            raise ValueError("slow_baseline_prompts is 1; it must be 0, or at least 2 for an interval")

    def validate_num_tables(self) -> None:
        for size in self.num_tables or ():
            if isinstance(size, bool) or not isinstance(size, int):
                raise ValueError(f"num_tables: must be whole numbers, got {size!r}")
        if self.rho is not None and (self.num_tables is None or len(self.rho) != len(self.num_tables)):
            raise ValueError("rho: must be as many numbers as num_tables")
        for rho in self.rho or ():
            if isinstance(rho, bool) or not isinstance(rho, (int, float)):
                raise ValueError(f"rho: must be numbers, got {rho!r}")


class InContextRun(TrainingRun):
    """A run on a task of [`trainers.tasks.in_context`][]."""

    loss_parts = LOSS_PARTS
    task: Any
    trainer: InContextTrainer

    @staticmethod
    def make_task(arguments: InContextTaskArguments) -> InContextTask:
        return get_in_context_task(arguments)

    def build(self) -> None:
        training, arguments = self.recipe.training, self.task.arguments
        if training.max_steps < 1:
            raise UserError("training.max_steps: must be set, since prompts are generated without end")
        self.curriculum = Curriculum.read(arguments.curriculum, self.task)
        if self.curriculum.length > training.max_steps:
            raise UserError(
                f"task.curriculum takes {self.curriculum.length} update steps to arrive, but training.max_steps is "
                f"{training.max_steps}"
            )
        if getattr(self.task.options, "autoregressive", False) and not training.dense_labels:
            raise UserError(
                "task.options.autoregressive: the labels of blocks tell the path; set training.dense_labels"
            )
        self.sizes = self._sizes()
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        # Another training seed brings other training prompts; validation and test stay what they are.
        train_data = CurriculumPrompts(self.task.with_seed(training.seed), self.curriculum, batch, training.max_steps)
        self.train_examples = len(train_data)
        set_seed(training.seed)
        self.model = self._make_model()
        self.train_labels = self.task.with_seed(training.seed).batch("train", range(LABELS_COUNTED))["labels"]
        warning = self.task.warning(self.train_labels) if isinstance(self.task, TableConnectivity) else None
        say(
            f"prompts   {self.train_examples:,} train, {arguments.num_validation:,} validation, "
            f"{arguments.num_test:,} test"
        )
        if warning is not None:
            say(f"warning   {warning}")
        say(f"model     {type(self.model).__name__}, {self.model.num_parameters():,} parameters")
        with user_errors_from_validation("training"):
            self.trainer = InContextTrainer(
                model=self.model,
                args=training,
                train_dataset=train_data,
                eval_dataset=self.task.dataset("validation", arguments.num_validation),
                data_collator=default_data_collator,
                compute_metrics=longest_prompt_metric(self.task.metric),
                levels=self._levels(),
            )

    def _levels(self) -> dict[str, int]:
        """Names of the levels whose losses are logged, with their numbers."""
        if isinstance(self.task, FunctionClass):
            return {f"after_{place}": place for place in thin(range(self.task.options.n_points), MOST_LEVELS)}
        lengths = {f"path_{length}": length for length in range(self.task.options.num_tables + 1)}
        return {"no_path": -1, **lengths}

    def _sizes(self) -> list[tuple[int, float]]:
        """Numbers of tables to measure at, each with its rho; checked before anything is trained."""
        evaluation = self.recipe.evaluation
        if not isinstance(self.task, TableConnectivity):
            if evaluation.num_tables is not None:
                raise UserError(f"evaluation.num_tables: {self.task.name} has no tables; leave it out")
            return []
        for name in ("baselines", "prompts"):
            if getattr(evaluation, name) is not None:
                raise UserError(f"evaluation.{name}: is for function classes; leave it out")
        sizes = evaluation.num_tables or []
        options = self.task.options
        found = []
        for place, size in enumerate(sizes):
            rho = options.rho * options.num_tables / size if evaluation.rho is None else evaluation.rho[place]
            rho = round(min(1.0, float(rho)), 6)
            try:
                self.task.variant(num_tables=size, min_tables=None, rho=rho).batch("test", [0])
            except UserError as error:
                raise UserError(f"evaluation.num_tables: {size}: {error}") from error
            found.append((size, rho))
        return found

    def _make_model(self) -> PreTrainedModel:
        """A model from the recipe's configuration, or the pretrained one it names.

        Raises:
            UserError: if it cannot be loaded or built, or does not fit the task.
        """
        recipe, options = self.recipe, self.task.options
        fits: dict[str, Any] = {"n_dims": options.n_dims}
        if recipe.model_type == LOW_RANK:
            if not isinstance(self.task, TableConnectivity):
                raise UserError(f"task.name: a {LOW_RANK} learns table_connectivity, not {self.task.name}")
            fits |= {"block_size": options.num_columns + 1, "num_tail_tokens": NUM_TAIL_TOKENS}
            auto_class: Any = AutoModelForSequenceClassification
        else:
            if not isinstance(self.task, FunctionClass):
                raise UserError(f"task.name: an {DENSE} learns the function classes, not {self.task.name}")
            fits |= {"n_outputs": self.task.n_outputs, "objective": self.task.objective}
            auto_class = AutoModelForTimeSeriesPrediction
        if recipe.pretrained is not None:
            model = pretrained_model(recipe, auto_class)
            for name, value in fits.items():
                if getattr(model.config, name) != value:
                    raise UserError(
                        f"model.pretrained: {recipe.pretrained!r} has {name}={getattr(model.config, name)}, the task "
                        f"{value}"
                    )
        else:
            if recipe.model_type == LOW_RANK:
                fits["num_blocks"] = options.num_tables
            config = recipe.model_config("task", **fits)
            with user_errors_from_validation("model"):
                model = auto_class.from_config(config)
        most = getattr(model.config, "max_points", None)
        if most is not None and most < options.n_points:
            raise UserError(f"model.max_points is {most}, but task.options.n_points is {options.n_points}")
        return model

    def probe_batch(self, examples: int) -> dict[str, torch.Tensor] | None:
        batch = super().probe_batch(examples)
        return None if batch is None else self.trainer.model_inputs(batch, training=True)

    def fingerprint_rows(self) -> Iterable[Any]:
        yield [self.task.name, dataclasses.asdict(self.task.options), self.task.seed, self.recipe.training.seed]
        for split in ("train", "validation", "test"):
            task = self.task.with_seed(self.recipe.training.seed) if split == "train" else self.task
            batch = task.batch(split, range(FINGERPRINTED))
            # Machines differ in the last digits of a logarithm.
            yield [
                batch["input_values"].mul(100).round().sum(dim=(1, 2)).tolist(),
                batch["labels"].sum().round().item(),
            ]

    def evaluate(self) -> Evaluation:
        self.model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if isinstance(self.task, TableConnectivity):
            return self._evaluate_questions(self.task)
        return self._evaluate_functions(self.task)

    def _common(self) -> dict[str, Any]:
        training = self.recipe.training
        return {
            "batch_size": training.per_device_eval_batch_size,
            "confidence": float(self.recipe.evaluation.confidence),
        }

    def _evaluate_questions(self, task: TableConnectivity) -> Evaluation:
        arguments, evaluation = self.task.arguments, self.recipe.evaluation
        sections = {}
        for split, size in (("validation", arguments.num_validation), ("test", arguments.num_test)):
            sections[split], records = evaluate_questions(
                self.model, task, split, size, self.train_labels, **self._common()
            )
        sections["test"]["by_tables"] = []
        for size, rho in self.sizes:
            variant = task.variant(num_tables=size, min_tables=None, rho=rho)
            found, _ = evaluate_questions(
                self.model, variant, "test", evaluation.questions_of_each_size, self.train_labels, **self._common()
            )
            sections["test"]["by_tables"].append({"num_tables": size, "rho": rho, **found})
        if task.options.autoregressive:
            sections["test"]["paths"] = follow_paths(self.model, task, "test", arguments.num_test, **self._common())
        questions = task.variant(num_tables=task.options.num_tables, min_tables=None).questions("validation", [0])
        ids = task.token_ids(questions, task.streams("validation", [0], "names of tables"))
        words = "connected" if bool(questions.connected[0]) else "not connected"
        return Evaluation(
            sections["validation"], sections["test"], records, {"prompt": str(ids[0].tolist()), "target": words}
        )

    def _evaluate_functions(self, task: FunctionClass) -> Evaluation:
        arguments, evaluation = self.task.arguments, self.recipe.evaluation
        left_out = [name for name, baseline in BASELINES.items() if not baseline.is_available]
        if left_out and evaluation.baselines is None:
            packages = sorted({str(BASELINES[name].package) for name in left_out})
            say(f"left out  {', '.join(left_out)}: {' and '.join(packages)} not installed")
        baselines = [name for name in BASELINES if name not in left_out]
        baselines = baselines if evaluation.baselines is None else evaluation.baselines
        common = self._common() | {"baselines": baselines, "slow_size": evaluation.slow_baseline_prompts}
        validation, _, _ = evaluate_prompts(
            self.model, task, "validation", arguments.num_validation, **common | {"slow_size": 0}
        )
        curve, predictions, targets = evaluate_prompts(self.model, task, "test", arguments.num_test, **common)
        test = summarise_curve(task, curve)
        if evaluation.baselines is None:
            test["baselines_left_out"] = left_out
        test["prompts"] = {}
        kinds = [kind for kind in CHANGES if kind != "standard"] if evaluation.prompts is None else evaluation.prompts
        for kind in kinds:
            test["prompts"][kind], _, _ = evaluate_prompts(
                self.model, task, "test", evaluation.prompts_of_each_kind, kind, **common | {"slow_size": 0}
            )
        records = []
        for index, (prediction, target) in enumerate(zip(predictions[:, -1], targets[:, -1], strict=True)):
            is_sign = task.metric == "accuracy"
            records.append(
                {
                    "id": f"test-{index}",
                    "target": target.tolist(),
                    "prediction": prediction.tolist(),
                    "parsed": str(prediction.tolist()),
                    "correct": bool((prediction > 0) == (target > 0)) if is_sign else None,
                    "steps": None,
                    "difficulty": None,
                }
            )
        return Evaluation(summarise_curve(task, validation), test, records)

    @staticmethod
    def results_table(metrics: dict[str, Any]) -> str:
        """The score of the test split, of predictors without a model, and of parts of the split."""
        metric, test = metrics["task"]["metric"], metrics["test"]

        def row(label: str, score: dict[str, Any]) -> list[str]:
            low, high = score["interval"]
            return [label, str(score["n"]), f"{score['value']:.4f}", f"[{low:.4f}, {high:.4f}]"]

        percent = f"{100 * test[metric]['confidence']:g} % interval"
        rows = [["", "n", metric, percent], row("model", test[metric])]
        rows += [row(entry["name"], entry[metric]) for entry in test["baselines"]]
        if test["by_difficulty"]:
            trivial = test["trivial"]
            rows.append(row("constant answer", trivial[metric]))
            rows += [row(f"model, path {level['difficulty']}", level[metric]) for level in test["by_difficulty"]]
            rows += [
                row(f"model, {entry['num_tables']} tables, rho {entry['rho']:.3g}", entry[metric])
                for entry in test["by_tables"]
            ]
        if "paths" in test and test["paths"]["n"] > 0:
            rows += [row(f"walks: {name}", test["paths"][name]) for name in ("arrives", "shortest")]
        rows += [row(f"model, {kind}", curve["model"][-1]) for kind, curve in test.get("prompts", {}).items()]
        return f"test split, at the end of the prompt:\n{aligned(rows)}"

    def write_reports(self, folder: Path, metrics: dict[str, Any]) -> None:
        internals = folder / "internals"
        internals.mkdir(exist_ok=True)
        test, name, metric = metrics["test"], self.task.name, self.task.metric
        history = [
            {key: value for key, value in entry.items() if key == "step" or key.startswith("loss")}
            for entry in self.trainer.state.log_history
            if "loss" in entry
        ]
        if isinstance(self.task, FunctionClass):
            curve = test["by_position"]
            title = f"{name}: score by number of in-context examples"
            save_with_numbers(curve_figure(curve, metric, title), internals / "in_context_curve.png", curve)
            if test["prompts"]:
                words = {kind: text for kind, (_, text) in CHANGES.items()}
                figure = prompts_figure(test["prompts"], metric, words)
                save_with_numbers(figure, internals / "other_prompts.png", {"prompts": test["prompts"]})
        else:
            numbers = {key: test[key] for key in ("accuracy", "by_difficulty", "baselines", "trivial")}
            title = f"{name}: accuracy by path length"
            save_with_numbers(path_length_figure(test, title), internals / "accuracy_by_path_length.png", numbers)
            if test["by_tables"]:
                figure = tables_figure(
                    test["by_tables"], self.task.options.num_tables, f"{name}: accuracy by number of tables"
                )
                save_with_numbers(figure, internals / "accuracy_by_tables.png", {"by_tables": test["by_tables"]})
            config = self.model.config
            masks = mask_numbers(
                config.num_blocks, config.block_size, config.num_tail_tokens, sorted({*WIDTHS, config.hidden_size})
            )
            save_with_numbers(mask_figure(masks), internals / "attention_masks.png", masks)
        self._write_history(internals, history)

    @staticmethod
    def _write_history(internals: Path, history: list[dict[str, Any]]) -> None:
        """Losses by level in the course of training."""
        names = list(dict.fromkeys(key for entry in history for key in entry if key.startswith("loss_")))
        figure = new_figure()
        axes = figure.add_subplot()
        for name in names:
            found = [(entry["step"], entry[name]) for entry in history if name in entry]
            axes.plot(*zip(*found, strict=True), linewidth=1, label=name.removeprefix("loss_").replace("_", " "))
        axes.set_xlabel("update step")
        axes.set_ylabel("training loss at this level")
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize=7, ncols=2)
        save_with_numbers(figure, internals / "loss_by_level.png", {"history": history})


KIND = Kind(
    name="in_context",
    model_types=(DENSE, LOW_RANK),
    sections={
        "task": InContextTaskArguments,
        "training": InContextTrainingArguments,
        "evaluation": InContextEvaluationArguments,
    },
    run=InContextRun,
    metrics=("loss", "accuracy", "error"),
)

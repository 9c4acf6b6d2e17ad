"""Runs of models that think in ticks: Continuous Thought Machines, and the networks they are compared with."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel, default_data_collator, set_seed

from model_cards.words import aligned

from ..arguments import EvaluationArguments, Kind, user_errors_from_validation
from ..errors import UserError
from ..figures import save_with_numbers
from ..pretrained import pretrained_model
from ..run import Evaluation, TrainingRun, say
from ..statistics import proportion
from ..tasks.thought import ThoughtExamples, ThoughtTask, ThoughtTaskArguments, get_thought_task
from .baselines import HEADS, machine_config, num_parameters, with_matched_width
from .evaluation import Thoughts, make_records, summarise_thoughts, think_in_ticks
from .figures import (
    attention_frames,
    attention_strip,
    neuron_figure,
    stopping_figure,
    synchronisation_figure,
    tick_figure,
    weight_figure,
    write_animation,
)
from .trainer import LOSS_PARTS, ThoughtTrainer, ThoughtTrainingArguments, thought_metric
from .watching import Watched, watch, without_stopping

MACHINES = ("continuous_thought_machine", "hyper_continuous_thought_machine")
BASELINES = ("thought_lstm", "thought_feed_forward")
STOPPING_PASSES = 3


@strict
@dataclass(kw_only=True)
class ThoughtEvaluationArguments(EvaluationArguments):
    """How long a finished model may think, and what is shown of it."""

    iterations: int | None = field(
        default=None, metadata={"help": "Bound on the ticks at evaluation; default is the configuration's."}
    )
    certainty_threshold: float | int | None = field(
        default=None,
        metadata={"help": "Certainty, in [0, 1], at which an example stops thinking at evaluation. Default: never."},
    )
    stopping_thresholds: list = field(
        default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999],
        metadata={"help": "Thresholds at which early stopping is measured."},
    )
    stopping_samples: int = field(
        default=500, metadata={"help": "Test examples that early stopping is measured on; 0 for no such measurement."}
    )
    shown_examples: int = field(
        default=2, metadata={"help": "Test examples whose thinking is drawn below internals/; 0 for none."}
    )

    def validate_ranges(self) -> None:
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"evaluation.iterations is {self.iterations}; it must be at least 1")
        thresholds = [("certainty_threshold", self.certainty_threshold)] if self.certainty_threshold is not None else []
        for name, value in [*thresholds, *(("stopping_thresholds", value) for value in self.stopping_thresholds)]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"evaluation.{name}: {value!r} is no certainty; they lie in [0, 1]")
        for name in ("stopping_samples", "shown_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; it must not be negative")


class ThoughtRun(TrainingRun):
    """A run on a task of [`trainers.tasks.thought`][]."""

    loss_parts = LOSS_PARTS
    task: ThoughtTask
    trainer: ThoughtTrainer

    @staticmethod
    def make_task(arguments: ThoughtTaskArguments) -> ThoughtTask:
        return get_thought_task(arguments)

    def build(self) -> None:
        training, evaluation = self.recipe.training, self.recipe.evaluation
        # The test split is read now so that a bad file stops the run before training; nothing uses it before the end.
        self.splits = {split: self.task.examples(split) for split in ("train", "validation", "test")}
        self.train_examples = len(self.splits["train"])
        example = default_data_collator([self.splits["train"][0]])
        example.pop("labels")
        set_seed(training.seed)
        self.model = self.make_model(example)
        say(f"examples  {', '.join(f'{len(examples)} {split}' for split, examples in self.splits.items())}")
        say(f"model     {type(self.model).__name__}, {self.model.num_parameters():,} parameters{self.matching}")
        forward_kwargs = {"iterations": evaluation.iterations, "certainty_threshold": evaluation.certainty_threshold}
        if self.task.loss == "ctc" and self.ticks < self.task.num_positions:
            raise UserError(
                f"model.iterations: {self.ticks} ticks cannot spell the {self.task.num_positions} classes of an answer"
            )
        with user_errors_from_validation("training"):
            self.trainer = ThoughtTrainer(
                model=self.model,
                args=training,
                train_dataset=self.splits["train"],
                eval_dataset=self.splits["validation"],
                processing_class=self.task.image_processor(),
                data_collator=default_data_collator,
                compute_metrics=thought_metric(self.task.loss),
                loss=self.task.loss,
                forward_kwargs={name: value for name, value in forward_kwargs.items() if value is not None},
            )

    @property
    def ticks(self) -> int:
        """Most ticks at evaluation, or in training if those are fewer."""
        return min(self.model.config.iterations, self.recipe.evaluation.iterations or self.model.config.iterations)

    def make_model(self, example: dict[str, torch.Tensor]) -> PreTrainedModel:
        """A model from the recipe's configuration, or the pretrained one it names; it is shown an example.

        Raises:
            UserError: if it cannot be loaded or built, or does not fit the task.
        """
        recipe, task = self.recipe, self.task
        head = HEADS[task.head]
        self.matching = ""
        if recipe.pretrained is not None:
            model = pretrained_model(recipe, head)
            shape = task.config_values()["prediction_reshaper"]
            if model.config.prediction_shape != shape:
                raise UserError(
                    f"model.pretrained: {recipe.pretrained!r} answers in the shape {model.config.prediction_shape}, "
                    f"the task {task.name} in {shape}"
                )
        else:
            config: Any = recipe.model_config("task", **task.config_values())
            if config.input_name != task.input_name:
                raise UserError(
                    f"model.backbone_type: {config.backbone_type!r} reads {config.input_name}, but the task "
                    f"{task.name} gives {task.input_name}"
                )
            if config.curriculum_lookahead is not None and task.head == "image":
                raise UserError(
                    f"model.curriculum_lookahead: an answer of the task {task.name} has one position; leave it out"
                )
            with user_errors_from_validation("model"):
                if recipe.model_type in BASELINES:
                    config = with_matched_width(config, task.head, example)
                    machine = num_parameters(machine_config(config), task.head)
                    self.matching = f"; width {config.width}, the machine of these settings has {machine:,}"
                model = head.from_config(config)
        if recipe.model_type in BASELINES and recipe.evaluation.certainty_threshold is not None:
            raise UserError(f"evaluation.certainty_threshold: a {recipe.model_type} does not stop early; leave it out")
        model.eval()
        with user_errors_from_validation("model"), torch.no_grad():
            model(**example, iterations=1)
        return model.train()

    def fingerprint_rows(self) -> Iterable[Any]:
        return self.task.fingerprint_rows(self.splits)

    def evaluate(self) -> Evaluation:
        self.trainer.compute_metrics = None
        self.model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        confidence = float(self.recipe.evaluation.confidence)
        trivial = self.task.trivial_prediction(self.splits["train"])
        sections = {}
        for split in ("validation", "test"):
            examples = self.splits[split]
            thoughts = cast(Thoughts, self.trainer.predict(examples).predictions)
            records = make_records(self.task, examples, thoughts)
            sections[split] = summarise_thoughts(self.task, examples, thoughts, records, trivial, confidence)
        if self.stops_early and (self.sharded or self.trainer.is_world_process_zero()):
            sections["test"]["stopping"] = self.measure_stopping(self.splits["test"], confidence)
        example = None
        picture = self.splits["validation"].picture(0)
        target = self.task.reading(*[self.splits["validation"].labels(0)] * 2)
        if picture is not None:
            example = {"prompt": f"{picture.shape[1]}x{picture.shape[0]}", "target": target}
        elif self.task.input_name == "input_values":
            values = self.splits["validation"][0]["input_values"]
            example = {"prompt": str([int(value) for value in values]), "target": target}
        return Evaluation(sections["validation"], sections["test"], records, example)

    @property
    def stops_early(self) -> bool:
        """Whether early stopping can be measured: the model can stop, and every tick gives a whole answer."""
        evaluation = self.recipe.evaluation
        return (
            self.recipe.model_type in MACHINES
            and self.task.loss == "ticks"
            and evaluation.stopping_samples > 0
            and bool(evaluation.stopping_thresholds)
        )

    def measure_stopping(self, examples: ThoughtExamples, confidence: float) -> dict[str, Any]:
        """
        Accuracy, mean ticks and wall time when examples stop at a certainty, for every threshold and without one.

        Returns:
            `{"n": …, "batch_size": …, "curve": [{"threshold", "accuracy", "mean_steps", "seconds"}, …]}`. The last
            entry of the curve is without a threshold; seconds are of the forward passes over all n examples, in the
            fastest of `STOPPING_PASSES` passes.
        """
        evaluation, batch_size = self.recipe.evaluation, self.recipe.training.per_device_eval_batch_size
        n = min(evaluation.stopping_samples, len(examples))
        batches = [
            default_data_collator([examples[index] for index in range(start, min(start + batch_size, n))])
            for start in range(0, n, batch_size)
        ]
        thresholds = [*sorted(evaluation.stopping_thresholds), None]
        seconds: dict[float | None, float] = dict.fromkeys(thresholds, math.inf)
        found = {}
        # In turn, and each more than once: what else runs on the machine slows all of them, or one pass only.
        for _ in range(STOPPING_PASSES):
            for threshold in thresholds:
                taken, found[threshold] = self._think_and_stop(batches, threshold)
                seconds[threshold] = min(seconds[threshold], taken)
        curve = []
        for threshold, thoughts in found.items():
            right = thoughts.right[range(n), thoughts.answer_ticks - 1]
            curve.append(
                {
                    "threshold": threshold,
                    "accuracy": proportion(int(right.sum()), n, confidence),
                    "mean_steps": float(thoughts.ticks.mean()),
                    "seconds": round(seconds[threshold], 4),
                }
            )
        return {"n": n, "batch_size": batch_size, "curve": curve}

    def _think_and_stop(
        self, batches: Sequence[dict[str, torch.Tensor]], threshold: float | None
    ) -> tuple[float, Thoughts]:
        """Seconds of the forward passes under a threshold, and what came of them."""
        model, device = self.model.eval(), self.trainer.args.device
        seconds, parts = 0.0, []
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            started = time.perf_counter()
            with torch.no_grad(), without_stopping(model):
                outputs = model(**inputs, iterations=self.recipe.evaluation.iterations, certainty_threshold=threshold)
                outputs.ticks.cpu()  # waits for an accelerator
            seconds += time.perf_counter() - started
            losses = outputs.predictions.new_zeros(outputs.predictions.shape[2], len(labels))
            parts.append(think_in_ticks(outputs, labels, losses))
        return seconds, Thoughts(*(torch.cat(fields).cpu().numpy() for fields in zip(*parts, strict=True)))

    @staticmethod
    def results_table(metrics: dict[str, Any]) -> str:
        """The score of the test split, at which ticks, by difficulty, and under early stopping."""
        test = metrics["test"]

        def row(label: str, score: dict[str, Any], ticks: float | None) -> list[str]:
            low, high = score["interval"]
            shown = "-" if ticks is None else f"{ticks:.2f}"
            return [label, str(score["n"]), f"{score['value']:.3f}", f"[{low:.3f}, {high:.3f}]", shown]

        percent = f"{100 * test['accuracy']['confidence']:g} % interval"
        rows = [["", "n", "accuracy", percent, "mean ticks"]]
        rows.append(row("answer", test["accuracy"], test["mean_steps"]))
        rows += [row(f"at the {name.replace('_', ' ')} tick", score, None) for name, score in test["at_tick"].items()]
        if "reaches_goal" in test:
            rows.append(row("reaches the goal", test["reaches_goal"], test["mean_steps"]))
        rows += [
            row(f"difficulty {level['difficulty']}", level["accuracy"], level["mean_steps"])
            for level in test["by_difficulty"] or []
        ]
        for entry in test.get("stopping", {}).get("curve", []):
            if entry["threshold"] is not None:
                rows.append(row(f"stopping at {entry['threshold']:g}", entry["accuracy"], entry["mean_steps"]))
        rows.append(row("trivial", test["trivial"]["accuracy"], None))
        notes = [
            f"positions right {test['position_accuracy']:.4f}, calibration error "
            f"{test['calibration']['answer_tick']['ece']:.4f}",
            f"trivial = {test['trivial']['name']}",
        ]
        return "\n".join(["test split, share of answers with every position right:", aligned(rows), *notes])

    def write_reports(self, folder: Path, metrics: dict[str, Any]) -> None:
        internals = folder / "internals"
        internals.mkdir(exist_ok=True)
        test = metrics["test"]
        save_with_numbers(tick_figure(test), internals / "ticks.png", {"per_tick": test["per_tick"]})
        if "stopping" in test:
            save_with_numbers(stopping_figure(test["stopping"]), internals / "stopping.png", test["stopping"])
        examples = self.splits["test"]
        shown = min(self.recipe.evaluation.shown_examples, len(examples))
        if self.recipe.model_type not in MACHINES or shown == 0:
            return
        for number, watched in enumerate(watch(cast(Any, self.model), self.task, examples, range(shown))):
            self._write_watched(internals, number, watched)

    @staticmethod
    def _write_watched(internals: Path, number: int, watched: Watched) -> None:
        """The pictures of one example's thinking."""
        numbers = watched.numbers()
        save_with_numbers(neuron_figure(watched), internals / f"neurons_{number}.png", numbers["neurons"])
        save_with_numbers(
            synchronisation_figure(watched), internals / f"synchronisation_{number}.png", numbers["synchronisation"]
        )
        save_with_numbers(attention_strip(watched), internals / f"attention_{number}.png", numbers["attention"])
        if watched.picture is not None:
            write_animation(internals / f"attention_{number}.gif", attention_frames(watched))
        if watched.contexts is not None:
            save_with_numbers(weight_figure(watched), internals / f"dynamic_weights_{number}.png", numbers["contexts"])


KIND = Kind(
    name="thought",
    model_types=(*MACHINES, *BASELINES),
    sections={
        "task": ThoughtTaskArguments,
        "training": ThoughtTrainingArguments,
        "evaluation": ThoughtEvaluationArguments,
    },
    run=ThoughtRun,
    metrics=("accuracy", "position_accuracy", "loss"),
)

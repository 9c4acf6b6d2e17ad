"""From generated tokens to scored predictions, and from those to the numbers of `metrics.json`."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from model_cards.words import aligned

from .statistics import mean_interval, proportion
from .tasks import Example, Mixture, Task, TrivialPredictor


def decode_predictions(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Generated tokens `(examples, length)`, padded with -100, as text without special tokens."""
    tokens = np.where(tokens == -100, tokenizer.pad_token_id, tokens)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def score_predictions(
    task: Task, examples: Sequence[Example], predictions: Sequence[str], steps: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """One record per example, as `predictions.jsonl` holds them.

    A record's `correct` is `None` under a metric that knows only degrees; its `score`, from 0 to 1, then stands beside.
    A record of a mixture names its `component`.

    Args:
        task: gives the rule that scores.
        examples: in the order of the predictions.
        predictions: generated text.
        steps (`np.ndarray` of shape `(examples,)`, *optional*): reasoning steps used, -1 for a model without steps.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples")
    records = []
    for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        score = task.score(prediction, example)
        used = None if steps is None or steps[index] < 0 else int(steps[index])
        record: dict[str, Any] = {
            "id": example.id,
            "target": example.target,
            "prediction": prediction,
            "parsed": score.parsed,
            "correct": score.correct,
            "steps": used,
            "difficulty": task.difficulty(example),
        }
        if score.degree is not None:
            record["score"] = score.degree
        if (component := task.component(example)) is not None:
            record["component"] = component
        records.append(record)
    return records


def measure(metric: str, values: Sequence[float], confidence: float) -> dict[str, Any]:
    """The mean of scores with its interval: `{"value", "n", "interval", "confidence", "method"}`.

    Args:
        metric: "accuracy" for scores of 0 and 1, whose mean is a share; any other name for degrees from 0 to 1.
        values: a score per example, at least one.
        confidence: level of the interval, in (0, 1).
    """
    if metric == "accuracy":
        return proportion(int(sum(values)), len(values), confidence)
    if len(values) < 2:
        # One number tells nothing about its spread; all that is known is the range of the score.
        method = "none: a single example"
        return {"value": float(values[0]), "n": 1, "interval": [0.0, 1.0], "confidence": confidence, "method": method}
    return mean_interval(values, confidence)


def value_of(record: dict[str, Any]) -> float:
    """What the metric averages over records: the score, or 1 for right and 0 for wrong."""
    return float(record["score"] if "score" in record else bool(record["correct"]))


def summarise(
    records: Sequence[dict[str, Any]],
    confidence: float,
    trivial: dict[str, Any] | None = None,
    max_steps: int | None = None,
    truncated_inputs: int | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """The numbers of one split: the metric with its interval, steps, and both by difficulty and component.

    Args:
        records: as `score_predictions` returns them.
        confidence: level of the intervals, in (0, 1).
        trivial: the trivial predictor's summary, see `score_trivial`.
        max_steps: the upper bound of reasoning steps.
        truncated_inputs: number of examples whose source was cut.
        task: gives the metric, under whose name the numbers stand, and the components of a mixture; without it, the
            metric is accuracy.

    Raises:
        ValueError: if records of a metric of degrees come without their task.
    """
    if task is None and any("score" in record for record in records):
        raise ValueError("the records hold degrees; give the task that names their metric")
    metric = "accuracy" if task is None else task.metric

    def mean_steps(group: Sequence[dict[str, Any]]) -> float | None:
        used = [record["steps"] for record in group if record["steps"] is not None]
        return float(np.mean(used)) if used else None

    def part(label: str, name: Any, group: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
        measured = measure(metric, [value_of(record) for record in group], confidence)
        return {label: name, "n": len(group), metric: measured, "mean_steps": mean_steps(group)}

    levels: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    components: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["difficulty"] is not None:
            levels[record["difficulty"]].append(record)
        if "component" in record:
            components[record["component"]].append(record)
    # Levels may be numbers and words: numbers come first, in their order.
    ordered = sorted(levels.items(), key=lambda item: (isinstance(item[0], str), item[0]))
    by_difficulty = [part("difficulty", level, group, metric) for level, group in ordered]
    summary = {
        "n": len(records),
        metric: measure(metric, [value_of(record) for record in records], confidence),
        "unparseable": sum(record["parsed"] is None for record in records),
        "mean_steps": mean_steps(records),
        "max_steps": max_steps if mean_steps(records) is not None else None,
        "truncated_inputs": truncated_inputs,
        "trivial": trivial,
        "by_difficulty": by_difficulty or None,
    }
    if isinstance(task, Mixture):
        summary["by_component"] = [
            part("component", label, group, task.components[label].metric) for label, group in components.items()
        ]
    return summary


def score_trivial(
    task: Task, predictor: TrivialPredictor, examples: Sequence[Example], confidence: float
) -> dict[str, Any]:
    """The trivial predictor's score on the same examples, by the same rule; for a mixture, of each component too."""
    values = [task.score(predictor.predict(example), example).value for example in examples]
    summary: dict[str, Any] = {"name": predictor.name, task.metric: measure(task.metric, values, confidence)}
    if isinstance(task, Mixture):
        summary["by_component"] = []
        for label, component in task.components.items():
            own = [v for v, example in zip(values, examples, strict=True) if task.component(example) == label]
            if own:
                entry = {"component": label, component.metric: measure(component.metric, own, confidence)}
                summary["by_component"].append(entry)
    return summary


def accuracy_metric(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for the Trainer: the task's metric by generation on `examples`, and mean reasoning steps.

    The metric stands under its own name ("accuracy", "rouge_l"); for a mixture, each component's stands beside it as
    `<label>_<metric>`.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        # What `AdaptiveReasoningTrainer.prediction_step` returns, over all batches.
        tokens, steps, *_ = cast(tuple[np.ndarray, ...], prediction.predictions)
        records = score_predictions(task, examples, decode_predictions(tokens, tokenizer), steps)
        metrics = {task.metric: float(np.mean([value_of(record) for record in records]))}
        if isinstance(task, Mixture):
            for label, component in task.components.items():
                own = [value_of(record) for record in records if record["component"] == label]
                if own:
                    metrics[f"{label}_{component.metric}"] = float(np.mean(own))
        if (steps >= 0).all():
            metrics["mean_steps"] = float(steps.mean())
        return metrics

    return compute


def results_table(summary: dict[str, Any], metric: str = "accuracy") -> str:
    """A split's summary as aligned text: a line per difficulty level and component, the total, the trivial predictor.

    Args:
        summary: as [`summarise`] returns it.
        metric: name of the task's metric.
    """

    def cells(label: str, count: int, measured: dict[str, Any], steps: float | None) -> list[str]:
        low, high = measured["interval"]
        return [
            label,
            str(count),
            f"{measured['value']:.3f}",
            f"[{low:.3f}, {high:.3f}]",
            "-" if steps is None else f"{steps:.2f}",
        ]

    percent = f"{100 * summary[metric]['confidence']:g} % interval"
    components = summary.get("by_component") or []
    groups = summary["by_difficulty"] or components
    rows = [["component" if components else "difficulty", "n", metric, percent, "mean steps"]]
    for entry in groups:
        name = str(entry["component" if components else "difficulty"])
        # The one value with an interval; a component has its own metric.
        own = next(key for key, value in entry.items() if isinstance(value, dict))
        shown = name if own == metric else f"{name} ({own})"
        rows.append(cells(shown, entry["n"], entry[own], entry["mean_steps"]))
    rows.append(cells("all", summary["n"], summary[metric], summary["mean_steps"]))
    trivial = summary["trivial"]
    if trivial is not None:
        rows.append(cells("trivial", summary["n"], trivial[metric], None))
    note = "" if trivial is None else f"\ntrivial = {trivial['name']}"
    return aligned(rows) + note

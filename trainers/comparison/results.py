"""Finished run folders -> `comparison.json`: the numbers of a comparison, and nothing that changes from run to run.

The same code, data and seeds give the same file, bit for bit, in one process on a CPU. What a clock measured, and the
machine it ran on, stand apart in `timings.json`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from model_cards.run_folder import is_error

from ..errors import UserError, one_line
from ..files import read_records
from ..statistics import Components, compare_crossed, crossed_interval, holm, mcnemar, power, proportion, seeds_needed
from .cells import Cell, CellFolder, Outcome
from .plan import LEAST_SEEDS, Comparison

SCHEMA_VERSION = 1
Key = tuple[str, str, int | None, int]


@dataclass
class RunResult:
    """What a finished run left.

    Attributes:
        metrics: of `metrics.json`.
        ids: of the test examples, in the order of `predictions.jsonl`.
        scores: of these, `(examples,)`; 1 and 0 for right and wrong.
        record: of `recipe.yaml`.
    """

    metrics: dict[str, Any]
    ids: list[str]
    scores: np.ndarray
    record: dict[str, Any]

    @property
    def metric(self) -> str:
        return self.metrics["task"]["metric"]

    @property
    def binary(self) -> bool:
        return bool(np.isin(self.scores, (0, 1)).all()) and self.metric == "accuracy"


def read_run(folder: Path) -> RunResult:
    """Read a finished run folder.

    Raises:
        UserError: if a file is missing, damaged, or its lines hold no score.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        record = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        rows = read_records(folder / "predictions.jsonl")
        metric = metrics["task"]["metric"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a finished run: metrics.json tells no metric of a task") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: not a finished run: {one_line(error)}") from error
    scores = []
    for number, row in enumerate(rows, start=1):
        # A degree from 0 to 1, a quantity under the metric's own name, or right and wrong.
        held = row if isinstance(row, dict) else {}
        value = next((held[name] for name in ("score", metric, "correct") if held.get(name) is not None), None)
        if not isinstance(value, bool | int | float):
            raise UserError(
                f"{folder / 'predictions.jsonl'}: line {number} has no score, {metric} or correct: nothing to compare"
            )
        scores.append(float(value))
    ids = [str(row.get("id", number)) for number, row in enumerate(rows)]
    return RunResult(metrics, ids, np.array(scores), record)


def score_table(runs: Sequence[RunResult], where: str) -> np.ndarray:
    """Scores `(seeds, examples)` of runs on the same examples.

    Raises:
        UserError: if their test examples differ.
    """
    for run in runs[1:]:
        if run.ids != runs[0].ids:
            raise UserError(f"{where}: the runs were tested on different examples; remove them and run again")
    return np.stack([run.scores for run in runs])


def summary_of(runs: Mapping[int, RunResult], where: str, confidence: float, resamples: int) -> dict[str, Any]:
    """The result of one model on one task at one training size, over its seeds."""
    results = list(runs.values())
    table, first = score_table(results, where), results[0]
    test, train = first.metrics["test"], first.metrics["train"]
    accuracy = first.binary
    bounds = (0.0, 1.0) if accuracy else (-math.inf, math.inf)
    if accuracy and len(results) == 1:
        score = proportion(int(table.sum()), table.size, confidence) | {"seeds": 1}
    else:
        score = crossed_interval(table, confidence, resamples, bounds=bounds)
    trivial = test.get("trivial")
    low, high = score["interval"]
    beats = None
    if trivial is not None:
        level = trivial[first.metric]["value"]
        beats = high < level if is_error(first.metric) else low > level
    steps = [run.metrics["test"].get("mean_steps") for run in results]
    validation = _mean([_value(run.metrics["validation"], run.metric) for run in results])
    return {
        "seeds": list(runs),
        "metric": first.metric,
        "score": score,
        "per_seed": [float(value) for value in table.mean(1)],
        "standard_deviation_of_seeds": float(table.mean(1).std(ddof=1)) if len(results) > 1 else None,
        "validation": validation,
        "trivial": trivial,
        "beats_trivial": beats,
        "unparseable": _mean([run.metrics["test"].get("unparseable") for run in results]),
        "mean_steps": _mean(steps),
        "max_steps": test.get("max_steps"),
        "parameters": first.metrics["parameters"],
        "train_examples": train["examples"],
        "updates": _mean([run.metrics["train"]["steps"] for run in results]),
    }


def _value(section: Mapping[str, Any], metric: str) -> float | None:
    entry = section.get(metric)
    return entry.get("value") if isinstance(entry, Mapping) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) and known else None


def compare_two(
    first: Mapping[int, RunResult], second: Mapping[int, RunResult], where: str, comparison: Comparison
) -> dict[str, Any]:
    """The difference of two models over the seeds that both have."""
    plan = comparison.plan
    seeds = [seed for seed in first if seed in second]
    ours, theirs = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    table = score_table([*ours, *theirs], where)
    one, other = table[: len(seeds)], table[len(seeds) :]
    binary = ours[0].binary and theirs[0].binary
    alpha = 1 - plan.confidence
    result = compare_crossed(one, other, float(plan.confidence), plan.resamples, binary=binary)
    entry: dict[str, Any] = {
        "seeds": seeds,
        "metric": ours[0].metric,
        "lower_is_better": is_error(ours[0].metric),
        **result,
        "same_data": all(_fingerprint(a) == _fingerprint(b) for a, b in zip(ours, theirs, strict=True)),
    }
    if binary:
        entry["mcnemar_per_seed"] = [
            mcnemar(int((a > b).sum()), int((b > a).sum())) for a, b in zip(one, other, strict=True)
        ]
    if result["components"] is not None and any(result["components"].values()):
        parts, examples = Components(**result["components"]), table.shape[1]
        observed = abs(result["difference"]["value"])
        entry["power"] = {
            "level": alpha,
            "wished_difference": plan.difference,
            "chance_with_these_seeds": power(float(plan.difference), parts, len(seeds), examples, alpha),
            "seeds_for_wished": seeds_needed(float(plan.difference), parts, examples, alpha=alpha),
            "seeds_for_observed": seeds_needed(observed, parts, examples, alpha=alpha) if observed else None,
            "wished_chance": 0.8,
        }
    return entry


def _fingerprint(run: RunResult) -> str | None:
    return run.record.get("provenance", {}).get("data_fingerprint")


def verdict(entry: Mapping[str, Any], alpha: float) -> str:
    """A comparison in words; a difference that is not significant is called that."""
    seeds = len(entry["seeds"])
    if seeds < LEAST_SEEDS:
        return f"not judged: {seeds} of at least {LEAST_SEEDS} seeds"
    if entry["p_value_holm"] > alpha:
        return "no significant difference"
    higher = entry["difference"]["value"] > 0
    better = higher != entry["lower_is_better"]
    return f"{entry['first'] if better else entry['second']} is better"


def gather(
    comparison: Comparison, cells: Mapping[Key, Cell], folder: CellFolder, outcomes: Mapping[str, Outcome]
) -> tuple[dict[str, Any], dict[str, Any], dict[Key, RunResult]]:
    """Read all finished runs.

    Returns:
        The content of `comparison.json` and of `curves.json`, without costs, and the runs.
    """
    plan = comparison.plan
    confidence, alpha = float(plan.confidence), 1 - plan.confidence
    runs = {key: read_run(folder.run(cell)) for key, cell in cells.items() if folder.is_finished(cell)}

    def of(model: str, task: str, size: int | None) -> dict[int, RunResult]:
        return {seed: runs[model, task, size, seed] for seed in plan.seeds if (model, task, size, seed) in runs}

    results, comparisons, curves = [], [], []
    for task in comparison.tasks:
        for size in comparison.sizes:
            where = task if size is None else f"{task}@{size}"
            place = {"task": task, "train_size": size}
            for model in comparison.models:
                found = of(model, task, size)
                if not found:
                    continue
                results.append(
                    {**place, "model": model, **summary_of(found, f"{where}, {model}", confidence, plan.resamples)}
                )
                history = {str(seed): run.metrics.get("loss_history", []) for seed, run in found.items()}
                curves.append({**place, "model": model, "history": history})
                other = of(comparison.against, task, size) if model != comparison.against else {}
                if set(found) & set(other):
                    pair = compare_two(found, other, where, comparison)
                    comparisons.append({**place, "first": model, "second": comparison.against, **pair})
    for entry, adjusted in zip(comparisons, holm([entry["p_value"] for entry in comparisons]), strict=True):
        entry["p_value_holm"] = adjusted
        entry["verdict"] = verdict(entry, alpha)
    tasks = {name: _about_task(name, runs) for name in comparison.tasks}
    content = {
        "schema_version": SCHEMA_VERSION,
        "name": comparison.name,
        "models": {name: _about_model(name, comparison, runs) for name in comparison.models},
        "against": comparison.against,
        "tasks": {name: about for name, about in tasks.items() if about is not None},
        "seeds": plan.seeds,
        "statistics": {
            "confidence": confidence,
            "level": alpha,
            "resamples": plan.resamples,
            "interval": "crossed bootstrap over seeds and examples",
            "test": "the larger p-value of a permutation over runs and examples and a t test over both; Holm over all "
            "comparisons",
        },
        "results": results,
        "comparisons": comparisons,
        "parameters": _parameter_match(results, comparison),
        "failed": [
            {"cell": name, "reason": outcome.reason} for name, outcome in outcomes.items() if outcome.status == "failed"
        ],
        "missing": [
            cell.name
            for key, cell in cells.items()
            if key not in runs and getattr(outcomes.get(cell.name), "status", None) != "failed"
        ],
        "published": [asdict(entry) for entry in comparison.published],
        "claimed": [asdict(entry) for entry in comparison.claimed],
    }
    return content, {"schema_version": SCHEMA_VERSION, "curves": curves}, runs


def _about_model(name: str, comparison: Comparison, runs: Mapping[Key, RunResult]) -> dict[str, Any]:
    first = next((run for key, run in runs.items() if key[0] == name), None)
    entry = comparison.models[name]
    return {
        "model_type": first.metrics["model_type"] if first else None,
        "architecture": first.metrics["architecture"] if first else None,
        "matched_to": entry.matched_to,
        "own_training": entry.training,
        **({"taught": True} if "teacher_answers" in entry.task else {}),
        "configuration": {
            task: next((run.record.get("model") for key, run in runs.items() if key[:2] == (name, task)), None)
            for task in comparison.tasks
        },
    }


def _about_task(name: str, runs: Mapping[Key, RunResult]) -> dict[str, Any] | None:
    found = [run for key, run in runs.items() if key[1] == name and key[2] is None]
    if not found:
        return None
    by_seed: dict[int, set[str | None]] = {}
    for key, run in runs.items():
        if key[1] == name and key[2] is None:
            by_seed.setdefault(key[3], set()).add(_fingerprint(run))
    return {
        **found[0].metrics["task"],
        "test_examples": len(found[0].ids),
        "training": _settings(found[0].record.get("training") or {}),
        # Generated data may depend on the seed; for one seed all models must have the same.
        "same_data": all(len(fingerprints) == 1 for fingerprints in by_seed.values()),
    }


def _settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all runs of a task share; a number of updates overrules one of epochs."""
    left_out = {"seed", "disable_tqdm", *(("num_train_epochs",) if training.get("max_steps", -1) > 0 else ())}
    return {key: value for key, value in training.items() if key not in left_out}


def _parameter_match(results: Sequence[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    counts = {
        (entry["task"], entry["train_size"], entry["model"]): entry["parameters"]["trainable"] for entry in results
    }
    match = []
    for (task, size, model), count in counts.items():
        base = counts.get((task, size, comparison.against))
        if base is not None and model != comparison.against:
            off = count / base - 1
            match.append(
                {
                    "task": task,
                    "train_size": size,
                    "model": model,
                    "against": comparison.against,
                    "relative_difference": off,
                    "within_tolerance": abs(off) <= comparison.plan.tolerance,
                }
            )
    return match


def timings(runs: Mapping[Key, RunResult], latencies: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """The content of `timings.json`: what a clock measured, and on what machine and versions."""
    versions = sorted({json.dumps(run.metrics["versions"], sort_keys=True) for run in runs.values()})
    seconds: dict[tuple[str, str, int | None], list[float]] = {}
    for (model, task, size, _), run in runs.items():
        seconds.setdefault((model, task, size), []).append(run.metrics["train"]["seconds"])
    return {
        "schema_version": SCHEMA_VERSION,
        "hardware": sorted({run.metrics["train"]["hardware"] for run in runs.values()}),
        "precision": sorted({run.metrics["train"]["precision"] for run in runs.values()}),
        "versions": [json.loads(text) for text in versions],
        "revisions": sorted({str(run.record.get("provenance", {}).get("git_revision")) for run in runs.values()}),
        "training": [
            {
                "task": task,
                "train_size": size,
                "model": model,
                "seconds": values,
                "mean_seconds": float(np.mean(values)),
            }
            for (model, task, size), values in seconds.items()
        ],
        "total_training_seconds": float(sum(sum(values) for values in seconds.values())),
        "latency": [{"task": task, "model": model, **found} for (model, task), found in latencies.items()],
    }

"""Records, summaries and tables for metrics of right and wrong, of degrees, and of mixtures."""

import numpy as np
import pytest

from tests.trainers.tasks.tools import DATA, make_task
from trainers.evaluation import (
    accuracy_metric,
    measure,
    results_table,
    score_predictions,
    score_trivial,
    summarise,
    value_of,
)
from trainers.statistics import mean_interval, proportion
from trainers.tasks import Mixture


def mixture(*names: str) -> Mixture:
    return make_task("mixture", options={"components": [{"name": n, "data_dir": str(DATA / n)} for n in names]})


def test_measure():
    assert measure("accuracy", [1.0, 0.0, 1.0], 0.9) == proportion(2, 3, 0.9)
    degrees = [0.1, 0.5, 0.25, 0.0]
    assert measure("rouge_l", degrees, 0.9) == mean_interval(degrees, 0.9)
    single = measure("rouge_l", [0.3], 0.95)
    assert (single["value"], single["n"], single["interval"]) == (0.3, 1, [0.0, 1.0])


def test_degrees():
    task = make_task("commongen")
    examples = task.rows("test")
    predictions = [examples[0].references[1], *("nothing of it" for _ in examples[1:])]
    records = score_predictions(task, examples, predictions)
    assert records[0]["score"] == 1.0
    assert records[0]["correct"] is None
    trivial = score_trivial(task, task.trivial_predictor(task.rows("train")), examples, 0.95)
    summary = summarise(records, 0.95, trivial, task=task)
    assert summary["rouge_l"]["value"] == pytest.approx(np.mean([value_of(record) for record in records]))
    assert [entry["difficulty"] for entry in summary["by_difficulty"]] == [3, 4]
    assert sum(entry["n"] for entry in summary["by_difficulty"]) == summary["n"] == 5
    assert "accuracy" not in summary
    with pytest.raises(ValueError, match="give the task that names their metric"):
        summarise(records, 0.95, trivial)
    assert "rouge_l" in results_table(summary, "rouge_l").splitlines()[0]


def test_components_of_a_mixture_are_measured_apart():
    task = mixture("strategyqa", "logiqa")
    examples = task.rows("test")
    predictions = [e.target if task.component(e) == "logiqa" else "neither" for e in examples]
    records = score_predictions(task, examples, predictions)
    trivial = score_trivial(task, task.trivial_predictor(task.rows("train")), examples, 0.95)
    summary = summarise(records, 0.95, trivial, task=task)
    values = {entry["component"]: entry["accuracy"]["value"] for entry in summary["by_component"]}
    assert values == {"strategyqa": 0.0, "logiqa": 1.0}
    assert summary["accuracy"] == proportion(8, 20)
    rows = task.components["strategyqa"].rows("test")
    own = score_trivial(
        task.components["strategyqa"],
        task.components["strategyqa"].trivial_predictor(task.components["strategyqa"].rows("train")),
        rows,
        0.95,
    )
    assert trivial["by_component"][0]["accuracy"] == own["accuracy"]
    assert [line.split()[0] for line in results_table(summary).splitlines()[:3]] == [
        "component",
        "strategyqa",
        "logiqa",
    ]


def test_a_mixture_of_unlike_metrics():
    task = mixture("strategyqa", "commongen")
    examples = task.rows("test")
    summary = summarise(score_predictions(task, examples, [e.target for e in examples]), 0.95, task=task)
    assert summary["mean_score"]["value"] == 1.0
    assert summary["by_component"][0]["accuracy"]["method"] == "Wilson score"
    assert summary["by_component"][1]["rouge_l"]["value"] == 1.0
    table = results_table(summary, "mean_score")
    assert "commongen (rouge_l)" in table


def test_the_trainers_metric_has_the_tasks_name():
    task = mixture("strategyqa", "commongen")
    examples = task.rows("validation")
    tokenizer = task.build_tokenizer(task.rows("train"), 400)
    tokens = [tokenizer(example.target)["input_ids"] for example in examples]
    padded = np.full((len(tokens), max(map(len, tokens))), -100)
    for row, ids in zip(padded, tokens, strict=True):
        row[: len(ids)] = ids

    class Prediction:
        predictions = (padded, np.full(len(tokens), -1))

    found = accuracy_metric(task, examples, tokenizer)(Prediction())
    assert found == {"mean_score": 1.0, "strategyqa_accuracy": 1.0, "commongen_rouge_l": 1.0}


def test_levels_may_be_numbers_and_words():
    task = make_task("strategyqa")
    records = score_predictions(task, task.rows("test")[:3], ["Yes", "No", ""])
    for record, level in zip(records, ["b", 2, "a"], strict=True):
        record["difficulty"] = level
    assert [entry["difficulty"] for entry in summarise(records, 0.95)["by_difficulty"]] == [2, "a", "b"]

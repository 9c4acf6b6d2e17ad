"""Accuracy against steps from run folders: exact points of every rule, intervals, the picture, and mistakes."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr

from trainers.adaptivity import OnePassModel, at_equal_steps, main, rank_correlation, table
from trainers.errors import UserError
from trainers.tasks import TaskArguments, get_task
from trainers.train import main as train

OPTIONS = "{height: 3, width: 4, max_distance: 4, step_targets: rounds, num_train: 64, num_validation: 8, num_test: 30}"
SIZES = [
    "--model.hidden_size", "16", "--model.num_slots", "8", "--model.max_reasoning_steps", "4",
    "--model.max_position_embeddings", "14", "--max_steps", "3", "--disable_tqdm",
]  # fmt: skip
RECIPE = "recipes/connection_transformer/flood_fill/small.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    common = [RECIPE, "--task.options", OPTIONS, *SIZES]
    assert train([*common, "--output_dir", str(folder / "learned")]) == 0
    fixed = ["--model.halting", "none", "--model.max_reasoning_steps", "2"]
    assert train([*common, *fixed, "--output_dir", str(folder / "fixed")]) == 0
    return folder


def test_report_of_runs(runs, tmp_path, capsys):
    arguments = [str(runs / "learned"), "--fixed", str(runs / "fixed"), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--bound", "6", "--thresholds", "0.5", "1", "--batch_size", "7"]) == 0
    numbers = json.loads((tmp_path / "out" / "adaptivity.json").read_text())
    (curve,), (point,) = numbers["runs"], numbers["fixed"]
    assert [entry["mean_steps"] for entry in curve["cut_off"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["threshold"] for entry in curve["adaptive"]] == [0.1, 0.5, 1]
    # Every probability is at most one, so all stop after the first step.
    last = curve["adaptive"][-1]
    assert (last["mean_steps"], last["accuracy"]) == (1, curve["cut_off"][0]["accuracy"])
    assert last["cut_off_at_equal_steps"] == last["accuracy"]["value"]
    assert last["steps_and_difficulty"]["value"] is None
    assert (point["run"], point["mean_steps"]) == ("fixed", 2)
    records = [json.loads(line) for line in (runs / "fixed" / "predictions.jsonl").read_text().splitlines()]
    rows = get_task(TaskArguments(name="flood_fill", options=yaml.safe_load(OPTIONS))).rows("test")
    right = {row.prompt: record["correct"] for row, record in zip(rows, records, strict=True)}
    assert point["accuracy"]["value"] == pytest.approx(sum(right.values()) / len(right))
    assert point["accuracy"]["n"] == len(right) < len(rows)
    assert (tmp_path / "out" / "adaptivity.png").read_bytes().startswith(b"\x89PNG")
    assert "learned: threshold 0.1 (recipe): accuracy" in capsys.readouterr().out


def test_the_table_tells_the_rank_correlation():
    entry = {"threshold": 0.5, "accuracy": {"value": 0.9, "interval": [0.8, 0.95]}, "mean_steps": 2.5}
    entry |= {
        "cut_off_at_equal_steps": 0.7,
        "milliseconds_per_example": 1.5,
        "steps_and_difficulty": {"value": 0.4321, "interval": [0.1, 0.6]},
    }
    numbers = {"runs": [{"run": "r", "threshold": 0.5, "adaptive": [entry], "cut_off": []}], "fixed": []}
    assert "r: threshold 0.5 (recipe): accuracy 0.900 at 2.50 steps" in table(numbers)
    assert "Spearman 0.432 [0.100, 0.600]" in table(numbers)
    entry["steps_and_difficulty"] = {"value": None, "interval": None}
    assert "steps do not vary" in table(numbers)


def test_points_equal_the_model_on_each_example(runs):
    model = OnePassModel(runs / "learned", {}, batch_size=8)
    measured = model.measure("learned", 0.6, 4)
    config = model.model.config
    config.halting_threshold = 0.6
    for index, example in enumerate(model.examples):
        ids = torch.tensor([model.task.encode(example, model.tokenizer)["input_ids"]])
        with torch.no_grad():
            outputs = model.model(input_ids=ids)
        marks = model.tokenizer.decode(outputs.logits[0, :12].argmax(-1))
        ended = outputs.logits[0].argmax(-1).tolist().index(2) if 2 in outputs.logits[0].argmax(-1) else 13
        assert measured["steps"][index] == outputs.reasoning_steps.item()
        assert measured["right"][index] == (marks == example.answer and ended == 12)


def test_other_options_of_the_task(runs):
    model = OnePassModel(runs / "learned", {"min_distance": 5, "max_distance": 5, "num_test": 3}, batch_size=8)
    assert {example.difficulty for example in model.examples} == {5}
    assert len(model.examples) == len({example.prompt for example in model.examples}) <= 3


def test_rank_correlation():
    random = np.random.default_rng(1)
    difficulty = random.integers(1, 9, size=400)
    steps = difficulty + random.integers(0, 4, size=400)
    found = rank_correlation(steps, difficulty)
    assert found["value"] == pytest.approx(spearmanr(steps, difficulty).statistic)
    low, high = found["interval"]
    assert low < found["value"] < high < 1
    # Fisher's interval, widened for ranks by Fieller, Hartley and Pearson (1957).
    half = 1.96 * np.sqrt(1.06 / 397)
    expected = np.tanh(np.arctanh(found["value"]) + np.array([-half, half]))
    assert found["interval"] == pytest.approx(expected, abs=0.02)
    assert rank_correlation(np.full(5, 3), np.arange(5))["interval"] is None


def test_equal_steps():
    curve = [{"mean_steps": float(k), "accuracy": {"value": value}} for k, value in ((1, 0.2), (2, 0.6), (3, 0.5))]
    assert at_equal_steps(curve, 1.25) == pytest.approx(0.3)
    assert at_equal_steps(curve[::-1], 3.0) == 0.5
    assert at_equal_steps(curve, 3.5) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{runs}/fixed"], "the run has no stopping rule; name it after --fixed"),
        (["{runs}/learned", "--fixed", "{runs}/learned"], "only runs with model.halting none are fixed"),
        (["{runs}/learned", "--bound", "0"], "--bound: 0; it must be at least 1"),
        (["{runs}/learned", "--thresholds", "-1"], "--thresholds: -1.0; they must not be negative"),
        (["{runs}/learned", "--task_options", "[1]"], "--task_options: must be a mapping"),
        (["{runs}/learned", "--task_options", "{walls"], "--task_options: not valid YAML: {walls"),
        (["{runs}/learned", "--task_options", "{walls: 1}"], "task.options: unknown option 'walls'"),
        (["{runs}"], "cannot read the recipe of the run"),
    ],
)
def test_mistakes_are_told_in_one_line(runs, tmp_path, arguments, message, capsys):
    arguments = [argument.format(runs=runs) if "{runs}" in argument else argument for argument in arguments]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.adaptivity.read_record", lambda path: {})
    monkeypatch.setattr("trainers.adaptivity.load_model", lambda *args, **options: (torch.nn.Linear(1, 1), object()))
    with pytest.raises(UserError, match="a Linear does not answer in one pass with a stopping rule"):
        OnePassModel(tmp_path, {}, 8)

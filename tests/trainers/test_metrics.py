"""The metrics as the `evaluate` library loads them: offline, and with the tasks' own scores."""

from pathlib import Path

import evaluate
import pytest

from tests.trainers.tasks.tools import make_task
from trainers import metrics
from trainers.metrics import METRICS, metric_path

TEXTS = ["", "No.", "yes and no", "(C) of course", "The answer: B", "E", "about 12", "#### 1,000", "A wave rolls in."]


def load(name: str) -> evaluate.Metric:
    return evaluate.load(metric_path(name))


def test_every_folder_is_listed():
    folders = {path.parent.name for path in Path(metrics.__file__).parent.glob("*/__init__.py")}
    assert folders == set(METRICS)
    with pytest.raises(ValueError, match="unknown metric 'bleu'; there are exact_match"):
        metric_path("bleu")


@pytest.mark.parametrize(
    ("name", "task"), [("yes_no", "strategyqa"), ("option_letter", "commonsenseqa"), ("final_number", "gsm8k")]
)
def test_scores_are_those_of_the_task(name, task):
    task = make_task(task)
    examples = (task.rows("train") + task.rows("test"))[:20]
    predictions = [example.target if index % 3 else TEXTS[index % 9] for index, example in enumerate(examples)]
    scores = [task.score(p, e) for p, e in zip(predictions, examples, strict=True)]
    found = load(name).compute(predictions=predictions, references=[example.answer for example in examples])
    assert found["accuracy"] == sum(score.correct for score in scores) / 20
    assert found["unparseable"] == sum(score.parsed is None for score in scores) > 0
    assert 0 < found["accuracy"] < 1


def test_rouge_l():
    task = make_task("commongen")
    examples = task.rows("test")
    predictions = TEXTS[-1:] + [example.references[-1] for example in examples[1:]]
    found = load("rouge_l").compute(predictions=predictions, references=[list(e.references) for e in examples])
    assert found["rouge_l"] == pytest.approx(
        sum(task.score(p, e).value for p, e in zip(predictions, examples, strict=True)) / len(examples)
    )


def test_exact_match():
    found = load("exact_match").compute(predictions=["Ada.", "Bob", "?"], references=[["ada"], ["Al", "bob"], ["x"]])
    assert found == {"accuracy": 2 / 3}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("yes_no", "reference 1 holds neither yes nor no: 'perhaps'"),
        ("final_number", "reference 0 holds no number: 'Yes'"),
        ("option_letter", "reference 0 is 'Yes', which is none of the letters ABCDE"),
    ],
)
def test_references_are_checked(name, rule):
    with pytest.raises(ValueError, match=rule):
        load(name).compute(predictions=["", ""], references=["Yes", "perhaps"])

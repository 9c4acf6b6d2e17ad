"""Mixtures of tasks, and targets that a teacher gave."""

import json
from collections import Counter

import pytest

from tests.trainers.tasks.tools import DATA, make_task
from trainers.errors import UserError
from trainers.tasks import SplitReport
from trainers.tasks.mixture import largest_remainders

LOCAL = {name: {"name": name, "data_dir": str(DATA / name)} for name in ("strategyqa", "commonsenseqa", "eli5")}


def mixture(*components, **options):
    arguments = {name: options.pop(name) for name in list(options) if name.startswith("max_")}
    return make_task("mixture", options={"components": list(components)} | options, **arguments)


def test_shares():
    assert largest_remainders({"a": 1, "b": 1, "c": 1}, 10) == {"a": 4, "b": 3, "c": 3}
    assert largest_remainders({"a": 0.1, "b": 2.9}, 30) == {"a": 1, "b": 29}
    assert largest_remainders({"a": 5, "b": 1}, 3) == {"a": 3, "b": 0}
    for total in range(50):
        counts = largest_remainders({"a": 0.3, "b": 1.7, "c": 0.01}, total)
        assert sum(counts.values()) == total
        assert all(abs(counts[n] - total * w / 2.01) < 1 for n, w in {"a": 0.3, "b": 1.7, "c": 0.01}.items())


def test_training_examples_come_in_the_given_shares():
    task = mixture(LOCAL["strategyqa"] | {"weight": 3}, LOCAL["commonsenseqa"], num_train=100)
    train = task.rows("train")
    counts = Counter(task.component(example) for example in train)
    assert counts == {"strategyqa": 75, "commonsenseqa": 25}
    assert len({example.id for example in train}) == 100
    own = {f"strategyqa/{e.id}": e for e in task.components["strategyqa"].rows("train")}
    taken = Counter(example.id.split("#")[0] for example in train if task.component(example) == "strategyqa")
    assert set(taken.values()) == {75 // len(own), 75 // len(own) + 1}  # all once before any again
    assert all(own[e.id.split("#")[0]].prompt == e.prompt for e in train if e.id.split("#")[0] in own)
    first = [task.component(example) for example in train[:40]]
    assert {"strategyqa", "commonsenseqa"} == set(first)
    assert mixture(LOCAL["strategyqa"] | {"weight": 3}, LOCAL["commonsenseqa"], num_train=100).rows("train") == train
    assert mixture(LOCAL["strategyqa"], LOCAL["commonsenseqa"], seed=1).rows("train") != train


def test_test_examples_are_those_of_the_components():
    task = mixture(LOCAL["strategyqa"], LOCAL["commonsenseqa"] | {"label": "everyday"})
    expected = [f"strategyqa/{e.id}" for e in make_task("strategyqa").rows("test")]
    expected += [f"everyday/{e.id}" for e in make_task("commonsenseqa").rows("test")]
    assert [example.id for example in task.rows("test")] == expected
    assert len(mixture(*list(LOCAL.values())[:2], max_test_samples=7).rows("test")) == 7
    assert task.report("test") == SplitReport(examples=20)
    assert "strategyqa, 50 % of training (local files" in task.source
    assert task.license == "strategyqa: MIT; everyday: MIT"


def test_an_example_is_treated_as_in_its_component():
    task = mixture(*LOCAL.values(), max_source_length=8, max_target_length=10)
    assert task.metric == "mean_score"
    tokenizer = task.build_tokenizer(task.rows("train"), 500)
    long = {task.component(e): e for e in task.rows("test")}
    own = make_task("eli5", max_source_length=8, max_target_length=10)
    inner = next(e for e in own.rows("test") if f"eli5/{e.id}" == long["eli5"].id)
    assert task.encode(long["eli5"], tokenizer) == own.encode(inner, tokenizer)
    with pytest.raises(UserError, match=r"question and options of example commonsenseqa/made-"):
        task.encode(long["commonsenseqa"], tokenizer)
    assert task.score("yes", long["strategyqa"]).parsed == "Yes"
    assert task.score("(B)", long["commonsenseqa"]).parsed == "B"
    assert task.score("so it is", long["eli5"]).degree is not None
    predictor = task.trivial_predictor(task.rows("train"))
    assert predictor.name.count("training split") == 3
    assert predictor.predict(long["strategyqa"]) in ("Yes", "No")


def test_what_one_component_is_tested_on_another_neither_trains_nor_chooses_on(tmp_path):
    test = [e.prompt for e in make_task("strategyqa").rows("test")]
    splits = {
        "train": [*test[:3], "Is it so?", "Or not?"],
        "validation": [test[3], "Is that so?"],
        "test": ["Unrelated?"],
    }
    for split, questions in splits.items():
        rows = [{"question": question, "answer": True} for question in questions]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = {"name": "strategyqa", "label": "other", "data_dir": str(tmp_path)}
    task = mixture(LOCAL["strategyqa"], other)
    for split, leaked in (("train", 3), ("validation", 1)):
        assert not {e.prompt for e in task.rows(split)} & set(test)
        assert task.report(split).leaked == leaked
    assert len(task.rows("test")) == len(test) + 1


@pytest.mark.parametrize(
    ("components", "rule"),
    [
        ([], "task.options.components: a mixture needs at least two tasks"),
        (["gsm8k", "eli5"], "components[0]: must be a mapping with the name of a task"),
        ([{"name": "gsm8"}, LOCAL["eli5"]], "task.name: unknown task 'gsm8'; did you mean 'gsm8k'?"),
        (
            [{"name": "gsm8k", "wieght": 2}, LOCAL["eli5"]],
            "components[0]: unknown field 'wieght'; did you mean 'weight'",
        ),
        ([{"name": "gsm8k", "weight": 0}, LOCAL["eli5"]], "components[0].weight: must be a number above 0, got 0"),
        ([LOCAL["eli5"], LOCAL["eli5"]], "components[1].label: 'eli5' occurs twice"),
        ([LOCAL["eli5"], {"name": "gsm8k", "label": "a/b"}], "components[1].label: must be text without '/'"),
        ([LOCAL["eli5"], {"name": "mixture"}], "components[1].name: a mixture cannot hold another"),
        ([LOCAL["eli5"], {"name": "gsm8k", "split_seed": -1}], "components[1]: split_seed is -1"),
    ],
)
def test_mistakes_are_one_line(components, rule):
    with pytest.raises(UserError) as caught:
        mixture(*components)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("option", "rule"), [("num_train", "is 0; it must be at least 1"), ("seed", "is -1; it must")])
def test_sizes_are_checked(option, rule):
    with pytest.raises(UserError, match=f"task.options: {option} {rule}"):
        mixture(LOCAL["eli5"], LOCAL["strategyqa"], **{option: {"num_train": 0, "seed": -1}[option]})


def test_the_data_belong_to_the_components():
    with pytest.raises(UserError, match=r"task.data_dir: belongs to the components of a mixture; write it there"):
        make_task("mixture", data_dir="data", options={"components": [LOCAL["eli5"], LOCAL["strategyqa"]]})


def teacher(tmp_path, records):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_teachers_answers_are_learned_in_the_place_of_the_targets(tmp_path):
    gold = make_task("gsm8k", options={"target": "rationale"})
    train = gold.rows("train")
    records = [{"id": e.id, "prediction": f" I think.\n#### {e.answer} "} for e in train[:5]]
    records += [{"id": train[5].id, "prediction": "#### -1"}, {"id": train[6].id, "prediction": "  "}]
    path = teacher(tmp_path, records)
    task = make_task("gsm8k", teacher_answers=path)
    assert [e.id for e in task.rows("train")] == [e.id for e in train[:6]]
    assert task.rows("train")[0].target == f"I think.\n#### {train[0].answer}"
    assert task.rows("train")[0].answer == train[0].answer
    assert task.report("train").without_teacher == len(train) - 6
    for split in ("validation", "test"):
        assert task.rows(split) == make_task("gsm8k").rows(split)
    right = make_task("gsm8k", teacher_answers=path, teacher_filter="correct")
    assert [e.id for e in right.rows("train")] == [e.id for e in train[:5]]


def test_a_teachers_file_that_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"task.teacher_answers: .*gone.jsonl is no .jsonl file"):
        make_task("gsm8k", teacher_answers=str(tmp_path / "gone.jsonl")).rows("train")
    path = teacher(tmp_path, [{"id": "elsewhere", "prediction": "1"}])
    with pytest.raises(UserError, match=r"holds no usable answer to any train example of gsm8k"):
        make_task("gsm8k", teacher_answers=path).rows("train")
    path = teacher(tmp_path, [{"id": "elsewhere"}])
    with pytest.raises(UserError, match=r"row 1, prediction: missing; the row has id"):
        make_task("gsm8k", teacher_answers=path).rows("train")
    with pytest.raises(UserError, match=r"task.teacher_answers: pointer_chase is generated"):
        make_task("pointer_chase", teacher_answers=path)

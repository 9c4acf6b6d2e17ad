"""A task from named columns, and a task from a file of one's own."""

import json
import re

import datasets
import pytest
import yaml

from tests.trainers.tasks.tools import COLUMNS, DATA, make_task
from trainers.errors import UserError
from trainers.tasks import TaskArguments, get_task

README = (DATA.parents[1] / "trainers" / "tasks" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def write(folder, split, *rows):
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def columns(folder, row, split="test", **options):
    write(folder, split, row)
    return make_task("columns", data_dir=str(folder), options=options)


def example_of(folder, row, **options):
    return columns(folder, row, **options).rows("test")[0]


def test_columns_give_what_the_named_task_gives():
    own, task = make_task("commonsenseqa"), make_task("columns", options=COLUMNS)
    for split in ("train", "validation", "test"):
        kept = [(e.prompt, e.target, e.answer, e.num_options) for e in task.rows(split)]
        assert kept == [(e.prompt, e.target, e.answer, e.num_options) for e in own.rows(split)]
    example = own.rows("test")[0]
    assert task.score(f"({example.answer})", example) == own.score(f"({example.answer})", example)


def test_exact_match(tmp_path):
    row = {"meta": {"q": " Who? "}, "a": ["Ada  Lovelace", "Lovelace"], "text": "Long ago.", "level": 2, "key": "x1"}
    names = {"question": "meta.q", "answer": "a", "context": "text", "difficulty": "level", "id": "key"}
    task = columns(tmp_path, row, **names)
    (example,) = task.rows("test")
    assert (example.id, example.prompt, example.target) == ("x1", "Long ago.\nWho?", "Ada  Lovelace")
    assert example.difficulty == 2
    for right in ("ada lovelace", " Lovelace. ", "“Lovelace”".strip("“”"), "LOVELACE!"):
        assert task.score(right, example).correct, right
    for wrong in ("Ada", "Lovelace, Ada", ".", ""):
        assert not task.score(wrong, example).correct, wrong
    assert task.score("...", example).parsed is None
    assert (task.metric, task.license, task.source) == ("accuracy", "not stated", "local files")


@pytest.mark.parametrize(("value", "target"), [(True, "Yes"), (False, "No"), (12, "12"), (0.5, "0.5")])
def test_answers_that_are_no_text(tmp_path, value, target):
    assert example_of(tmp_path, {"question": "Is it?", "answer": value}).target == target


def test_number(tmp_path):
    task = columns(tmp_path, {"question": "How many?", "answer": "1,000"}, metric="number")
    (example,) = task.rows("test")
    assert example.target == "1000"
    assert task.score("It is $1000.00.", example).correct
    assert not task.score("It is 100", example).correct


def test_rouge(tmp_path):
    task = columns(tmp_path, {"question": "Why?", "answer": ["a b c d", "x"]}, metric="rouge_l", license="CC0")
    (example,) = task.rows("test")
    assert (task.metric, task.license) == ("rouge_l", "CC0")
    assert task.score("a c", example).value == pytest.approx(2 / 3)
    assert task.trivial_predictor([example]).name.startswith(("repeats", "always"))


@pytest.mark.parametrize("answer", [1, "B", "(b)", "green  light", "B."])
def test_ways_to_name_an_option(tmp_path, answer):
    row = {"question": "Which?", "answer": answer, "o": ["red", "green light", "blue"]}
    example = example_of(tmp_path, row, options="o", metric="choice")
    assert (example.prompt, example.target) == ("Which?\n(A) red\n(B) green light\n(C) blue", "B")


@pytest.mark.parametrize(
    ("row", "options", "rule"),
    [
        ({"question": "Why?"}, {}, "answer: missing; the row has question"),
        ({"question": {"a": 1}, "answer": "x"}, {"question": "question.q"}, "question.q: missing; question has a"),
        ({"question": "Why?", "answer": None}, {}, "answer: must be text, got null"),
        ({"question": "Why?", "answer": []}, {}, "answer: must hold at least one answer"),
        ({"question": "Why?", "answer": "some"}, {"metric": "number"}, "must be one number for the metric number"),
        ({"question": "Why?", "answer": "x", "l": 1.5}, {"difficulty": "l"}, "l: must be text, got a number (1.5)"),
        ({"answer": 3, "o": ["a", "b"]}, {}, "is 3, but the 2 options are counted from 0 to 1"),
        ({"answer": "C", "o": ["x", "y"]}, {}, "is 'C', which is neither one of the options nor a letter from A to B"),
        ({"answer": "x", "o": ["x"]}, {}, "o: must be a list of 2 to 26 options"),
        ({"answer": "x", "o": ["x", " "]}, {}, "o[1]: must not be empty"),
        ({"answer": "p", "o": ["x", "y"], "l": ["p"]}, {"labels": "l"}, "l: must be a list of 2 labels"),
        (
            {"answer": "r", "o": ["x", "y"], "l": ["p", "q"]},
            {"labels": "l"},
            "is 'r', which is none of the labels p, q",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_one_line(tmp_path, row, options, rule):
    if "o" in row:
        row, options = {"question": "Which?"} | row, {"options": "o", "metric": "choice"} | options
    with pytest.raises(UserError) as caught:
        example_of(tmp_path, row, **options)
    assert rule in str(caught.value)
    assert "test.jsonl, row 1, " in str(caught.value)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"metric": "choice"}, "metric is choice, but options names no column"),
        ({"options": "o"}, "options names a column, but metric is exact_match; it is read for choice only"),
        ({"splits": {"dev": "test"}}, "splits maps 'dev' to 'test'; it must map train, validation, test to names"),
        ({"metric": "bleu"}, "metric"),
        ({"question_column": "q"}, "unknown option 'question_column'"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, rule):
    with pytest.raises(UserError) as caught:
        make_task("columns", options=options)
    assert rule in str(caught.value)


def test_columns_need_data():
    with pytest.raises(UserError, match=r"task.data_dir: columns needs a folder with the data, or task.hub_id"):
        make_task("columns", data_dir=None).rows("test")


def test_columns_of_a_data_set_on_the_hub(monkeypatch):
    calls = []

    def load_dataset(path, config=None, *, revision=None, split=None):
        calls.append((path, config, revision, split))
        lines = (DATA / "gsm8k" / f"{'train' if split == 'all' else 'test'}.jsonl").read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = {"hub_id": "user/sums", "hub_config": "main", "hub_revision": "v1", "data_dir": None}
    task = make_task("columns", **arguments, options={"splits": {"train": "all"}, "metric": "rouge_l"})
    assert len(task.rows("train")) + len(task.rows("validation")) == 36
    assert {call[3] for call in calls} == {"all", "test"}
    assert calls[0][:3] == ("user/sums", "main", "v1")
    assert (task.source, task.dataset_id) == ("user/sums (main) at v1", "user/sums")


def test_one_file_is_divided_into_all_splits(tmp_path):
    rows = [
        {"question": f"Which animal has {i} {w}?", "answer": w} for i, w in enumerate(["legs", "eyes", "ears"] * 10)
    ]
    write(tmp_path, "train", *rows)
    task = make_task("columns", data_dir=str(tmp_path), test_fraction=0.2, validation_fraction=0.25)
    assert [len(task.rows(split)) for split in ("train", "validation", "test")] == [18, 6, 6]


def test_the_readmes_recipe(tmp_path):
    values = yaml.safe_load(blocks("yaml")[0])["task"]
    rows = [
        {"query": f"Capital of {name}?", "solution": name[::-1], "level": 1} for name in ("Oz", "Erewhon", "Utopia")
    ]
    write(tmp_path, "test", *rows)
    task = get_task(TaskArguments(**values | {"data_dir": str(tmp_path)}))
    assert [example.answer for example in task.rows("test")] == ["zo", "nohwere", "aipotu"]
    assert task.license == "CC BY 4.0"


def test_the_readmes_task(tmp_path):
    (tmp_path / "capitals.py").write_text(blocks("python")[0])
    countries = ["Norway Oslo", "Peru Lima", "Kenya Nairobi", "Japan Tokyo", "Chile Santiago"]
    rows = [dict(zip(("country", "capital"), pair.split(), strict=True)) for pair in countries]
    write(tmp_path, "train", *rows[:4])
    write(tmp_path, "test", *rows[4:])
    name = str(tmp_path / "capitals.py")
    task = make_task_of_file(name, tmp_path)
    assert (task.name, len(task.rows("train")), len(task.rows("validation"))) == ("capitals", 3, 1)
    (example,) = task.rows("test")
    assert task.score("santiago ", example).correct
    write(tmp_path, "test", {"country": "17", "capital": "x"})
    with pytest.raises(UserError, match=r"test.jsonl, row 1, country: must be a name, got '17'"):
        make_task_of_file(name, tmp_path).rows("test")


def make_task_of_file(name: str, data_dir):
    return get_task(TaskArguments(name=name, data_dir=str(data_dir), validation_fraction=0.25))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "does not exist"),
        ("import trainers.nothing", "fails: ModuleNotFoundError: No module named 'trainers.nothing'"),
        ("from trainers.tasks import GSM8K", "must define one task with a name and all methods; it has none"),
        (
            "from trainers.tasks import GSM8K\nclass A(GSM8K): pass\nclass B(GSM8K): pass",
            "must define one task with a name and all methods; it has A, B",
        ),
    ],
)
def test_a_file_that_is_no_task_is_one_line(tmp_path, content, rule):
    path = tmp_path / "task.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        make_task_of_file(str(path), tmp_path)
    assert str(caught.value).startswith(f"task.name: {path} ")
    assert rule in str(caught.value)

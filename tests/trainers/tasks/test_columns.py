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


def test_prefix_language_modelling(tmp_path):
    """The task that a recipe names by its file: the first half of a text's words is read, the second written."""
    name = str(DATA.parents[1] / "trainers" / "tasks" / "prefix_language_modelling.py")
    write(tmp_path, "train", *({"text": f"{number} the cat sat"} for number in range(30)))
    write(tmp_path, "test", {"text": " one  two\nthree four five "})
    task = get_task(TaskArguments(name=name, data_dir=str(tmp_path), max_source_length=6, max_target_length=5))
    (example,) = task.rows("test")
    assert (example.prompt, example.target, example.answer) == ("one two", "three four five", "three four five")
    assert [task.score(text, example).value for text in ("three four five", "three five", "", "six")] == [1, 0.8, 0, 0]
    assert (task.score("six", example).correct, task.metric) == (None, "rouge_l")
    assert task.trivial_predictor(task.rows("train")).predict(example) in ("one two", task.rows("train")[0].answer)
    tokenizer = task.build_tokenizer(task.rows("train"), 300)
    encoded, end = task.encode(example, tokenizer), tokenizer.eos_token_id
    read, written = tokenizer(example.prompt)["input_ids"], tokenizer(example.target)["input_ids"]
    assert len(read) > 6
    assert len(written) > 5
    assert encoded == {"input_ids": [*read[-6:-1], end], "labels": [*written[:4], end]}, "beginning and end are lost"
    assert task.truncated([example]) == 1
    write(tmp_path, "test", {"text": "one"})
    with pytest.raises(UserError, match=r"test.jsonl, row 1, text: must hold two words at least"):
        get_task(TaskArguments(name=name, data_dir=str(tmp_path))).rows("test")


def test_what_is_too_long(tmp_path):
    """An answer is cut only where overlap is scored; of a lettered question the options are kept."""
    write(tmp_path, "test", {"question": "what is it?", "answer": "the number 5 and no other"})
    tokenizer = make_task("columns", data_dir=str(tmp_path)).build_tokenizer([], 300)
    for metric in ("rouge_l", "exact_match"):
        task = make_task("columns", data_dir=str(tmp_path), options={"metric": metric}, max_target_length=4)
        example = task.rows("test")[0]
        whole = tokenizer(example.target)["input_ids"]
        if metric == "rouge_l":
            assert task.encode(example, tokenizer)["labels"] == [*whole[:3], tokenizer.eos_token_id]
        else:
            with pytest.raises(UserError, match=rf"max_target_length: 4, but the target of .* has {len(whole)} tokens"):
                task.encode(example, tokenizer)
    options = {"metric": "choice", "options": "options", "context": "text"}
    row = {"text": "long ago " * 20, "question": "Who?", "options": ["Ada", "Bo"], "answer": "Bo"}
    write(tmp_path, "test", row)
    for room, kept in ((64, "Who?\n(A) Ada\n(B) Bo"), (12, None)):
        task = make_task("columns", data_dir=str(tmp_path), options=options, max_source_length=room)
        example = task.rows("test")[0]
        if kept is None:
            with pytest.raises(UserError, match="max_source_length"):
                task.encode(example, tokenizer)
        else:
            ids = task.encode(example, tokenizer)["input_ids"]
            assert len(ids) <= room
            assert tokenizer.decode(ids, skip_special_tokens=True).endswith(kept)


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

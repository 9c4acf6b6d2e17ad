"""The fields, prompts and rules of each data set beyond the first three, and what a bad row says."""

import json

import datasets
import pytest

from tests.trainers.tasks.tools import DATA, make_task
from trainers.errors import UserError
from trainers.tasks import Example

CHOICE = {
    "id": "q",
    "question": "Which one?",
    "choices": {"label": ["A", "B", "C"], "text": ["x", "y", "z"]},
    "answerKey": "B",
}
PAIR = {"pairID": "1n", "premise": "It rains.", "hypothesis": "It\n is wet.", "genre": "fiction", "label": 1}
CONCEPTS = {"concept_set_idx": 0, "concepts": ["dog", "run"], "target": "A dog runs."}
THREAD = {"q_id": "a", "title": "Why?", "selftext": "", "answers": {"text": ["So.", "Thus."], "score": [1, 5]}}


def rows(tmp_path, name, split, *values, **arguments):
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return make_task(name, data_dir=str(tmp_path), **arguments).rows("test")


def test_commonsenseqa(tmp_path):
    (example,) = rows(tmp_path, "commonsenseqa", "validation", CHOICE)
    assert example == Example(id="q", prompt="Which one?\n(A) x\n(B) y\n(C) z", target="B", answer="B", num_options=3)


def test_arc_labels_become_letters(tmp_path):
    values = CHOICE | {"choices": {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}, "answerKey": "3"}
    (example,) = rows(tmp_path, "arc_easy", "test", values)
    assert example.target == "C"
    task = make_task("arc_easy")
    assert task.score("(C)", example).correct
    assert task.score("D", example).parsed is None  # there are three options
    assert task.score("3", example).parsed is None


def test_both_parts_of_arc_have_files_and_configurations_of_their_own():
    easy, challenge = make_task("arc_easy"), make_task("arc_challenge")
    assert [len(easy.rows(split)) for split in ("train", "validation", "test")] == [12, 4, 4]
    assert [len(challenge.rows(split)) for split in ("train", "validation", "test")] == [8, 4, 4]
    assert (easy.arguments.hub_config, challenge.arguments.hub_config) == ("ARC-Easy", "ARC-Challenge")


def test_multinli(tmp_path):
    (example,) = rows(tmp_path, "multinli", "validation_matched", PAIR)
    assert example == Example(
        id="1n",
        prompt="premise: It rains.\nhypothesis: It is wet.",
        target="neutral",
        answer="neutral",
        difficulty="fiction",
    )
    task = make_task("multinli")
    assert task.score("I say Neutral.", example).correct
    assert task.score("entailment, not neutral", example).parsed == "entailment"
    assert task.score("neutrally", example).parsed is None


def test_multinli_keeps_the_hypotheses_of_a_premise_on_one_side():
    task = make_task("multinli")
    premises = [{task.question(e) for e in task.rows(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, premises)) == len(set.union(*premises)) == 12
    assert len(task.rows("validation")) == 3
    mismatched = make_task("multinli", options={"test": "mismatched"})
    assert {e.difficulty for e in mismatched.rows("test")} == {"letters", "nineeleven", "face-to-face"}


def test_commongen_joins_the_sentences_of_a_set_outside_of_train(tmp_path):
    task = make_task("commongen")
    assert len(task.rows("train")) + sum(len(e.references) for e in task.rows("validation")) == 22
    first = task.rows("test")[0]
    assert first.prompt == "fish net boat pull"
    assert len(first.references) == 3
    assert task.score(first.references[2], first).value == 1.0
    assert task.score("boat", first).value == pytest.approx(2 * 1 / (1 + 9))  # of 8, 10 and 9 words one is met
    other = CONCEPTS | {"concepts": ["run", "dog"], "target": "Run, dog!"}
    (joined,) = rows(tmp_path, "commongen", "validation", CONCEPTS, other, CONCEPTS)
    assert joined.references == ("A dog runs.", "Run, dog!")


def test_eli5(tmp_path):
    (example,) = rows(tmp_path, "eli5", "test", THREAD | {"selftext": " I\nwonder. "}, options={"max_references": 2})
    assert example == Example(
        id="a", prompt="Why?\nI wonder.", target="Thus.", answer="Thus.", references=("Thus.", "So.")
    )


def test_eli5_shortens_what_is_too_long():
    task = make_task("eli5", max_source_length=8, max_target_length=10)
    tokenizer = task.build_tokenizer(task.rows("train"), 400)
    for example in task.rows("train"):
        encoded = task.encode(example, tokenizer)
        whole = tokenizer(example.target)["input_ids"]
        assert encoded["labels"] == (whole if len(whole) <= 10 else [*whole[:9], whole[-1]])
        question = tokenizer(example.prompt)["input_ids"]
        assert encoded["input_ids"] == (question if len(question) <= 8 else [*question[:7], question[-1]])


@pytest.mark.parametrize("name", ["commongen", "eli5"])
def test_the_trivial_predictor_of_free_texts_is_the_better_rule(name):
    task = make_task(name)
    train = task.rows("train")
    predictor = task.trivial_predictor(train)
    fixed = sorted((e.answer for e in train), key=lambda text: (len(text), text))[len(train) // 2]
    others = [e for e in train if e.answer != fixed]
    repeated = sum(task.score(e.prompt, e).value for e in others)
    constant = sum(task.score(fixed, e).value for e in others)
    assert predictor.name.startswith("repeats" if repeated >= constant else "always")
    assert predictor.predict(train[0]) == (train[0].prompt if repeated >= constant else fixed)


@pytest.mark.parametrize(
    ("name", "split", "values", "rule"),
    [
        ("commonsenseqa", "validation", CHOICE | {"answerKey": "D"}, "answerKey: is 'D', which is none of the labels"),
        ("commonsenseqa", "validation", CHOICE | {"answerKey": ""}, "answerKey: must not be empty"),
        ("commonsenseqa", "validation", CHOICE | {"choices": ["x"]}, "choices: must be an object with label and text"),
        ("arc_easy", "test", CHOICE | {"choices": {"text": ["x", "y"]}}, "choices.label: must be a list"),
        ("arc_easy", "test", CHOICE | {"choices": {"label": ["A"], "text": ["x"]}}, "choices.text: must be 2 to 26"),
        ("arc_easy", "test", CHOICE | {"choices": {"label": ["A"], "text": ["x", "y"]}}, "has 1 labels for 2 texts"),
        ("arc_easy", "test", CHOICE | {"choices": {"label": ["A", "A"], "text": ["x", "y"]}}, "holds a label twice"),
        ("arc_challenge", "test", {"question": "Which?"}, "choices: missing; the row has question"),
        ("multinli", "validation_matched", PAIR | {"label": 3}, "label: must be 0 (entailment), 1 (neutral) or 2"),
        ("multinli", "validation_matched", PAIR | {"label": "maybe"}, "label: must be 0, 1 or 2, or one of"),
        ("multinli", "validation_matched", PAIR | {"premise": " "}, "premise: must not be empty"),
        ("commongen", "validation", CONCEPTS | {"concepts": []}, "concepts: must not be empty"),
        ("commongen", "validation", CONCEPTS | {"concepts": ["dog", 3]}, "concepts[1]: must be text, got a whole"),
        ("commongen", "validation", CONCEPTS | {"target": ""}, "target: must not be empty"),
        ("eli5", "test", THREAD | {"answers": {"text": [], "score": []}}, "answers.text: must be a list with at least"),
        ("eli5", "test", THREAD | {"answers": {"text": ["x"], "score": [1, 2]}}, "answers.score: has 2 numbers for 1"),
        ("eli5", "test", THREAD | {"answers": {"text": ["x"], "score": ["1"]}}, "must be a list of whole numbers"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path, name, split, values, rule):
    with pytest.raises(UserError) as caught:
        rows(tmp_path, name, split, values)
    assert f"{split}.jsonl, row 1, " in str(caught.value)
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("commonsenseqa", {("tau/commonsense_qa", None, "train"), ("tau/commonsense_qa", None, "validation")}),
        ("multinli", {("nyu-mll/multi_nli", None, "train"), ("nyu-mll/multi_nli", None, "validation_matched")}),
        ("commongen", {("allenai/common_gen", None, "train"), ("allenai/common_gen", None, "validation")}),
        ("arc_challenge", {("allenai/ai2_arc", "ARC-Challenge", s) for s in ("train", "validation", "test")}),
        ("eli5", {("vblagoje/lfqa", None, s) for s in ("train", "validation", "test")}),
    ],
)
def test_splits_on_the_hub(monkeypatch, name, calls):
    """Rows that went through `datasets`, which turns a list of objects into an object of lists, give the same."""
    local, seen = make_task(name), set()

    def load_dataset(path, config=None, *, revision=None, split=None):
        seen.add((path, config, split))
        folder = DATA / {"arc_challenge": "arc"}.get(name, name)
        file = folder / f"{'ARC-Challenge_' if name == 'arc_challenge' else ''}{split}.jsonl"
        return datasets.Dataset.from_list([json.loads(line) for line in file.read_text().splitlines()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = make_task(name, data_dir=None)
    for split in ("train", "validation", "test"):
        assert task.rows(split) == local.rows(split)
    assert seen == calls


def test_an_empty_split_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"test.jsonl: holds no rows$"):
        make_task("arc_easy", data_dir=str(tmp_path)).rows("test")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list([]))
    with pytest.raises(UserError, match=r"^allenai/ai2_arc \(test\): holds no rows$"):
        make_task("arc_easy", data_dir=None).rows("test")

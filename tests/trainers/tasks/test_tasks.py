"""Prompts, targets, encoding, scores and trivial predictors of the tasks, and their arguments."""

import dataclasses
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassError

from tests.trainers.tasks.tools import COLUMNS, DATA, make_task
from trainers.errors import UserError
from trainers.tasks import TASKS, Example, Task, TaskArguments, get_task
from trainers.tasks.base import SPLITS, build_options

POINTER_CHASE = {"num_train": 200, "num_validation": 20, "num_test": 20}


OPTIONS = {
    "pointer_chase": POINTER_CHASE,
    "flood_fill": POINTER_CHASE,
    "columns": COLUMNS,
    "mixture": {
        "components": [
            {"name": "strategyqa", "data_dir": str(DATA / "strategyqa"), "weight": 3},
            {"name": "commonsenseqa", "data_dir": str(DATA / "commonsenseqa")},
        ]
    },
}


def small_task(name: str, **arguments) -> Task:
    if name in OPTIONS:
        arguments["options"] = OPTIONS[name] | arguments.get("options", {})
    return make_task(name, **arguments)


@pytest.fixture(scope="module", params=[*TASKS, "gsm8k rationale"])
def task(request):
    name, _, target = request.param.partition(" ")
    return small_task(name, options={"target": target} if target else {})


@pytest.fixture(scope="module")
def tokenizer(task):
    return task.build_tokenizer(task.rows("train"), 1500)


@pytest.mark.parametrize("split", SPLITS)
def test_gold_targets_are_right_and_empty_predictions_are_not(task, split):
    examples = task.rows(split)
    assert len(examples) > 0
    right = True if task.metric == "accuracy" else None
    for example in examples:
        assert task.score(example.target, example).correct is right
        assert task.score(example.target, example).value == 1
        assert task.score(example.target, example).parsed == example.answer
        assert task.score(f" {example.target}\n", example).value == 1
        for nothing in ("", "  ", "?", "<eos>"):
            score = task.score(nothing, example)
            assert score.value == 0
            if right or not nothing.strip():
                assert (score.correct, score.parsed) == (right and False, None)


def test_splits_are_disjoint_and_ids_unique(task):
    prompts = [{example.prompt for example in task.rows(split)} for split in SPLITS]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    ids = [example.id for split in SPLITS for example in task.rows(split)]
    assert len(ids) == len(set(ids))
    # The made-up rows of LogiQA come from a few templates, and so do not keep apart.
    assert any(task.report(split).near_leaked for split in SPLITS) == (task.name == "logiqa")
    assert [task.report(split).examples for split in SPLITS] == [len(task.rows(split)) for split in SPLITS]


def test_encoding(task, tokenizer):
    for split in SPLITS:
        for example in task.rows(split):
            encoded = task.encode(example, tokenizer)
            assert set(encoded) == {"input_ids", "labels"}
            for ids, text in ((encoded["input_ids"], example.prompt), (encoded["labels"], example.target)):
                assert ids == tokenizer(text)["input_ids"]
                assert ids[-1] == tokenizer.eos_token_id
                assert not {0, 1, 2, 3} & set(ids[:-1])
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert task.truncated(task.rows(split)) == 0


def test_the_trivial_predictor_sees_no_answer(task):
    predictor = task.trivial_predictor(task.rows("train"))
    examples = task.rows("test")
    blind = [dataclasses.replace(example, target="", answer="") for example in examples]
    predictions = [predictor.predict(example) for example in blind]
    assert predictions == [predictor.predict(example) for example in examples]
    assert all(task.score(p, e).parsed is not None for p, e in zip(predictions, examples, strict=True))
    assert "training split" in predictor.name
    # Chosen on training examples alone, so it may be computed without the test.
    assert all(0 <= task.score(p, e).value <= 1 for p, e in zip(predictions, examples, strict=True))


def test_a_task_says_where_its_data_comes_from(task):
    assert task.source
    assert task.license
    assert task.metric == ("rouge_l" if task.name in ("commongen", "eli5") else "accuracy")


def test_the_resolved_arguments_build_the_same_task(task):
    assert task.arguments.max_source_length > 2
    assert task.arguments.max_target_length >= 2
    again = get_task(TaskArguments(**dataclasses.asdict(task.arguments)))
    assert again.arguments == task.arguments
    assert list(again.rows("validation")) == list(task.rows("validation"))


def test_a_task_and_its_rows_can_be_sent_to_another_process(task):
    copy = pickle.loads(pickle.dumps(task))
    assert list(copy.rows("test")) == list(task.rows("test"))


def test_strategyqa():
    rows = {example.id: example for split in SPLITS for example in small_task("strategyqa").rows(split)}
    for source in json.loads((DATA / "strategyqa" / "train.json").read_text(encoding="utf-8")):
        example = rows[source["qid"]]
        assert example.prompt == source["question"].strip()
        assert example.target == example.answer == ("Yes" if source["answer"] else "No")
        assert example.difficulty == len(source["decomposition"])
        assert not any(step in example.prompt for step in source["decomposition"])


def test_strategyqa_most_frequent_answer():
    task = small_task("strategyqa")
    assert task.trivial_predictor(task.rows("train")).name == 'always "No" (most frequent answer of the training split)'


def test_strategyqa_rows_without_id_and_decomposition(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "Is it?", "answer": true, "decomposition": null}')
    rows = make_task("strategyqa", data_dir=str(tmp_path)).rows("test")
    assert rows == [Example(id="test-1", prompt="Is it?", target="Yes", answer="Yes")]


def test_logiqa(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        '{"context": " Two\\n lines. ", "query": "Which?", "options": ["one", "two\\nlines", "three"], '
        '"correct_option": "1"}'
    )
    task = make_task("logiqa", data_dir=str(tmp_path))
    (example,) = task.rows("test")
    assert example.prompt == "Two lines.\nWhich?\n(A) one\n(B) two lines\n(C) three"
    assert (example.id, example.target, example.answer, example.difficulty) == ("test-1", "B", "B", None)
    assert task.question(example) == "Two lines.\nWhich?"
    assert task.score("(B)", example).correct
    assert not task.score("A or B", example).correct


def test_gsm8k_targets():
    answers, rationales = (small_task("gsm8k", options={"target": kind}) for kind in ("answer", "rationale"))
    assert (answers.arguments.max_target_length, rationales.arguments.max_target_length) == (16, 512)
    for short, long in zip(answers.rows("train"), rationales.rows("train"), strict=True):
        assert short.target == short.answer == long.answer
        *steps, last = long.target.split("\n")
        assert last == f"#### {long.answer}"
        assert len(steps) == long.difficulty == short.difficulty
        assert "<<" not in long.target
        assert "," not in short.target


def test_gsm8k_example():
    task = small_task("gsm8k", options={"target": "rationale"})
    example = next(e for e in task.rows("test") if e.answer == "65960")
    assert example.target.endswith("\n#### 65960")
    for right in ("65,960", "$65960.00", "first 1\n#### 65,960 dollars"):
        assert task.score(right, example).correct
    for wrong in ("-65960", "65.960", "6,5960", "65960 ####", "#### 1 65960"):
        assert not task.score(wrong, example).correct


def test_most_frequent_answer_with_a_tie():
    task = small_task("gsm8k")
    examples = [Example(id=str(i), prompt="", target=a, answer=a) for i, a in enumerate(["7", "3", "7", "3", "1"])]
    assert task.trivial_predictor(examples).predict(examples[0]) == "3"
    with pytest.raises(ValueError, match="no training examples"):
        task.trivial_predictor([])


@pytest.mark.parametrize("name", ["strategyqa", "gsm8k"])
def test_a_long_question_loses_its_beginning(name):
    task = small_task(name, max_source_length=12)
    examples = task.rows("train")
    tokenizer = task.build_tokenizer(examples, 400)
    cut = 0
    for example in examples:
        whole = tokenizer(example.prompt, verbose=False)["input_ids"]
        ids = task.encode_source(example, tokenizer)
        assert ids == whole[-12:]
        cut += len(whole) > 12
    assert cut == task.truncated(examples) > 0
    assert task.truncated(examples[:0]) == task.truncated(task.rows("test")) == 0


def logiqa_parts(task, example, tokenizer):
    ids = task.encode_source(example, tokenizer)
    assert len(ids) <= task.arguments.max_source_length
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


def test_logiqa_cuts_the_context_alone():
    whole = small_task("logiqa")
    tokenizer = whole.build_tokenizer(whole.rows("train"), 400)
    lengths = [len(tokenizer(e.prompt)["input_ids"]) for e in whole.rows("train")]
    task = small_task("logiqa", max_source_length=max(lengths) - 15)
    for example, length in zip(task.rows("train"), lengths, strict=True):
        text, kept = logiqa_parts(task, example, tokenizer)
        context, question = example.prompt.split("\n", 1)
        assert text.endswith("\n" + question)
        assert context.endswith(text.removesuffix("\n" + question))
        assert kept == min(length, max(lengths) - 15)
    assert 0 < task.truncated(task.rows("train")) < len(lengths)


def test_logiqa_options_are_cut_only_on_demand():
    examples = small_task("logiqa").rows("train")
    tokenizer = small_task("logiqa").build_tokenizer(examples, 400)
    example = max(examples, key=lambda e: len(tokenizer(e.prompt.split("\n", 1)[1])["input_ids"]))
    question, *options = example.prompt.split("\n")[1:]
    needed = len(tokenizer("\n" + "\n".join([question, *options]))["input_ids"])
    task = small_task("logiqa", max_source_length=needed)
    assert logiqa_parts(task, example, tokenizer) == ("\n" + "\n".join([question, *options]), needed)

    refusing = small_task("logiqa", max_source_length=needed - 8)
    with pytest.raises(UserError, match=rf"max_source_length: {needed - 8}, .* need {needed} .*\.long_options"):
        refusing.encode(example, tokenizer)
    assert refusing.truncated(examples) == 0

    shortening = small_task("logiqa", max_source_length=needed - 8, options={"long_options": "shorten"})
    text, length = logiqa_parts(shortening, example, tokenizer)
    assert needed - 8 - len(options) < length <= needed - 8
    kept = text.split("\n")[1:]
    assert kept[0] == question
    assert all(long.startswith(short) and len(short) > 4 for short, long in zip(kept[1:], options, strict=True))

    hopeless = small_task("logiqa", max_source_length=20, options={"long_options": "shorten"})
    with pytest.raises(UserError, match=r"need \d+ tokens; raise it$"):
        hopeless.encode(example, tokenizer)


def test_a_target_is_never_cut():
    task = small_task("gsm8k", options={"target": "rationale"}, max_target_length=20)
    examples = task.rows("train")
    tokenizer = task.build_tokenizer(examples, 400)
    example = max(examples, key=lambda e: len(e.target))
    with pytest.raises(UserError, match=rf"task.max_target_length: 20, but the target of example {example.id} has \d+"):
        task.encode(example, tokenizer)
    assert len(task.encode_source(example, tokenizer)) > 1


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"name": "gsm8k", "max_train_samples": 0}, "max_train_samples is 0; it must be at least 1"),
        ({"name": "gsm8k", "max_source_length": 1}, "max_source_length is 1; it must be at least 2"),
        ({"name": "gsm8k", "split_seed": -1}, "split_seed is -1"),
        ({"name": "gsm8k", "validation_fraction": 1}, "validation_fraction is 1; it must lie between 0 and 1"),
        ({"name": "gsm8k", "test_fraction": 0.0}, "test_fraction is 0.0; it must lie between 0 and 1"),
        (
            {"name": "gsm8k", "near_duplicate_similarity": 1.5},
            "near_duplicate_similarity is 1.5; it must lie above 0 and be at most 1",
        ),
        (
            {"name": "gsm8k", "teacher_filter": "correct"},
            "teacher_filter is correct, but teacher_answers names no file",
        ),
        ({"name": "gsm8k", "max_target_length": "16"}, "max_target_length"),
        ({"name": "gsm8k", "split_seed": True}, "split_seed"),
        ({"name": "gsm8k", "options": []}, "options"),
        ({"name": 3}, "name"),
    ],
)
def test_bad_arguments_are_refused(arguments, rule):
    with pytest.raises(StrictDataclassError, match=rule):
        TaskArguments(**arguments)


def test_every_argument_has_help():
    for cls in (TaskArguments, *(task.options_class for task in TASKS.values())):
        assert all(field.metadata["help"] for field in dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "gsm8"},
            "task.name: unknown task 'gsm8'; did you mean 'gsm8k'?; "
            "known tasks: strategyqa, logiqa, gsm8k, commonsenseqa, arc_easy, arc_challenge, multinli, commongen, "
            "eli5, pointer_chase, flood_fill, columns, mixture",
        ),
        (
            {"name": "gsm8k", "options": {"taget": "answer"}},
            "task.options: unknown option 'taget'; did you mean 'target'?; known options: target",
        ),
        (
            {"name": "strategyqa", "options": {"target": "answer"}},
            "task.options: unknown option 'target'; this task has no options",
        ),
        (
            {"name": "pointer_chase", "options": {"num_symbols": 1}},
            "task.options: num_symbols is 1; it must be at least 2",
        ),
        (
            {"name": "pointer_chase", "data_dir": "data"},
            "task.data_dir: pointer_chase is generated and reads no data; leave it out",
        ),
        (
            {"name": "pointer_chase", "max_source_length": 8},
            "task.max_source_length: 8, but a prompt with 5 symbols needs 9 tokens",
        ),
        (
            {"name": "pointer_chase", "options": {"num_symbols": 3, "max_hops": 2, "num_test": 18}},
            "task.options: num_test is 18, but 3 symbols and 2 hops give only 17 different test examples",
        ),
    ],
)
def test_user_errors_of_get_task(arguments, message):
    with pytest.raises(UserError) as caught:
        get_task(TaskArguments(**arguments))
    assert str(caught.value) == message


@pytest.mark.parametrize(("value", "word"), [("rationales", "target"), (3, "target")])
def test_bad_option_values_are_one_line(value, word):
    with pytest.raises(UserError) as caught:
        build_options(TASKS["gsm8k"].options_class, {"target": value})
    assert str(caught.value).startswith("task.options: ")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_get_task_reads_no_data(tmp_path):
    get_task(TaskArguments(name="gsm8k", data_dir=str(tmp_path / "missing")))

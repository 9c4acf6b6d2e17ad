"""Exact and near duplicates, against the definition and in the splits of a task."""

import itertools
import json
import random
import re
import unicodedata

import numpy as np
import pytest

from tests.trainers.tasks.tools import make_task
from trainers.errors import UserError
from trainers.tasks import SplitReport
from trainers.tasks.duplicates import NearDuplicates, question_key, shingles

STORY = (
    "A baker sells {} loaves of bread every morning and {} in the afternoon. How many loaves does the {} sell a day?"
)


def plain_pieces(text: str) -> set[str]:
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return {words[start : start + 5] for start in range(max(1, len(words) - 4))}


def plain_similarity(first: str, second: str) -> float:
    if re.findall(r"\d+", first) != re.findall(r"\d+", second):
        return 0.0
    one, other = plain_pieces(first), plain_pieces(second)
    return len(one & other) / len(one | other)


@pytest.mark.parametrize(
    "text", ["Hello, World!  Hello.", "abc", "", "naïve ﬁnal ÅNGSTRÖM", "a_b-c d'e", "数学は楽しい科目です"]
)
def test_pieces_are_those_of_the_definition(text):
    assert len(shingles(text)) == len(plain_pieces(text))
    assert np.array_equal(shingles(text), shingles(text.upper().lower()))


def test_the_search_finds_what_the_definition_says():
    """All pairs of 200 texts made of few words, so that every similarity occurs, at several thresholds."""
    draw = random.Random(0)
    words = ["river", "stone", "house", "3", "17", "17", "walk", "bright", "near", "the", "a", "of", "under", "market"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(200)]
    texts += [text.replace("stone", "stones") for text in texts[:40]]
    for threshold in (0.3, 0.5, 0.8, 1.0):
        found = NearDuplicates(texts[:100], threshold)
        hits = 0
        for text in texts[100:]:
            best = max(plain_similarity(text, other) for other in texts[:100])
            expected = best if best >= threshold - 1e-9 else 0.0
            assert found.similarity(text) == pytest.approx(expected), text
            hits += expected > 0
        assert 0 < hits < 140


def test_numbers_make_another_question():
    near = NearDuplicates([STORY.format(12, 7, "baker")], 0.8)
    assert STORY.format(12, 7, "bakers") in near
    assert STORY.format(12, 8, "baker") not in near
    assert STORY.format(7, 12, "baker") not in near


def test_no_texts_and_bad_thresholds():
    assert NearDuplicates([], 0.8).similarity("anything") == 0
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match="threshold"):
            NearDuplicates(["x"], threshold)


def test_equal_questions():
    assert question_key("Is it  SO?\n") == question_key("is it so?")
    assert question_key("ﬁne") == question_key("fine")
    assert question_key("is it so") != question_key("is it so?")


def rows(*questions):
    return [{"question": question, "answer": "#### 1"} for question in questions]


def task(folder, train, test, validation=None, **arguments):
    for name, questions in (("train", train), ("test", test), ("validation", validation)):
        if questions is not None:
            lines = "".join(json.dumps(row) + "\n" for row in rows(*questions))
            (folder / f"{name}.jsonl").write_text(lines)
    return make_task("gsm8k", data_dir=str(folder), **arguments)


SUBJECTS = [f"{a} {b}" for a, b in itertools.product(("red", "tall", "quiet", "wooden"), ("clerk", "miller", "sailor"))]
QUESTIONS = [f"What did the {subject} buy at the {subject[::-1]} market?" for subject in SUBJECTS]


def test_near_duplicates_of_later_splits_are_dropped_counted_and_told(tmp_path, caplog):
    almost = [question.replace("What did", "What, then, did") for question in QUESTIONS[:3]]
    gsm8k = task(
        tmp_path, [*almost, QUESTIONS[3].upper(), *QUESTIONS[4:8]], QUESTIONS[:2] + QUESTIONS[3:4], QUESTIONS[2:3]
    )
    assert [e.prompt for e in gsm8k.rows("train")] == QUESTIONS[4:8]
    assert gsm8k.report("train") == SplitReport(examples=4, leaked=1, near_leaked=3)
    assert gsm8k.report("test") == SplitReport(examples=3)
    assert caplog.messages == [
        "gsm8k: dropped 1 train example(s) whose question occurs in a later split",
        "gsm8k: dropped 3 train example(s) whose question nearly occurs in a later split (similarity 0.8 or more; "
        "task.near_duplicate_similarity: 1 keeps them)",
    ]
    exact = make_task("gsm8k", data_dir=str(tmp_path), near_duplicate_similarity=1)
    assert exact.report("train") == SplitReport(examples=7, leaked=1)
    assert exact.arguments.near_duplicate_similarity == 1


def test_near_duplicates_of_the_held_out_share_are_dropped_from_train(tmp_path):
    doubled = [text for question in QUESTIONS for text in (question, question.replace("What did", "What, then, did"))]
    gsm8k = task(tmp_path, doubled, ["Unrelated?"], validation_fraction=0.25)
    validation, train = gsm8k.rows("validation"), gsm8k.rows("train")
    assert len(validation) == 6
    found = NearDuplicates([example.prompt for example in validation], 0.8)
    assert not any(example.prompt in found for example in train)
    assert len(train) == 18 - gsm8k.report("train").near_leaked
    assert gsm8k.report("train").near_leaked > 0


def test_a_test_split_held_out_of_train(tmp_path):
    gsm8k = task(tmp_path, QUESTIONS, None, test_fraction=0.25, validation_fraction=0.4)
    splits = [{example.prompt for example in gsm8k.rows(split)} for split in ("train", "validation", "test")]
    assert list(map(len, splits)) == [5, 4, 3]
    assert set.union(*splits) == set(QUESTIONS)
    again = task(tmp_path, QUESTIONS, None, test_fraction=0.25, validation_fraction=0.4)
    assert again.rows("test") == gsm8k.rows("test")
    with pytest.raises(UserError, match=r"test_fraction: 0.01 of 12 questions leaves train or test empty"):
        task(tmp_path, QUESTIONS, None, test_fraction=0.01).rows("test")
    with pytest.raises(UserError, match=r"test_fraction: leave it out, since .*test.jsonl is the test split"):
        task(tmp_path, QUESTIONS, ["One?"], test_fraction=0.25).rows("test")

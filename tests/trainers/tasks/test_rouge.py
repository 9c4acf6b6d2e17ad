"""ROUGE-L against the textbook recursion, the paper's example, and figures of the reference implementation."""

import functools
import random

import pytest

from trainers.tasks.rouge import common_subsequence, rouge_l


def plain_common_subsequence(first, second) -> int:
    @functools.cache
    def length(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if first[i - 1] == second[j - 1]:
            return length(i - 1, j - 1) + 1
        return max(length(i - 1, j), length(i, j - 1))

    return length(len(first), len(second))


def test_common_subsequence_is_that_of_the_recursion():
    draw = random.Random(0)
    for _ in range(300):
        first, second = (tuple(draw.choices("abcd", k=draw.randint(0, 15))) for _ in range(2))
        assert common_subsequence(first, second) == plain_common_subsequence(first, second)
        assert common_subsequence(first, second) == common_subsequence(second, first)


def test_the_papers_example():
    """Lin 2004, section 3.1: with beta = 1 the candidates score 3/4 and 1/2."""
    reference = ["police killed the gunman"]
    assert rouge_l("police kill the gunman", reference) == 0.75
    assert rouge_l("the gunman kill police", reference) == 0.5


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # `RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure` of rouge_score 0.1.2
        ("The dog's ball, thrown far.", "the dog s ball was thrown very far", 0.8571428571428571),
        ("A wave is ridden by a surfer.", "A surfer rides a tall wave.", 0.3076923076923077),
        ("It costs $3.50 in 2020!", "in 2020 it cost 3 50", 0.5),
        ("Air scatters blue light", "Air scatters blue light far more than red light.", 0.6153846153846154),
        ("nothing here", "something else", 0.0),
    ],
)
def test_figures_of_the_reference_implementation(prediction, reference, score):
    assert rouge_l(prediction, [reference]) == pytest.approx(score, abs=1e-12)


def test_references_and_empty_texts():
    assert rouge_l("a cat", ["a dog", "a cat"]) == 1.0
    assert rouge_l("", ["a dog"]) == rouge_l("?!", ["a dog"]) == rouge_l("a dog", ["..."]) == 0.0
    assert rouge_l("Ein GROẞES Ökosystem", ["ein großes ökosystem"]) == 1.0
    with pytest.raises(ValueError, match="at least one reference"):
        rouge_l("a", [])

"""The flood fill task: right answers by networkx, balanced distances, disjoint splits, pure functions of the index."""

from collections import Counter

import networkx as nx
import numpy as np
import pytest

from tests.trainers.tasks.tools import make_task
from trainers.errors import UserError
from trainers.tasks.base import SPLITS
from trainers.tasks.flood_fill import BLOCK, flood

SIZES = {"num_train": 300, "num_validation": 40, "num_test": 40}


def fill(**options):
    return make_task("flood_fill", options=SIZES | options)


def reachable(prompt: str, height: int, width: int) -> tuple[str, int]:
    """Answer and difficulty by a library of graphs."""
    cells = prompt.split()
    graph = nx.grid_2d_graph(height, width)
    graph.remove_nodes_from([(row, column) for row, column in list(graph) if cells[row * width + column] == "#"])
    lengths = nx.single_source_shortest_path_length(graph, divmod(cells.index("S"), width))
    marks = ["+" if divmod(cell, width) in lengths else "-" for cell in range(height * width)]
    return " ".join(marks), max(lengths.values())


@pytest.mark.parametrize("shape", [(5, 5, 8), (3, 6, 5), (1, 9, 6)])
@pytest.mark.parametrize("split", SPLITS)
def test_answers_and_difficulties_are_right(shape, split):
    height, width, longest = shape
    examples = list(fill(height=height, width=width, max_distance=longest, num_test=16).rows(split))[:60]
    for example in examples:
        assert (example.answer, example.difficulty) == reachable(example.prompt, height, width)
        assert example.target == example.answer


def test_rounds_of_a_flood():
    maps = fill().read_prompt("S . . . . # # # # . . . . . . . # # # # . . . . .")
    for rounds, cells in ((0, 1), (1, 2), (3, 4), (100, 17)):
        assert flood(maps, rounds)[0].sum() == cells
    assert flood(maps)[1].tolist() == [16]


def test_distances_are_balanced_and_can_be_chosen():
    task = fill(min_distance=2, max_distance=6, num_train=1000)
    counts = Counter(example.difficulty for example in task.rows("train"))
    assert counts == dict.fromkeys(range(2, 7), 200)


def test_an_example_depends_on_seed_split_and_index_alone():
    whole, short = fill(num_train=BLOCK + 40), fill(num_train=BLOCK + 7)
    last = short.rows("train")[-1]
    assert whole.rows("train")[BLOCK + 6] == last
    assert short.rows("train")[2:5] == list(whole.rows("train"))[2:5]
    prompts = {fill(seed=seed).rows("train")[0].prompt for seed in (0, 1)}
    assert len(prompts | {short.rows("test")[0].prompt}) == 3


def test_a_map_belongs_to_one_split():
    """On a map so small that every split sees most of its maps."""
    task = fill(height=2, width=3, max_distance=2, num_train=500, num_test=200, num_validation=200)
    prompts = {split: {example.prompt for example in task.rows(split)} for split in SPLITS}
    assert len(prompts["train"]) > 50
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_score_takes_whole_maps_only():
    task = fill()
    example = task.rows("test")[0]
    marks = example.answer.split()
    other = " ".join(["+" if marks[0] == "-" else "-", *marks[1:]])
    assert task.score(other, example) == task.score(other + " ", example)
    assert (task.score(other, example).correct, task.score(other, example).parsed) == (False, other)
    for broken in (" ".join(marks[1:]), f"{example.answer} +", example.prompt):
        assert (task.score(broken, example).correct, task.score(broken, example).parsed) == (False, None)


@pytest.mark.parametrize("kind", ["answer", "settled", "rounds"])
def test_targets_of_the_steps(kind):
    task = fill(height=3, width=4, max_distance=4, step_targets=kind)
    tokenizer = task.build_tokenizer([], 100)
    yes, no = tokenizer.convert_tokens_to_ids(["+", "-"])
    for example in task.rows("train")[:30]:
        encoded = task.encode(example, tokenizer)
        assert encoded["labels"] == tokenizer(example.target)["input_ids"]
        if kind == "answer":
            assert "step_targets" not in encoded
            continue
        assert len(encoded["step_targets"]) == 4
        for step, targets in enumerate(encoded["step_targets"], 1):
            reached = flood(task.read_prompt(example.prompt), step)[0].ravel()
            if kind == "rounds":
                assert targets == [*(yes if mark else no for mark in reached), tokenizer.eos_token_id]
            else:
                assert targets == (encoded["labels"] if step >= example.difficulty else [-100] * 13)


def test_trivial_rules():
    near = fill(min_distance=1, max_distance=1)
    predictor = near.trivial_predictor(near.rows("train"))
    assert predictor.name.startswith("the start and its open neighbours; best of 3 rules")
    assert all(predictor.predict(example) == example.answer for example in near.rows("test"))
    open_field = fill(height=1, width=4, min_distance=3, max_distance=3, max_walls=0.3, num_test=2, num_validation=2)
    predictor = open_field.trivial_predictor(open_field.rows("train")[:5])
    assert predictor.name.startswith("every open cell")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height is 0; it must be at least 1"),
        ({"min_distance": 5, "max_distance": 4}, "max_distance is 4; it must be at least min_distance"),
        ({"max_distance": 25}, "max_distance is 25; on a map of 25 cells it must be below their number"),
        ({"min_walls": 0.6, "max_walls": 0.5}, "min_walls is 0.6 and max_walls 0.5; they must lie in"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=rf"task.options.*{message}"):
        fill(**options)


def test_what_cannot_be_generated(monkeypatch):
    monkeypatch.setattr("trainers.tasks.flood_fill.PATIENCE", 2)
    with pytest.raises(UserError, match="too few have their farthest reachable cell at a distance of 24"):
        fill(min_distance=24, max_distance=24).rows("train")[0]
    with pytest.raises(UserError, match=r"task\.max_target_length: 25, but a map of 25 cells needs 26 tokens"):
        make_task("flood_fill", options=SIZES, max_target_length=25)
    with pytest.raises(UserError, match=r"task\.data_dir: flood_fill is generated"):
        make_task("flood_fill", data_dir="data")


def test_hash_spreads_maps_evenly():
    task = fill()
    examples = [task.read_prompt(example.prompt) for example in fill(num_train=500).rows("train")]
    tenths = np.concatenate([task.split_of(maps) for maps in examples])
    assert set(tenths.tolist()) == set(range(2, 10))

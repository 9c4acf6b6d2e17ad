"""Every task that generates its examples, under any options: refused in one line, or right and a pure function of seed,
split and index."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainers.errors import UserError
from trainers.tasks import TASKS, StoredTask, TaskArguments, get_task
from trainers.tasks.base import SPLITS
from trainers.tasks.in_context import IN_CONTEXT_TASKS
from trainers.tasks.thought import THOUGHT_TASKS, ThoughtTaskArguments, get_thought_task

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=60)
TEXT = sorted(name for name, task in TASKS.items() if not issubclass(task, StoredTask) and name != "mixture")
TICKS = sorted(name for name in THOUGHT_TASKS if name not in ("images", "digits"))  # those two are stored pictures
NAMES = [*TEXT, *TICKS, *IN_CONTEXT_TASKS]
SIZES = {"num_train": 24, "num_validation": 8, "num_test": 8}
values = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([0, 1, 2, 3, 0.0, 0.25, 0.5, 1.0, 1.5, -1.0, float("nan"), float("inf"), 2**64, 10**9]),
    st.booleans(),
    st.none(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 5), max_size=3),
)


def build(name: str, options: dict) -> Any:
    if name in TEXT:
        return get_task(TaskArguments(name=name, options=options))
    if name in TICKS:
        return get_thought_task(ThoughtTaskArguments(name=name, options=options))
    return IN_CONTEXT_TASKS[name](options)


def sizes(name: str) -> dict[str, int]:
    """Few examples, few points: what a task can be told of these."""
    known = {option.name for option in dataclasses.fields(build(name, {}).options)}
    return {key: value for key, value in (SIZES | {"n_points": 6, "num_tables": 4}).items() if key in known}


def item(task: Any, name: str, split: str, index: int) -> dict[str, Any]:
    if name in TEXT:
        return dataclasses.asdict(task.rows(split)[index])
    if name in TICKS:
        return dict(task.examples(split)[index])
    return {key: value[0] for key, value in task.batch(split, [index]).items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


def check(name: str, data: Any) -> None:
    known = [option.name for option in dataclasses.fields(build(name, {}).options)]
    changes = data.draw(st.dictionaries(st.sampled_from(known), values, max_size=3))
    if any(isinstance(value, int) and value > 10**6 for key, value in changes.items() if key != "seed"):
        changes = {key: value for key, value in changes.items() if key in ("seed", *SIZES)}
    options = sizes(name) | changes
    split = data.draw(st.sampled_from(SPLITS))
    try:
        task = build(name, options)
        first, second = item(task, name, split, 0), item(task, name, split, 1)
    except UserError as error:
        if not any(key in str(error) for key in known):
            raise
        return
    except IndexError:  # a split of one example
        return
    again = build(name, options)
    assert same(item(again, name, split, 1), second), "the order of asking matters"
    assert same(item(again, name, split, 0), first)
    for value in first.values():
        assert not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.isfinite().all()
    if name in TEXT:
        examples = [task.rows(split)[index] for index in range(min(6, len(task.rows(split))))]
        assert len({example.id for example in examples}) == len(examples)
        for example in examples:
            assert task.score(example.target, example).correct
            assert not task.score("", example).correct
            assert example.prompt.strip()


def test_every_generated_task_is_tried():
    stored = {name for name, task in TASKS.items() if issubclass(task, StoredTask)} | {"mixture"}
    assert {*TEXT} == {*TASKS} - stored
    assert {*NAMES} == {*TEXT, *THOUGHT_TASKS, *IN_CONTEXT_TASKS} - {"images", "digits"}
    assert len(NAMES) >= 14


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(data=st.data())
def test_any_options(name, data):
    check(name, data)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@LONG
@given(data=st.data())
def test_any_options_at_length(name, data):
    check(name, data)


@pytest.mark.parametrize("name", ["flood_fill", "pointer_chase"])
def test_more_examples_than_a_sequence_holds(name):
    for number in (2**63, -(2**63)):
        with pytest.raises(UserError, match=r"num_train is -?\d+; it must be a number of at most 63 bits$"):
            build(name, sizes(name) | {"num_train": number})

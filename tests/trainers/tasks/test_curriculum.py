"""A curriculum: what it says at every step, prompts that depend on their index alone, and mistakes in one line."""

import pytest
import torch
from torch.utils.data import DataLoader

from trainers.errors import UserError
from trainers.tasks.in_context import (
    FUNCTION_CLASSES,
    Curriculum,
    CurriculumPrompts,
    InContextTaskArguments,
    Schedule,
    TableConnectivity,
    get_in_context_task,
)


def linear(**options):
    return FUNCTION_CLASSES["linear_regression"]({"n_dims": 5, "n_points": 8} | options)


def tables(**options):
    return TableConnectivity({"num_tables": 6, "n_dims": 24, "max_tables": 8, "rho": 0.25} | options)


def test_a_schedule_grows_by_whole_increments_and_stays_at_its_end():
    schedule = Schedule(start=5, end=8, increment=2, interval=3)
    assert [schedule.at(step) for step in range(10)] == [5, 5, 5, 7, 7, 7, 8, 8, 8, 8]
    falling = Schedule(start=0.3, end=0.1, increment=-0.1, interval=2)
    assert [round(falling.at(step), 9) for step in range(8)] == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({}, 0),
        ({"n_dims": {"start": 3, "increment": 1, "interval": 4}}, 8),
        ({"n_points": {"start": 3, "increment": 2, "interval": 1}}, 3),
        (
            {
                "n_dims": {"start": 3, "increment": 1, "interval": 4},
                "n_points": {"start": 4, "increment": 3, "interval": 10},
            },
            20,
        ),
    ],
)
def test_the_length_of_a_curriculum(values, length):
    curriculum = Curriculum.read(values, linear())
    assert curriculum.length == length
    last = {name: getattr(linear().options, name) for name in values}
    assert curriculum.at(length) == last
    if length:
        assert curriculum.at(length - 1) != last


def test_prompts_follow_the_update_step_they_belong_to():
    task = linear()
    curriculum = Curriculum.read(
        {
            "n_dims": {"start": 3, "increment": 1, "interval": 1},
            "n_points": {"start": 4, "increment": 2, "interval": 2},
        },
        task,
    )
    data = CurriculumPrompts(task, curriculum, prompts_per_update=4, num_updates=6)
    assert len(data) == 24
    for index in range(24):
        step = index // 4
        prompt = data[index]
        stage = {"n_dims": min(5, 3 + step), "n_points": min(8, 4 + 2 * (step // 2))}
        expected = task.batch("train", [index], **stage)
        assert all(torch.equal(prompt[name], values[0]) for name, values in expected.items())
        assert prompt["input_values"].shape[0] == stage["n_points"]
        assert (prompt["input_values"] != 0).any(dim=0).sum() == stage["n_dims"]
    # A batch may even hold prompts of two steps.
    for prompt, index in zip(data.__getitems__([2, 3, 4, 5]), (2, 3, 4, 5), strict=True):
        # Matrix products of other batch sizes may round differently.
        torch.testing.assert_close(prompt, data[index])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_that_reads_ahead_gets_the_same_prompts(num_workers):
    task = tables()
    curriculum = Curriculum.read({"num_tables": {"start": 3, "increment": 1, "interval": 2}}, task)
    data = CurriculumPrompts(task, curriculum, prompts_per_update=8, num_updates=5)
    batches = list(DataLoader(data, batch_size=8, num_workers=num_workers))
    assert [batch["block_targets"].shape[1] for batch in batches] == [3, 3, 4, 4, 5]
    for place, batch in enumerate(batches):
        prompts = [data[place * 8 + row] for row in range(8)]
        assert all(torch.equal(batch[name], torch.stack([p[name] for p in prompts])) for name in batch)


@pytest.mark.parametrize(
    "stage",
    [{"num_tables": 4}, {"rho": 0.4}, {"path_length": 2}, {"max_path_length": 1}, {"num_tables": 3, "rho": 0.6}],
    ids=str,
)
def test_stages_of_table_connectivity_are_tasks_with_the_same_names(stage):
    task = tables()
    batch = task.batch("train", range(40), **stage)
    options = {"num_tables": 6, "n_dims": 24, "max_tables": 8, "rho": 0.25} | stage
    expected = TableConnectivity(options).batch("train", range(40))
    assert all(torch.equal(batch[name], values) for name, values in expected.items())
    lengths = batch["path_length"][batch["labels"] > 0]
    if "path_length" in stage:
        assert set(lengths.tolist()) == {2}
    if "max_path_length" in stage:
        assert set(lengths.tolist()) == {0, 1}


def test_short_paths_are_balanced_and_ask_for_two_slots():
    task = tables(max_path_length=2)
    questions = task.questions("train", range(400))
    assert questions.connected.sum() == 200
    assert set(questions.path_length[questions.connected].tolist()) == {0, 1, 2}
    same_table = questions.query_tables[:, 0] == questions.query_tables[:, 1]
    same_column = questions.query[:, 0] == questions.query[:, 1]
    assert not (same_table & same_column).any()


def test_prompts_of_several_sizes():
    task = tables(min_tables=3)
    batch = task.batch("train", range(300))
    sizes = batch["attention_mask"].sum(dim=1)
    assert set(sizes.tolist()) == {3, 4, 5, 6}
    assert batch["input_values"].shape == (300, 6 * 3 + 3, 24)
    for row in range(0, 300, 7):
        size = int(sizes[row])
        alone = task.batch("train", [row], num_tables=size, min_tables=None)
        blocks, tail = batch["input_values"][row].tensor_split([6 * 3])
        assert torch.equal(torch.cat((blocks[: size * 3], tail)), alone["input_values"][0])
        assert (blocks[size * 3 :] == 0).all()
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (6 - size)
        assert torch.equal(batch["block_targets"][row, :size], alone["block_targets"][0])
        assert (batch["block_targets"][row, size:] == -100).all()
        assert batch["labels"][row] == alone["labels"][0]
        assert batch["path_length"][row] == alone["path_length"][0]
    # A prompt depends on its index alone.
    for name, values in task.batch("train", [5, 250]).items():
        assert torch.equal(values, batch[name][[5, 250]])


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (linear, {"dims": {}}, "task.curriculum.dims: unknown variable; did you mean 'n_dims'"),
        (linear, {"n_dims": {"start": 3}}, "must be a mapping with the fields start, increment, interval"),
        (linear, {"n_dims": [3, 1, 2]}, "must be a mapping with the fields"),
        (linear, {"n_dims": {"start": 3, "increment": -1, "interval": 2}}, "never leads from start=3 to .*n_dims=5"),
        (linear, {"n_dims": {"start": 3, "increment": 0, "interval": 2}}, "never leads"),
        (linear, {"n_dims": {"start": 0, "increment": 1, "interval": 2}}, r"at the start: n_dims: 0 must lie in"),
        (linear, {"n_dims": {"start": 3, "increment": 1, "interval": 0}}, "interval is 0; it must be at least 1"),
        (linear, {"n_dims": {"start": 3.5, "increment": 1, "interval": 2}}, "start: must be a whole number, got 3.5"),
        (linear, {"n_dims": {"start": True, "increment": 1, "interval": 2}}, "must be a whole number, got True"),
        (tables, {"rho": {"start": "a", "increment": 1, "interval": 2}}, "rho.start: must be a number, got 'a'"),
        (tables, {"path_length": {"start": 1, "increment": 1, "interval": 2}}, "path_length, which is not set"),
        (tables, {"num_tables": {"start": 1, "increment": 1, "interval": 2}}, "num_tables is 1; it must be at least 2"),
    ],
)
def test_bad_curricula_are_refused(task, values, message):
    with pytest.raises(UserError, match=message) as caught:
        Curriculum.read(values, task())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path_length": 2, "max_path_length": 3}, "path_length and max_path_length are both set"),
        ({"max_path_length": 9}, r"max_path_length is 9; it must lie in \[0, num_tables=6\]"),
        ({"max_path_length": 2, "balanced": False}, "max_path_length needs balanced=true"),
        ({"min_tables": 3, "autoregressive": True}, "autoregressive and min_tables are both set"),
        ({"min_tables": 1}, r"min_tables is 1; it must lie in \[2, num_tables=6\]"),
        ({"min_tables": 7}, r"min_tables is 7; it must lie in \[2, num_tables=6\]"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        tables(**options)


def test_arguments_name_a_task():
    task = get_in_context_task(InContextTaskArguments(name="linear_regression", options={"n_dims": 3}, prompts_seed=4))
    assert task.seed == 4
    assert task.arguments.options == {"n_dims": 3, "n_points": 41, "scale": 1.0}
    with pytest.raises(UserError, match="unknown task 'linear_regresion'; did you mean 'linear_regression'"):
        get_in_context_task(InContextTaskArguments(name="linear_regresion"))
    other = task.with_seed(9)
    assert (other.options, other.seed) == (task.options, 9)
    assert not torch.equal(other.batch("train", [0])["labels"], task.batch("train", [0])["labels"])

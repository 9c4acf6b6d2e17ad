"""The sweep command: grid, axes, choice by validation, and every way to misuse it."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from tests.trainers.comparisons import CHASE, CONNECTION, TRAINING, pretended, trained, write_run
from trainers import sweep
from trainers.arguments import parse_recipe
from trainers.comparison.cells import CellFolder
from trainers.errors import UserError
from trainers.sweep import Point, grid, parse_axis

__all__ = ["pretended", "trained"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "recipes" / "sweep").glob("*.yaml"))
SECTIONS = {"model": CONNECTION, "task": CHASE, "training": TRAINING}


def write_recipe(folder: Path, **changes) -> Path:
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(SECTIONS | changes))
    return path


def run(recipe: Path, out: Path, *options: str) -> int:
    return sweep.main([str(recipe), "--output_dir", str(out), *options])


def test_sweep_from_recipe_to_table_and_plot(trained, tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    assert run(recipe, out, "--over", "num_slots=4,8", "--max_samples", "16") == 0
    assert "2 settings, 1 seeds; 2 runs" in capsys.readouterr().out
    content = json.loads((out / "sweep.json").read_text())
    assert [row["point"] for row in content["points"]] == [{"model.num_slots": 4}, {"model.num_slots": 8}]
    for row, slots in zip(content["points"], (4, 8), strict=True):
        folder = out / "runs" / f"num_slots={slots}" / "seed-0"
        assert json.loads((folder / "config.json").read_text())["num_slots"] == slots
        metrics = json.loads((folder / "metrics.json").read_text())
        assert row["score"]["value"] == metrics["test"]["accuracy"]["value"]
        assert row["score"]["method"] == "Wilson score"
        assert row["train_examples"] == 16
    assert sum(row["chosen"] for row in content["points"]) == 1
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    before = (out / "sweep.json").read_bytes()
    assert run(recipe, out, "--over", "num_slots=4,8", "--max_samples", "16") == 0
    assert len(trained.ran) == 2, "finished runs are kept"
    assert (out / "sweep.json").read_bytes() == before


def test_more_seeds_and_values_add_to_what_is_there(pretended, tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    assert run(recipe, out, "--over", "num_slots=4,8") == 0
    pretended.fail = {"num_slots=16/seed-1"}
    assert run(recipe, out, "--over", "model.num_slots=4,16", "--seeds", "0", "1") == 1
    assert len(pretended.ran) == 5
    content = json.loads((out / "sweep.json").read_text())
    assert [row["seeds"] for row in content["points"]] == [[0, 1], [0]]
    assert [entry["cell"] for entry in content["failed"]] == ["num_slots=16/seed-1"]
    assert "## Failed runs" in (out / "sweep.md").read_text()


def test_grid_is_every_combination_with_nested_fields():
    axes = {"model.num_slots": [4, 8], "task.options.max_hops": [1, 2], "training.learning_rate": [0.1]}
    cells = grid(SECTIONS, axes, [3, 5])
    assert len(cells) == 8
    assert [seed for _, seed in cells] == [3] * 4 + [5] * 4
    cell = cells[Point((("model.num_slots", 8), ("task.options.max_hops", 2), ("training.learning_rate", 0.1))), 5]
    assert cell.name == "num_slots=8,max_hops=2,learning_rate=0.1/seed-5"
    assert cell.recipe["task"]["options"] == {**CHASE["options"], "max_hops": 2}
    assert cell.recipe["training"]["seed"] == 5
    assert SECTIONS["task"]["options"]["max_hops"] == 2, "the recipe itself is left alone"
    assert "/" not in Point((("model.pretrained", "a/b c"),)).name


def test_axes_are_read_as_yaml():
    assert parse_axis("model.num_slots=16,32", SECTIONS) == ("model.num_slots", [16, 32])
    assert parse_axis("num_slots=16", SECTIONS) == ("model.num_slots", [16])
    assert parse_axis("training.learning_rate=1e-4,0.001", SECTIONS) == ("training.learning_rate", [1e-4, 0.001])
    assert parse_axis("model.connection_type=scalar,block", SECTIONS) == ("model.connection_type", ["scalar", "block"])
    assert parse_axis("model.scale_embedding=[true, false]", SECTIONS) == ("model.scale_embedding", [True, False])
    for word, rule in (
        ("model.num_slots", "expected FIELD=VALUE"),
        ("num_slot=3", "is not in the recipe; did you mean 'num_slots'"),
        ("model.a=[1", "cannot read the values"),
    ):
        with pytest.raises(UserError, match=rule):
            parse_axis(word, SECTIONS)
    with pytest.raises(UserError, match="stands in task and training"):
        parse_axis("name=3", {"task": {"name": 1}, "training": {"name": 2}})


def made(tmp_path: Path, axes, metric: str = "accuracy"):
    cells = grid(SECTIONS, axes, [0, 1])
    folder = CellFolder(tmp_path / "made")
    for number, ((_, seed), cell) in enumerate(cells.items()):
        write_run(folder.run(cell), [(index + seed) % (number % 4 + 2) == 0 for index in range(30)], metric)
    return sweep.gather(axes, cells, folder, {})


def test_the_best_is_chosen_by_validation(tmp_path):
    content, clock = made(tmp_path, {"model.num_slots": [4, 8, 16]})
    best = max(content["points"], key=lambda row: row["validation"])
    assert [row["chosen"] for row in content["points"]] == [row is best for row in content["points"]]
    page = sweep.markdown(content, clock)
    assert page.count("(best)") == 1
    assert "chosen by the validation score alone" in page
    rows = list(csv.DictReader(io.StringIO(sweep.csv_text(content))))
    assert [row["model.num_slots"] for row in rows] == ["4", "8", "16"]
    assert float(rows[1]["score"]) == content["points"][1]["score"]["value"]
    assert {entry["point"] for entry in clock["training"]} == {"num_slots=4", "num_slots=8", "num_slots=16"}


def test_of_an_error_the_least_is_chosen(tmp_path):
    content, _ = made(tmp_path, {"model.num_slots": [4, 8, 16]}, metric="error")
    least = min(row["validation"] for row in content["points"])
    assert [row["validation"] for row in content["points"] if row["chosen"]] == [least]


def test_plot_has_a_line_for_each_value_and_a_panel_for_the_rest(tmp_path):
    axes = {"model.connection_type": ["scalar", "block"], "model.num_slots": [4, 64], "model.connection_rank": [1, 2]}
    content, _ = made(tmp_path, axes)
    figure = sweep.chart(content)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 2
    for axis in figure.axes:
        assert len(axis.containers) == 2
        assert [label.get_text() for label in axis.get_xticklabels()] == ["scalar", "block"]


def test_plot_of_what_is_finished(tmp_path):
    """Four panels in rows of three, of which the last place is empty; a setting without a run has no point."""
    axes = {"model.num_slots": [4, 8], "model.dropout": [0.0], "model.connection_rank": [1, 2, 3, 4]}
    content, clock = made(tmp_path, axes)
    gone = content["points"].pop()
    assert gone["point"] == {"model.num_slots": 8, "model.dropout": 0.0, "model.connection_rank": 4}
    content["points"] = [row for row in content["points"] if row["point"]["model.connection_rank"] != 3]
    figure = sweep.chart(content)
    assert [axis.get_title() for axis in figure.axes] == [f"model.connection_rank = {rank}" for rank in (1, 2, 3, 4)]
    assert [[len(container[0].get_xdata()) for container in axis.containers] for axis in figure.axes] == [
        [2],
        [2],
        [],
        [1],
    ]
    for row in content["points"]:
        row["validation"] = None
    assert "(best)" not in sweep.markdown(content, clock)


def test_values_may_be_lists_and_mappings(pretended, tmp_path):
    path = tmp_path / "lists.yaml"
    kwargs = [{"num_cycles": 1}, {"num_cycles": 2}]
    over = {"training.lr_scheduler_kwargs": kwargs, "training.layer_sizes": [[1, 2], [1, 3]]}
    assert len(grid(SECTIONS, over, [0])) == 4
    write_recipe(tmp_path, training=TRAINING | {"lr_scheduler_type": "cosine"})
    path.write_text(yaml.safe_dump({"recipe": "base.yaml", "over": {"training.lr_scheduler_kwargs": kwargs}}))
    assert run(path, tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["point"] for row in content["points"]] == [{"training.lr_scheduler_kwargs": value} for value in kwargs]
    path.write_text(yaml.safe_dump({"recipe": "base.yaml", "over": {3: [1]}}))
    with pytest.raises(UserError, match=r"over: 3 is no section.field"):
        sweep.read_sweep(sweep.parse([str(path)]))


def test_no_finished_run_is_a_mistake(pretended, tmp_path, capsys):
    pretended.fail = {"num_slots"}
    assert run(write_recipe(tmp_path), tmp_path / "out", "--over", "num_slots=4,8", "--seeds", "0") == 2
    assert capsys.readouterr().err.endswith("out: no run is finished: training.loss: no number\n")


def test_sweep_recipe_and_command_line_together(pretended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    path = tmp_path / "grid.yaml"
    plan = {
        "recipe": "base.yaml",
        "over": {"model.num_slots": [4, 8]},
        "seeds": [0, 1, 2],
        "fields": {"model": {"dropout": 0.2}},
    }
    path.write_text(yaml.safe_dump(plan))
    assert sweep.main([str(path), "--debug", "--over", "model.num_slots=4"]) == 0
    out = tmp_path / "outputs" / "sweep-grid-debug"
    content = json.loads((out / "sweep.json").read_text())
    assert (content["seeds"], content["axes"]) == ([0, 1], {"model.num_slots": [4]})
    recipe = yaml.safe_load((out / "cells" / "num_slots=4" / "seed-0.yaml").read_text())
    assert recipe["model"]["dropout"] == 0.2
    assert recipe["training"]["max_steps"] == 2
    assert recipe["task"]["max_test_samples"] == 32


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], "--over is missing"),
        (["--over", "num_slots=4,4"], "must be different"),
        (["--over", "training.seed=1,2"], "use --seeds"),
        (["--over", "model.num_slots=0"], "num_slots=0: .*num_slots"),
        (["--over", "model.num_slot=3"], "unknown field model.num_slot; did you mean"),
        (["--over", "task.options.hops=3"], "unknown option 'hops'"),
        (["--over", "num_slots=3", "--seeds", "1", "1"], "different numbers"),
        (["--over", "num_slots=3", "--data_dir", "nowhere"], "--data_dir: no folder nowhere"),
        (["--over", "num_slots=3", "--max_samples", "0"], "--max_samples is 0"),
        (["--ovr", "num_slots=3"], "unrecognized arguments"),
        (["--over", "model.=3"], r"over: 'model\.' is no section.field"),
        (["--over", "task.hub_revision=2024-01-01"], r"task.hub_revision: expected .*, got datetime.date"),
        (["--over", 'tokenizer.name_or_path=["a/b","a_b"]'], "two values give runs of the same name"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_is_run(pretended, options, rule, tmp_path, capsys):
    assert run(write_recipe(tmp_path), tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert re.search(rule, message)
    assert message.count("\n") == 1
    assert pretended.ran == []


def test_another_recipe_in_the_same_folder_is_refused(pretended, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(write_recipe(tmp_path), out, "--over", "num_slots=4") == 0
    changed = write_recipe(tmp_path, training=TRAINING | {"max_steps": 9})
    assert run(changed, out, "--over", "num_slots=4") == 2
    assert "training.max_steps is 9 but the run there was started with 3" in capsys.readouterr().err
    assert run(changed, out, "--over", "num_slots=4", "--overwrite") == 0
    assert len(pretended.ran) == 2


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_shipped_sweeps_are_rehearsed(path, pretended, tmp_path):
    """All but the training: every cell's recipe is one that `trainers.train` takes, and there is a plot."""
    options = ["--debug", "--max_samples", "4"]
    if "logiqa" in path.read_text():
        options += ["--data_dir", str(ROOT / "tests" / "data" / "logiqa")]
    assert run(path, tmp_path / "out", *options) == 0
    recipes = list((tmp_path / "out" / "cells").rglob("seed-*.yaml"))
    assert len(recipes) == len(pretended.ran) > 0
    for recipe in recipes:
        assert parse_recipe([str(recipe)], prog="train").training.max_steps == 2
    assert (tmp_path / "out" / "sweep.png").exists()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_shipped_sweeps_are_complete(path, tmp_path):
    sections, axes, seeds = sweep.read_sweep(sweep.parse([str(path)]))
    cells = grid(sections, axes, seeds)
    recipe = tmp_path / "cell.yaml"
    for (_, seed), cell in cells.items():
        if seed == seeds[0]:
            recipe.write_text(yaml.safe_dump(cell.recipe))
            checked = parse_recipe([str(recipe)], prog="train")
            assert checked.model_config(vocab_size=100).vocab_size == 100
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"`recipes/sweep/{path.name}`" in listed

"""The comparison command: plan, cells, resumption, statistics of the report, and every way to misuse it."""

import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from model_cards import comparison as card
from tests.trainers.comparisons import (
    CHASE,
    CONNECTION,
    TRAINING,
    VANILLA,
    pretended,
    trained,
    write_comparison,
    write_run,
)
from trainers import compare
from trainers.arguments import parse_recipe
from trainers.command import interruptible
from trainers.comparison.cells import Cell, CellFolder, Estimate, Outcome, Worker, run_cell, run_cells
from trainers.comparison.cost import forward_flops
from trainers.comparison.figures import all_charts
from trainers.comparison.matching import _check_counts, matched_fields, prepare, trainable_parameters
from trainers.comparison.plan import (
    LEAST_SEEDS,
    TUNABLE,
    apply_data_dirs,
    limit_samples,
    read_comparison,
    sample_limits,
)
from trainers.comparison.results import gather, read_run, timings
from trainers.comparison.tables import COLUMNS, csv_text, latex_text
from trainers.errors import UserError

__all__ = ["pretended", "trained"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]
COMPARISONS = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))
QUESTIONS = {"name": "strategyqa", "data_dir": str(ROOT / "tests" / "data" / "strategyqa"), "max_source_length": 16}
PNG = b"\x89PNG\r\n\x1a\n"


def run(recipe: Path, out: Path, *options: str) -> int:
    return compare.main([str(recipe), "--output_dir", str(out), *options])


def files(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("comparison.json", "curves.json")}


def test_comparison_from_recipe_to_report_and_again(trained, tmp_path, capsys):
    recipe, out = write_comparison(tmp_path), tmp_path / "out"
    assert run(recipe, out) == 0
    shown = capsys.readouterr().out
    assert "4 runs, 0 of them finished" in shown
    assert "[4/4]" in shown
    assert "left" in shown, "the remaining time is estimated"
    assert len(trained.ran) == 4
    content = json.loads((out / "comparison.json").read_text())
    assert [(entry["task"], entry["model"], entry["seeds"]) for entry in content["results"]] == [
        ("chase", "connection", [0, 1]),
        ("chase", "vanilla", [0, 1]),
    ]
    (pair,) = content["comparisons"]
    assert (pair["first"], pair["second"], pair["same_data"]) == ("connection", "vanilla", True)
    assert pair["verdict"] == "not judged: 2 of at least 5 seeds"
    predictions = {}
    for entry in content["results"]:
        for seed, value in zip(entry["seeds"], entry["per_seed"], strict=True):
            folder = out / "runs" / "chase" / entry["model"] / f"seed-{seed}"
            assert json.loads((folder / "metrics.json").read_text())["test"]["accuracy"]["value"] == pytest.approx(
                value
            )
            predictions[entry["model"], seed] = (folder / "predictions.jsonl").read_text()
            assert not list(folder.glob("checkpoint-*")), "nothing needs the checkpoints of a finished run"
        assert entry["cost"]["flops_per_example"] > 0
    for name in ("accuracy.png", "cost.png", "training_curves.png"):
        assert (out / name).read_bytes()[:8] == PNG
    assert str(tmp_path) not in (out / "comparison.json").read_text()

    # Again: nothing is trained, and the same numbers come out.
    before = files(out)
    assert run(recipe, out) == 0
    assert len(trained.ran) == 4
    assert files(out) == before
    # A model's runs lost: they alone are trained again, to the same bits.
    shutil.rmtree(out / "runs" / "chase" / "connection")
    assert run(recipe, out) == 0
    assert len(trained.ran) == 6
    assert files(out) == before

    # Another recipe does not touch what is there, unless told to.
    changed = write_comparison(tmp_path, training={**TRAINING, "learning_rate": 1.0e-3})
    capsys.readouterr()
    assert run(changed, out) == 2
    assert re.search(r"training\.learning_rate is 0\.001 but .* 0\.003; --overwrite", capsys.readouterr().err)
    assert files(out) == before
    assert run(changed, out, "--overwrite", "--seeds", "0", "--models", "vanilla") == 0
    assert len(trained.ran) == 7
    content = json.loads((out / "comparison.json").read_text())
    assert [entry["seeds"] for entry in content["results"]] == [[0, 1], [0, 1]]


def test_two_folders_hold_the_same_bits(trained, tmp_path):
    recipe = write_comparison(tmp_path, tasks={"qa": {"task": QUESTIONS}}, seeds=[0])
    for out in (tmp_path / "one", tmp_path / "other"):
        assert run(recipe, out) == 0
    assert len(trained.ran) == 4
    assert files(tmp_path / "one") == files(tmp_path / "other")
    assert (tmp_path / "one" / "comparison.tex").read_bytes() == (tmp_path / "other" / "comparison.tex").read_bytes()


def test_a_model_may_learn_from_a_teacher_and_the_report_says_so(trained, tmp_path, capsys):
    rows = json.loads((Path(QUESTIONS["data_dir"]) / "train.json").read_text())
    answers = tmp_path / "predictions.jsonl"
    answers.write_text("".join(json.dumps({"id": row["qid"], "prediction": "Maybe"}) + "\n" for row in rows))
    models = {
        "gold": {"model": VANILLA},
        "taught": {"model": VANILLA, "task": {"teacher_answers": str(answers)}},
    }
    recipe, out = (
        write_comparison(tmp_path, models=models, tasks={"qa": {"task": QUESTIONS}}, seeds=[0]),
        tmp_path / "out",
    )
    assert run(recipe, out) == 0, capsys.readouterr().err
    content = json.loads((out / "comparison.json").read_text())
    assert content["models"]["taught"]["taught"] is True
    assert "taught" not in content["models"]["gold"]
    assert content["tasks"]["qa"]["same_data"] is False
    page = (out / "comparison.md").read_text()
    assert "the fingerprints differ. In the place of the gold targets of training, `taught` learned" in page
    assert str(tmp_path) not in page + (out / "comparison.json").read_text()
    models["taught"]["task"] = {"max_test_samples": 3}
    assert run(write_comparison(tmp_path, models=models), tmp_path / "out2") == 2
    assert "models.taught.task.max_test_samples: all models have the same task" in capsys.readouterr().err


def test_a_failing_run_is_isolated_listed_and_tried_again(pretended, tmp_path, capsys):
    recipe, out = write_comparison(tmp_path), tmp_path / "out"
    pretended.fail = {"vanilla/seed-1"}
    assert run(recipe, out) == 1
    shown = capsys.readouterr().out
    assert "chase/vanilla/seed-1: FAILED: training.loss: no number" in shown
    content = json.loads((out / "comparison.json").read_text())
    assert content["failed"] == [{"cell": "chase/vanilla/seed-1", "reason": "training.loss: no number"}]
    assert [entry["seeds"] for entry in content["results"]] == [[0, 1], [0]]
    assert content["comparisons"][0]["seeds"] == [0], "only seeds that both have are compared"
    assert "## Failed runs" in (out / "comparison.md").read_text()
    pretended.fail = set()
    assert run(recipe, out) == 0
    assert len(pretended.ran) == 5
    assert json.loads((out / "comparison.json").read_text())["failed"] == []


def test_parts_can_be_run_and_reported(pretended, tmp_path, capsys):
    recipe, out = write_comparison(tmp_path), tmp_path / "out"
    assert run(recipe, out, "--report_only") == 2
    assert "no run is finished" in capsys.readouterr().err
    assert run(recipe, out, "--models", "vanilla", "--seeds", "1") == 0
    content = json.loads((out / "comparison.json").read_text())
    assert content["comparisons"] == []
    assert content["missing"] == ["chase/connection/seed-0", "chase/vanilla/seed-0", "chase/connection/seed-1"]
    assert "## Not run" in (out / "comparison.md").read_text()
    assert run(recipe, out, "--report_only") == 0
    assert len(pretended.ran) == 1
    for option, value in (("--tasks", "chse"), ("--models", "x"), ("--seeds", "7")):
        assert run(recipe, out, option, value) == 2
        assert f"{option}: the recipe has no" in capsys.readouterr().err


def test_debug_rehearses_with_little(pretended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_comparison(tmp_path, seeds=[3, 4, 5, 6, 7], training={**TRAINING, "max_steps": 500, "eval_steps": 1})
    assert compare.main([str(recipe), "--debug", "--tasks", "chase"]) == 0
    content = json.loads((tmp_path / "outputs" / "compare-tiny-debug" / "comparison.json").read_text())
    assert content["seeds"] == [3, 4]
    assert {entry["updates"] for entry in content["results"]} == {2}
    with pytest.raises(UserError, match="no task"):
        compare.main([str(recipe), "--debug", "--data_dir", "nope=x"])


def test_a_cell_as_a_process_of_its_own(tmp_path):
    """The real thing: one cell that fails, with the training command's own line as the reason, and no other harm."""
    folder = CellFolder(tmp_path)
    recipe = {"model": VANILLA, "task": {"name": "strategyqa", "data_dir": "nowhere"}, "training": {"use_cpu": True}}
    cell = Cell("broken/seed-0", recipe)
    with folder.lock(cell, wait=True) as lock:
        outcome = run_cell(folder, cell, Worker(), lock)
    assert outcome.status == "failed"
    assert "nowhere" in outcome.reason
    assert "\n" not in outcome.reason
    assert folder.outcome(cell)["status"] == "failed"


def test_a_cell_ended_by_a_signal_is_told(tmp_path, monkeypatch):
    from trainers.comparison import cells

    folder, cell = CellFolder(tmp_path), Cell("killed", {"model": VANILLA})
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    real = cells._run
    monkeypatch.setattr(cells, "_run", lambda _, log, environment, lock: real(command, log, environment, lock))
    with folder.lock(cell, wait=True) as lock:
        assert run_cell(folder, cell, Worker(), lock).reason == "ended by SIGKILL (out of memory?)"


def test_an_interrupted_command_takes_its_cell_along(tmp_path):
    """SIGTERM as `timeout` or a queue sends it: the training process ends too, and the lock is free again."""
    from trainers.comparison import cells

    folder, cell = CellFolder(tmp_path), Cell("a", {})
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]

    def end_once_started() -> None:
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_once_started).start()
    with pytest.raises(KeyboardInterrupt), interruptible(), folder.lock(cell, wait=True) as lock:
        cells._run(command, log, dict(os.environ), lock)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    with folder.lock(cell, wait=False) as lock:
        assert lock is not None


def test_a_held_cell_is_left_to_its_holder(pretended, tmp_path):
    """Two workers: what another holds is skipped; the first worker waits for it and takes its result."""
    folder = CellFolder(tmp_path)
    mine, theirs = (
        Cell(name, {"model": VANILLA, "task": CHASE, "training": TRAINING | {"seed": 0}}) for name in ("mine", "theirs")
    )
    with folder.lock(theirs, wait=True):
        with folder.lock(theirs, wait=False) as second:
            assert second is None
        outcomes = run_cells(folder, [theirs, mine], Worker(rank=1, count=2))
    assert list(outcomes) == ["mine"]
    write_run(folder.run(theirs), [1, 0, 1])
    folder.file(theirs, "yaml").write_text(yaml.safe_dump(theirs.recipe))
    outcomes = run_cells(folder, [theirs, mine], Worker(rank=0, count=2))
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"theirs": "reused", "mine": "reused"}
    assert len(pretended.ran) == 1


def test_a_failure_of_another_worker_is_not_tried_twice(trained, tmp_path):
    """What failed since this command began is not tried again, but what failed before it is, whatever the clock said
    then: it may have been set back."""
    folder, cell = CellFolder(tmp_path), Cell("bad", {"model": VANILLA})
    for ended, tried in ((time.time, 0), (lambda: time.time() + 3600, 1), (lambda: time.time() - 3600, 1)):
        trained.ran.clear()
        trained.fail = {"bad"}
        folder.outcome = lambda cell, ended=ended: {
            "status": "failed", "seconds": 1.0, "reason": "out of luck", "ended": ended(),
        }  # fmt: skip
        outcomes = run_cells(folder, [cell], Worker())
        assert len(trained.ran) == tried
        assert tried or outcomes["bad"] == Outcome("failed", 1.0, "out of luck")


def test_interrupted_training_is_resumed_and_a_stillborn_run_removed(trained, tmp_path, monkeypatch):
    from trainers.comparison import cells

    recipe = {"model": VANILLA, "task": CHASE, "training": TRAINING | {"seed": 0}}
    folder, cell, seen = CellFolder(tmp_path), Cell("a", recipe), []

    def start(command, log, *_) -> int:
        seen.append(command)
        log.write_text("stopped")
        return 1

    monkeypatch.setattr(cells, "_run", start)
    for content, resumed in ((None, False), ("junk.txt", False), ("recipe.yaml", True)):
        if content:
            folder.run(cell).mkdir(parents=True)
            (folder.run(cell) / content).write_text("x")
        with folder.lock(cell, wait=True) as lock:
            run_cell(folder, cell, Worker(), lock)
        assert ("--resume" in seen[-1]) == resumed
        assert folder.run(cell).exists() == resumed


def test_workers_are_numbered_by_the_launcher(monkeypatch):
    assert Worker.from_environment({}) == Worker(0, 1, 0)
    assert Worker.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Worker(3, 4, 1)
    with pytest.raises(UserError, match="FSDP: every run of a comparison or sweep trains in one process"):
        Worker.from_environment({"ACCELERATE_USE_FSDP": "true"})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment = Worker(1, 2, 1).environment()
    assert "RANK" not in environment
    assert "TORCHELASTIC_RUN_ID" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "6"


def test_remaining_time_goes_by_group():
    slow, slow2, fast, unknown = (
        Cell(name, {}, group) for name, group in (("a", ("s",)), ("b", ("s",)), ("c", ("f",)), ("d", ("u",)))
    )
    estimate = Estimate([slow, slow2, fast, unknown], workers=2)
    assert estimate.remaining([slow]) is None
    estimate.add(slow, 100)
    estimate.add(fast, 20)
    assert estimate.remaining([slow2]) == 50
    assert estimate.remaining([slow2, unknown]) == (100 + 60) / 2


def made(tmp_path: Path, better: float, seeds: int = 5, examples: int = 200, metric: str = "accuracy", **changes):
    """A comparison of run folders made by hand, in which `a` has that much more than `b`."""
    recipe = write_comparison(
        tmp_path,
        models={"a": {"model": CONNECTION}, "b": {"model": VANILLA}},
        tasks={"first": {"task": CHASE}, "second": {"task": CHASE}},
        seeds=list(range(seeds)),
        resamples=1000,
        **changes,
    )
    comparison, folder = read_comparison(recipe), CellFolder(tmp_path / "out")
    cells = comparison.cells()
    random = np.random.default_rng(0)
    difficulty = {task: random.random(examples) for task in comparison.tasks}
    for (model, task, size, _), cell in cells.items():
        level = 0.5 + (better if model == "a" and task == "first" else 0) - (0.1 if size else 0)
        noise = random.normal(0, 0.02, size=examples)
        scores = difficulty[task] + noise < level if metric == "accuracy" else level + noise
        write_run(folder.run(cell), scores, metric)
    return comparison, cells, folder


def test_a_real_difference_is_told_and_another_is_called_not_significant(tmp_path):
    comparison, cells, folder = made(tmp_path, better=0.2)
    content, _, _ = gather(comparison, cells, folder, {})
    first, second = content["comparisons"]
    assert first["verdict"] == "a is better"
    assert first["p_value_holm"] == pytest.approx(2 * min(first["p_value"], second["p_value"]))
    assert first["difference"]["interval"][0] > 0
    assert first["effect"]["cohens_h"] > 0.2
    assert max(first["mcnemar_per_seed"]) < 0.05
    assert second["verdict"] == "no significant difference"
    low, high = second["difference"]["interval"]
    assert low < 0 < high
    assert first["power"]["seeds_for_observed"] <= 5
    assert "1 of 2 differences are significant" in card.comparison_card(content, {})


def test_of_an_error_less_is_better(tmp_path):
    comparison, cells, folder = made(tmp_path, better=0.2, metric="error")
    content, _, _ = gather(comparison, cells, folder, {})
    assert content["comparisons"][0]["verdict"] == "b is better"
    assert "effect" not in content["comparisons"][0]
    assert content["results"][0]["metric"] == "error"


def test_data_that_differ_between_models_are_told(tmp_path):
    comparison, cells, folder = made(tmp_path, better=0.0)
    path = folder.run(cells["a", "first", None, 2]) / "recipe.yaml"
    path.write_text(path.read_text().replace("same", "other"))
    content, _, _ = gather(comparison, cells, folder, {})
    assert [entry["same_data"] for entry in content["comparisons"]] == [False, True]
    assert "did **not** all have the same data" in card.comparison_card(content, {})
    path = folder.run(cells["b", "first", None, 2]) / "recipe.yaml"
    path.write_text(path.read_text().replace("same", "other"))
    content, _, _ = gather(comparison, cells, folder, {})
    assert content["tasks"]["first"]["same_data"], "generated data may go with the seed"


@pytest.mark.parametrize(
    ("row", "metric", "score"),
    [
        ({"correct": True}, "accuracy", 1.0),
        ({"correct": None, "score": 0.25}, "rouge_l", 0.25),
        ({"error": 3.5}, "error", 3.5),
    ],
)
def test_scores_of_every_kind_of_metric_are_read(row, metric, score, tmp_path):
    folder = write_run(tmp_path / "run", [0.5], metric=metric)
    (folder / "predictions.jsonl").write_text(json.dumps({"id": "x"} | row) + "\n")
    assert read_run(folder).scores.tolist() == [score]


@pytest.mark.parametrize(
    ("file", "content", "rule"),
    [
        ("metrics.json", "{", "not a finished run: "),
        ("metrics.json", "[]", "not a finished run: metrics.json tells no metric of a task"),
        ("metrics.json", '{"task": 3}', "not a finished run: metrics.json tells no metric of a task"),
        ("recipe.yaml", "a: [", "not a finished run: "),
        ("predictions.jsonl", "3\n", "line 1 has no score, accuracy or correct: nothing to compare"),
        ("predictions.jsonl", '{"correct": "yes"}\n', "line 1 has no score, accuracy or correct: nothing to compare"),
    ],
)
def test_a_damaged_run_is_one_line(file, content, rule, tmp_path):
    folder = write_run(tmp_path / "run", [1, 0, 1])
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=rule) as caught:
        read_run(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_few_seeds_are_not_judged(tmp_path):
    comparison, cells, folder = made(tmp_path, better=0.3, seeds=LEAST_SEEDS - 1)
    content, _, _ = gather(comparison, cells, folder, {})
    assert content["comparisons"][0]["verdict"] == "not judged: 4 of at least 5 seeds"
    assert "Nothing is judged" in card.comparison_card(content, {})


def test_runs_on_other_examples_cannot_be_paired(tmp_path):
    comparison, cells, folder = made(tmp_path, better=0.0)
    path = folder.run(next(iter(cells.values()))) / "predictions.jsonl"
    path.write_text(path.read_text().replace("test-3", "test-x"))
    with pytest.raises(UserError, match="different examples"):
        gather(comparison, cells, folder, {})
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match="line 1 has no score, accuracy or correct"):
        read_run(path.parent)


def report(tmp_path: Path):
    others = {
        "source": "a paper",
        "url": "https://example.org/paper",
        "note": "Its table 2.",
        "results": {"Their model | large": {"first": 0.75}, "Baseline": {"first": 0.73, "third": 0.5}},
    }
    comparison, cells, folder = made(tmp_path, better=0.2, train_sizes=[20], claimed=[others], published=[others])
    content, curves, runs = gather(comparison, cells, folder, {})
    for entry in content["results"]:
        entry["cost"] = {"flops_per_example": 2.5e6, "examples": 16} if entry["train_size"] is None else None
    latency = {"latency_seconds": 0.01, "batch_seconds_per_example": 0.002, "batch": 32, "device": "cpu"}
    return content, curves, timings(runs, {("a", "first"): latency})


def test_report_tells_what_the_numbers_tell(tmp_path):
    content, curves, clock = report(tmp_path)
    page = card.comparison_card(content, clock, command="python -m x", pictures=["accuracy.png"])
    assert "    python -m x" in page
    assert "a is better" in page
    assert "no significant difference" in page
    assert page.count("Theirs, not ours") == 2
    assert "stated, not known to be measured" in page
    assert "Their model &#124; large" in page, "text of others cannot break a table"
    assert 'always "A" &#124; B' in page
    for line in page.splitlines():
        if line.startswith("| "):
            assert len(line) < 500
    rows = list(csv.DictReader(io.StringIO(csv_text(content, clock))))
    assert len(rows) == 8
    assert list(rows[0]) == list(COLUMNS)
    found = next(row for row in rows if (row["task"], row["model"], row["verdict"]) == ("first", "a", "a is better"))
    assert float(found["difference"]) == content["comparisons"][0]["difference"]["value"]
    latex = latex_text(content)
    assert latex.count(r"\\") == 3
    assert "0.732" not in latex
    assert {len(re.findall("(?<!\\\\)&", line)) for line in latex.splitlines() if line.endswith(r"\\")} == {4}
    charts = all_charts(content, curves, clock)
    assert list(charts) == ["accuracy.png", "cost.png", "training_curves.png", "data_size.png"]
    assert all(isinstance(figure, Figure) for figure in charts.values())
    assert json.loads(json.dumps(content)) == content


def test_card_command_renders_a_folder(tmp_path, capsys):
    content, _, clock = report(tmp_path)
    for name, value in (("comparison", content), ("timings", clock)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert card.main([str(tmp_path), "--command", "python -m y", "--title", "Compared"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# Compared\n")
    assert "    python -m y" in shown
    (tmp_path / "timings.json").write_text("{}")
    assert card.main([str(tmp_path)]) == 2
    assert "schema version" in capsys.readouterr().err
    assert card.main([str(tmp_path / "nothing")]) == 2


def test_flops_are_those_of_the_matrix_products():
    """A pre-norm Transformer of one layer each: counted by hand, two operations a multiply-add."""
    width, inner, vocabulary, source, target = 16, 32, 50, 6, 4
    config = AutoConfig.for_model(**VANILLA, vocab_size=vocabulary)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    inputs = {"input_ids": torch.full((1, source), 5), "labels": torch.full((1, target), 5)}

    def attention(queries: int, keys: int) -> int:
        return 2 * width * width * (2 * queries + 2 * keys) + 2 * 2 * queries * keys * width

    encoder = attention(source, source) + 2 * 2 * source * width * inner
    decoder = attention(target, target) + attention(target, source) + 2 * 2 * target * width * inner
    assert forward_flops(model, inputs) == encoder + decoder + 2 * target * width * vocabulary


def test_matched_models_get_solved_sizes(monkeypatch, tmp_path):
    """What `matched_to` of an architecture returns becomes the recipe of the cells; parameters are those of modules."""
    config_class = type(AutoConfig.for_model("vanilla_transformer"))

    def solve(reference, **fixed):
        wanted = trainable_parameters(reference)
        sizes = range(30, 200, 3)
        configs = (config_class(vocab_size=reference.vocab_size, intermediate_size=size, **fixed) for size in sizes)
        return min(configs, key=lambda config: abs(trainable_parameters(config) - wanted))

    monkeypatch.setattr(config_class, "matched_to", staticmethod(solve), raising=False)
    reference = AutoConfig.for_model(**CONNECTION, vocab_size=40)
    fields = matched_fields({name: value for name, value in VANILLA.items() if name != "intermediate_size"}, reference)
    assert fields["model_type"] == "vanilla_transformer"
    assert fields["hidden_size"] == 16
    assert "vocab_size" not in fields
    solved = trainable_parameters(AutoConfig.for_model(**fields, vocab_size=40))
    assert solved == pytest.approx(trainable_parameters(reference), rel=0.02)
    with pytest.raises(UserError, match="cannot be matched"):
        matched_fields(CONNECTION, reference)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"droput": 0.1}, r"unknown field model.droput; did you mean 'dropout'\?"),
        ({"hidden_size": "16"}, "model.hidden_size: expected int, got '16'"),
        (
            {"model_type": "vanila_transformer"},
            "model.model_type: unknown architecture 'vanila_transformer'; did you mean",
        ),
        ({"hidden_size": 512, "num_hidden_layers": 9}, r"matched_to: no sizes with .*hidden_size=512.* come within 1"),
        ({"num_attention_heads": 0}, "matched_to: num_attention_heads: Value must be a positive integer, got 0"),
    ],
)
def test_models_that_cannot_be_matched(model, rule, tmp_path, capsys):
    fixed = {name: value for name, value in VANILLA.items() if name in ("model_type", "max_position_embeddings")}
    models = {"connection": {"model": CONNECTION}, "vanilla": {"model": fixed | model, "matched_to": "connection"}}
    assert run(write_comparison(tmp_path, models=models, parameters="matched"), tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert re.search(f"^error: chase, vanilla: {rule}", message)
    assert message.count("\n") == 1


def test_what_is_no_size_is_kept_beside_the_solved_ones():
    reference = AutoConfig.for_model(**CONNECTION, vocab_size=40)
    fields = {"model_type": "vanilla_transformer", "embeddings_from": "ann/model", "dropout": 0.3}
    solved = matched_fields(fields, reference)
    assert solved.items() >= fields.items()
    assert solved["hidden_size"] == CONNECTION["hidden_size"]


def test_only_text_models_are_matched_and_counted_before_training(tmp_path):
    machine = {"model_type": "continuous_thought_machine", "d_model": 16, "memory_length": 3, "iterations": 3}
    parity = {"name": "parity", "options": {"length": 6, "num_train": 20, "num_validation": 5, "num_test": 5}}
    models = {"small": {"model": machine}, "large": {"model": machine | {"d_model": 32}}}
    shared = {"tasks": {"p": {"task": parity}}, "parameters": "matched"}
    comparison = read_comparison(write_comparison(tmp_path, models=models, **shared))
    prepare(comparison, comparison.cells(), comparison.tasks)
    models["large"] = {"model": machine, "matched_to": "small"}
    comparison = read_comparison(write_comparison(tmp_path, models=models, **shared))
    with pytest.raises(UserError, match=r"^p, large: matched_to: small does not take part or is no text model$"):
        prepare(comparison, comparison.cells(), comparison.tasks)


def test_unmatched_parameters_are_refused(tmp_path, capsys):
    recipe = write_comparison(tmp_path, parameters="matched")
    assert run(recipe, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert re.search(
        r"chase: connection has [\d,]+ trainable parameters and vanilla [\d,]+ \(.* more than 1 % apart", message
    )
    assert not (tmp_path / "out").exists(), "refused before anything is written"


@pytest.mark.parametrize("count", [980, 1020])
def test_fewer_parameters_are_refused_like_more(tmp_path, count):
    comparison = read_comparison(write_comparison(tmp_path, parameters="matched"))
    other = next(name for name in comparison.models if name != comparison.against)
    _check_counts(comparison, "chase", {comparison.against: 1000, other: 1005})
    with pytest.raises(UserError, match=rf"{other} has [\d,]+ trainable parameters and {comparison.against} 1,000"):
        _check_counts(comparison, "chase", {comparison.against: 1000, other: count})


def test_all_models_get_the_same_but_their_own(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(
        yaml.safe_dump({"model": {"model_type": "x"}, "task": CHASE, "training": {"max_steps": 9, "seed": 4}})
    )
    recipe = write_comparison(
        tmp_path,
        models={"a": {"model": CONNECTION, "training": {"learning_rate": 1.0e-4}}, "b": {"model": VANILLA}},
        tasks={"t": {"recipe": "base.yaml", "model": {"dropout": 0.3}, "models": {"b": {"hidden_size": 32}}}},
        train_sizes=[10],
        training={"max_steps": 3},
        seeds=[7, 8],
    )
    comparison = read_comparison(recipe)
    cells = comparison.cells()
    assert [key[3] for key in cells] == [7, 7, 7, 7, 8, 8, 8, 8], "seeds change slowest"
    a, b = cells["a", "t", 10, 7].recipe, cells["b", "t", 10, 7].recipe
    assert a["task"] == b["task"] == {**CHASE, "max_train_samples": 10}
    assert a["training"] == {"max_steps": 3, "seed": 7, "learning_rate": 1.0e-4, "disable_tqdm": True}
    assert b["training"] == {"max_steps": 3, "seed": 7, "disable_tqdm": True}
    assert (a["model"], b["model"]) == (CONNECTION | {"dropout": 0.3}, VANILLA | {"dropout": 0.3, "hidden_size": 32})
    assert "max_train_samples" not in cells["a", "t", None, 7].recipe["task"]
    limit_samples(comparison, 6)
    assert comparison.recipe("a", "t", None, 7)["task"]["max_train_samples"] == 6
    assert "max_steps" not in TUNABLE
    assert "per_device_train_batch_size" not in TUNABLE


@pytest.mark.parametrize(
    ("model_type", "task", "limits"),
    [
        ("vanilla_transformer", {"max_test_samples": 5}, {"train": 8, "validation": 8, "test": 5}),
        ("continuous_thought_machine", {}, {"train": 8, "validation": 8, "test": 8}),
        ("in_context_transformer", {"num_test": 4}, {"validation": 8, "test": 4}),
    ],
)
def test_examples_are_limited_in_the_fields_of_the_task(model_type, task, limits):
    found = sample_limits({"model": {"model_type": model_type}, "task": task}, 8)
    form = "num_{}" if "num_test" in task else "max_{}_samples"
    assert found == {form.format(split): limit for split, limit in limits.items()}


def test_data_folders_are_found(tmp_path):
    recipe = write_comparison(
        tmp_path,
        tasks={"qa": {"task": {"name": "strategyqa"}}, "logiqa": {"task": {"name": "logiqa"}}, "c": {"task": CHASE}},
    )
    comparison = read_comparison(recipe)
    for name in ("strategyqa", "logiqa", "special"):
        (tmp_path / name).mkdir()
    apply_data_dirs(comparison, [str(tmp_path), f"logiqa={tmp_path / 'special'}"])
    folders = {name: comparison.recipe("vanilla", name, None, 0)["task"].get("data_dir") for name in comparison.tasks}
    assert folders == {"qa": str(tmp_path / "strategyqa"), "logiqa": str(tmp_path / "special"), "c": None}
    for wrong, rule in (
        ("nothing", "no folder"),
        ("qaa=x", "no task 'qaa'; did you mean 'qa'"),
        ("qa=x", "no folder x"),
    ):
        with pytest.raises(UserError, match=rule):
            apply_data_dirs(comparison, [wrong])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"modles": {}}, "unknown field 'modles'; did you mean 'models'"),
        ({"models": {}}, "needs models and tasks"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"seeds": "5"}, "seeds"),
        ({"against": "vanila"}, "against: no model 'vanila'; did you mean 'vanilla'"),
        ({"train_sizes": [0]}, "train_sizes"),
        ({"confidence": 95}, "confidence is 95"),
        ({"tolerance": 0}, "tolerance is 0"),
        ({"resamples": 1}, "resamples is 1"),
        ({"parameters": "same"}, "parameters"),
        ({"models": {"a b": {"model": VANILLA}}}, "names a folder"),
        ({"models": {"a": {}}}, "model.model_type is missing"),
        ({"models": {"a": [1]}}, "expected a mapping"),
        ({"models": {"a": {"model": VANILLA, "training": {"max_steps": 9}}}}, "same budget"),
        ({"models": {"a": {"model": VANILLA, "tasks": ["chess"]}}}, "no task 'chess'; did you mean 'chase'"),
        ({"models": {"a": {"model": VANILLA, "matched_to": "a"}}}, "no other model"),
        ({"models": {"a": {"model": VANILLA, "recipe": "gone.yaml"}}}, "cannot read the recipe"),
        (
            {"models": {"a": {"model": VANILLA}, **{n: {"model": VANILLA, "matched_to": m} for n, m in ("ba", "cb")}}},
            "models.c.matched_to: b is itself matched to another model",
        ),
        ({"tasks": {"t": {}}}, "task.name is missing"),
        ({"tasks": {"t": {"task": CHASE, "models": {"x": {}}}}}, "no model 'x'"),
        ({"claimed": [{"results": {}}]}, "source is missing"),
    ],
)
def test_mistakes_in_the_recipe_are_told_in_a_line(changes, rule, tmp_path, capsys):
    assert run(write_comparison(tmp_path, **changes), tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert re.search(rule, message)
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"models": {"a": {"model": VANILLA | {"hiden_size": 3}}}}, "chase, a: unknown field model.hiden_size"),
        ({"training": {**TRAINING, "learning_rate": -1}}, "training.learning_rate is -1"),
        ({"tasks": {"chase": {"task": {"name": "chas"}}}}, "unknown task 'chas'"),
        ({"tasks": {"s": {"task": {"name": "strategyqa", "data_dir": "nowhere"}}}}, "nowhere"),
    ],
)
def test_mistakes_in_cells_are_told_before_any_is_run(trained, changes, rule, tmp_path, capsys):
    assert run(write_comparison(tmp_path, **changes), tmp_path / "out") == 2
    assert rule in capsys.readouterr().err
    assert trained.ran == []


def test_mistakes_on_the_command_line(tmp_path, capsys):
    recipe = write_comparison(tmp_path)
    for options, rule in (
        (["--max_samples", "0"], "--max_samples is 0"),
        (["--sedes", "1"], "unrecognized arguments"),
        (["--seeds", "x"], "invalid int"),
    ):
        assert run(recipe, tmp_path / "out", *options) == 2
        assert rule in capsys.readouterr().err
    assert compare.main([str(tmp_path / "gone.yaml")]) == 2
    recipe.write_text("seeds: [1]\nseeds: [2]\n")
    assert run(recipe, tmp_path / "out") == 2
    assert "the key 'seeds' stands there twice" in capsys.readouterr().err
    recipe.write_text("models: [")
    assert run(recipe, tmp_path / "out") == 2
    assert "not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_shipped_comparisons_are_rehearsed(path, pretended, tmp_path, monkeypatch, capsys):
    """All but the training: data read, sizes matched, every cell's recipe written and one that `trainers.train` takes,
    report and pictures made. Of a starting point that is not there yet, the line says where it is looked for."""
    data = ROOT / "tests" / "data"
    monkeypatch.chdir(tmp_path)
    options = [str(path), "--max_samples", "4", "--data_dir", str(data), "--output_dir", "out"]
    missing = read_comparison(path).models.get("reader")
    if missing is not None:
        assert compare.main(options) == 2
        assert f"{missing.model['reader']} does not exist" in capsys.readouterr().err
        return
    assert compare.main([*options, "--debug"]) == 0
    recipes = list((tmp_path / "out" / "cells").rglob("seed-*.yaml"))
    assert len(recipes) == len(pretended.ran)
    for recipe in recipes:
        parsed = parse_recipe([str(recipe)], prog="train")
        assert parsed.training.max_steps == 2
        assert (parsed.task.max_train_samples or 4) <= 4
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["comparisons"]
    assert content["failed"] == content["missing"] == []


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_shipped_comparisons_are_complete(path):
    comparison = read_comparison(path)
    assert len(comparison.plan.seeds) >= LEAST_SEEDS
    assert comparison.cells()
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"`recipes/compare/{path.name}`" in listed

"""Runs of every kind that are killed between any two operations on files, or broken off by a signal: the same command
goes on to the identical end, and an unfinished folder is never taken for a finished one."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from tests.test_security import make_model, write_pieces
from trainers import compare, couple, evaluate, sweep
from trainers.comparison import cells
from trainers.files import LOCK_NAME, only_user_of, remove_leftovers
from trainers.run import empty_folder, finished
from trainers.run_trainer import RunTrainer, delete_checkpoint, last_complete_checkpoint
from trainers.tasks.thought.base import ThoughtExamples
from trainers.train import main

from .comparisons import VANILLA, Trained, write_comparison
from .killing import in_a_copy
from .test_in_context import CONNECTIVITY, FUNCTIONS
from .test_thought import PARITY
from .test_train import RECIPE

TRAINING = {
    "max_steps": 7,  # within an epoch
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3.0e-3,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
TICKS = {
    "model": {"model_type": "continuous_thought_machine", **PARITY, "dropout": 0.1},
    "task": {"name": "parity", "options": {"length": 6, "num_train": 40, "num_validation": 4, "num_test": 6}},
    "evaluation": {"shown_examples": 0, "stopping_samples": 0},
    "training": TRAINING,
}
FEW = {"slow_baseline_prompts": 0, "prompts": ["random_quadrant"], "prompts_of_each_kind": 4}
KINDS = {
    "text": {"model": VANILLA, "task": RECIPE["task"], "training": TRAINING | BEST},
    "reasoning": {**RECIPE, "training": TRAINING | BEST},
    "thought": TICKS,
    "functions": {**FUNCTIONS, "training": TRAINING, "evaluation": FEW},
    "connectivity": {**CONNECTIVITY, "training": TRAINING | {"dense_labels": True}},
}
QUICKEST = "thought"
ALL_KINDS = [kind if kind == QUICKEST else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]


class Whole:
    """Runs of each kind that nothing disturbs, made when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder, self.operations = folder, {}

    def __call__(self, kind: str) -> tuple[list[str], Path]:
        """The command of a kind without its output folder, and a folder in which it ended undisturbed."""
        recipe, out = self.folder / f"{kind}.yaml", self.folder / kind
        if kind not in self.operations:
            recipe.write_text(yaml.safe_dump(KINDS[kind]))
            end = in_a_copy(lambda: main([str(recipe), "--output_dir", str(out)]), out)
            assert end.code == 0, end.errors
            self.operations[kind] = end.operations
        return [str(recipe), "--output_dir"], out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_times(content)
            for key, content in value.items()
            if "second" not in key and key not in ("command", "created", "runtime", "ended", "spent")
        }
    return [without_times(content) for content in value] if isinstance(value, list) else value


def end_state(folder: Path) -> dict[str, Any]:
    """All that a folder holds: weights bit for bit, numbers but for times, and the names of all other files."""
    state: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            state[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        elif path.suffix == ".json" and path.name not in ("trainer_state.json", "checksums.json"):
            state[name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            state[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            state[name] = None
    return state


def assert_same_end(folder: Path, expected: Path) -> None:
    state, wanted = end_state(folder), end_state(expected)
    assert [name for name in {**state, **wanted} if state.get(name, 0) != wanted.get(name, 0)] == []


def resumed(command: list[str], target: Path) -> None:
    assert main([*command, str(target), "--resume"]) == 0


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_run_killed_when_it_was_trained_is_not_trained_on(whole, tmp_path, kind):
    """The kill comes in the evaluation of the finished model; the last checkpoint is one from within an epoch."""
    command, out = whole(kind)
    target = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.run.TrainingRun.finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_copy(lambda: main([*command, str(target)]), target).signal == signal.SIGKILL
    resumed(command, target)
    assert_same_end(target, out)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_operation_ends_the_same(whole, tmp_path, kind):
    """Recording, saving, rotating, drawing, writing the results: a few of the hundred operations of a run."""
    command, out = whole(kind)
    for operation in sorted(random.Random(kind).sample(range(3, whole.operations[kind] + 1), 5)):
        target = tmp_path / str(operation)
        end = in_a_copy(lambda target=target: main([*command, str(target)]), target, operation)
        assert end.signal == signal.SIGKILL, (operation, end)
        resumed(command, target)
        assert_same_end(target, out)


def test_early_stopping_before_a_kill_holds_after_it(tmp_path):
    """The evaluation that stops the training is followed by a checkpoint, and that by the kill."""
    training = TRAINING | BEST | {"max_steps": 40, "learning_rate": 0.3, "early_stopping_patience": 2}
    recipe, target = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump({**TICKS, "training": training}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.run.TrainingRun.finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_copy(lambda: main([str(recipe), "--output_dir", str(target)]), target).signal == signal.SIGKILL
    last = max(int(path.name.split("-")[1]) for path in target.glob("checkpoint-*"))
    assert last < 40, "the training was not stopped"
    resumed([str(recipe), "--output_dir"], target)
    assert json.loads((target / "metrics.json").read_text())["train"]["steps"] == last


def test_a_folder_that_is_being_emptied_is_not_finished(tmp_path):
    """`--overwrite` killed at each of its deletions: never does the rest look like a whole run."""
    names = ("a.json", "metrics.json", "README.md", "model.safetensors", "recipe.yaml", "z/picture.png")

    def make(folder: Path) -> None:
        (folder / "z").mkdir(parents=True)
        for name in names:
            (folder / name).touch()

    make(tmp_path / "whole")
    operations = in_a_copy(lambda: empty_folder(tmp_path / "whole"), tmp_path / "whole").operations
    assert operations >= len(names)
    for operation in range(2, operations + 1):
        folder = tmp_path / str(operation)
        make(folder)
        assert in_a_copy(lambda folder=folder: empty_folder(folder), folder, operation).signal == signal.SIGKILL
        assert not finished(folder)
        assert (folder / "recipe.yaml").exists()


def test_a_checkpoint_that_is_being_deleted_is_not_complete(whole, tmp_path):
    _, out = whole(QUICKEST)
    shutil.copytree(out, tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoint-7"
    operations = in_a_copy(lambda: delete_checkpoint(folder), tmp_path).operations
    assert operations > 5
    for operation in (2, operations // 2, operations):
        target = tmp_path / str(operation)
        shutil.copytree(out, target)
        killed = in_a_copy(lambda target=target: delete_checkpoint(target / "checkpoint-7"), target, operation)
        assert killed.signal == signal.SIGKILL
        assert last_complete_checkpoint(target) == str(target / "checkpoint-6")


def test_what_a_killed_process_was_writing_is_deleted_and_nothing_else(tmp_path):
    ours = (".metrics.json.k3_x9ab0.json", ".README.md.abcdefgh.md")
    others = (".env.template", ".hidden.json", ".a.json.abcdefgh.yaml", ".a.json.Abcdefgh.json", "a.json.abcdefgh.json")
    for name in (*ours, *others):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_a_run_in_one_line_and_it_goes_on(whole, tmp_path, number):
    command, out = whole(QUICKEST)
    target = tmp_path / "out"
    real = RunTrainer.training_step

    def step(self, *arguments, **options):
        if self.state.global_step == 5:
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it from birth
        return main([*command, str(target)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", step)
        end = in_a_copy(work, target)
    assert end.code == 130
    assert end.errors.strip().splitlines()[-1] == "interrupted; the same command with --resume continues the run"
    assert "Traceback" not in end.errors
    assert not (target / LOCK_NAME).exists()
    resumed(command, target)
    assert_same_end(target, out)


def assert_goes_on_from_the_last_whole_checkpoint(command, target, out) -> None:
    assert {path.name for path in target.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    resumed(command, target)
    assert_same_end(target, out)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_loss_that_is_no_number_is_told_and_the_run_goes_on_from_before_it(whole, tmp_path, capsys, kind):
    command, out = whole(kind)
    target = tmp_path / "out"
    real = RunTrainer.compute_loss

    def broken(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = real(self, model, inputs, True, num_items_in_batch)
        loss = loss * float("nan") if model.training and self.state.global_step == 4 else loss
        return (loss, outputs) if return_outputs else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "compute_loss", broken)
        assert main([*command, str(target)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: training: the loss is not a finite number at update 5; lower training.learning_rate" in last
    assert_goes_on_from_the_last_whole_checkpoint(command, target, out)


def test_weights_that_are_no_numbers_are_not_saved(whole, tmp_path, capsys):
    """The gradient of a finite loss is infinite: the update breaks the weights, the next loss would tell."""
    command, out = whole(QUICKEST)
    target = tmp_path / "out"
    real = RunTrainer.training_step

    def step(self, model, *arguments, **options):
        loss = real(self, model, *arguments, **options)
        if self.state.global_step == 5:
            next(model.parameters()).grad.fill_(float("inf"))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", step)
        assert main([*command, str(target)]) == 2
    assert "training: weights are not finite numbers at update 6;" in capsys.readouterr().err
    assert_goes_on_from_the_last_whole_checkpoint(command, target, out)


def test_a_process_that_loads_data_dies(whole, tmp_path, capsys):
    """It is killed when it reads for the sixth update; the run ends in one line, and resumes to the same end."""
    command, out = whole(QUICKEST)
    target = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TICKS, "training": TRAINING | {"dataloader_num_workers": 1}}))
    command = [str(recipe), "--output_dir"]
    examples = [cls for cls in ThoughtExamples.__subclasses__() if cls.__name__ != "ImageExamples"]

    def dying(self, index, real):
        if get_worker_info() is not None and list(target.glob("checkpoint-4")):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    with pytest.MonkeyPatch.context() as patch:
        for cls in examples:
            if "__getitem__" in vars(cls):
                real = cls.__getitem__
                patch.setattr(cls, "__getitem__", lambda self, index, real=real: dying(self, index, real))
        assert main([*command, str(target)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: a process that loads data (training.dataloader_num_workers) ended")
    assert not (target / "metrics.json").exists()
    resumed(command, target)
    weights = [load_file(folder / "model.safetensors") for folder in (out, target)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def held_by_another(folder: Path) -> Callable[[], None]:
    """Let another process claim a folder; calling what is returned kills that process."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process == 0:
        with only_user_of(folder):
            (folder.parent / "held").touch()
            time.sleep(600)
    while not (folder.parent / "held").exists():
        time.sleep(0.005)

    def let_go() -> None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    return let_go


@pytest.mark.parametrize("command", ["couple", "evaluate"])
def test_another_command_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path, capsys, command):
    model = make_model(tmp_path / "model")
    run, words = {
        "couple": (couple.main, ["--model", str(model), "--dataset", str(write_pieces(tmp_path)), "--output"]),
        "evaluate": (
            evaluate.main, [str(model), "--task", "pointer_chase", "--limit", "2", "--device", "cpu", "--output_dir"],
        ),
    }[command]  # fmt: skip
    target = tmp_path / "out"
    let_go = held_by_another(target)
    try:
        assert run([*words, str(target)]) == 2
        assert "another process is at work in this folder" in capsys.readouterr().err
        assert {path.name for path in target.iterdir()} == {LOCK_NAME}
    finally:
        let_go()
    assert (target / LOCK_NAME).exists()
    assert run([*words, str(target)]) == 0
    assert not (target / LOCK_NAME).exists()


@pytest.mark.parametrize("options", [[], pytest.param(["--memory", "256MiB"], marks=pytest.mark.long)])
def test_coupling_killed_at_any_stage_ends_the_same(tmp_path, options):
    """Gradients, inner products, matrices, pictures, page and report, with blocks on disk and without."""
    model, pieces = make_model(tmp_path / "model"), write_pieces(tmp_path)
    command = ["--model", str(model), "--dataset", str(pieces), *options, "--output"]

    def run(target: Path) -> int:
        return couple.main([*command, str(target)])

    end = in_a_copy(lambda: run(tmp_path / "whole"), tmp_path / "whole")
    assert end.code == 0, end.errors
    numbers = random.Random(0).sample(range(1, end.operations + 1), 8)
    for operation in numbers if options else (end.operations // 3, end.operations):
        target = tmp_path / str(operation)
        assert in_a_copy(lambda target=target: run(target), target, operation).signal == signal.SIGKILL
        if (target / couple.REPORT).exists():  # it is written last
            report = json.loads((target / couple.REPORT).read_text())
            assert all((target / name).exists() for name in report["generated_files"])
        assert run(target) == 0
        found, expected = end_state(target), end_state(tmp_path / "whole")
        for state in (found, expected):
            state[couple.REPORT].pop("gpu_performance")
        assert found == expected


@pytest.mark.long
def test_an_evaluation_killed_at_any_operation_ends_the_same(tmp_path):
    """Of a new one, and of one that replaces another by `--overwrite`."""
    model = make_model(tmp_path / "model")
    command = [str(model), "--task", "pointer_chase", "--limit", "6", "--batch_size", "2", "--output_dir"]

    def run(target: Path, *options: str) -> int:
        return evaluate.main([*command, str(target), *options])

    assert run(tmp_path / "old", "--num_beams", "2") == 0
    for old in (False, True):
        options = ["--overwrite"] if old else []
        folder = tmp_path / f"whole-{old}"
        if old:
            shutil.copytree(tmp_path / "old", folder)
        end = in_a_copy(lambda folder=folder, options=options: run(folder, *options), folder)
        assert end.code == 0, end.errors
        for operation in random.Random(0).sample(range(1, end.operations + 1), 5):
            target = tmp_path / f"{old}-{operation}"
            if old:
                shutil.copytree(tmp_path / "old", target)
            killed = in_a_copy(lambda target=target, options=options: run(target, *options), target, operation)
            assert killed.signal == signal.SIGKILL
            assert run(target, *options) == 0
            assert_same_end(target, folder)


@pytest.mark.long
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_many_runs_killed_at_any_operation_end_the_same(tmp_path, monkeypatch, command):
    """The command and the run it is at are killed together, three times on the way to the end."""
    monkeypatch.setattr(cells, "_run", Trained())
    models = {name: {"model": VANILLA | {"num_hidden_layers": layers}} for name, layers in (("one", 1), ("two", 2))}
    if command == "compare":
        recipe, run, options = write_comparison(tmp_path, models=models, seeds=[0]), compare.main, []
    else:
        recipe, run, options = tmp_path / "recipe.yaml", sweep.main, ["--over", "model.num_hidden_layers=1,2"]
        training = TRAINING | {"max_steps": 3}
        recipe.write_text(yaml.safe_dump({"model": VANILLA, "task": RECIPE["task"], "training": training}))

    def work(target: Path) -> int:
        return run([str(recipe), *options, "--output_dir", str(target)])

    whole = tmp_path / "whole"
    end = in_a_copy(lambda: work(whole), whole)
    assert end.code == 0, end.errors
    draw, target = random.Random(0), tmp_path / "killed"
    for _ in range(3):
        operation = draw.randrange(2, end.operations // 2)
        assert in_a_copy(lambda operation=operation: work(target), target, operation).signal == signal.SIGKILL
    assert work(target) == 0
    name = "comparison.json" if command == "compare" else "sweep.json"
    numbers = [without_times(json.loads((folder / name).read_text())) for folder in (whole, target)]
    for content in numbers:
        content.pop("versions", None)
    assert numbers[0] == numbers[1]
    for weights in (whole / "runs").rglob("model.safetensors"):
        other = target / weights.relative_to(whole)
        assert all(torch.equal(tensor, load_file(other)[key]) for key, tensor in load_file(weights).items())

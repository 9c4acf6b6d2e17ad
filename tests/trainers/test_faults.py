"""What breaks while a run is at work: damaged checkpoints, full disks, two runs in one folder, a loss that explodes."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from tests.test_security import make_model, write_pieces
from tests.trainers.tasks.test_thought import images_in
from trainers import couple, evaluate
from trainers.command import explain, run_command
from trainers.coupling.analyzer import CouplingAnalyzer
from trainers.errors import UserError
from trainers.files import CHECKSUMS_NAME, LOCK_NAME, damaged_file, write_checksums, writing_to
from trainers.run_trainer import RunTrainer, last_complete_checkpoint
from trainers.train import main

from .killing import in_a_copy
from .test_thought import IMAGES
from .test_train import ROOT, newest_checkpoint, same_tensors, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe without early stopping, and the folder of its finished run with three checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    training = {"early_stopping_patience": None, "num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "steps"}
    training |= {"eval_steps": None, "save_steps": 5, "save_total_limit": None}
    # Large enough that weights take more room than the code that is saved beside them.
    model = {"hidden_size": 48, "connection_rank": 8}
    recipe = write_recipe(folder, training=training, model=model)
    assert main([str(recipe), "--output_dir", str(folder / "out")]) == 0
    assert len(list((folder / "out").glob("checkpoint-*"))) == 4
    return recipe, folder / "out"


def unfinished(out: Path, target: Path) -> Path:
    """A copy of a run as it was before it finished. Returns its newest checkpoint."""
    shutil.copytree(out, target)
    for name in ("metrics.json", "README.md", "model.safetensors", "predictions.jsonl"):
        (target / name).unlink()
    return newest_checkpoint(target)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_damaged_checkpoint_is_dropped(run, tmp_path, damage):
    """Each of its files, one at a time."""
    _, out = run
    newest = newest_checkpoint(out)
    names = {path.name for path in newest.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < names
    # Without its list of checksums a checkpoint is one of another tool; there is nothing to compare it with.
    for name in sorted(names - ({CHECKSUMS_NAME} if damage == "gone" else set())):
        target = tmp_path / name
        for folder in (newest, out / "checkpoint-15"):
            shutil.copytree(folder, target / folder.name)
        file = target / newest.name / name
        content = bytearray(file.read_bytes())
        place = random.Random(name).randrange(len(content))
        content[place] ^= 1
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes({"flipped": content, "cut": content[:place], "empty": b""}[damage])
        assert last_complete_checkpoint(target) == str(target / "checkpoint-15"), name
        assert not file.parent.exists()


def test_an_empty_checkpoint_is_dropped(run, tmp_path, caplog):
    _, out = run
    shutil.copytree(out / "checkpoint-15", tmp_path / "checkpoint-15")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-25").touch()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-15")
    assert "checkpoint-20 is dropped: it was not written to its end" in caplog.text


def test_damage_is_told_and_the_run_ends_the_same(run, tmp_path, capsys, caplog):
    recipe, out = run
    newest = unfinished(out, tmp_path / "out")
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert main([str(recipe), "--output_dir", str(tmp_path / "out"), "--resume"]) == 0
    assert "checkpoint-16 is dropped: model.safetensors is damaged; the run goes on from the one before" in caplog.text
    assert "from checkpoint-15" in capsys.readouterr().out
    assert same_tensors(tmp_path / "out", out)
    assert (tmp_path / "out" / "predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()


def test_damaged_best_checkpoint_stops_the_run(tmp_path, capsys):
    recipe = write_recipe(tmp_path, training={"early_stopping_patience": None, "load_best_model_at_end": True})
    out = tmp_path / "out"
    assert main([str(recipe), "--output_dir", str(out)]) == 0
    best = json.loads((newest_checkpoint(out) / "trainer_state.json").read_text())["best_global_step"]
    (out / "metrics.json").unlink()
    weights = out / f"checkpoint-{best}" / "model.safetensors"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])
    assert best != int(newest_checkpoint(out).name.split("-")[1]), "the best checkpoint must not be the newest one"
    capsys.readouterr()
    assert main([str(recipe), "--output_dir", str(out), "--resume"]) == 2
    assert "model.safetensors: damaged since it was written" in capsys.readouterr().err


def test_checksums(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert damaged_file(tmp_path) is None
    write_checksums(tmp_path, [tmp_path / "a"])
    write_checksums(tmp_path, [tmp_path / "b"])
    assert damaged_file(tmp_path) is None
    (tmp_path / "b").write_text("c")
    assert damaged_file(tmp_path) == "b"
    (tmp_path / "b").unlink()
    assert damaged_file(tmp_path) == "b"
    (tmp_path / CHECKSUMS_NAME).write_text("[")
    assert damaged_file(tmp_path) == CHECKSUMS_NAME


def test_second_run_in_a_folder_is_refused(run, tmp_path, capsys):
    """While a process is at work in a folder none enters, even with --resume or --overwrite; after a kill one may."""
    recipe, _ = run
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainers.train", str(recipe), "--output_dir", str(out), "--num_train_epochs=2000"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(out.glob("checkpoint-*")):
            assert first.poll() is None
            time.sleep(0.02)
        for option in ("--resume", "--overwrite"):
            assert main([str(recipe), "--output_dir", str(out), "--num_train_epochs=2000", option]) == 2
            assert "another process is at work in this folder" in capsys.readouterr().err
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert (out / LOCK_NAME).exists()
    assert main([str(recipe), "--output_dir", str(out), "--overwrite"]) == 0
    assert not (out / LOCK_NAME).exists()


def test_exploding_loss_is_told(run, tmp_path, capsys):
    recipe, _ = run
    out = tmp_path / "out"
    rise = ["--learning_rate", "1e25", "--lr_scheduler_type", "linear", "--warmup_steps", "0", "--optim", "sgd"]
    assert main([str(recipe), "--output_dir", str(out), *rise, "--save_steps", "1", "--max_grad_norm", "0"]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: training: the loss is not a finite number at update 2; lower training.learning_rate" in shown
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (out / "metrics.json").exists()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out / "checkpoint-1/model.safetensors").values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [("model.safetensors", "File too large"), ("optimizer.pt", "a file was not written to its end; is the disk full?")],
)
def test_disk_that_fills_up(run, tmp_path, name, reason):
    """No file may grow beyond a limit of the system: one line, exit code 2; with room again the run ends the same."""
    recipe, out = run
    target = tmp_path / "out"
    limit = (newest_checkpoint(out) / name).stat().st_size - 1000
    smaller = [path.name for path in newest_checkpoint(out).iterdir() if path.stat().st_size <= limit]
    assert "modeling_connection_transformer.py" in smaller
    assert (name == "model.safetensors") == ("model.safetensors" not in smaller)

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return main([str(recipe), "--output_dir", str(target)])

    end = in_a_copy(work, target)
    assert end.code == 2, end.errors
    assert end.errors.strip().splitlines()[-1] == f"error: {target / 'checkpoint-5'}: {reason}"
    assert not (target / "metrics.json").exists()
    assert main([str(recipe), "--output_dir", str(target), "--resume"]) == 0
    assert same_tensors(target, out)


def test_a_file_that_cannot_be_written_is_an_oserror_whichever_library_writes(tmp_path):
    zeros = {"a": torch.zeros(3000)}
    tokenizer = Tokenizer(models.WordLevel({"a" * 9000: 0}, unk_token="a"))
    writers = {
        "torch": lambda path: torch.save(zeros, path),
        "safetensors": lambda path: save_file(zeros, path),
        "tokenizers": lambda path: tokenizer.save(str(path)),
        "python": lambda path: path.write_text("a" * 9000),
    }

    def all_fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        for name, write in writers.items():
            with pytest.raises(OSError, match=r"File too large|is the disk full\?"), writing_to(tmp_path / name):
                write(tmp_path / name)

    end = in_a_copy(all_fail, tmp_path)
    assert end.code == 0, end.errors
    with pytest.raises(RuntimeError, match="a bug"), writing_to(tmp_path):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_an_image_damaged_in_the_middle_of_the_data(tmp_path, capsys, damage):
    images_in(tmp_path / "data", "train", number=6)
    images_in(tmp_path / "data", "test")
    file = tmp_path / "data" / "train" / "red" / "3.png"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
    recipe = {
        "model": {"model_type": "continuous_thought_machine", **IMAGES},
        "task": {"name": "images", "data_dir": str(tmp_path / "data")},
        "training": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"error: {file}: cannot be read as an image"
    assert not list((tmp_path / "out").iterdir())


def test_a_mistake_met_by_a_process_that_loads_data_is_one_line():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise UserError(f"row {index + 1}: is broken")

    with pytest.raises(UserError) as raised:
        list(torch.utils.data.DataLoader(Rows(), num_workers=1))
    assert "Traceback" in str(raised.value)
    assert explain(raised.value) == "row 1: is broken"


def test_what_the_terminal_cannot_show_is_shown_escaped(monkeypatch):
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii"))
    assert run_command(lambda: print("run folder  sortie é", flush=True) or 0) == 0
    assert stream.getvalue().strip() == rb"run folder  sortie \xe9"


def test_plain_locale_and_no_cache(tmp_path):
    """Prompts and folders with letters beyond ASCII under the C locale and in a terminal without them, caches that
    cannot be made, and another time zone."""
    data = tmp_path / "données"
    data.mkdir()
    rows = [{"question": f"Est-ce né en {year}, à Orléans?", "answer": year % 2 == 0} for year in range(1900, 1920)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (data / "train.jsonl").write_text("\n".join(lines[:14]) + "\n", encoding="utf-8")
    (data / "dev.jsonl").write_text("\n".join(lines[14:]) + "\n", encoding="utf-8")
    (tmp_path / "file").write_text("")
    task = {"name": "strategyqa", "data_dir": str(data), "options": {}, "max_source_length": 16}
    recipe = write_recipe(tmp_path, task=task, tokenizer={"vocab_size": 300})
    nowhere = str(tmp_path / "file" / "cache")
    caches = dict.fromkeys(("HF_HOME", "HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"), nowhere)
    environment = {**os.environ, **caches, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TZ": "Pacific/Kiritimati"}
    command = [sys.executable, "-m", "trainers.train", str(recipe), "--output_dir", str(tmp_path / "sortie é")]
    result = subprocess.run(
        [*command, "--max_steps", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert r"run folder  " in result.stdout
    assert r"sortie \xe9" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "sortie é/predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(records) == 6


def kill_in_the_middle(work: Callable[[], object], is_under_way: Callable[[], bool], seed: int) -> None:
    """Start the work in a copy of this process, and end that by SIGKILL at a random moment once it is under way."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while not is_under_way():
        assert process.is_alive(), "the work ended before it could be killed"
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, 0.1))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the work ended before it could be killed"


def slowly(monkeypatch, owner: type, name: str) -> list[int]:
    """Make a method wait before it does its work. Returns a list that grows with every call in this process."""
    plain, calls = getattr(owner, name), []

    def slow(self, *arguments, **options):
        calls.append(1)
        time.sleep(0.03)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(owner, name, slow)
    return calls


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_evaluation_goes_on_to_the_same_end(run, tmp_path, monkeypatch, seed):
    """30 questions in batches of 2: what was answered before the kill is not asked again, the files are the same."""
    _, out = run
    command = [str(out), "--batch_size", "2", "--output_dir"]
    assert evaluate.main([*command, str(tmp_path / "whole")]) == 0
    calls = slowly(monkeypatch, evaluate.Generator, "answer")
    target, partial = tmp_path / "killed", tmp_path / "killed" / evaluate.PARTIAL
    kill_in_the_middle(
        lambda: evaluate.main([*command, str(target)]), lambda: partial.exists() and partial.stat().st_size > 0, seed
    )
    assert not (target / "metrics.json").exists()
    before = partial.read_bytes().count(b"\n")
    assert evaluate.main([*command, str(target)]) == 0
    assert len(calls) == 15 - before < 15
    assert (target / "predictions.jsonl").read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "whole", target))
    assert first == second


def test_killed_coupling_leaves_no_report_and_the_next_is_whole(tmp_path, monkeypatch):
    """The plain way, without blocks on disk, starts again: no file of the killed one is taken for a result."""
    model, pieces = make_model(tmp_path / "model"), write_pieces(tmp_path)
    command = ["--model", str(model), "--dataset", str(pieces), "--tokens_per_batch", "4", "--output"]
    assert couple.main([*command, str(tmp_path / "whole")]) == 0
    calls = slowly(monkeypatch, CouplingAnalyzer, "_shard")
    target = tmp_path / "killed"
    kill_in_the_middle(lambda: couple.main([*command, str(target)]), lambda: target.exists(), seed=0)
    assert not (target / couple.REPORT).exists()
    assert couple.main([*command, str(target)]) == 0
    assert calls
    first, second = (load_file(folder / "coupling.safetensors") for folder in (tmp_path / "whole", target))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


@pytest.mark.parametrize(("limit", "best", "kept"), [(1, None, {20}), (2, 5, {5, 20}), (3, 5, {5, 15, 20})])
def test_old_checkpoints_are_deleted_by_update_and_not_by_date(run, tmp_path, limit, best, kept):
    """The clock was set back before each checkpoint: the newest has the oldest date."""
    for step in (5, 10, 15, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").touch()
        os.utime(folder, (2_000_000_000 - 1000 * step,) * 2)

    class Trainer:
        run_dir = tmp_path
        args = SimpleNamespace(save_total_limit=limit, should_save=True)
        state = SimpleNamespace(best_model_checkpoint=best and f"elsewhere/checkpoint-{best}")

    RunTrainer.delete_old_checkpoints(Trainer())
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == kept


def test_clock_that_goes_backwards(run, tmp_path, monkeypatch):
    """The newest checkpoint has the oldest date, and every look at the clock is earlier than the one before."""
    recipe, out = run
    newest = unfinished(out, tmp_path / "out")
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        date = 2_000_000_000 - 1000 * int(folder.name.split("-")[1])
        for path in (*folder.iterdir(), folder):
            os.utime(path, (date, date))
    shutil.rmtree(newest)
    moments = iter(range(1_900_000_000, 0, -60))
    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    assert last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-15")
    assert main([str(recipe), "--output_dir", str(tmp_path / "out"), "--resume"]) == 0
    assert same_tensors(tmp_path / "out", out)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train"]["seconds"] > 0

"""What breaks while a run is at work: damaged checkpoints, full disks, two runs in one folder, a loss that explodes."""

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

import pytest
import torch
from safetensors.torch import load_file

from tests.test_security import make_model, write_pieces
from trainers import couple, evaluate
from trainers.coupling.analyzer import CouplingAnalyzer
from trainers.files import CHECKSUMS_NAME, LOCK_NAME, damaged_file, write_checksums
from trainers.run_trainer import last_complete_checkpoint
from trainers.train import main

from .test_train import ROOT, newest_checkpoint, same_tensors, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe without early stopping, and the folder of its finished run with three checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    training = {"early_stopping_patience": None, "num_train_epochs": 2, "eval_strategy": "no", "save_strategy": "steps"}
    recipe = write_recipe(folder, training={**training, "eval_steps": None, "save_steps": 5, "save_total_limit": None})
    assert main([str(recipe), "--output_dir", str(folder / "out")]) == 0
    assert len(list((folder / "out").glob("checkpoint-*"))) == 4
    return recipe, folder / "out"


def unfinished(out: Path, target: Path) -> Path:
    """A copy of a run as it was before it finished. Returns its newest checkpoint."""
    shutil.copytree(out, target)
    for name in ("metrics.json", "README.md", "model.safetensors", "predictions.jsonl"):
        (target / name).unlink()
    return newest_checkpoint(target)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_checkpoint_is_dropped(run, tmp_path, name, damage):
    _, out = run
    newest = unfinished(out, tmp_path / "out")
    file = newest / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    assert last_complete_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-15")
    assert not newest.exists()


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


def test_disk_that_fills_up(run, tmp_path):
    """No file may grow beyond a limit of the system: one line, exit code 2; with room again the run ends the same."""
    recipe, out = run
    target = tmp_path / "out"
    limit = (out / "model.safetensors").stat().st_size + 1000  # room for the weights, not for Adam's two moments
    command = [sys.executable, "-m", "trainers.train", str(recipe), "--output_dir", str(target)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (target / "metrics.json").exists()
    assert main([str(recipe), "--output_dir", str(target), "--resume"]) == 0
    assert same_tensors(target, out)


def test_plain_locale_and_no_cache(tmp_path):
    """Prompts and folders with letters beyond ASCII under the C locale, and a cache that cannot be made."""
    data = tmp_path / "données"
    data.mkdir()
    rows = [{"question": f"Est-ce né en {year}, à Orléans?", "answer": year % 2 == 0} for year in range(1900, 1920)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (data / "train.jsonl").write_text("\n".join(lines[:14]) + "\n", encoding="utf-8")
    (data / "dev.jsonl").write_text("\n".join(lines[14:]) + "\n", encoding="utf-8")
    (tmp_path / "file").write_text("")
    task = {"name": "strategyqa", "data_dir": str(data), "options": {}, "max_source_length": 16}
    recipe = write_recipe(tmp_path, task=task, tokenizer={"vocab_size": 300})
    environment = {**os.environ, "LC_ALL": "C", "HF_HOME": str(tmp_path / "file" / "cache")}
    command = [sys.executable, "-m", "trainers.train", str(recipe), "--output_dir", str(tmp_path / "sortie é")]
    result = subprocess.run(
        [*command, "--max_steps", "2"], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr[-2000:]
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

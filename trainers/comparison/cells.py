"""Running many cells, each a `python -m trainers.train` process with a run folder of its own.

A process per cell, and not a call: a cell that runs out of memory or crashes ends alone, nothing of one cell (random
state, caches, memory) reaches the next, and what a cell does is exactly what the training command does.

Several workers, as `accelerate launch` starts them, share the cells: each takes one that nobody holds, and trains it on
its own device. A cell is held by a lock on a file, which the training process inherits. So a cell whose training
outlived the command that started it is waited for and not started twice.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from model_cards.words import duration

from ..errors import UserError
from ..files import json_text, write_text
from ..run import finished, first_difference, remove_folder

# What a launcher tells its workers; a cell is one process and must not take itself for one of many.
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# Launchers that spread one model over processes, which a cell in one process cannot honour.
SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


@dataclass(frozen=True)
class Cell:
    """One run among many.

    Attributes:
        name: its place below the folder of all, like `strategyqa/vanilla/seed-0`.
        recipe: the sections of its recipe.
        group: what cells of about the same running time have in common.
    """

    name: str
    recipe: dict[str, dict[str, Any]]
    group: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: `finished` (now), `reused` (before), `failed` (with the reason)."""

    status: str
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class Worker:
    """One of the processes that share the cells."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Worker":
        """As the launcher numbered this process.

        Raises:
            UserError: if the launcher was told to spread one model over processes.
        """
        for variable, what in SHARDING_VARIABLES.items():
            if environment.get(variable, "false").lower() in ("1", "true"):
                raise UserError(
                    f"{what}: every run of a comparison or sweep trains in one process; launch without it "
                    "(with several processes each takes runs of its own)"
                )
        numbers = (environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        rank, count, local = (
            int(number) if number else default for number, default in zip(numbers, (0, 1, 0), strict=True)
        )
        return cls(rank, count, local)

    def environment(self) -> dict[str, str]:
        """The environment of a cell's process: without the launcher's variables, and with this worker's device."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
        }
        if self.count > 1 and torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
            kept["CUDA_VISIBLE_DEVICES"] = devices[self.local_rank % len(devices)]
        return kept


@dataclass
class CellFolder:
    """Where the cells of one comparison or sweep live.

    Attributes:
        path: the folder; `runs/<name>` are run folders, `cells/<name>.*` what belongs to them: the recipe as it was
            given to the training command, its output, its outcome and its lock.
    """

    path: Path

    def run(self, cell: Cell) -> Path:
        return self.path / "runs" / cell.name

    def file(self, cell: Cell, suffix: str) -> Path:
        return self.path / "cells" / f"{cell.name}.{suffix}"

    def is_finished(self, cell: Cell) -> bool:
        return finished(self.run(cell))

    def recorded(self, cell: Cell) -> dict[str, Any] | None:
        """The recipe a cell was last started with, or `None`."""
        try:
            return yaml.safe_load(self.file(cell, "yaml").read_text(encoding="utf-8"))
        except (FileNotFoundError, yaml.YAMLError):
            return None

    def outcome(self, cell: Cell) -> dict[str, Any] | None:
        """What the last attempt left: `status`, `seconds`, `reason`, `ended`."""
        try:
            return json.loads(self.file(cell, "json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def score(self, cell: Cell) -> str:
        """The test score of a finished cell in words."""
        metrics = json.loads((self.run(cell) / "metrics.json").read_text(encoding="utf-8"))
        metric = metrics["task"]["metric"]
        return f"{metric} {metrics['test'][metric]['value']:.3f}"

    @contextmanager
    def lock(self, cell: Cell, wait: bool) -> Iterator[int | None]:
        """Hold a cell. Yields the lock's file descriptor, or `None` if another holds it and `wait` is false."""
        path = self.file(cell, "lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            yield descriptor
        finally:
            os.close(descriptor)


def check_recorded(folder: CellFolder, cells: Sequence[Cell], overwrite: bool) -> None:
    """Refuse to go on in a folder whose runs were made by another recipe.

    Raises:
        UserError: naming the first cell and field that differ, unless `overwrite` allows to replace such runs.
    """
    for cell in cells:
        then = folder.recorded(cell)
        difference = first_difference(cell.recipe, then) if then is not None else None
        if difference is not None and not overwrite:
            field, ours, theirs = difference
            raise UserError(
                f"{folder.run(cell)}: {field} is {ours!r} but the run there was started with {theirs!r}; --overwrite "
                "replaces the runs that differ, --output_dir names another folder"
            )


def run_cell(
    folder: CellFolder, cell: Cell, worker: Worker, lock: int, overwrite: bool = False, keep_checkpoints: bool = False
) -> Outcome:
    """Run one held cell to its end, or find that it is finished. Never raises for what happens inside it.

    Args:
        folder: of all cells.
        cell: the cell.
        worker: this process.
        lock: descriptor of the cell's lock; the training process inherits it.
        overwrite: replace a run that another recipe made.
        keep_checkpoints: leave the `checkpoint-*` folders of a finished run, which nothing needs any more.
    """
    run, then = folder.run(cell), folder.recorded(cell)
    same = then is not None and first_difference(cell.recipe, then) is None
    if same and folder.is_finished(cell):
        before = folder.outcome(cell) or {}
        return Outcome("reused", float(before.get("seconds", 0.0)))
    if not same and overwrite and run.exists():
        remove_folder(run)
    run.parent.mkdir(parents=True, exist_ok=True)
    recipe = folder.file(cell, "yaml")
    write_text(recipe, yaml.safe_dump(cell.recipe, sort_keys=False, allow_unicode=True))
    command = [sys.executable, "-m", "trainers.train", str(recipe), "--output_dir", str(run)]
    if (run / "recipe.yaml").exists():
        command.append("--resume")
    elif run.exists():
        shutil.rmtree(run)  # killed before the run was recorded: nothing in it is worth keeping
    begun = time.monotonic()
    code = _run(command, folder.file(cell, "log"), worker.environment(), lock)
    outcome = Outcome("finished", time.monotonic() - begun)
    if code != 0 or not folder.is_finished(cell):
        outcome = Outcome("failed", outcome.seconds, _reason(code, folder.file(cell, "log")))
    elif not keep_checkpoints:
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    record = dataclasses.asdict(outcome) | {"ended": time.time()}
    write_text(folder.file(cell, "json"), json_text(record))
    return outcome


def _run(command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int) -> int:
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=(lock,),
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # nothing is lost: a resumed run goes on from its last checkpoint
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def _reason(code: int, log: Path) -> str:
    """Why a cell failed, in a line: what the training command said, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    last = (told or lines or ["no output"])[-1]
    return last.removeprefix("error: ")[:300]


class Estimate:
    """Remaining time, from how long cells of the same group took."""

    def __init__(self, cells: Sequence[Cell], workers: int):
        self.groups = {cell.name: cell.group for cell in cells}
        self.workers = workers
        self.seconds: dict[tuple[str, ...], list[float]] = {}

    def add(self, cell: Cell, seconds: float) -> None:
        if seconds > 0:
            self.seconds.setdefault(cell.group, []).append(seconds)

    def remaining(self, cells: Sequence[Cell]) -> float | None:
        """Seconds that these cells will take, or `None` while nothing is known."""
        everything = [value for values in self.seconds.values() for value in values]
        if not everything:
            return None
        typical = sum(everything) / len(everything)

        def expected(group: tuple[str, ...]) -> float:
            values = self.seconds.get(group)
            return sum(values) / len(values) if values else typical

        return sum(expected(cell.group) for cell in cells) / self.workers


def run_cells(
    folder: CellFolder,
    cells: Sequence[Cell],
    worker: Worker,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
) -> dict[str, Outcome]:
    """Run all cells that are not finished, together with the other workers, and tell about each.

    Args:
        folder: of all cells.
        cells: in the order in which they are run.
        worker: this process.
        overwrite, keep_checkpoints: as for [`run_cell`].

    Returns:
        On the first worker: the outcome of every cell, whoever ran it. On the others: of those they ran.
    """
    begun, estimate, outcomes = time.time(), Estimate(cells, worker.count), {}
    for cell in cells:
        if folder.is_finished(cell):
            estimate.add(cell, float((folder.outcome(cell) or {}).get("seconds", 0.0)))

    def settle(cell: Cell, wait: bool) -> Outcome | None:
        with folder.lock(cell, wait) as lock:
            if lock is None:
                return None
            record = folder.outcome(cell)
            # A record from the future is one of before the clock was set back.
            if record and record["status"] == "failed" and begun <= record["ended"] <= time.time():
                return Outcome("failed", record["seconds"], record["reason"])  # another worker has just tried it
            return run_cell(folder, cell, worker, lock, overwrite, keep_checkpoints)

    for wait in (False, True):
        if wait and worker.rank != 0:
            break  # the first worker waits for the rest and reports
        for index, cell in enumerate(cells):
            if cell.name in outcomes:
                continue
            outcome = settle(cell, wait)
            if outcome is None:
                continue
            outcomes[cell.name] = outcome
            if outcome.status == "finished":
                estimate.add(cell, outcome.seconds)
            open_cells = [other for other in cells if other.name not in outcomes and not folder.is_finished(other)]
            left = estimate.remaining(open_cells)
            line = f"[{len(cells) - len(open_cells)}/{len(cells)}] {cell.name}: "
            if outcome.status == "failed":
                line += f"FAILED: {outcome.reason} (output: {folder.file(cell, 'log')})"
            else:
                line += f"{folder.score(cell)}, {outcome.status}, {duration(outcome.seconds)}"
            if left is not None and open_cells:
                line += f"; about {duration(left)} left"
            if outcome.status != "reused" or index == len(cells) - 1:
                print(line, flush=True)
    return outcomes

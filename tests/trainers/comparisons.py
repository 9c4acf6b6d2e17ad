"""What the tests of comparison and sweep share: small recipes, run folders made by hand, cells run in this process."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from trainers import compare, train
from trainers.comparison import cells

TRAINING = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 3.0e-3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "use_cpu": True,
}
CHASE = {
    "name": "pointer_chase",
    "options": {"num_symbols": 4, "max_hops": 2, "num_train": 32, "num_validation": 10, "num_test": 20},
}
CONNECTION = {
    "model_type": "connection_transformer",
    "hidden_size": 16,
    "num_slots": 8,
    "connection_rank": 4,
    "max_reasoning_steps": 2,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
VANILLA = {
    "model_type": "vanilla_transformer",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


class Trained:
    """Runs cells by calling the training command in this process, which is quicker than a process for each, or
    pretends to: then a run folder made by hand stands in for training.

    Attributes:
        ran: the run folders that were trained, in order.
        fail: parts of folder names whose cells fail.
    """

    def __init__(self, pretend: bool = False):
        self.pretend = pretend
        self.ran: list[str] = []
        self.fail: set[str] = set()

    def __call__(self, command, log: Path, environment, lock) -> int:
        assert command[1:3] == ["-m", "trainers.train"]
        folder = command[command.index("--output_dir") + 1]
        self.ran.append(folder)
        if any(part in folder for part in self.fail):
            log.write_text("Traceback ...\nerror: training.loss: no number\nbye\n")
            return 1
        if self.pretend:
            updates = yaml.safe_load(Path(command[3]).read_text())["training"]["max_steps"]
            write_run(Path(folder), np.arange(20) % 3 == len(self.ran) % 3, updates=updates)
            return 0
        with log.open("w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return train.main(command[3:])


@pytest.fixture
def trained(monkeypatch) -> Trained:
    runner = Trained()
    monkeypatch.setattr(cells, "_run", runner)
    return runner


@pytest.fixture
def pretended(monkeypatch) -> Trained:
    runner = Trained(pretend=True)
    monkeypatch.setattr(cells, "_run", runner)
    monkeypatch.setattr(compare, "measure", lambda run, recipe: None)  # there is no model in such a folder
    return runner


def write_comparison(folder: Path, name: str = "tiny", **changes) -> Path:
    values = {
        "models": {"connection": {"model": CONNECTION}, "vanilla": {"model": VANILLA}},
        "tasks": {"chase": {"task": CHASE}},
        "seeds": [0, 1],
        "training": TRAINING,
        "parameters": "free",
        "resamples": 200,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def write_run(folder: Path, scores, metric: str = "accuracy", updates: int = 7) -> Path:
    """A finished run folder, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    scores = np.asarray(scores, dtype=float)
    name = "correct" if metric == "accuracy" else metric
    rows = [
        {"id": f"test-{index}", name: bool(value) if metric == "accuracy" else value}
        for index, value in enumerate(scores)
    ]
    entry = {"value": float(scores.mean()), "n": len(scores), "interval": [0.1, 0.9], "confidence": 0.95, "method": "-"}
    split = {
        "n": len(scores),
        metric: entry,
        "unparseable": 1,
        "mean_steps": 2.5,
        "max_steps": 3,
        "trivial": {"name": 'always "A" | B', metric: entry | {"value": 0.5}},
    }
    metrics = {
        "status": "finished",
        "model_type": "made_up",
        "architecture": "MadeUpModel",
        "task": {"name": "made", "source": "made by hand", "license": "none", "metric": metric},
        "seed": 0,
        "parameters": {"total": 1000, "trainable": 1000},
        "train": {
            "examples": 50,
            "steps": updates,
            "seconds": 12.5,
            "hardware": "x86_64 CPU, 2 cores",
            "precision": "fp32",
        },
        "validation": split,
        "test": split,
        "versions": {"torch": "2"},
        "loss_history": [{"step": step, "loss": 1 / step, f"eval_{metric}": step / 10} for step in (1, 2, 3)],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"model": {"model_type": "made_up"}, "training": {}, "provenance": {"data_fingerprint": "same"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    (folder / "README.md").write_text("card\n")
    return folder

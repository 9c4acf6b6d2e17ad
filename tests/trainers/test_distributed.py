"""Two processes are one run: the same losses, metrics and predictions as on one, and one set of files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.trainers.test_thought import TINY
from tests.trainers.two_processes import SHARDED
from trainers.train import main

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = ROOT / "recipes" / "accelerate_configs" / "multi_cpu.yaml"
# Of 16 examples an update, 2 x 8 on one process are 2 x 4 on each of two. Numbers of training examples are chosen by
# what they leave for the last update of an epoch; 21 and 43 examples to predict fill no last batch either.
TRAINING = {
    "max_steps": 7,
    "warmup_steps": 0,
    "learning_rate": 3.0e-3,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}
TEXT = {
    "hidden_size": 16,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "dropout": 0.0,
}
CHASE = {"num_symbols": 6, "max_hops": 2, "num_validation": 21, "num_test": 43}
TICKS = {
    **TINY,
    "model_type": "continuous_thought_machine",
    "iterations": 8,
    "certainty_check_interval": 1,
    "positional_embedding_type": "none",
}
CONTEXT = {"hidden_size": 16, "num_attention_heads": 2}
RUNS = {
    # 35 = 2 x 16 + 3: in the last update the second process has nothing but an example that does not count.
    "adaptive depth": {
        "model": {
            "model_type": "connection_transformer",
            "num_slots": 8,
            "connection_rank": 4,
            "max_reasoning_steps": 6,
            "halting_threshold": 0.25,
            "step_cost_weight": 0.1,
            "orthogonality_weight": 0.1,
            **TEXT,
        },
        "task": {"name": "pointer_chase", "options": {**CHASE, "num_train": 35}},
        "training": {**TRAINING, "early_stopping_patience": 1},
    },
    # 22 = 16 + 6: the second process has two of the last six.
    "learned halting": {
        "model": {
            "model_type": "connection_transformer",
            "is_encoder_decoder": False,
            "hidden_size": 16,
            "num_slots": 8,
            "connection_rank": 2,
            "connection_type": "diagonal",
            "max_reasoning_steps": 5,
            "halting": "learned",
            "halting_threshold": 0.8621,
            "deep_supervision": 1,
            "num_attention_heads": 2,
            "dropout": 0.0,
            "max_position_embeddings": 10,
        },
        "task": {
            "name": "flood_fill",
            "options": {
                "height": 1,
                "width": 8,
                "max_distance": 4,
                "step_targets": "rounds",
                "num_train": 22,
                "num_validation": 21,
                "num_test": 43,
            },
        },
        "training": {**TRAINING, "learning_rate": 3.0e-2},
    },
    # 25 = 16 + 8 + 1: the last update has a whole micro-batch, and a second one of a single example.
    "transformer": {
        "model": {"model_type": "vanilla_transformer", "num_hidden_layers": 1, "intermediate_size": 16, **TEXT},
        "task": {"name": "pointer_chase", "options": {**CHASE, "num_train": 25}},
        "training": TRAINING,
    },
    "ticks": {
        "model": {**TICKS, "backbone_type": "parity_backbone"},
        "task": {"name": "parity", "options": {"length": 9, "num_train": 19, "num_validation": 21, "num_test": 43}},
        "training": {**TRAINING, "learning_rate": 3.0e-2, "early_stopping_patience": 1},
        "evaluation": {"certainty_threshold": 0.0087, "stopping_samples": 0, "shown_examples": 0},
    },
    "spelling": {
        "model": {**TICKS, "backbone_type": "none"},
        "task": {"name": "sorting", "options": {"length": 3, "num_train": 34, "num_validation": 21, "num_test": 43}},
        "training": TRAINING,
        "evaluation": {"stopping_samples": 0, "shown_examples": 0},
    },
    # Prompts of in-context models are made for the update that takes them, so that no update lacks any.
    "functions": {
        "model": {"model_type": "in_context_transformer", "num_hidden_layers": 2, "max_points": 7, **CONTEXT},
        "task": {
            "name": "linear_regression",
            "num_validation": 21,
            "num_test": 43,
            "options": {"n_dims": 3, "n_points": 6},
            "curriculum": {"n_points": {"start": 3, "increment": 1, "interval": 2}},
        },
        "training": TRAINING,
        "evaluation": {"slow_baseline_prompts": 0, "prompts": ["random_quadrant"], "prompts_of_each_kind": 5},
    },
    "connectivity": {
        "model": {"model_type": "low_rank_in_context_transformer", "num_hidden_layers": 4, **CONTEXT},
        "task": {
            "name": "table_connectivity",
            "num_validation": 21,
            "num_test": 43,
            "options": {"num_tables": 5, "n_dims": 24, "max_tables": 8, "rho": 0.25},
            "curriculum": {"num_tables": {"start": 3, "increment": 1, "interval": 3}},
        },
        "training": {**TRAINING, "dense_labels": True},
        "evaluation": {"num_tables": [5], "questions_of_each_size": 5},
    },
}
BATCHES = {"one": 8, "two": 4}


def launch(*arguments: str) -> list[str]:
    """The command line that starts two CPU processes, at a port that is free."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE)]
    return [*command, "--main_process_port", "0", "--quiet", *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def command_of(folder: Path, kind: str, processes: str) -> list[str]:
    """Arguments of `trainers.train` for a run of `RUNS`; its output goes to `folder / processes / kind`."""
    recipe = folder / f"{kind}.yaml"
    recipe.write_text(yaml.safe_dump(RUNS[kind]))
    size = str(BATCHES[processes])
    batches = ["--per_device_train_batch_size", size, "--per_device_eval_batch_size", size]
    return [str(recipe), "--output_dir", str(folder / processes / kind), *batches]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """A folder with all runs of `RUNS` below `two/`, and with `sharded.json`; see `two_processes.py`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "commands.json").write_text(json.dumps([command_of(folder, kind, "two") for kind in RUNS]))
    command = launch("-m", "tests.trainers.two_processes", str(folder))
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("model card") == len(RUNS)
    return folder


def assert_near(first, second, where: str = "") -> None:
    """Nested results are equal, numbers up to 1e-5; what is a time is not compared."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            if "seconds" not in key:
                assert_near(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_near(*pair, f"{where}[{number}]")
    elif isinstance(first, float):
        assert second == pytest.approx(first, rel=1e-5, abs=1e-6), where
    elif first != second:
        # Numbers may stand in a text.
        assert float(second) == pytest.approx(float(first), rel=1e-5, abs=1e-6), where


def read_records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_give_the_results_of_one(two_processes, kind):
    """Losses and their parts at every update, evaluations, the best step, metrics, and every prediction."""
    assert main(command_of(two_processes, kind, "one")) == 0
    one, two = (json.loads((two_processes / name / kind / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["train"]["hardware"].startswith("2 processes on ")
    steps = one["train"]["steps"]
    assert two["train"]["steps"] == steps
    assert len([entry for entry in one["loss_history"] if "loss" in entry]) == steps >= 4
    for name in ("loss_history", "validation", "test"):
        assert_near(one[name], two[name], name)
    assert two["train"]["best_step"] == one["train"]["best_step"]
    assert_near(*(read_records(two_processes / name / kind) for name in ("one", "two")), "predictions")


@pytest.mark.parametrize("kind", ["adaptive depth", "learned halting", "ticks"])
def test_processes_halt_at_different_steps(two_processes, kind):
    """At evaluation each process stops with the last sample of its batch: batches of four, dealt out in turn."""
    steps = [record["steps"] for record in read_records(two_processes / "two" / kind)]
    last = [max(steps[start : start + 4]) for start in range(0, len(steps), 4)]
    assert any(first != second for first, second in zip(last[::2], last[1::2], strict=False))


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_gradients_are_those_of_the_whole_model(two_processes, name):
    """FSDP2 by torch itself, as accelerate shards on GPUs only. float32, some ten layers."""
    found = json.loads((two_processes / "sharded.json").read_text())[name]
    assert found["modules"] >= 1
    assert found["difference"] < 1e-5


@pytest.mark.long
def test_a_worker_that_dies_ends_the_run_which_resumes_to_the_same_end(tmp_path):
    """One of two processes is killed in training: the launcher ends the other; `--resume` gives the same weights."""
    recipe = tmp_path / "recipe.yaml"
    # An epoch has three updates, the last one an uneven one, so that checkpoints lie at its end and within it.
    training = {**TRAINING, "max_steps": 100, "load_best_model_at_end": False, "eval_strategy": "no"}
    training |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 10}
    recipe.write_text(yaml.safe_dump({**RUNS["adaptive depth"], "training": training}))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = launch("-m", "trainers.train", str(recipe), "--output_dir", str(broken))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **silent)
    while not list(broken.glob("checkpoint-*/trainer_state.json")):
        assert launcher.poll() is None, "the run ended before it could be broken"
        time.sleep(0.01)
    worker = workers_of(launcher.pid)[-1]
    os.kill(worker, signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not (broken / "metrics.json").exists()
    for folder, option in ((broken, ["--resume"]), (whole, [])):
        command = launch("-m", "trainers.train", str(recipe), "--output_dir", str(folder), *option)
        assert subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, **silent, timeout=300).returncode == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(first[name].equal(second[name]) for name in first)
    assert (whole / "predictions.jsonl").read_text() == (broken / "predictions.jsonl").read_text()


def workers_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher has started, from the process table."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [launcher]
    for process in found:
        found += [child for child, parent in sorted(parents.items()) if parent == process and child not in found]
    ranks = []
    for process in found[1:]:
        with contextlib.suppress(OSError):
            if b"RANK=" in (Path("/proc") / str(process) / "environ").read_bytes():
                ranks.append(process)
    return ranks

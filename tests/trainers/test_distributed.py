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

from trainers.train import main

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = ROOT / "recipes" / "accelerate_configs" / "multi_cpu.yaml"
RECIPE = {
    "model": {
        "model_type": "connection_transformer",
        "hidden_size": 16,
        "num_slots": 8,
        "connection_rank": 4,
        "max_reasoning_steps": 3,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "dropout": 0.0,
        "step_cost_weight": 0.1,
        "orthogonality_weight": 0.1,
    },
    "task": {
        "name": "pointer_chase",
        "options": {"num_symbols": 6, "max_hops": 2, "num_train": 64, "num_validation": 21, "num_test": 43},
    },
    "training": {
        "num_train_epochs": 10,
        "warmup_steps": 0,
        "learning_rate": 1.0e-2,
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "load_best_model_at_end": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    },
}


def launch(*options: str) -> list[str]:
    """The command line of a run on two CPU processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE)]
    return [*command, "--main_process_port", "0", "--quiet", "-m", "trainers.train", *options]


def one_and_two(tmp_path: Path, recipe: dict, sizes: dict[str, int]) -> tuple[dict, dict]:
    """The same run on one process and on two, each with its batch size. Returns their metrics.

    Losses, the best step, and every prediction that is written must agree.
    """
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def options(name: str) -> list[str]:
        size = str(sizes[name])
        batches = ["--per_device_train_batch_size", size, "--per_device_eval_batch_size", size]
        return [str(path), "--output_dir", str(tmp_path / name), "--gradient_accumulation_steps", "2", *batches]

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = launch(*options("two"))
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("model card") == 1
    assert main(options("one")) == 0

    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["train"]["hardware"].startswith("2 processes on ")
    assert one["train"]["steps"] == two["train"]["steps"]
    assert len(one["loss_history"]) == len(two["loss_history"])
    for first, second in zip(one["loss_history"], two["loss_history"], strict=True):
        assert second == pytest.approx(first, rel=1e-5)
    assert two["train"]["best_step"] == one["train"]["best_step"]
    return one, two


def test_two_processes_give_the_results_of_one(tmp_path):
    """16 examples an update: 2 x 8 on one process, 2 x 4 on each of two. 43 test examples fill no last batch."""
    one, two = one_and_two(tmp_path, RECIPE, {"one": 8, "two": 4})
    assert one["train"]["steps"] == 40
    assert len(one["loss_history"]) == 10
    assert two["test"] == one["test"]
    assert two["validation"] == one["validation"]
    predictions = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1]


TRAINING = {
    "max_steps": 8,
    "learning_rate": 3.0e-3,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}
OTHER_KINDS = {
    "ticks": {
        "model": {
            "model_type": "continuous_thought_machine",
            "iterations": 5,
            "d_model": 16,
            "d_input": 8,
            "heads": 2,
            "n_synch_out": 8,
            "n_synch_action": 8,
            "synapse_depth": 1,
            "memory_length": 3,
            "memory_hidden_dims": 4,
            "backbone_type": "parity_backbone",
            "positional_embedding_type": "custom-rotational-1d",
        },
        "task": {
            "name": "parity",
            "options": {"length": 9, "num_train": 32, "num_validation": 11, "num_test": 21},
        },
        "training": TRAINING,
        "evaluation": {"stopping_samples": 0, "shown_examples": 0},
    },
    "functions": {
        "model": {
            "model_type": "in_context_transformer",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_points": 7,
        },
        "task": {
            "name": "linear_regression",
            "num_validation": 11,
            "num_test": 21,
            "options": {"n_dims": 3, "n_points": 6},
            "curriculum": {"n_points": {"start": 3, "increment": 1, "interval": 2}},
        },
        "training": TRAINING,
        "evaluation": {"slow_baseline_prompts": 0, "prompts": ["random_quadrant"], "prompts_of_each_kind": 5},
    },
    "connectivity": {
        "model": {
            "model_type": "low_rank_in_context_transformer",
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
        },
        "task": {
            "name": "table_connectivity",
            "num_validation": 11,
            "num_test": 21,
            "options": {"num_tables": 5, "n_dims": 24, "max_tables": 8, "rho": 0.25},
            "curriculum": {"num_tables": {"start": 3, "increment": 1, "interval": 3}},
        },
        "training": TRAINING | {"dense_labels": True},
        "evaluation": {"num_tables": [5], "questions_of_each_size": 5},
    },
}


def assert_near(first, second) -> None:
    """Nested results are equal, numbers up to 1e-5; what is a time is not compared."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            if "seconds" not in key:
                assert_near(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_near(*pair)
    elif isinstance(first, float):
        assert second == pytest.approx(first, rel=1e-5, abs=1e-6)
    else:
        assert first == second


@pytest.mark.long
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_two_processes_give_the_results_of_one_for_the_other_kinds(tmp_path, kind):
    """21 test examples on two processes with 4 a batch: the last batch is short. 16 divides the training examples, or
    accelerate would fill up the last batch of an epoch by repeating some."""
    one, two = one_and_two(tmp_path, OTHER_KINDS[kind], {"one": 8, "two": 4})
    assert_near(one["test"], two["test"])
    assert_near(one["validation"], two["validation"])


@pytest.mark.long
def test_a_worker_that_dies_ends_the_run_which_resumes_to_the_same_end(tmp_path):
    """One of two processes is killed in training: the launcher ends the other; `--resume` gives the same weights."""
    recipe = tmp_path / "recipe.yaml"
    training = {**RECIPE["training"], "num_train_epochs": 40, "early_stopping_patience": None}
    training |= {"load_best_model_at_end": False, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 20}
    recipe.write_text(yaml.safe_dump({**RECIPE, "training": training}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = launch(str(recipe), "--output_dir", str(broken))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, **silent)
    while not list(broken.glob("checkpoint-*/trainer_state.json")):
        assert launcher.poll() is None, "the run ended before it could be broken"
        time.sleep(0.01)
    worker = workers_of(launcher.pid)[-1]
    os.kill(worker, signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not (broken / "metrics.json").exists()
    for folder, option in ((broken, ["--resume"]), (whole, [])):
        command = launch(str(recipe), "--output_dir", str(folder), *option)
        assert subprocess.run(command, cwd=tmp_path, env=environment, **silent, timeout=300).returncode == 0
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

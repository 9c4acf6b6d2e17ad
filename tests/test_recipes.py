"""Every recipe parses, names only known fields and builds its model; every smoke recipe runs end to end."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from transformers import AutoModelForSeq2SeqLM

from trainers.arguments import parse_recipe
from trainers.train import main

ROOT = Path(__file__).resolve().parents[1]
# No recipes of `trainers.train`: accelerate's own, and those of the commands that run many recipes (their own tests).
ELSEWHERE = ("accelerate_configs", "compare", "sweep")
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in ELSEWHERE)
DATA = ROOT / "tests" / "data"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_builds(path):
    recipe = parse_recipe([str(path)], prog="train")
    task = recipe.kind.run.make_task(recipe.task)
    if recipe.kind.name != "sequence_to_sequence":
        return  # what the model is built from is decided by the data
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    assert config.max_position_embeddings >= task.arguments.max_source_length
    with torch.device("meta"):
        assert AutoModelForSeq2SeqLM.from_config(config).num_parameters() > 0


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem == "smoke"], ids=name)
def test_smoke_recipe_runs(path, tmp_path):
    """Two update steps on a few rows in the data sets' own schemas, then evaluation, card and all."""
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    if (DATA / path.parent.name).is_dir():
        options += ["--data_dir", str(DATA / path.parent.name)]
    assert main([str(path), *options, "--disable_tqdm"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["task"]["name"] == parse_recipe([str(path)], prog="train").task.name
    assert metrics["train"]["steps"] == 2


def test_every_recipe_is_in_the_list():
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    missing = [name(path) for path in RECIPES if f"`recipes/{name(path)}`" not in listed]
    assert not missing, "add the recipe with its command, hardware, time and result to recipes/README.md"


# What accelerate's launcher makes of each configuration. Those for GPUs are read and checked, and not run.
LAUNCHED = {
    "cpu": {"use_cpu": True, "num_processes": 1},
    "multi_cpu": {"use_cpu": True, "multi_gpu": True, "num_processes": 2},
    "single_gpu": {"use_cpu": False, "num_processes": 1},
    "multi_gpu": {"use_cpu": False, "multi_gpu": True, "num_processes": 2},
    "fsdp2": {"use_fsdp": True, "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    "deepspeed_zero2": {"use_deepspeed": True, "zero_stage": 2, "zero3_init_flag": False},
    "deepspeed_zero3": {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True},
}


def test_every_accelerate_config_is_known():
    configs = {path.stem for path in (ROOT / "recipes" / "accelerate_configs").iterdir()}
    assert configs == set(LAUNCHED)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("config", LAUNCHED)
def test_accelerate_takes_the_config(config, precision):
    """Read and checked by the launcher, short of starting processes, alone and with a precision for it."""
    path = ROOT / "recipes" / "accelerate_configs" / f"{config}.yaml"
    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
    words = ["--config_file", str(path), *([] if precision == "no" else ["--mixed_precision", precision])]
    arguments = launch_command_parser().parse_args([*words, "-m", "trainers.train", "recipes/quickstart.yaml"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    for name, value in LAUNCHED[config].items():
        assert getattr(arguments, name) == value, name
    assert arguments.mixed_precision == precision
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        command, environment = prepare_deepspeed_cmd_env(arguments)
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(LAUNCHED[config]["zero_stage"])
    elif arguments.multi_gpu or arguments.use_fsdp:
        environment = prepare_multi_gpu_env(arguments)
    else:
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        assert command[-3:] == ["-m", "trainers.train", "recipes/quickstart.yaml"]
    assert environment.get("FSDP_VERSION") == ("2" if config == "fsdp2" else None)
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision

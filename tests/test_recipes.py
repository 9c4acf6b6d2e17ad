"""Every recipe parses, names only known fields and builds its model; every smoke recipe runs end to end."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_config_loads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]

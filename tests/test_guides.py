"""The guides' example code works as written."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_documented_commands import PAGES
from trainers.tasks import TASKS
from trainers.train import main

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "model": {"model_type": "vanilla_transformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "task": {"name": "sums"},
    "training": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
}


@pytest.fixture
def sums(tmp_path, monkeypatch):
    """The task of the guide, imported from a file that holds its code block and nothing else."""
    guide = (ROOT / "trainers" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "sums.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("sums")
    monkeypatch.setitem(TASKS, "sums", module.Sums)
    yield module.Sums
    sys.modules.pop("sums")


def test_task_of_the_guide_trains(sums, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["task"]["name"] == "sums"
    assert metrics["test"]["n"] == 250


def test_splits_of_the_guide_share_no_question(sums):
    from trainers.tasks import TaskArguments

    task = sums(TaskArguments(name="sums"))
    prompts = [{example.prompt for example in task.rows(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 2500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = {ROOT / name for name in re.findall(r"`((?:hf_models|trainers|recipes|tests|model_cards)/[\w./-]+)`", text)}
    named |= {page.parent / link for link in re.findall(r"\]\((?!http)([\w./-]+)\)", text)}
    assert not sorted(str(path) for path in named if "my_model" not in path.name and not path.exists())

"""The README's commands and its snippet are run, the quick start with fewer steps than its recipe."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainers import __version__

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], cwd: Path, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """A folder in which the first command was run, and what it printed."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    install, _, launch = blocks("bash")[0].strip().partition(" && ")
    assert install == "pip install -e ."
    command = shlex.split(launch)
    assert command == ["accelerate", "launch", "-m", "trainers.train", "recipes/quickstart.yaml"]
    python_command = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
    return folder, run([*python_command, "--max_steps", "20", "--save_steps", "10", "--eval_steps", "10"], cwd=folder)


def test_quickstart_runs_and_names_the_next_command(quickstart):
    folder, printed = quickstart
    assert (folder / "outputs" / "quickstart" / "README.md").exists()
    assert "test split, answers by generation" in printed
    assert "python push_to_hub.py outputs/quickstart <user>/<name> --dry-run" in printed
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    header = next(line for line in shown.splitlines() if line.strip().startswith("difficulty"))
    assert header.split() in [line.split() for line in printed.splitlines()], "the README shows another table"


def test_snippet_runs(quickstart):
    folder, _ = quickstart
    (snippet,) = [block for block in blocks("python") if "from_pretrained" in block]
    printed = run([sys.executable, "-c", snippet], cwd=folder).splitlines()
    assert [line.split()[0] for line in printed] == ["answer", "steps"]
    assert 1 <= int(printed[1].split()[1]) <= 4


def test_push_is_shown_before_it_is_done(quickstart):
    folder, _ = quickstart
    commands = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines() if "push_to_hub" in line]
    dry_run = shlex.split(next(line for line in commands if "--dry-run" in line).replace("<user>/<name>", "user/name"))
    assert dry_run[:2] == ["python", "push_to_hub.py"]
    printed = run([sys.executable, str(ROOT / "push_to_hub.py"), *dry_run[2:]], cwd=folder)
    assert "model.safetensors" in printed
    assert any("--verify" in line for line in commands)


def test_recipes_named_in_the_text_exist():
    for name in set(re.findall(r"recipes/[\w/]+\.yaml", README)):
        assert (ROOT / name).exists(), name


def test_test_command():
    assert 'pip install -e ".[test]" && pytest -n auto' in [block.strip() for block in blocks("bash")]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_trained_model_is_traced_and_evaluated(quickstart):
    """The commands that look inside the quick start's model and measure it run as written."""
    folder, _ = quickstart
    commands = [
        shlex.split(line) for block in blocks("bash") for line in block.splitlines() if "outputs/quickstart" in line
    ]
    trace, evaluate = ([c for c in commands if f"trainers.{name}" in c] for name in ("trace", "evaluate"))
    printed = run([sys.executable, *trace[0][1:]], cwd=folder)
    assert "halted" in printed or "steps" in printed
    printed = run([sys.executable, *evaluate[0][1:], "--limit", "20"], cwd=folder)
    assert "accuracy" in printed


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if "-m trainers." in line]
)
def test_commands_name_what_exists(line):
    """Every command's module exists, and so does every recipe it names."""
    words = shlex.split(line, comments=True)
    module = words[words.index("-m") + 1]
    assert importlib.util.find_spec(module), module
    for word in words:
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file(), word


NEEDS = "# needs "
HERE = ("tutorial.yaml", "--compare eager")
LINES = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("part", HERE)
def test_command_runs(quickstart, part):
    """As written, with two update steps where it trains."""
    folder, _ = quickstart
    (line,) = [line for line in LINES if part in line]
    words = shlex.split(line)
    command = [sys.executable, *words[1:]]
    if words[0] == "accelerate":
        command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:], "--max_steps", "2"]
    assert run(command, cwd=folder)


def test_every_command_is_run_or_marked():
    """One of the tests above runs a command, or its line says what it needs that a test has not."""
    run_above = ("quickstart", "pytest", *HERE)
    for line in LINES:
        assert NEEDS in line or any(part in line for part in run_above), line


def test_version_is_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)$", changes, re.MULTILINE).group(1) == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
    assert f"version = {{{__version__}}}" in README
    assert citation["title"] in README

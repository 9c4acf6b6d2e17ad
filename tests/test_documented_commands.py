"""Every command that a page names: understood by the program it calls, and run by a test or marked with what it needs.

Commands are the lines of shell blocks and the spans of code that begin like one. A line of a block is marked by
`# needs …` behind it, or by a stand-in for what the reader brings (`path/to/…`, `$MODEL`, `RECIPE`); without a mark it
is run as it is written. The README's are run by `test_readme.py`.
"""

import argparse
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt

from trainers import compare, couple, evaluate, sweep, trace
from trainers.arguments import parse_recipe
from trainers.comparison.plan import read_comparison
from trainers.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("hf_models", "trainers", "recipes", "model_cards", "tests")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(page for part in FOLDERS for page in (ROOT / part).rglob("*.md")),
]
PROGRAMS = r"python (-m |push_to_hub)|accelerate launch |pip (install|wheel) |pytest( |$)|\.ci/"
BEGINNING = re.compile(rf"(\w+=\S+ )*({PROGRAMS})|recipes/\S+ --")
# What stands for something of the reader's, and something of that kind.
STAND_INS = {
    "trainers.compare RECIPE": "trainers.compare recipes/compare/small.yaml",
    "RECIPE": "recipes/quickstart.yaml",
    "FIELD=A,B": "model.num_slots=16,32",
    "RUN…": "outputs/run",
    "[--field value …]": "",
}
# Programs whose own functions read a command line without doing what it says; the others are stopped behind argparse.
READERS: dict[str, Callable[[list[str]], object]] = {
    "trainers.train": lambda argv: parse_recipe(argv, prog="train"),
    "trainers.evaluate": evaluate.parse,
    "trainers.trace": trace.parse,
    "trainers.couple": couple.parse,
    "trainers.sweep": lambda argv: sweep.read_sweep(sweep.parse(argv)),
    "trainers.compare": lambda argv: read_comparison(compare.parse(argv).recipe),
}
MARK = re.compile(r"  +# needs \S|path/to/|\$MODEL\b|\b[A-Z]{4,}\b")


def commands(page: Path) -> Iterator[tuple[bool, str]]:
    """The commands of a page, each with whether it is a line of a block."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "code_block" or (token.type == "fence" and token.info in ("", "bash")):
            yield from ((True, line) for line in token.content.splitlines() if BEGINNING.match(line))
        for child in token.children or ():
            if child.type == "code_inline" and BEGINNING.match(child.content):
                yield False, child.content


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


ALL = sorted({(name(page), is_line, command) for page in PAGES for is_line, command in commands(page)})
UNMARKED = sorted(
    {command for page, is_line, command in ALL if is_line and page != "README.md" and not MARK.search(command)}
)


class Understood(Exception):
    """A command line was read to its end."""


def understand_module(module: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if module in READERS and argv:
        READERS[module](argv)
        return
    package = importlib.util.find_spec(module).submodule_search_locations
    program = importlib.import_module(f"{module}.__main__" if package else module)
    if not argv:
        return  # the text speaks of the program
    read = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **options):
        read(self, *arguments, **options)
        raise Understood

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [module, *argv])
        try:
            program.main()
        except Understood:
            return
    raise AssertionError(f"{module} does not understand {shlex.join(argv)}")


def understand(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that programs, modules, files and options exist and that the values fit.

    Raises:
        AssertionError, UserError or SystemExit, if one does not.
    """
    for stand_in, value in STAND_INS.items():
        command = command.replace(stand_in, value)
    for part in re.split(r" && ", command):
        words = [word for word in shlex.split(part, comments=True) if not re.fullmatch(r"\w+=\d+", word)]
        if words[0] == "accelerate":
            launch = launch_command_parser().parse_args([*words[2:], "script"] if "-m" not in words else words[2:])
            assert launch.config_file is None or (ROOT / launch.config_file).is_file()
            if launch.module:
                understand_module(launch.training_script, launch.training_script_args, monkeypatch)
        elif words[:2] == ["python", "-m"]:
            understand_module(words[2], words[3:], monkeypatch)
        elif words[0].startswith("recipes/"):
            READERS["trainers.train"](words)
        elif words[0] == "python":
            understand_module(Path(words[1]).stem, words[2:], monkeypatch)
        elif words[0] == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(re.findall(r"\[(\w[\w-]*)\]", part)) <= extras.keys()
        elif words[0] == "pytest":
            markers = re.findall(r"^  \"(\w+):", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert set(re.findall(r"-m (\w+)", part)) <= set(markers)
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/"))
        else:
            assert words[0] == "unzip" or (ROOT / words[0]).is_file()


@pytest.mark.parametrize(("page", "command"), [(page, command) for page, _, command in ALL])
def test_command_is_understood(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    understand(command, monkeypatch)


@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=[pytest.mark.long] if "benchmarks" in each else []) for each in UNMARKED]
)
def test_unmarked_command_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    python, option, module, *argv = shlex.split(command)
    assert (python, option) == ("python", "-m"), "only such commands are run here; mark what this one needs"
    monkeypatch.setattr(sys, "argv", [module, *argv])
    assert not importlib.import_module(module).main(), capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_mistakes_in_commands_are_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in (
        "accelerate launch -m trainers.train recipes/quickstart.yaml --max_step 3",
        "accelerate launch -m trainers.train recipes/quick.yaml",
        "accelerate launch --config_file recipes/accelerate_configs/gpu.yaml -m trainers.train RECIPE",
        "python -m trainers.sweep RECIPE --over model.slots",
        "python -m trainers.adaptivity RUN… --fixd RUN…",
        "python -m tests.benchmarks.bench_coupling --model bert",
        "pip install 'adaptive-reasoners[everything]'",
        "pytest tests/test_nothing.py",
    ):
        with pytest.raises((AssertionError, UserError, SystemExit)):
            understand(command, monkeypatch)

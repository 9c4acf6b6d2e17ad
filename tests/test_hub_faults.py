"""A Hub that is busy, broken, slow or cuts the connection: one line from every command, nothing half written, and the
same command works when the Hub does.

The commands run in one process whose Hub is a server on the loopback interface, with the unmodified client of the
libraries; its pauses between tries are left out, and its time limits shortened to a fraction of a second.
"""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from PIL import Image

from tests.hub_server import Entry, HubServer, git_blob_oid
from tests.test_security import PIECES, make_model, write_pieces

ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
ROWS = {
    split: "".join(
        json.dumps({"question": f"Is {number} an even number ?", "answer": str(number % 2 == 0)}) + "\n"
        for number in range(first, first + 12)
    ).encode()
    for split, first in (("train", 0), ("validation", 12), ("test", 24))
}
# The process reads one command a line and answers with its exit code and what it printed.
COMMANDS = """
import contextlib, importlib, io, json, sys, time, traceback
from huggingface_hub import constants
constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.2
from trainers import hub
hub.LONGEST_SILENCE = 0.2
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.001))
answers = sys.stdout
for line in sys.stdin:
    constants.HF_HUB_CACHE, module, *arguments = json.loads(line)
    shown, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        try:
            code = importlib.import_module(module).main(arguments)
        except BaseException:
            code = None
            traceback.print_exc()
    print(json.dumps([code, shown.getvalue(), errors.getvalue()]), file=answers, flush=True)
"""
FAULTS: dict[str, Callable] = {
    "429": lambda hub, path: hub.answer(429, path=path, times=10**6, headers={"Retry-After": "1"}),
    "500": lambda hub, path: hub.answer(500, path=path, times=10**6),
    "503": lambda hub, path: hub.answer(503, path=path, times=10**6),
    "slow": lambda hub, path: hub.stall(60, path=path, times=10**6),
    "cut": lambda hub, path: hub.lose_answer(path=path, times=10**6),
    "cut in the middle": lambda hub, path: hub.cut_download(path=path, times=10**6, after_bytes=20),
}


class Result(NamedTuple):
    code: int | None
    shown: str
    errors: str


class World:
    """A Hub, a process that runs commands against it, and a folder for what they write."""

    def __init__(self, folder: Path):
        self.folder, self.hub = folder, HubServer()
        short = self.hub.environment(folder / "home", PYTHONPATH=str(ROOT), HF_HUB_DISABLE_XET="1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS], cwd=folder, env=short, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.model = make_model(folder / "model")
        write_pieces(folder)

    def run(self, *words: object, cache: Path | None = None) -> Result:
        """Run a command, with another folder for the cache if one is given."""
        job = [str(cache or self.folder / "home" / "hub"), *(str(word) for word in words)]
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Result(*json.loads(self.process.stdout.readline()))

    def publish(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model") -> str:
        """Put files into a repository as they are, without the client."""
        repository = self.hub.create_repository(repo_id, repo_type)
        tree = dict(repository.resolve("main").tree)
        for name, content in files.items():
            oid = git_blob_oid(content)
            repository.blobs[oid] = content
            tree[name] = Entry(oid, len(content))
        commit = repository.add_commit(repository.resolve("main"), "files", "", "ada", self.hub.now(), tree)
        repository.branches["main"] = commit.sha
        return repo_id

    def publish_model(self, repo_id: str) -> str:
        return self.publish(repo_id, {path.name: path.read_bytes() for path in self.model.iterdir()})

    def publish_rows(self, repo_id: str) -> str:
        return self.publish(repo_id, {f"{split}.jsonl": rows for split, rows in ROWS.items()}, "dataset")

    def recipe(self, name: str, **sections: dict) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.process.stdin.close()
    world.process.wait(timeout=60)
    world.hub.close()


CHASE = {"name": "pointer_chase", "options": {"num_symbols": 4, "num_train": 32, "num_validation": 8, "num_test": 8}}
VANILLA = {"model_type": "vanilla_transformer", **TINY}
TICKS = {
    "model_type": "continuous_thought_machine", "iterations": 3, "d_model": 16, "d_input": 8, "heads": 2,
    "n_synch_out": 8, "n_synch_action": 8, "synapse_depth": 2, "memory_length": 3, "memory_hidden_dims": 4,
    "backbone_type": "resnet18-1",
}  # fmt: skip


def columns(repo_id: str) -> dict:
    named = {"question": "question", "answer": "answer", "splits": {"validation": "validation"}}
    return {"name": "columns", "hub_id": repo_id, "options": named, "max_source_length": 20, "max_target_length": 8}


def train_on_rows(world: World, name: str, out: Path) -> tuple:
    recipe = world.recipe(name, model=VANILLA, task=columns(world.publish_rows(f"ada/{name}")), training=TRAINING)
    return "trainers.train", recipe, "--output_dir", out


def train_from_embeddings(world: World, name: str, out: Path) -> tuple:
    model = {**VANILLA, "embeddings_from": world.publish_model(f"ada/{name}")}
    return "trainers.train", world.recipe(name, model=model, task=CHASE, training=TRAINING), "--output_dir", out


def train_with_tokenizer(world: World, name: str, out: Path) -> tuple:
    tokenizer = {"name_or_path": world.publish_model(f"ada/{name}")}
    recipe = world.recipe(name, model=VANILLA, task=CHASE, tokenizer=tokenizer, training=TRAINING)
    return "trainers.train", recipe, "--output_dir", out


def train_on_images(world: World, name: str, out: Path) -> tuple:
    files = {}
    for split, colour in itertools.product(("train", "test"), ("red", "blue")):
        for number in range(3):
            picture = io.BytesIO()
            Image.new("RGB", (6, 6), colour).save(picture, "png")
            files[f"{split}/{colour}/{number}.png"] = picture.getvalue()
    task = {"name": "images", "hub_id": world.publish(f"ada/{name}", files, "dataset")}
    recipe = world.recipe(
        name, model=TICKS, task=task, training=TRAINING, evaluation={"shown_examples": 0, "stopping_samples": 0}
    )
    return "trainers.train", recipe, "--output_dir", out


def evaluate(world: World, name: str, out: Path) -> tuple:
    options = ["--task", "pointer_chase", "--limit", "4", "--output_dir", out]
    return "trainers.evaluate", world.publish_model(f"ada/{name}"), *options


def compare(world: World, name: str, out: Path) -> tuple:
    models = {"small": {"model": VANILLA}, "large": {"model": {**VANILLA, "hidden_size": 32}}}
    recipe = world.recipe(
        name, models=models, against="small", parameters="free", seeds=[0], training=TRAINING,
        tasks={"columns": {"task": columns(world.publish_rows(f"ada/{name}"))}},
    )  # fmt: skip
    return "trainers.compare", recipe, "--output_dir", out


def couple(world: World, name: str, out: Path) -> tuple:
    options = ["--dataset", world.folder / "pieces.jsonl", "--output", out]
    return "trainers.couple", "--model", world.publish_model(f"ada/{name}"), *options


def trace(world: World, name: str, out: Path) -> tuple:
    return "trainers.trace", world.publish_model(f"ada/{name}"), PIECES[0]["question"], "--json"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_refusal(world: World, words: tuple, name: str, kind: str, place: str, out: Path) -> None:
    """A command while one kind of request fails: exit code 2, one line that names the repository, nothing written."""
    FAULTS[kind](world.hub, place)
    result = world.run(*words)
    world.hub.faults.clear()
    assert result.code == 2, f"{kind} at {place}: {result.errors}"
    last = result.errors.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ")
    assert f"ada/{name}" in last
    assert "Traceback" not in result.errors
    assert not files_in(out)


ASKING = (train_on_rows, train_on_images, train_from_embeddings, train_with_tokenizer, evaluate, couple, trace)
QUICK = ("503", "cut in the middle")


@pytest.mark.parametrize(
    "command", [command for command in ASKING if command is not train_on_images], ids=lambda command: command.__name__
)
def test_a_fault_is_told_in_one_line_and_the_command_works_later(world, command):
    name = command.__name__
    out = world.folder / name
    words = command(world, name, out)
    for place in (f"/ada/{name}/resolve/", f"/api/.*/ada/{name}"):
        for kind in FAULTS if command is trace else QUICK:
            # The library that reads data tries for longer than a quick test should.
            if command is not train_on_rows or "resolve" in place:
                check_refusal(world, words, name, kind, place, out)
    result = world.run(*words)
    assert result.code == 0, result.errors
    assert files_in(out) or command is trace


@pytest.mark.long
@pytest.mark.parametrize("command", [command for command in ASKING if command is not trace], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_in_every_command(world, kind, command):
    name = f"{command.__name__}_{kind.replace(' ', '_')}"
    out = world.folder / name
    words = command(world, name, out)
    for place in (f"/ada/{name}/resolve/", f"/api/.*/ada/{name}"):
        check_refusal(world, words, name, kind, place, out)
    result = world.run(*words)
    assert result.code == 0, result.errors
    assert files_in(out)


def test_a_comparison_whose_data_do_not_come_starts_no_run(world):
    out = world.folder / "compare"
    words = compare(world, "compare", out)
    FAULTS["503"](world.hub, "/ada/compare/resolve/")
    result = world.run(*words)
    world.hub.faults.clear()
    assert result.code == 2, result.errors
    assert "error: " in result.errors.splitlines()[-1]
    assert "ada/compare" in result.errors.splitlines()[-1]
    assert not [file for file in files_in(out) if "metrics" in file or "safetensors" in file]


def test_what_is_busy_for_a_moment_or_cut_once_is_asked_again(world):
    """Two refusals of the weights and one answer cut in the middle: the client goes on, and the result is the same."""
    plain = world.run(*trace(world, "calm", world.folder))
    words = trace(world, "moment", world.folder)
    world.hub.answer(503, path="/ada/moment/resolve/.*/model.safetensors", times=2)
    world.hub.cut_download(path="/ada/moment/resolve/.*/model.safetensors", after_bytes=5000)
    result = world.run(*words)
    assert result.code == 0, result.errors
    assert [fault.times for fault in world.hub.faults] == [0, 0]
    world.hub.faults.clear()
    assert result.shown.replace("ada/moment", "ada/calm") == plain.shown
    assert len(world.hub.asked("GET", "/ada/moment/.*safetensors")) == 2


def test_no_file_is_left_out_unsaid(world):
    """The tokenizer's settings or those of generation do not come: no command works with a model without them."""
    for file in ("tokenizer_config.json", "generation_config.json"):
        name = file.split("_")[0]
        words = evaluate(world, name, world.folder / name)
        world.hub.answer(500, path=f"/ada/{name}/resolve/.*/{file}", times=10**6)
        result = world.run(*words)
        world.hub.faults.clear()
        assert result.code == 2
        assert f"the Hub does not give {file} of 'ada/{name}' at the moment: 500" in result.errors


def test_a_model_in_the_cache_is_used_and_that_is_said(world):
    words = trace(world, "cached", world.folder)
    first = world.run(*words)
    FAULTS["cut"](world.hub, "ada/cached")
    second = world.run(*words)
    world.hub.faults.clear()
    assert (first.code, second.code) == (0, 0), second.errors
    assert second.shown == first.shown
    assert "model: the Hub does not answer" in second.errors
    assert "ada/cached is read from the cache" in second.errors


def test_a_cache_that_cannot_be_written(world):
    (world.folder / "file").write_text("")
    result = world.run(*trace(world, "uncached", world.folder), cache=world.folder / "file" / "cache")
    assert result.code == 2
    assert result.errors.splitlines()[-1].startswith("error: model: the Hub does not give")
    assert "Not a directory" in result.errors.splitlines()[-1]

"""The push command against a Hub on this machine, over HTTP and with the unmodified client.

Whatever does not load a model runs the client in this process, with `endpoint` or the client's settings pointed at the
server. Loading happens in processes of its own, which know nothing but the server and an empty cache.
"""

import base64
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, close_session, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import push_to_hub
from hf_models.connection_transformer import (
    ConnectionTransformerConfig,
    ConnectionTransformerForConditionalGeneration,
    ConnectionTransformerForMaskedLM,
    ConnectionTransformerForMultipleChoice,
    ConnectionTransformerForSequenceClassification,
    ConnectionTransformerModel,
)
from hf_models.vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerForMultipleChoice,
    VanillaTransformerForSequenceClassification,
    VanillaTransformerModel,
)
from model_cards.card import write_card
from push_to_hub import PushError, PushResult, push_run, verify_push
from tests import hub_server
from tests.hub_server import HubServer, new_token
from tests.model_cards.run_folders import metrics_of, predictions_of, recipe_of
from trainers import hub as trainers_hub
from trainers.errors import UserError
from trainers.redaction import secrets_in
from trainers.train import main as train

hub = hub_server.hub
ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("vanilla_transformer", "connection_transformer")
COMMON_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForMultipleChoice",
)
AUTO_CLASSES = {
    "vanilla_transformer": COMMON_AUTO_CLASSES,
    "connection_transformer": (*COMMON_AUTO_CLASSES, "AutoModelForMaskedLM"),
}
CLASSES = {
    "vanilla_transformer": (
        VanillaTransformerModel,
        VanillaTransformerForConditionalGeneration,
        VanillaTransformerForSequenceClassification,
        VanillaTransformerForMultipleChoice,
    ),
    "connection_transformer": (
        ConnectionTransformerModel,
        ConnectionTransformerForConditionalGeneration,
        ConnectionTransformerForSequenceClassification,
        ConnectionTransformerForMultipleChoice,
        ConnectionTransformerForMaskedLM,
    ),
}
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}
CONFIGS = {
    "vanilla_transformer": VanillaTransformerConfig(**TINY, num_hidden_layers=1, intermediate_size=32),
    "connection_transformer": ConnectionTransformerConfig(
        **TINY, num_slots=4, connection_rank=2, num_decoder_layers=1, max_reasoning_steps=3
    ),
}
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    ".eval_results/strategyqa.yaml",
    "evaluations/strategyqa/metrics.json",
    "internals/steps.html",
    "internals/steps.json",
    "internals/steps.png",
    "coupling/deep/gradient_similarity.csv",
    "metrics.json",
    "model.safetensors",
    "predictions.jsonl",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}


def files_of(architecture: str) -> set[str]:
    code = {f"configuration_{architecture}.py", f"modeling_{architecture}.py"}
    if architecture == "connection_transformer":
        code.add("connections_connection_transformer.py")
    return FILES | code


def make_run(folder: Path, architecture: str) -> Path:
    """A finished run: a tiny model with random weights, a word-level tokenizer, and a trainer's other files."""
    torch.manual_seed(0)
    CLASSES[architecture][1](CONFIGS[architecture]).save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"word{number}" for number in range(28))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    ).save_pretrained(folder)
    recipe = recipe_of(architecture)
    recipe["task"]["max_source_length"] = 16
    metrics = metrics_of(architecture) | {"example": {"prompt": "word1 word2 word3", "target": "word4"}}
    write(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    write(folder / "metrics.json", json.dumps(metrics, indent=1))
    write(folder / "predictions.jsonl", "".join(f"{json.dumps(p)}\n" for p in predictions_of(architecture)))
    write(folder / ".eval_results/strategyqa.yaml", "[]\n")
    write(folder / "evaluations/strategyqa/metrics.json", "{}\n")
    write(folder / "internals/steps.json", '{"schema_version": 1}\n')
    write(folder / "internals/steps.html", "<html><body>steps</body></html>\n")
    write(folder / "internals/steps.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    write(folder / "coupling/deep/gradient_similarity.csv", "a,b\n1,2\n")
    write_card(folder)
    return folder


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def change_json(path: Path, **changes) -> None:
    write(path, json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory) -> dict[str, Path]:
    return {name: make_run(tmp_path_factory.mktemp("outputs") / f"{name}-run", name) for name in ARCHITECTURES}


@pytest.fixture
def run(finished_runs, tmp_path) -> Path:
    """A run folder of its own, to be changed at will."""
    return Path(shutil.copytree(finished_runs["vanilla_transformer"], tmp_path / "outputs" / "my-run"))


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path) -> None:
    """The client of this process may reach the server, holds no token, and does not spend time waiting."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    verbosity = hub_logging.get_verbosity()
    close_session()
    yield
    close_session()
    hub_logging.set_verbosity(verbosity)


def push(hub: HubServer, run: Path, repo_id: str = "ada/reasoner", **options) -> PushResult:
    options = {"token": hub.user.token, "endpoint": hub.url} | options
    return push_run(run, repo_id, **options)


@pytest.fixture
def command(hub, monkeypatch, capfd):
    """Runs the command in this process; returns exit code, stdout and stderr, in neither of which a token may stand."""

    def call(*arguments: object, token: str | None = hub.user.token) -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        code = push_to_hub.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert token is None or token not in out + err
        return code, out, err

    return call


def in_fresh_process(hub: HubServer, folder: Path, *command: object, token: str | None = None):
    """Runs Python in an empty folder with an empty cache and the server as its Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=hub.environment(folder / "home", token=token, PYTHONWARNINGS="ignore"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def writes(hub: HubServer) -> list[str]:
    return [str(request) for request in hub.requests if request.method not in ("GET", "HEAD")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_push_is_one_commit_with_exactly_the_files_of_the_run(hub, finished_runs, architecture):
    lines: list[str] = []
    result = push(hub, finished_runs[architecture], show=lines.append)

    commits = hub.commits("ada/reasoner")
    assert [commit.title for commit in commits] == [f"Upload {architecture}-run", "initial commit"]
    assert result.changed
    assert (result.commit_sha, result.revision) == (commits[0].sha, commits[0].sha)
    assert result.commit_url == f"{hub.url}/ada/reasoner/commit/{commits[0].sha}"
    assert not hub.repository("ada/reasoner").private
    pushed = hub.files("ada/reasoner")
    assert set(pushed) == files_of(architecture) | {".gitattributes"}
    for name in files_of(architecture) - {"README.md"}:
        assert pushed[name] == (finished_runs[architecture] / name).read_bytes(), name
    assert commits[0].tree["model.safetensors"].sha256 is not None

    text = "\n".join(lines)
    assert all(name in text for name in files_of(architecture))
    assert commits[0].sha in text
    assert hub.user.token not in text
    for request in hub.requests:
        assert hub.user.token.encode() not in request.body
        assert hub.user.token not in f"{request.path}{request.query}"
        if request.path.startswith("/lfs") and request.method == "PUT":
            assert "authorization" not in request.headers


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("continuous_thought_machine/parity/smoke.yaml", marks=pytest.mark.long),
        "low_rank_in_context_transformer/table_connectivity/smoke.yaml",
        pytest.param("continuous_thought_machine/images/smoke.yaml", marks=pytest.mark.long),
        pytest.param("hyper_continuous_thought_machine/mazes/smoke.yaml", marks=pytest.mark.long),
        pytest.param("in_context_transformer/linear_regression/smoke.yaml", marks=pytest.mark.long),
    ],
)
def test_runs_of_models_that_read_no_text(hub, tmp_path, recipe, capsys):
    """Trained by the command, pushed without a tokenizer, loaded elsewhere by every Auto class with equal outputs."""
    path, folder = ROOT / "recipes" / recipe, tmp_path / "run"
    options = ["--output_dir", str(folder), "--max_steps", "2", "--disable_tqdm"]
    if (ROOT / "tests" / "data" / path.parent.name).is_dir():
        options += ["--data_dir", str(ROOT / "tests" / "data" / path.parent.name)]
    assert train([str(path), *options]) == 0
    lines: list[str] = []
    push(hub, folder, "ada/thinker", verify=True, show=lines.append)
    pushed = hub.files("ada/thinker")
    assert "tokenizer.json" not in pushed
    assert {"model.safetensors", "config.json", "README.md", "metrics.json"} <= set(pushed)
    assert any(name.startswith("internals/") and name.endswith(".png") for name in pushed)
    report = "\n".join(lines)
    assert "AutoTokenizer" not in report
    loaders = [name for name in json.loads(pushed["config.json"])["auto_map"] if name != "AutoConfig"]
    assert all(re.search(rf"^{name} +ok  max \|difference\| 0", report, re.MULTILINE) for name in loaders)


def test_files_are_listed_before_anything_is_sent(hub, run):
    seen: list[int] = []
    push(hub, run, show=lambda line: seen.append(len(hub.requests)) if "model.safetensors" in line else None)
    assert seen == [0]


def test_a_repetition_makes_no_commit(hub, run, command):
    sha = push(hub, run).commit_sha
    hub.requests.clear()
    code, out, _ = command(run, "ada/reasoner")
    assert code == 0
    assert f"Nothing to push: {hub.url}/ada/reasoner is up to date at {sha}" in out
    assert writes(hub) == []
    assert len(hub.commits("ada/reasoner")) == 2


def test_a_changed_file_is_pushed_alone(hub, run):
    first = push(hub, run)
    hub.requests.clear()
    change_json(run / "metrics.json", seed=7)
    second = push(hub, run, message="New seed")
    assert second.changed
    assert second.commit_sha != first.commit_sha
    assert hub.commits("ada/reasoner")[0].title == "New seed"
    assert json.loads(hub.files("ada/reasoner")["metrics.json"])["seed"] == 7
    (commit,) = hub.asked("POST", "/commit/")
    assert [json.loads(line)["value"].get("path") for line in commit.body.splitlines()] == [None, "metrics.json"]


def test_weights_of_an_earlier_push_are_replaced_and_foreign_files_stay(hub, run):
    push(hub, run)
    HfApi(hub.url, hub.user.token).upload_file(
        path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="ada/reasoner"
    )
    weights = load_file(run / "model.safetensors")
    (run / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, run / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    write(run / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))
    push(hub, run)
    pushed = set(hub.files("ada/reasoner"))
    assert pushed - FILES >= {"notes.txt", *weight_map.values(), "model.safetensors.index.json"}
    assert "model.safetensors" not in pushed

    index = run / "model.safetensors.index.json"
    content = index.read_text()
    for wrong, rule in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "weight_map must map the tensors' names to those of their shards"),
        ('{"weight_map": ["a"]}', "weight_map must map"),
        ('{"weight_map": {"a": 3}}', "'3' is not the name of a shard"),
        ('{"weight_map": {"a": "../model-1-of-1.safetensors"}}', "'../model-1-of-1.safetensors' is not the name of"),
    ):
        write(index, wrong)
        with pytest.raises(UserError, match=rf"index\.json: {re.escape(rule)}"):
            push(hub, run)
    write(index, content)

    (run / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing: model-00002-of-00002\.safetensors"):
        push(hub, run)


def test_pull_request(hub, run, command):
    code, out, _ = command(run, "ada/reasoner", "--create-pr")
    assert code == 0
    assert f"{hub.url}/ada/reasoner/discussions/1" in out
    assert 'revision="refs/pr/1"' in out
    assert set(hub.files("ada/reasoner")) == {".gitattributes"}
    assert set(hub.files("ada/reasoner", "refs/pr/1")) == files_of("vanilla_transformer") | {".gitattributes"}

    code, out, _ = command(run, "ada/reasoner", "--create-pr")
    assert code == 0
    assert f"Nothing to push: {hub.url}/ada/reasoner/discussions/1 is up to date" in out
    assert list(hub.repository("ada/reasoner").pull_requests) == [1]

    change_json(run / "metrics.json", seed=8)
    assert push(hub, run, create_pr=True).revision == "refs/pr/2"


def test_pull_request_to_somebody_elses_repository(hub, run):
    grace = hub.add_user("grace")
    hub.create_repository("grace/reasoner")
    result = push(hub, run, "grace/reasoner", create_pr=True)
    assert hub.repository("grace/reasoner").pull_requests[1].author == "ada"
    assert result.pull_request_url == f"{hub.url}/grace/reasoner/discussions/1"
    assert len(hub.commits("grace/reasoner")) == 1
    result = push(hub, run, "grace/reasoner", token=grace.token)
    assert hub.commits("grace/reasoner")[0].sha == result.commit_sha


def test_branch(hub, run):
    result = push(hub, run, revision="trial/seed-0")
    repository = hub.repository("ada/reasoner")
    assert set(repository.branches) == {"main", "trial/seed-0"}
    assert set(hub.files("ada/reasoner")) == {".gitattributes"}
    assert repository.branches["trial/seed-0"] == result.commit_sha
    assert 'revision="trial/seed-0"' in hub.files("ada/reasoner", "trial/seed-0")["README.md"].decode()
    assert not push(hub, run, revision="trial/seed-0").changed
    with pytest.raises(UserError, match="give one of them"):
        push(hub, run, revision="trial", create_pr=True)


def test_private(hub, run):
    push(hub, run, "ada/secret", private=True)
    assert hub.repository("ada/secret").private
    assert not push(hub, run, "ada/secret", private=True).changed
    hub.create_repository("ada/open")
    with pytest.raises(UserError, match="ada/open exists and is public"):
        push(hub, run, "ada/open", private=True)
    assert len(hub.commits("ada/open")) == 1


@pytest.mark.parametrize("token", ["the user's", None])
def test_dry_run_connects_to_nothing(hub, run, command, token):
    write(run / "training_args.bin", b"pickle")
    code, out, _ = command(run, "ada/reasoner", "--dry-run", token=hub.user.token if token else None)
    assert code == 0
    assert hub.requests == []
    for name in files_of("vanilla_transformer"):
        assert name in out
    weights = (run / "model.safetensors").stat().st_size
    assert f"{weights / 1000:.1f} kB" in next(line for line in out.splitlines() if "model.safetensors" in line)
    assert "Stays on this machine: training_args.bin" in out
    assert "license: mit" in out
    assert 'name = "ada/reasoner"' in out
    assert "Dry run: nothing was sent." in out


def test_the_card_names_the_repository_and_keeps_what_was_written_by_hand(hub, run):
    local = (run / "README.md").read_text()
    write(run / "README.md", local + "\n## By hand\n\nSeen by Ada.\n")
    push(hub, run)
    pushed = hub.files("ada/reasoner")["README.md"].decode()
    assert 'name = "ada/reasoner"' in pushed
    assert "Seen by Ada." in pushed
    assert (run / "README.md").read_text() == local + "\n## By hand\n\nSeen by Ada.\n"
    metadata = ModelCard(pushed).data
    assert (metadata.license, metadata.library_name) == ("mit", "transformers")
    assert metadata.eval_results[0].metric_type == "accuracy"


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("license: mit\n", "", "lacks license"),
        ("library_name: transformers\n", "", "lacks library_name"),
        ("model-index:", "other:", "lacks model-index"),
        ("license: mit\n", "license: [mit\n", "cannot be read"),
        ("---\nda", "da", "lacks license, library_name, model-index"),
    ],
)
def test_a_card_without_usable_metadata_is_refused(hub, run, old, new, rule):
    text = (run / "README.md").read_text()
    assert old in text
    write(run / "README.md", text.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"README\.md: the metadata {rule}") as caught:
        push(hub, run)
    assert "\n" not in str(caught.value)
    write(run / "README.md", text.encode("utf-16"))
    with pytest.raises(UserError, match=r"README\.md: not UTF-8 text"):
        push(hub, run)
    assert hub.requests == []


def test_an_unfinished_run_is_refused_with_all_that_is_missing(hub, run, command):
    removed = ("model.safetensors", "tokenizer.json", "README.md", "recipe.yaml", "generation_config.json")
    for name in (*removed, "modeling_vanilla_transformer.py"):
        (run / name).unlink()
    change_json(run / "metrics.json", status="running")
    code, _, err = command(run, "ada/reasoner")
    assert code == 2
    assert len(err.splitlines()) == 1
    for name in (*removed, "modeling_vanilla_transformer.py", '"status": "finished" in metrics.json'):
        assert name in err
    assert hub.requests == []

    empty = run.parent / "empty"
    empty.mkdir()
    _, _, err = command(empty, "ada/reasoner")
    for name in (*push_to_hub.REQUIRED_FILES, "model.safetensors"):
        assert name in err
    assert command(run.parent / "nowhere", "ada/reasoner")[2].endswith("nowhere: there is no such folder\n")


@pytest.mark.parametrize("auto_class", ["AutoConfig", *COMMON_AUTO_CLASSES])
def test_an_incomplete_auto_map_is_refused(hub, run, auto_class):
    auto_map = json.loads((run / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *COMMON_AUTO_CLASSES}
    del auto_map[auto_class]
    change_json(run / "config.json", auto_map=auto_map)
    with pytest.raises(UserError, match=rf"missing: {auto_class} in config\.json's auto_map"):
        push(hub, run)


def test_code_that_would_not_load_elsewhere_is_refused(hub, run):
    config = json.loads((run / "config.json").read_text())
    reference = config["auto_map"]["AutoModel"]
    change_json(run / "config.json", auto_map=config["auto_map"] | {"AutoModel": f"else/where--{reference}"})
    with pytest.raises(UserError, match=r"auto_map\.AutoModel is 'else/where--"):
        push(hub, run)
    change_json(run / "config.json", auto_map=config["auto_map"] | {"AutoModel": "modeling_vanilla_transformer.Gone"})
    with pytest.raises(UserError, match=r"class Gone in modeling_vanilla_transformer\.py"):
        push(hub, run)
    change_json(run / "config.json", auto_map=config["auto_map"])
    code = (run / "modeling_vanilla_transformer.py").read_text()
    write(run / "modeling_vanilla_transformer.py", f"{code}\nfrom .attention_vanilla import attend\n")
    with pytest.raises(UserError, match=r"attention_vanilla\.py \(imported by modeling_vanilla_transformer\.py\)"):
        push(hub, run)
    write(run / "attention_vanilla.py", "attend = None\n")
    assert "attention_vanilla.py" in {file.path for file in push(hub, run).files}
    write(run / "modeling_vanilla_transformer.py", f"{code}\nclass (\n")
    with pytest.raises(UserError, match="not valid Python"):
        push(hub, run)


def test_a_classifier_needs_no_generation_config_and_verifies(hub, run):
    for name in ("generation_config.json", "model.safetensors"):
        (run / name).unlink()
    VanillaTransformerForSequenceClassification(CONFIGS["vanilla_transformer"]).save_pretrained(run)
    write(run / "README.md", (run / "README.md").read_text().replace("## Load and run", "## Example"))
    lines: list[str] = []
    push(hub, run, verify=True, show=lines.append)
    assert "generation_config.json" not in hub.files("ada/reasoner")
    report = dict(re.split(r"\s+ok\s*", line) for line in lines if re.match(r"Auto\w+\s+ok", line))
    assert set(report) == {"AutoConfig", "AutoTokenizer", *COMMON_AUTO_CLASSES}
    assert report["AutoModelForSequenceClassification"] == "max |difference| 0.0"
    assert report["AutoModelForSeq2SeqLM"] == "left out: the run saved an encoder alone"


def test_what_is_not_on_the_list_stays(hub, run):
    staying = (
        "checkpoint-10/optimizer.pt",
        "checkpoint-10/model.safetensors",
        "checkpoint-10/trainer_state.json",
        "runs/events.out.tfevents.1",
        "wandb/run.json",
        "logs/train.log",
        "training_args.bin",
        "pytorch_model.bin",
        "optimizer.pt",
        "weights.pkl",
        "other.safetensors",
        "trainer_state.json",
        "helper.py",
        ".env",
        "notes.txt",
        "internals/state.pt",
        "internals/activations.npz",
        "internals/wandb/summary.json",
        "internals/.hidden.json",
        "coupling/checkpoint-3/optimizer.json",
        "coupling/trainer_state.json",
    )
    for name in staying:
        write(run / name, b"{}")
    lines: list[str] = []
    push(hub, run, show=lines.append)
    assert set(hub.files("ada/reasoner")) == files_of("vanilla_transformer") | {".gitattributes"}
    (stays,) = [line for line in lines if line.startswith("Stays on this machine")]
    for name in ("checkpoint-10/", "training_args.bin", "helper.py", ".env", "internals/wandb/summary.json"):
        assert name in stays


def test_a_link_that_leads_out_of_the_folder_is_refused(hub, run, tmp_path):
    write(tmp_path / "elsewhere.json", "{}")
    (run / "internals/linked.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=r"linked\.json is a link that leads out"):
        push(hub, run)
    (run / "internals/linked.json").unlink()
    (run / "internals/linked.json").symlink_to(run / "internals/steps.json")
    push(hub, run)


def test_cut_weights_are_refused(hub, run):
    content = (run / "model.safetensors").read_bytes()
    write(run / "model.safetensors", content[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        push(hub, run)
    assert hub.requests == []


# Put together here, so that no string that looks like a secret stands in the source.
PLANTED = {
    "hub": "hf_" + "aB3dE" * 7,
    "aws": "AKIA" + "ABCDEFGH12345678",
    "github": "ghp_" + "a1B2" * 9,
    "openai": "sk-" + "proj-" + "a1B2" * 8,
    "google": "AIza" + "a1B2c" * 7,
    "slack": "xoxb-" + "123456789012-abcdef",
    "jwt": ".".join(("eyJ" + "a1b2" * 5, "eyJ" + "c3d4" * 5, "e5f6" * 5)),
    "wandb": "WANDB_API_KEY=" + "0123456789abcdef" * 2,
    "option": "--hub_token " + "q1w2e3r4" * 3,
    "address": "https://ada:" + "hunter2hunter2" + "@example.org/repo.git",
    "private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", ["recipe.yaml", "internals/steps.html"])
def test_a_planted_secret_is_refused_and_never_shown(hub, run, command, kind, name):
    text = (run / name).read_text()
    write(run / name, f"{text}key: {PLANTED[kind]}\n")
    for options in ((), ("--dry-run",), ("--debug",)):
        code, out, err = command(run, "ada/reasoner", *options)
        assert code == 2
        assert f"{name} line {len(text.splitlines()) + 1} (" in err
        secret = PLANTED[kind].split("=")[-1].split(" ")[-1]
        assert secret not in out + err
    assert hub.requests == []


def test_the_users_own_token_is_found_whatever_it_looks_like(hub, run, command, tmp_path, monkeypatch):
    token = "plain-words-as-a-token"
    write(run / "predictions.jsonl", f'{{"id": 1}}\n{{"prediction": "{token}"}}\n')
    code, out, err = command(run, "ada/reasoner", "--dry-run", token=token)
    assert code == 2
    assert "predictions.jsonl line 2 (your own token)" in err
    write(tmp_path / "stored", token + "\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "stored"))
    code, out, err = command(run, "ada/reasoner")
    assert "predictions.jsonl line 2 (your own token)" in err
    assert token not in out + err
    assert hub.requests == []


def test_secrets_in_metadata_and_message_are_found(hub, run):
    with pytest.raises(UserError, match="the commit message"):
        push(hub, run, message=f"with {PLANTED['github']}")
    weights = load_file(run / "model.safetensors")
    save_file(weights, run / "model.safetensors", metadata={"format": "pt", "note": PLANTED["hub"]})
    with pytest.raises(UserError, match=r"model\.safetensors metadata \(a Hugging Face token\)") as caught:
        push(hub, run)
    assert PLANTED["hub"] not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    "line",
    [
        "from hf_models.connection_transformer import ConnectionTransformerForConditionalGeneration",
        '"eos_token": "<eos>", "pad_token": "<pad>", "secretkey": 12345678901234567890',
        '"hub_token": "<HUB_TOKEN>"',
        "accelerate launch -m trainers.train recipes/x/small.yaml --max_new_tokens 12 --decoder_start_token_id 1",
        "commit 0123456789abcdef0123456789abcdef01234567, see https://example.org/a@b",
        "task-specific tokens: the password is never asked for; api keys are not needed",
        "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 64).decode(),
    ],
)
def test_ordinary_text_is_no_secret(line):
    assert list(secrets_in(line, [])) == []


@pytest.mark.parametrize(
    "repo_id",
    [
        "reasoner",
        "ada/",
        "/reasoner",
        "ada/two/three",
        "ada/a--b",
        "ada/with space",
        "https://huggingface.co/ada/x",
        "ada/x.git",
    ],
)
def test_a_wrong_repository_name_is_refused_without_a_connection(hub, run, command, repo_id):
    code, _, err = command(run, repo_id)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "is not the name of a repository, expected <user>/<name>" in err
    assert hub.requests == []


def test_refusals_of_the_hub_are_one_line(hub, run, command):
    reader, grace = hub.add_user("ada-reads", role="read", organizations=("ada",)), hub.add_user("grace")
    hub.create_repository("grace/hidden", private=True)
    hub.create_repository("grace/shown")
    cases = {
        ("ada/reasoner", new_token()): "401: {url} does not accept the token",
        ("ada/reasoner", None): "there is no token of the Hub: set HF_TOKEN",
        ("ada/reasoner", "two words"): "the token of the Hub holds blanks",
        ("ada/reasoner", reader.token): "403: the token may not write to ada/reasoner",
        ("grace/new", hub.user.token): "403: the token may not write to grace/new",
        ("grace/hidden", hub.user.token): "403: the token may not write to grace/hidden",
        ("grace/shown", hub.user.token): "403: the token may not write to grace/shown",
    }
    for (repo_id, token), expected in cases.items():
        code, _, err = command(run, repo_id, token=token)
        assert code == 2
        assert len(err.splitlines()) == 1, err
        assert expected.format(url=hub.url) in err
        assert "Traceback" not in err
    assert set(hub.repositories) == {("model", "grace/hidden"), ("model", "grace/shown")}
    assert len(hub.commits("grace/shown")) == len(hub.commits("grace/hidden")) == 1
    assert hub.asked("PUT") == []
    push(hub, run, "grace/hidden", token=grace.token)

    hub.answer(404, path="/api/repos/create", message="Repository not found", code="RepoNotFound")
    code, _, err = command(run, "ada/reasoner")
    assert code == 2
    assert "404: there is no repository ada/reasoner" in err


def test_a_server_that_repeats_the_token_does_not_get_it_printed(hub, run, command):
    for options in ((), ("--debug",)):
        hub.answer(403, path="/commit/", message=f"Forbidden for {hub.user.token}")
        code, _, err = command(run, "ada/reasoner", *options)
        assert code == 2
        assert "403: the token may not write to ada/reasoner (Forbidden for <token>)" in err
        assert ("Traceback" in err) == bool(options)
    hub.answer(403, path="/commit/", message=f"Forbidden for {hub.user.token}")
    with pytest.raises(PushError) as caught:
        push(hub, run)
    error: BaseException | None = caught.value
    while error is not None:
        assert hub.user.token not in f"{error} {error!r}"
        error = error.__cause__


def test_a_server_that_repeats_another_secret_does_not_get_it_printed(hub, run, command):
    secret = new_token()
    hub.answer(500, path="/api/models/", times=100, message=f"the key {secret} is in use")
    code, out, err = command(run, "ada/reasoner")
    assert code == 2
    assert "the key <secret> is in use" in err
    assert secret not in out + err


def test_no_server(hub, run, command):
    hub.close()
    code, _, err = command(run, "ada/reasoner")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"the connection to {hub.url} failed" in err
    assert "pushing again is safe" in err


BUSY = {
    "information": ("GET", "/api/models/ada/reasoner$"),
    "creation": ("POST", "/api/repos/create"),
    "listing": ("GET", "/tree/"),
    "metadata": ("POST", "/api/validate-yaml"),
    "announcement": ("POST", "/preupload/"),
    "large files": ("POST", "/info/lfs/"),
    "upload": ("PUT", "/lfs/"),
    "check": ("POST", "/verify"),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("status", [503, 500, 429])
@pytest.mark.parametrize("place", BUSY)
def test_a_busy_hub_is_asked_again(hub, run, place, status):
    method, path = BUSY[place]
    hub.answer(status, method=method, path=path, times=2, message="Busy", headers={"Retry-After": "1"})
    result = push(hub, run)
    assert result.changed
    first, second, third = (request.status for request in hub.asked(method, path)[:3])
    assert (first, second, third) == (status, status, 404 if place == "information" else 200)
    assert len(hub.commits("ada/reasoner")) == 2
    assert set(hub.files("ada/reasoner")) == files_of("vanilla_transformer") | {".gitattributes"}


@pytest.mark.parametrize("place", ["upload", "commit"])
def test_a_hub_that_stays_busy_gets_nothing_and_a_later_push_everything(hub, run, command, place):
    method, path = BUSY[place]
    hub.answer(503, method=method, path=path, times=100)
    code, _, err = command(run, "ada/reasoner")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"503: {hub.url} refused" in err
    assert "pushing again is safe" in err
    assert len(hub.commits("ada/reasoner")) == 1
    hub.faults.clear()
    assert command(run, "ada/reasoner")[0] == 0
    assert len(hub.commits("ada/reasoner")) == 2


def test_a_connection_cut_in_mid_upload(hub, run, command):
    (run / "internals/steps.png").unlink()
    hub.cut_upload(after_bytes=5000)
    assert push(hub, run, "ada/once").changed
    assert [request.status for request in hub.asked("PUT")] == [None, 200]
    assert len(hub.asked("PUT")[0].body) == 5000
    assert len(hub.commits("ada/once")) == 2

    hub.cut_upload(after_bytes=5000, times=6)
    code, _, err = command(run, "ada/often")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "Error while uploading 'model.safetensors'" in err
    assert "pushing again is safe" in err
    assert set(hub.files("ada/often")) == {".gitattributes"}
    assert hub.repository("ada/often").large_files == {}
    assert command(run, "ada/often")[0] == 0
    assert hub.files("ada/often")["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert len(hub.commits("ada/often")) == 2


def test_a_commit_cut_in_mid_upload_leaves_nothing(hub, run):
    hub.cut_upload(method="POST", path="/commit/", after_bytes=3000, times=4)
    with pytest.raises(PushError, match=r"the connection to .* failed"):
        push(hub, run)
    assert len(hub.commits("ada/reasoner")) == 1
    assert push(hub, run).changed


@pytest.mark.parametrize("place", ["information", "upload", "commit"])
def test_a_hub_that_is_too_slow(hub, run, command, monkeypatch, place):
    """It takes longer than the client waits: one line; once it is quick again, the push is made."""
    monkeypatch.setattr(trainers_hub, "LONGEST_SILENCE", 0.2)
    method, path = BUSY[place]
    hub.stall(60, method=method, path=path, times=10**6)
    code, _, err = command(run, "ada/reasoner")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "timed out" in err
    assert "pushing again is safe" in err
    hub.faults.clear()
    assert command(run, "ada/reasoner")[0] == 0
    assert len(hub.commits("ada/reasoner")) == 2


@pytest.mark.parametrize("place", ["information", "announcement", "upload", "commit"])
def test_a_killed_push_is_made_by_the_next(hub, run, place):
    """SIGKILL while a request is under way: the repository is as it was, and pushing again makes one whole commit."""
    method, path = BUSY[place]
    hub.stall(60, method=method, path=path)
    killed_push(hub, run, lambda: hub.asked(method, path))
    if place != "information":
        assert set(hub.files("ada/reasoner")) == {".gitattributes"}
    assert push(hub, run).changed
    assert set(hub.files("ada/reasoner")) == files_of("vanilla_transformer") | {".gitattributes"}
    assert len(hub.commits("ada/reasoner")) == 2


def test_a_push_killed_after_its_commit_is_not_made_twice(hub, run):
    hub.create_repository("ada/reasoner")
    killed_push(hub, run, lambda: len(hub.commits("ada/reasoner")) == 2, then=60)
    assert not push(hub, run).changed
    assert len(hub.commits("ada/reasoner")) == 2


def killed_push(hub: HubServer, run: Path, when: Callable[[], object], then: float = 0.0) -> None:
    """A push in a copy of this process, which ends by SIGKILL as soon as `when` says so.

    Args:
        then: seconds that the push goes on to wait when it is through, so that it cannot end by itself.
    """

    def work() -> None:
        close_session()
        push(hub, run)
        threading.Event().wait(then)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while not when():
        assert process.is_alive(), "the push ended before it could be killed"
        threading.Event().wait(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("path", ["/commit/", "/api/repos/create"])
def test_a_lost_answer_does_not_double_the_work(hub, run, path):
    hub.lose_answer(method="POST", path=path)
    result = push(hub, run)
    assert len(hub.asked("POST", "/commit/")) == 1
    assert [commit.sha for commit in hub.commits("ada/reasoner")][:-1] == [result.commit_sha]


def test_a_lost_answer_does_not_open_a_second_pull_request(hub, run):
    hub.lose_answer(method="POST", path="/commit/")
    result = push(hub, run, create_pr=True)
    assert (result.revision, list(hub.repository("ada/reasoner").pull_requests)) == ("refs/pr/1", [1])
    assert result.pull_request_url == f"{hub.url}/ada/reasoner/discussions/1"


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, run, monkeypatch):
    create_commit = HfApi.create_commit

    def overtaken(self, repo_id, operations, **options):
        operation = CommitOperationAdd("notes.txt", b"mine")
        create_commit(self, repo_id, [operation], commit_message="Overtaken", token=hub.user.token)
        return create_commit(self, repo_id, operations, **options)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    with pytest.raises(PushError, match="412: somebody else changed ada/reasoner meanwhile"):
        push(hub, run)
    assert [commit.title for commit in hub.commits("ada/reasoner")] == ["Overtaken", "initial commit"]


def test_files_that_the_repository_ignores_are_reported(hub, run):
    hub.create_repository("ada/reasoner")
    api = HfApi(hub.url, hub.user.token)
    api.upload_file(path_or_fileobj=b"*.jsonl\n", path_in_repo=".gitignore", repo_id="ada/reasoner")
    with pytest.raises(PushError, match=r"lacks predictions\.jsonl: the repository's \.gitignore"):
        push(hub, run)


LOADER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_models", "trainers", "model_cards", "push_to_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import hf_models
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("hf_models can be imported")
import transformers

with open(sys.argv[1]) as file:
    jobs = json.load(file)
inputs = load_file(sys.argv[2])
results = {}
for name, job in jobs.items():
    pinned = {"revision": job["revision"], "trust_remote_code": True}
    config = transformers.AutoConfig.from_pretrained(job["repo_id"], **pinned)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    for auto_class in job["auto_classes"]:
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_pretrained(job["repo_id"], **pinned).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            output = model(**{k.split("/")[1]: v for k, v in inputs.items() if k.startswith(auto_class + "/")})
        results[f"{name}/{auto_class}"] = output[0].contiguous()
        if auto_class == "AutoModelForSeq2SeqLM":
            tokens = model.generate(inputs[f"{auto_class}/input_ids"], max_new_tokens=6, do_sample=False)
            results[f"{name}/generate"] = tokens
    print("----", name)
    shown = {}
    exec(job["shown"], shown)
    print(type(shown["model"]).__module__, shown["tokenizer"]("word1 word2").input_ids)
    exec(job["card"], {})
save_file(results, sys.argv[3])
"""


def example_inputs() -> dict[str, torch.Tensor]:
    """Inputs by "AutoClass/argument"."""
    inputs = {}
    for auto_class in AUTO_CLASSES["connection_transformer"]:
        shape = (2, 3, 7) if auto_class == "AutoModelForMultipleChoice" else (2, 7)
        ids = torch.arange(4, 4 + torch.Size(shape).numel()).reshape(shape) % 28 + 4
        inputs |= {f"{auto_class}/input_ids": ids, f"{auto_class}/attention_mask": torch.ones_like(ids)}
        if auto_class in ("AutoModel", "AutoModelForSeq2SeqLM"):
            inputs[f"{auto_class}/decoder_input_ids"] = torch.tensor([[1, 9, 12], [1, 10, 4]])
    return inputs


def test_every_auto_class_loads_elsewhere_and_computes_the_same(hub, finished_runs, tmp_path):
    """Pushed from here by this package, loaded there from the Hub alone, with both examples that a reader is given."""
    inputs, jobs, expected = example_inputs(), {}, {}
    for architecture, run_dir in finished_runs.items():
        lines: list[str] = []
        result = push(hub, run_dir, f"ada/{architecture}", show=lines.append)
        card = hub.files(f"ada/{architecture}")["README.md"].decode()
        jobs[architecture] = {
            "repo_id": result.repo_id,
            "revision": result.commit_sha,
            "auto_classes": AUTO_CLASSES[architecture],
            "shown": next(line for line in lines if "from_pretrained" in line),
            "card": card.split("```python\n")[1].split("```")[0],
        }
        for auto_class, model_class in zip(AUTO_CLASSES[architecture], CLASSES[architecture], strict=True):
            torch.manual_seed(0)
            model = model_class.from_pretrained(run_dir).eval()
            assert type(model).__module__.startswith("hf_models.")
            with torch.no_grad():
                arguments = {k.split("/")[1]: v for k, v in inputs.items() if k.startswith(f"{auto_class}/")}
                expected[f"{architecture}/{auto_class}"] = model(**arguments)[0]
            if auto_class == "AutoModelForSeq2SeqLM":
                ids = inputs[f"{auto_class}/input_ids"]
                tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
                expected[f"{architecture}/generate"] = tokens

    write(tmp_path / "loader.py", LOADER)
    write(tmp_path / "jobs.json", json.dumps(jobs))
    save_file(inputs, tmp_path / "inputs.safetensors")
    child = in_fresh_process(
        hub,
        tmp_path / "elsewhere",
        tmp_path / "loader.py",
        tmp_path / "jobs.json",
        tmp_path / "inputs.safetensors",
        tmp_path / "results.safetensors",
    )
    assert child.returncode == 0, child.stderr
    results = load_file(tmp_path / "results.safetensors")
    assert set(results) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=0, atol=0, msg=name)
    for architecture, job in jobs.items():
        shown = child.stdout.split(f"---- {architecture}\n")[1]
        assert job["revision"] in shown.splitlines()[0]
        assert "[5, 6]" in shown.splitlines()[0]
        assert shown.splitlines()[1].startswith("answer:")


@pytest.mark.parametrize(
    ("architecture", "options"), [("vanilla_transformer", ["--private"]), ("connection_transformer", ["--create-pr"])]
)
def test_the_command_verifies_what_it_pushed(hub, finished_runs, tmp_path, architecture, options):
    script = ROOT / "push_to_hub.py"
    arguments = (script, finished_runs[architecture], "ada/reasoner", "--verify", *options)
    child = in_fresh_process(hub, tmp_path / "here", *arguments, token=hub.user.token)
    assert child.returncode == 0, child.stderr
    assert hub.user.token not in child.stdout + child.stderr
    lines = {line.split()[0]: line for line in child.stdout.splitlines() if "  ok" in line}
    assert set(lines) == {"AutoConfig", "AutoTokenizer", *AUTO_CLASSES[architecture]}
    for auto_class in AUTO_CLASSES[architecture]:
        assert "max |difference| 0.0" in lines[auto_class]
    assert "generate() equal" in lines["AutoModelForSeq2SeqLM"]
    downloads = hub.asked("GET", r"/resolve/.*/modeling_")
    assert len(downloads) == 1, "the code was not fetched from the Hub"


def test_verification_notices_other_weights(hub, run):
    result = push(hub, run)
    weights = load_file(run / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name][5] += 0.25
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    with pytest.raises(PushError, match=r"verification failed: AutoModel: RuntimeError: the outputs differ by up to"):
        verify_push(run, result, token=hub.user.token, endpoint=hub.url, show=lines.append)
    assert [line.split()[0] for line in lines] == ["AutoConfig", "AutoTokenizer"]


def test_verification_notices_code_that_needs_this_package(hub, run):
    code = (run / "modeling_vanilla_transformer.py").read_text()
    needy = code.replace("\nimport torch\n", "\nimport torch\nfrom hf_models import vanilla_transformer\n", 1)
    assert needy != code
    write(run / "modeling_vanilla_transformer.py", needy)
    with pytest.raises(PushError, match=r"verification failed: AutoModel: ImportError: .*hf_models") as caught:
        push(hub, run, verify=True)
    assert "\n" not in str(caught.value)
    assert len(hub.commits("ada/reasoner")) == 2


def test_options_that_contradict_each_other(hub, run, command, capfd):
    assert command(run, "ada/reasoner", "--dry-run", "--verify")[0] == 2
    assert command(run, "ada/reasoner", "--revision", "with space")[0] == 2
    assert hub.requests == []
    with pytest.raises(SystemExit) as caught:
        push_to_hub.main(["--help"])
    assert caught.value.code == 0
    assert "--create-pr" in capfd.readouterr().out


def test_the_server_stores_what_the_client_uploads(hub, tmp_path):
    """Large files in several parts, folders, deletions, tags, branches, paged listings and downloads with ranges."""
    hub.part_size, hub.tree_page_size = 1000, 2
    api = HfApi(hub.url, hub.user.token)
    assert api.whoami()["name"] == "ada"
    api.create_repo("ada/things")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("ada/things")
    large = os.urandom(3500)
    write(tmp_path / "up/weights.safetensors", large)
    write(tmp_path / "up/a/b/notes.txt", "first")
    write(tmp_path / "up/empty", "")
    first = api.upload_folder(repo_id="ada/things", folder_path=tmp_path / "up").oid
    assert len(hub.asked("PUT", "/part/")) == 4
    assert hub.files("ada/things") == {
        ".gitattributes": hub.files("ada/things")[".gitattributes"],
        "weights.safetensors": large,
        "a/b/notes.txt": b"first",
        "empty": b"",
    }
    tree = [entry.path for entry in api.list_repo_tree("ada/things", recursive=True)]
    assert tree == [".gitattributes", "a", "a/b", "a/b/notes.txt", "empty", "weights.safetensors"]
    assert [entry.path for entry in api.list_repo_tree("ada/things", "a")] == ["a/b"]
    (info,) = api.get_paths_info("ada/things", ["weights.safetensors", "absent"])
    assert (info.size, info.lfs.size) == (3500, 3500)

    api.create_tag("ada/things", tag="v1")
    api.create_branch("ada/things", branch="trial")
    api.delete_file("a/b/notes.txt", "ada/things")
    assert [commit.title for commit in api.list_repo_commits("ada/things", revision="v1")][1:] == ["initial commit"]
    refs = api.list_repo_refs("ada/things")
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert {ref.name for ref in refs.branches} == {"main", "trial"}
    assert not api.file_exists("ada/things", "a/b/notes.txt")
    assert api.file_exists("ada/things", "a/b/notes.txt", revision="v1")
    copy = Path(snapshot_download("ada/things", revision="v1", cache_dir=tmp_path / "cache", endpoint=hub.url))
    assert (copy / "weights.safetensors").read_bytes() == large
    assert copy.name == first
    for wanted, status, expected in (("bytes=100-199", 206, large[100:200]), ("bytes=3400-", 206, large[3400:])):
        request = urllib.request.Request(
            f"{hub.url}/ada/things/resolve/v1/weights.safetensors", headers={"Range": wanted}
        )
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read()) == (status, expected)


def test_the_server_refuses_as_the_hub_does(hub, tmp_path):
    hub.create_repository("ada/things")
    hub.create_repository("ada/hidden", private=True)
    hub.repository("ada/things").gated = "manual"
    mine, other = HfApi(hub.url, hub.user.token), HfApi(hub.url, hub.add_user("grace").token)
    anonymous = HfApi(hub.url, token=False)

    def download(api, path="README.md", **options):
        return api.hf_hub_download(
            "ada/things", path, cache_dir=tmp_path / api.token[:6] if api.token else None, **options
        )

    assert mine.model_info("ada/hidden").private
    for api in (other, anonymous):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("ada/hidden")
        with pytest.raises(GatedRepoError):
            download(api, ".gitattributes")
    assert Path(download(mine, ".gitattributes")).read_bytes().startswith(b"*.bin")
    with pytest.raises(EntryNotFoundError):
        download(mine)
    with pytest.raises(RevisionNotFoundError):
        download(mine, revision="absent")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        other.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="ada/things")
    with pytest.raises(HfHubHTTPError, match="412"):
        mine.create_commit("ada/things", [CommitOperationAdd("x", b"x")], commit_message="x", parent_commit="0" * 40)
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        mine.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id="ada/things")
    assert len(hub.commits("ada/things")) == 1

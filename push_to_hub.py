"""Put a finished run on the Hub, as one commit that anybody can load without this package.

    python push_to_hub.py outputs/my-run user/name --dry-run
    python push_to_hub.py outputs/my-run user/name --private --verify

What leaves this machine is decided by a list of what may leave (weights as safetensors, configuration, code of the
architecture, tokenizer, card, recipe, metrics, predictions, reports), never by a list of what may not. The token comes
from `HF_TOKEN` or from `hf auth login`. Exit code: 0 when the files are on the Hub, 2 when they are not.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    Discussion,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # the ancestor of error answers and lost connections alike, whichever HTTP library the client uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from model_cards.card import CardError, render_card
from model_cards.run_folder import REPORT_SUFFIXES
from trainers.errors import UserError
from trainers.hub import limit_silence
from trainers.redaction import known_tokens, redact, secrets_in

REQUIRED_FILES = ("config.json", "metrics.json", "recipe.yaml", "README.md")
# What a model that reads text needs as well: one whose configuration has a vocabulary.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL_FILES = (
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "predictions.jsonl",
)
REPORT_FOLDERS = ("internals", "coupling", "evaluations")
# Where the Hub looks for results of a model on data sets: one YAML file per task, written by `trainers.evaluate`.
RESULTS_FOLDER = ".eval_results"
# Parts of a path that never leave, wherever they stand: a Trainer's state and a tracker's logs also consist of JSON.
NEVER = (
    ".*",
    "__pycache__",
    "checkpoint-*",
    "logs",
    "runs",
    "wandb",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "trainer_state.json",
    "training_args*",
)
# What `from_pretrained` would still read if an earlier push left it behind: removed in the commit that replaces it.
READ_ON_LOADING = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
AUTO_CLASS_OF_SUFFIX = {
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForPrediction": "AutoModelForTimeSeriesPrediction",
}
GENERATING_SUFFIXES = ("ForConditionalGeneration", "ForCausalLM")

BINARY_SUFFIXES = (".safetensors", ".png")

RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0  # seconds: the most that a Retry-After of the Hub is obeyed
OUR_PACKAGES = ("hf_models", "trainers", "model_cards", "push_to_hub")


class PushError(RuntimeError):
    """The Hub or the network refused. The message is one line and never holds a token."""


@dataclass(frozen=True)
class PushFile:
    """One file that leaves.

    Args:
        path (`str`): its path in the repository, with forward slashes.
        source (`pathlib.Path`): where it lies on this machine.
        size (`int`): bytes.
        content (`bytes`, *optional*): a text file's bytes. They are read once, so that what was searched for secrets
            is what is sent. Binary files are read from `source` while they are sent.
    """

    path: str
    source: Path
    size: int
    content: bytes | None = field(default=None, repr=False)

    def is_same_as(self, remote: RepoFile) -> bool:
        """Whether the Hub already holds these bytes: by sha256 for a large file, else by git's blob id."""
        if self.size != remote.size:
            return False
        if remote.lfs is not None and self.content is None:
            with self.source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
        content = self.source.read_bytes() if self.content is None else self.content
        if remote.lfs is not None:
            return hashlib.sha256(content).hexdigest() == remote.lfs.sha256
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id

    def operation(self) -> CommitOperationAdd:
        return CommitOperationAdd(self.path, str(self.source) if self.content is None else self.content)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Args:
        repo_id (`str`): `<user>/<name>`.
        url (`str`): page of the repository.
        files (`tuple[PushFile, ...]`): everything that belongs to the run.
        changed (`bool`): whether a commit was made; False for a dry run and when the Hub was already up to date.
        commit_sha (`str`, *optional*): the commit that holds the files, 40 hexadecimal digits; None for a dry run.
        commit_url (`str`, *optional*): its page.
        pull_request_url (`str`, *optional*): the pull request's page, with `create_pr`.
        revision (`str`, *optional*): what to give to `from_pretrained`: the commit, or `refs/pr/N`.
    """

    repo_id: str
    url: str
    files: tuple[PushFile, ...]
    changed: bool = False
    commit_sha: str | None = None
    commit_url: str | None = None
    pull_request_url: str | None = None
    revision: str | None = None


def push_run(
    run_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> PushResult:
    """Push a finished run folder to a model repository, in one commit.

    A push either arrives whole or not at all, and pushing the same folder again makes no commit. Files that an earlier
    push left behind and that `from_pretrained` would still read (other weights, a chat template) are removed in the
    same commit; everything else in the repository stays.

    Args:
        run_dir (`str` or `os.PathLike`): folder that a training run left, with `metrics.json` saying "finished".
        repo_id (`str`): `<user or organization>/<name>`. Made if it does not exist.
        private (`bool`, *optional*, defaults to `False`): make a new repository private. An existing public repository
            is then refused.
        revision (`str`, *optional*): branch to commit to, made from `main` if it does not exist. Default: `main`.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request against `main` instead.
        dry_run (`bool`, *optional*, defaults to `False`): check and list everything, without any connection.
        verify (`bool`, *optional*, defaults to `False`): afterwards load what was pushed in a fresh process that does
            not have this package, and compare it with the folder (see [`verify_push`]).
        message (`str`, *optional*): title of the commit.
        token (`str`, *optional*): token of the Hub. Default: `HF_TOKEN`, or the one stored by `hf auth login`.
        endpoint (`str`, *optional*): address of the Hub. Default: `HF_ENDPOINT`, or https://huggingface.co.
        show (`Callable[[str], None]`, *optional*): is given each line of the report.

    Returns:
        [`PushResult`]

    Raises:
        UserError: the folder is no finished run (all that is missing is named), a file holds something that looks like
            a token, the card's metadata cannot be used, or an argument is wrong.
        PushError: the Hub refused, the connection was lost, or the verification failed.
    """
    run_dir, token = Path(run_dir), _checked_token(token)
    message = message or f"Upload {run_dir.resolve().name}"
    _check_target(repo_id, revision, create_pr, dry_run and verify)
    files = _with_card(run_dir, collect_files(run_dir), repo_id, revision)
    _check_secrets(files, message, known_tokens(token))

    endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
    url = f"{endpoint}/{repo_id}"
    for line in _listing(run_dir, files, url):
        show(line)
    if dry_run:
        card = next(file.content for file in files if file.path == "README.md" and file.content is not None)
        show(f"\n{card.decode()}\nDry run: nothing was sent.")
        return PushResult(repo_id, url, tuple(files))

    hub = _Hub(repo_id, endpoint, token or _checked_token(get_token()), show)
    result = hub.push(files, revision=revision, private=private, create_pr=create_pr, message=message)
    if not result.changed:
        show(f"\nNothing to push: {result.pull_request_url or url} is up to date at {result.commit_sha}")
    else:
        show(f"\nPushed: {result.pull_request_url or result.commit_url}\nCommit: {result.commit_sha}")
    show(f"\n{_snippet(run_dir, result)}")
    if verify:
        show("")
        verify_push(run_dir, result, token=hub.token, endpoint=endpoint, show=show)
    return result


def collect_files(run_dir: Path) -> list[PushFile]:
    """The files of a run that leave this machine, sorted by path.

    Raises:
        UserError: the folder is not a finished run; the message names everything that is missing.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such folder")
    missing = [name for name in REQUIRED_FILES if not (run_dir / name).is_file()]
    config = _read_json(run_dir / "config.json") if "config.json" not in missing else {}
    tokenizer = TOKENIZER_FILES if _reads_text(config) else ()
    missing += [name for name in tokenizer if not (run_dir / name).is_file()]
    metrics = _read_json(run_dir / "metrics.json") if "metrics.json" not in missing else {"status": "finished"}
    if metrics.get("status") != "finished":
        missing.append(f'"status": "finished" in metrics.json (it says {json.dumps(metrics.get("status"))})')
    saved_class = _saved_class(config)
    generates = not saved_class or saved_class.endswith(GENERATING_SUFFIXES)
    if generates and not (run_dir / "generation_config.json").is_file():
        missing.append("generation_config.json")
    weights = _weight_files(run_dir, missing)
    code = _code_files(run_dir, config, missing) if config else []
    if missing:
        raise UserError(f"{run_dir} is not a finished run; missing: {', '.join(missing)}")

    names = [*REQUIRED_FILES, *tokenizer, *weights, *code, *(n for n in OPTIONAL_FILES if (run_dir / n).is_file())]
    for folder in REPORT_FOLDERS:
        names += [
            path.relative_to(run_dir).as_posix() for path in (run_dir / folder).rglob("*") if _is_report(path, run_dir)
        ]
    names += [f"{RESULTS_FOLDER}/{path.name}" for path in (run_dir / RESULTS_FOLDER).glob("*.yaml")]
    files = []
    for name in sorted(set(names)):
        source = run_dir / name
        if not source.resolve().is_relative_to(run_dir.resolve()):
            raise UserError(f"{source} is a link that leads out of the run's folder")
        if source.suffix == ".safetensors":
            _check_weights(source)
        content = None if source.suffix in BINARY_SUFFIXES else source.read_bytes()
        files.append(PushFile(name, source, source.stat().st_size if content is None else len(content), content))
    return files


def _saved_class(config: dict) -> str:
    architectures = config.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else ""


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _weight_files(run_dir: Path, missing: list[str]) -> list[str]:
    """`model.safetensors`, or the index and every shard it names: what `from_pretrained` would read."""
    if (run_dir / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = run_dir / "model.safetensors.index.json"
    if not index.is_file():
        missing.append("model.safetensors (or model.safetensors.index.json and its shards)")
        return []
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must map the tensors' names to those of their shards")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not fnmatch(shard, "model-*-of-*.safetensors") or "/" in shard:
            raise UserError(f"{index}: {shard!r} is not the name of a shard (model-00001-of-00002.safetensors)")
        if not (run_dir / shard).is_file():
            missing.append(f"{shard} (named by {index.name})")
    return [index.name, *shards]


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error


def _code_files(run_dir: Path, config: dict, missing: list[str]) -> list[str]:
    """The modules that `auto_map` names and, step by step, the modules of the folder that these import.

    The map is complete when it names the configuration, the body (AutoModel) and every head that the code defines:
    `save_pretrained` alone would name only the class that was saved.
    """
    auto_map = config.get("auto_map") or {}
    entries: dict[str, tuple[str, str]] = {}
    for auto_class, reference in auto_map.items():
        if not isinstance(reference, str) or not re.fullmatch(r"\w+\.\w+", reference):
            raise UserError(
                f'config.json: auto_map.{auto_class} is {reference!r}, expected "module.Class" of this folder'
            )
        module, _, class_name = reference.partition(".")
        entries[auto_class] = (f"{module}.py", class_name)

    classes: dict[str, list[str]] = {}
    waiting = [(file, "named by config.json's auto_map") for file, _ in entries.values()]
    while waiting:
        file, why = waiting.pop()
        if file in classes:
            continue
        classes[file] = []
        if not (run_dir / file).is_file():
            missing.append(f"{file} ({why})")
            continue
        try:
            tree = ast.parse((run_dir / file).read_bytes())
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{run_dir / file}: not valid Python ({error})") from error
        classes[file] = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                waiting.append((f"{node.module.split('.')[0]}.py", f"imported by {file}"))

    for auto_class, (file, class_name) in entries.items():
        if (run_dir / file).is_file() and class_name not in classes[file]:
            missing.append(f"class {class_name} in {file} (named by auto_map.{auto_class})")
    needed = {"AutoConfig", "AutoModel"}
    # A file may hold a second architecture, whose classes are not this one's.
    family = re.sub(f"({'|'.join(AUTO_CLASS_OF_SUFFIX)}|Model)$", "", _saved_class(config))
    heads = [name for file, _ in entries.values() for name in classes[file] if name.startswith(family)]
    needed |= {auto for suffix, auto in AUTO_CLASS_OF_SUFFIX.items() if any(name.endswith(suffix) for name in heads)}
    missing += [f"{auto_class} in config.json's auto_map" for auto_class in sorted(needed - entries.keys())]
    return sorted(classes)


def _reads_text(config: dict[str, Any]) -> bool:
    return not config or config.get("vocab_size") is not None


def _is_report(path: Path, run_dir: Path) -> bool:
    parts = path.relative_to(run_dir).parts
    never = any(fnmatch(part, pattern) for part in parts for pattern in NEVER)
    return path.is_file() and path.suffix in REPORT_SUFFIXES and not never


def _checked_token(token: str | None) -> str | None:
    """The token without surrounding blanks. One that cannot stand in a header would end up in an error message."""
    token = (token or "").strip() or None
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UserError("the token of the Hub holds blanks or characters outside of ASCII: set HF_TOKEN again")
    return token


def _check_secrets(files: list[PushFile], message: str, tokens: list[str]) -> None:
    """Refuse the push when a file, or the commit's title, holds something that looks like a token."""
    found = [f"the commit message ({kind})" for _, kind in secrets_in(message, tokens)]
    for file in files:
        if file.content is not None:
            text = file.content.decode("utf-8", errors="replace")
            found += [f"{file.path} line {line} ({kind})" for line, kind in secrets_in(text, tokens)]
        elif file.source.suffix == ".safetensors":
            with safe_open(file.source, "np") as weights:
                metadata = json.dumps(weights.metadata() or {})
            found += [f"{file.path} metadata ({kind})" for _, kind in secrets_in(metadata, tokens)]
    if found:
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise UserError(f"nothing was pushed: something that looks like a secret stands in {shown}; remove it first")


def _one_line(text: Any, *tokens: str | None) -> str:
    return redact(" ".join(str(text).split()), *tokens)


def _with_card(run_dir: Path, files: list[PushFile], repo_id: str, revision: str | None) -> list[PushFile]:
    """The files, with a card whose metadata the Hub can read and whose loading example names the repository.

    The card in the folder loads the folder. Its section "Load and run" is drawn again, the rest goes as it is, be it
    drawn or written by hand.
    """
    path = run_dir / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    metadata = _card_metadata(path, text)
    section = re.compile(r"^## Load and run$.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if section.search(text):
        try:
            drawn = section.search(render_card(run_dir, repo_id, revision, license=str(metadata.license)))
        except CardError as error:
            raise UserError(f"{path}: its loading example cannot be drawn: {_one_line(error)}") from error
        text = section.sub(lambda match: drawn.group() if drawn else match.group(), text, count=1)
    content = text.encode()
    card = PushFile("README.md", path, len(content), content)
    return [card if file.path == "README.md" else file for file in files]


def _card_metadata(path: Path, text: str) -> ModelCardData:
    try:
        metadata = ModelCard(text).data
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: the metadata cannot be read: {_one_line(error)}") from error
    assert isinstance(metadata, ModelCardData)  # what a `ModelCard` parses into
    missing = [name for name in ("license", "library_name") if not metadata.get(name)]
    if not metadata.eval_results:
        missing.append("model-index")
    if missing:
        raise UserError(f"{path}: the metadata lacks {', '.join(missing)}")
    return metadata


def _check_target(repo_id: str, revision: str | None, create_pr: bool, verify_without_push: bool) -> None:
    rule = f"{repo_id!r} is not the name of a repository, expected <user>/<name>"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{rule}: {_one_line(error)}") from error
    if repo_id.count("/") != 1:
        raise UserError(rule)
    if revision is not None and create_pr:
        raise UserError(
            "--create-pr opens a pull request against main, --revision commits to a branch: give one of them"
        )
    if revision is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", revision):
        raise UserError(f"--revision {revision!r} is not the name of a branch")
    if verify_without_push:
        raise UserError("--verify loads what was pushed, --dry-run pushes nothing: give one of them")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _listing(run_dir: Path, files: list[PushFile], url: str) -> Iterator[str]:
    yield f"{len(files)} files, {_size(sum(file.size for file in files))}, for {url}:"
    width = max(len(file.path) for file in files)
    for file in files:
        yield f"  {file.path:<{width}}  {_size(file.size):>9}"
    leaving = {file.path for file in files}
    staying = []
    for path in run_dir.iterdir():
        if path.name in (*REPORT_FOLDERS, RESULTS_FOLDER) and path.is_dir():
            inside = (inner.relative_to(run_dir).as_posix() for inner in path.rglob("*") if inner.is_file())
            staying += [name for name in inside if name not in leaving]
        elif path.name not in leaving:
            staying.append(f"{path.name}/" if path.is_dir() else path.name)
    if staying:
        yield f"Stays on this machine: {', '.join(sorted(staying))}"


def _snippet(run_dir: Path, result: PushResult) -> str:
    """The lines that load what was pushed, with the commit pinned."""
    config = _read_json(run_dir / "config.json")
    auto_class = next(
        (auto for auto, reference in config["auto_map"].items() if reference.endswith(f".{_saved_class(config)}")),
        "AutoModel",
    )
    arguments = f'"{result.repo_id}", revision="{result.revision}", trust_remote_code=True'
    names = {"model": auto_class}
    if _reads_text(config):
        names = {"tokenizer": "AutoTokenizer"} | names
    elif (run_dir / "preprocessor_config.json").is_file():
        names = {"processor": "AutoImageProcessor"} | names
    lines = [f"{name} = {loader}.from_pretrained({arguments})" for name, loader in names.items()]
    return "\n".join([f"from transformers import {', '.join(sorted(names.values()))}", "", *lines])


class _Done(NamedTuple):
    """Where a push is to be found: the last fields of [`PushResult`]."""

    commit_sha: str
    commit_url: str
    pull_request_url: str | None
    revision: str


def _changes(files: list[PushFile], remote: dict[str, RepoFile]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What has to happen to a commit's files for them to be these; nothing when they are."""
    paths = {file.path for file in files}
    changed = [file for file in files if file.path not in remote or not file.is_same_as(remote[file.path])]
    stale = [p for p in remote if p not in paths and any(fnmatch(p, pattern) for pattern in READ_ON_LOADING)]
    return [*(file.operation() for file in changed), *(CommitOperationDelete(path) for path in sorted(stale))]


class _Hub:
    """One repository of the Hub, with the retries that the client does not make and errors of one line."""

    def __init__(self, repo_id: str, endpoint: str, token: str | None, show: Callable[[str], None]):
        if token is None:
            raise UserError("there is no token of the Hub: set HF_TOKEN or run `hf auth login`")
        self.repo_id, self.endpoint, self.token, self.show = repo_id, endpoint, token, show
        limit_silence()
        self.api = HfApi(endpoint=endpoint, token=token)

    def push(
        self, files: list[PushFile], *, revision: str | None, private: bool, create_pr: bool, message: str
    ) -> PushResult:
        url, branch = f"{self.endpoint}/{self.repo_id}", revision or "main"
        parent = self.prepare(branch, private)
        tree = self.tree(parent)
        operations = _changes(files, tree)
        if not operations:
            return PushResult(self.repo_id, url, tuple(files), False, *self.page(parent))
        done = self.open_pull_request(files) if create_pr else None
        if done is not None:
            return PushResult(self.repo_id, url, tuple(files), False, *done)
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                self.show(f"Removed on the Hub, where an earlier push left it: {operation.path_in_repo}")
        done = self.commit(files, operations, branch, parent, create_pr, message)
        if ".gitignore" in tree:
            absent = [operation.path_in_repo for operation in _changes(files, self.tree(done.commit_sha))]
            if absent:
                raise PushError(f"{done.commit_url} lacks {', '.join(absent)}: the repository's .gitignore names them")
        return PushResult(self.repo_id, url, tuple(files), True, *done)

    def prepare(self, branch: str, private: bool) -> str:
        """Make repository and branch where they do not exist. Returns the commit at the branch's head."""
        try:
            info = self.call(self.api.model_info, self.repo_id)
        except RepositoryNotFoundError:
            self.call(self.api.create_repo, self.repo_id, private=private or None, exist_ok=True, explain=True)
            info = self.call(self.api.model_info, self.repo_id, explain=True)
        if private and not info.private:
            raise UserError(f"--private: {self.repo_id} exists and is public; make it private in its settings first")
        try:
            return self.call(self.api.model_info, self.repo_id, revision=branch).sha
        except RevisionNotFoundError:
            self.call(self.api.create_branch, self.repo_id, branch=branch, exist_ok=True, explain=True)
            return self.call(self.api.model_info, self.repo_id, revision=branch, explain=True).sha

    def tree(self, commit_sha: str) -> dict[str, RepoFile]:
        """The files of a commit by path."""
        entries = self.call(
            lambda: list(self.api.list_repo_tree(self.repo_id, revision=commit_sha, recursive=True)), explain=True
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def page(self, sha: str, pull_request: int | None = None) -> _Done:
        url = f"{self.endpoint}/{self.repo_id}"
        if pull_request is None:
            return _Done(sha, f"{url}/commit/{sha}", None, sha)
        return _Done(sha, f"{url}/commit/{sha}", f"{url}/discussions/{pull_request}", f"refs/pr/{pull_request}")

    def open_pull_request(self, files: list[PushFile]) -> _Done | None:
        """The open pull request that proposes exactly these files, if there is one."""

        def open_ones() -> list[Discussion]:
            return list(
                self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open")
            )

        pulls = self.call(open_ones, explain=True)
        for pull in pulls:
            sha = self.call(self.api.model_info, self.repo_id, revision=f"refs/pr/{pull.num}", explain=True).sha
            if not _changes(files, self.tree(sha)):
                return self.page(sha, pull.num)
        return None

    def commit(
        self, files: list[PushFile], operations: list, branch: str, parent: str, create_pr: bool, message: str
    ) -> _Done:
        """Upload and commit. The client repeats a failed upload but not a failed commit, so that is done here.

        Naming the parent makes the repetition safe: the Hub refuses the commit if the branch has moved. When an answer
        is lost, the commit may have been made all the same; the branch's head, or the open pull requests, tell.
        """
        for delay in (*RETRY_DELAYS, None):
            try:
                done: CommitInfo = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=message,
                    revision=branch,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
                return _Done(done.oid, done.commit_url, done.pr_url, done.pr_revision or done.oid)
            except Exception as error:
                if not isinstance(error, (HTTPError, OSError, RuntimeError, ValueError)):
                    raise
                if not (_is_transient(error) or _status(error) == 412):
                    raise self.failure(error) from self.cause(error)
                landed = self.landed(files, branch, parent, create_pr)
                if landed is not None:
                    return landed
                if delay is None or not _is_transient(error):
                    raise self.failure(error) from self.cause(error)
                self.wait(error, delay)
        raise AssertionError("unreachable")

    def landed(self, files: list[PushFile], branch: str, parent: str, create_pr: bool) -> _Done | None:
        """The commit that holds these files although its answer was lost, if there is one."""
        if create_pr:
            return self.open_pull_request(files)
        sha = self.call(self.api.model_info, self.repo_id, revision=branch, explain=True).sha
        return None if sha == parent or _changes(files, self.tree(sha)) else self.page(sha)

    def call(self, function: Callable, *args, explain: bool = False, **kwargs):
        """Call the client, again after a while if the Hub was busy or the connection was lost.

        A missing repository or revision is raised as the client's own exception, for the caller to mend, unless
        `explain` is set.
        """
        for delay in (*RETRY_DELAYS, None):
            try:
                return function(*args, **kwargs)
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                if explain:
                    raise self.failure(error) from self.cause(error)
                raise
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                if delay is None or not _is_transient(error):
                    raise self.failure(error) from self.cause(error)
                self.wait(error, delay)
        raise AssertionError("unreachable")

    def wait(self, error: Exception, delay: float) -> None:
        response = getattr(error, "response", None)
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        delay = max(delay, min(float(asked), LONGEST_WAIT)) if asked.isdigit() else delay
        self.show(f"{self.reason(error)}; trying again in {delay:.0f} s")
        time.sleep(delay)

    def failure(self, error: BaseException) -> PushError:
        refused = _status(error) in (401, 403, 404)
        end = "nothing was pushed" if refused else "a push is one commit, whole or not at all, so pushing again is safe"
        return PushError(f"{self.reason(error)}; {end}")

    def cause(self, error: BaseException) -> BaseException | None:
        """The error to name as the cause: none when its text holds the token, which a traceback would print."""
        return None if self.token in f"{error!r} {error}" else error

    def reason(self, error: BaseException) -> str:
        """One line that says what went wrong and what mends it."""
        prefix = ""
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            prefix, error = f"{_one_line(error, self.token)} ", error.__cause__
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it to push"
        said = _one_line(getattr(error, "server_message", None) or "", self.token)
        said = f" ({said})" if said else ""
        match _status(error):
            case 401 if not isinstance(error, RepositoryNotFoundError):
                return (
                    f"{prefix}401: {self.endpoint} does not accept the token{said}; set HF_TOKEN or run `hf auth login`"
                )
            case 403:
                return f"{prefix}403: the token may not write to {self.repo_id}{said}"
            case 401 | 404 if isinstance(error, RepositoryNotFoundError):
                return f"{prefix}404: there is no repository {self.repo_id}, or the token may not see it{said}"
            case 412:
                return f"{prefix}412: somebody else changed {self.repo_id} meanwhile{said}"
            case 429:
                return f"{prefix}429: too many requests for {self.endpoint}{said}"
            case int(status):
                return f"{prefix}{status}: {self.endpoint} refused{said}"
        if isinstance(error, json.JSONDecodeError):
            return f"{prefix}{self.endpoint} gave an answer that is not JSON"
        if isinstance(error, HTTPError):
            said = _one_line(error, self.token) or type(error).__name__
            return f"{prefix}the connection to {self.endpoint} failed ({said})"
        return f"{prefix}{_one_line(error, self.token)}"


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later. Requests that the client itself repeats have had their chance."""
    if isinstance(error, json.JSONDecodeError):
        return True
    if not isinstance(error, HTTPError):
        return False
    # An HTTP error of the client forgets its own request: the answer still knows it.
    response = getattr(error, "response", None)
    request = error.request if response is None else response.request
    if any(part in request.url.path for part in ("/preupload/", ".git/info/lfs/")):
        return False
    status = _status(error)
    return status is None or status in RETRIED_STATUSES


def verify_push(
    run_dir: str | os.PathLike,
    result: PushResult,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> None:
    """Load what was pushed where this package does not exist, and compare it with the run's folder.

    A fresh process in an empty folder, with an empty cache and without this package, loads the configuration, the
    tokenizer and the model by every Auto class of `auto_map`, once from the Hub at the pushed commit and once from the
    folder. Weights that a head does not find in the checkpoint are drawn from the same seed. All tensors that the
    models return, and the tokens that `generate` returns where there is one, must agree.

    Args:
        run_dir (`str` or `os.PathLike`): the folder that was pushed.
        result ([`PushResult`]): what [`push_run`] returned.
        token (`str`, *optional*): token of the Hub, for a private repository.
        endpoint (`str`, *optional*): address of the Hub.
        show (`Callable[[str], None]`, *optional*): is given one line for each class.

    Raises:
        PushError: something cannot be loaded or differs; the message names it.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "repo_id": result.repo_id,
            "revision": result.revision,
            "commit": result.commit_sha,
            "run_dir": str(Path(run_dir).resolve()),
            "blocked": OUR_PACKAGES,
        }
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        functions = (
            _block_imports,
            _example_inputs,
            _largest_difference,
            _check_origin,
            _compare_model,
            _load_elsewhere,
        )
        script = "\n\n".join(inspect.getsource(function) for function in functions)
        Path(folder, "check.py").write_text(f"{script}\n\n_load_elsewhere()\n", encoding="utf-8")
        ours = re.compile(
            r"HF_(HOME|HUB_CACHE|HUB_OFFLINE|MODULES_CACHE|ASSETS_CACHE|TOKEN_PATH)|TRANSFORMERS_(CACHE|OFFLINE)"
        )
        environment = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
        environment |= {"HF_HOME": os.path.join(folder, "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["HF_ENDPOINT"] = endpoint or constants.ENDPOINT
        if token is not None:
            environment["HF_TOKEN"] = token
        child = subprocess.run(
            [sys.executable, "check.py"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        report = Path(folder, "report.jsonl")
        lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
    for entry in map(json.loads, lines):
        if not entry["ok"]:
            raise PushError(f"verification failed: {entry['name']}: {_one_line(entry['text'], token)}")
        show(f"{entry['name']}  ok  {entry['text']}".rstrip())
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise PushError(f"verification failed: the loading process stopped: {_one_line(last, token)}")


# The functions below run in the fresh process, which gets their source: they use nothing of this module.


def _block_imports(names):
    """Make these packages impossible to import, also where an editable install offers them."""
    import importlib.abc
    import sys

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} can be imported, so this would not show that the push is complete")


def _example_inputs(auto_class, model):
    """Token ids of shape (2, 12), the second sequence padded; (2, 3, 12) for multiple choice.

    A model that reads no tokens says itself what it can be given.
    """
    import torch

    config = model.config
    if getattr(config, "vocab_size", None) is None:
        return dict(model.dummy_inputs)
    length = min(12, getattr(config, "max_position_embeddings", None) or 12)
    generator = torch.Generator().manual_seed(0)

    def token_ids(*shape, vocab_size):
        return torch.randint(min(4, vocab_size - 1), vocab_size, shape, generator=generator)

    shape = (2, 3, length) if auto_class == "AutoModelForMultipleChoice" else (2, length)
    inputs = {"input_ids": token_ids(*shape, vocab_size=config.vocab_size)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, ..., -length // 3 :] = 0
    if config.is_encoder_decoder:
        decoder_vocab_size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
        inputs["decoder_input_ids"] = token_ids(2, max(2, length // 2), vocab_size=decoder_vocab_size)
    return inputs


def _largest_difference(left, right):
    """Largest absolute difference over all tensors of two model outputs; infinity when they are not alike."""
    import torch

    if torch.is_tensor(left) and torch.is_tensor(right):
        if left.shape != right.shape or left.dtype != right.dtype:
            return float("inf")
        # Equal infinities count as equal, NaN as different from everything.
        differences = torch.where(left == right, 0.0, (left.double() - right.double()).abs())
        return differences.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item() if left.numel() else 0.0
    if isinstance(left, dict):
        left, right = tuple(left.values()), tuple(right.values()) if isinstance(right, dict) else None
    if isinstance(left, (tuple, list)):
        if not isinstance(right, (tuple, list)) or len(left) != len(right):
            return float("inf")
        return max((_largest_difference(*pair) for pair in zip(left, right, strict=True)), default=0.0)
    return 0.0


def _check_origin(loaded, commit):
    """The class must come from the code beside the weights: of this commit, or of a folder where none is given."""
    module = type(loaded).__module__
    if not module.startswith("transformers_modules.") or commit not in module:
        expected = f"the code of commit {commit}" if commit else "the code in the folder"
        raise RuntimeError(f"{type(loaded).__name__} comes from {module}, not from {expected}")


def _compare_model(auto_class, job, saved_class):
    """Load by one Auto class from the Hub and from the folder; returns what to report, raises what is wrong."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(job["run_dir"], trust_remote_code=True)
    if auto_class == "AutoModelForSeq2SeqLM" and not config.is_encoder_decoder:
        return "left out: the run saved an encoder alone"
    loader, models, new = getattr(transformers, auto_class), [], []
    for source, arguments in ((job["repo_id"], {"revision": job["revision"]}), (job["run_dir"], {})):
        torch.manual_seed(0)
        model, info = loader.from_pretrained(
            source, trust_remote_code=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
        _check_origin(model, job["commit"] if source == job["repo_id"] else "")
        models.append(model.eval())
        # Another head than the saved one starts with weights of its own, also where the saved one uses the same name.
        new.append(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}))
    if new[0] != new[1]:
        raise RuntimeError(f"weights not found on the Hub: {new[0]}, in the folder: {new[1]}")
    if new[0] and (auto_class == "AutoModel" or type(models[0]).__name__ == saved_class):
        raise RuntimeError(f"the checkpoint does not hold {new[0]}")

    inputs = _example_inputs(auto_class, models[0])
    with torch.no_grad():
        outputs = [model(**inputs, use_cache=False) if model.can_generate() else model(**inputs) for model in models]
        difference = _largest_difference(*outputs)
        if not difference <= 1e-6:
            raise RuntimeError(f"the outputs differ by up to {difference}")
        text = f"max |difference| {difference}"
        if models[0].can_generate():
            source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            tokens = [model.generate(**source, max_new_tokens=8, do_sample=False, num_beams=1) for model in models]
            if not torch.equal(*tokens):
                raise RuntimeError("generate() returns other tokens")
            text += ", generate() equal"
    if new[0]:
        text += f", new weights from one seed: {', '.join(new[0])}"
    return text


def _load_elsewhere():
    """Check configuration, tokenizer and every Auto class; writes one line for each into report.jsonl."""
    import json
    import sys
    from functools import partial

    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    _block_imports(job["blocked"])
    from transformers import AutoConfig, AutoTokenizer

    def compare_config():
        config = AutoConfig.from_pretrained(job["repo_id"], revision=job["revision"], trust_remote_code=True)
        _check_origin(config, job["commit"])
        local = AutoConfig.from_pretrained(job["run_dir"], trust_remote_code=True)
        ignored = ("_name_or_path", "_commit_hash", "auto_map")
        pair = [{k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, local)]
        if pair[0] != pair[1]:
            different = sorted(k for k in {*pair[0], *pair[1]} if pair[0].get(k) != pair[1].get(k))
            raise RuntimeError(f"the configurations differ in {different}")
        return ""

    def compare_tokenizer():
        remote = AutoTokenizer.from_pretrained(job["repo_id"], revision=job["revision"], trust_remote_code=True)
        local = AutoTokenizer.from_pretrained(job["run_dir"], trust_remote_code=True)
        vocabulary = local.get_vocab()
        text = " ".join(sorted(vocabulary)[:256])
        if remote.get_vocab() != vocabulary or remote(text)["input_ids"] != local(text)["input_ids"]:
            raise RuntimeError("the tokenizers differ")
        if remote.special_tokens_map != local.special_tokens_map:
            raise RuntimeError("the special tokens differ")
        return f"{len(vocabulary)} tokens"

    with open(f"{job['run_dir']}/config.json", encoding="utf-8") as file:
        saved = json.load(file)
    saved_class = (saved.get("architectures") or [None])[0]
    checks = [("AutoConfig", compare_config)]
    if saved.get("vocab_size") is not None:
        checks.append(("AutoTokenizer", compare_tokenizer))
    for auto_class in saved["auto_map"]:
        if auto_class not in ("AutoConfig", "AutoTokenizer"):
            checks.append((auto_class, partial(_compare_model, auto_class, job, saved_class)))
    width = max(len(name) for name, _ in checks)
    with open("report.jsonl", "w", encoding="utf-8") as report:
        for name, check in checks:
            try:
                text, ok = check(), True
            except Exception as error:
                text, ok = f"{type(error).__name__}: {error}", False
            report.write(json.dumps({"name": name.ljust(width) if ok else name, "ok": ok, "text": text}) + "\n")
            report.flush()
            if not ok:
                sys.exit(1)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="push_to_hub.py",
        description="Put a finished run on the Hub, as one commit that anybody can load without this package.",
        epilog="The token comes from HF_TOKEN or from `hf auth login`.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="folder of the run, such as outputs/my-run")
    parser.add_argument("repo_id", metavar="USER/NAME", help="repository of the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="commit to this branch instead of main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    parser.add_argument("--dry-run", action="store_true", help="list what would leave, without any connection")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="afterwards load it by every Auto class in a fresh process without this package, and compare",
    )
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    parser.add_argument(
        "--debug", action="store_true", help="print the traceback of an error and the client's warnings"
    )
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    if not debug:
        hub_logging.set_verbosity_error()
    try:
        push_run(**arguments, show=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("push_to_hub.py: interrupted; a push is one commit, so pushing again is safe", file=sys.stderr)
        return 130
    except Exception as error:
        tokens = known_tokens(None)
        if debug:
            print(redact(traceback.format_exc(), *tokens), file=sys.stderr)
        expected = isinstance(error, (UserError, PushError))
        text = str(error) if expected else f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        print(f"push_to_hub.py: {_one_line(text, *tokens)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

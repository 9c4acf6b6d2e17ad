"""Loading a model and its tokenizer from a run folder, a model folder or the Hub, with every mistake in one line."""

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import hf_models  # noqa: F401 - registers our own architectures with the Auto classes

from .errors import UserError, one_line
from .hub import NO_PICKLES, PICKLED_WEIGHTS, into_cache
from .thought import baselines  # noqa: F401 - registers what the machines are compared with

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
# What the libraries raise for a folder, file or name that does not fit.
LOADING_ERRORS = (
    OSError,
    HTTPError,
    ValueError,
    ImportError,
    KeyError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


def saved_class(config: PreTrainedConfig) -> type:
    """The class that a configuration was saved with, or an Auto class that finds it.

    Args:
        config: as `AutoConfig` gives it. The first name in its `architectures` is looked up beside the configuration's
            own class, which serves the library's models and ours, and then in its `auto_map`, which serves models
            that bring their code.

    Returns:
        A class with `from_pretrained`; `AutoModel` if the configuration names no class that is known.
    """
    if not config.architectures:
        return AutoModel
    name = config.architectures[0]
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    found = getattr(package, name, None)
    if found is not None:
        return found
    for auto_name, reference in (getattr(config, "auto_map", None) or {}).items():
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            return getattr(transformers, auto_name, AutoModel)
    return AutoModel


def language_model_class(config: PreTrainedConfig) -> type:
    """The Auto class that loads a model of text with its language-model head, whatever head it was saved with."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def locate(name_or_path: str, option: str = "model") -> tuple[str, dict[str, Any]]:
    """Where `from_pretrained` finds a model: its first argument, and `gguf_file` for a file of that kind.

    Raises:
        UserError: for a file that does not exist, or a folder without `config.json`.
    """
    path = Path(name_or_path).expanduser()
    if not name_or_path:
        raise UserError(f"{option}: the name is empty; give a run folder, a model folder or a Hub id")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{option}: {path} does not exist")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        return name_or_path, {}
    if not (path / "config.json").is_file():
        checkpoints = [item for item in path.glob("checkpoint-*") if (item / "config.json").is_file()]
        last = max(checkpoints, key=lambda item: item.stat().st_mtime, default=None)
        hint = f"; its last checkpoint is {last}" if last else ""
        raise UserError(f"{option}: cannot load {name_or_path!r}: the folder holds no config.json{hint}")
    return str(path), {}


def pickled_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights as pickles alone."""
    safe = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return not safe and any(PICKLED_WEIGHTS.fullmatch(file.name) for file in folder.iterdir())


def source_options(
    name: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    trust_remote_code: bool = False,
    option: str = "model",
) -> dict[str, Any]:
    """What every `from_pretrained` of a command gets, so that a repository's files are there and its code runs only as
    the user said.

    Args:
        name: Hub id, or a folder.
        revision: branch, tag or commit on the Hub.
        weights: whether weights are needed, or the tokenizer alone.
        trust_remote_code: whether code that the repository brings may run, see [`load_model`].
        option: what the caller names the argument, for messages.

    Returns:
        Keyword arguments for `from_pretrained`: the revision, and whether code is trusted.

    Raises:
        UserError: if the Hub does not give the files, if code of the Hub is trusted without naming its revision, if the
            code lies in yet another repository, or if the weights are there as pickles alone.
    """
    is_folder = Path(name).is_dir()
    if trust_remote_code and not is_folder and revision is None:
        raise UserError(
            f"{option}: trust_remote_code runs the code that {name!r} brings; name the revision whose code you"
            " have read, such as a commit"
        )
    options = into_cache(name, revision, weights=weights, trust_remote_code=trust_remote_code, option=option)
    if weights and is_folder and pickled_weights(Path(name)):
        raise UserError(f"{option}: {NO_PICKLES.format(repr(name))}")
    if trust_remote_code:
        try:
            config = PreTrainedConfig.get_config_dict(name, **options)[0]
            maps = [config.get("auto_map"), get_tokenizer_config(name, **options).get("auto_map")]
        except LOADING_ERRORS as error:
            raise UserError(f"{option}: cannot load {name!r}: {one_line(error)[:300]}") from error
        for elsewhere in re.findall(r'"([^"]+)--', json.dumps(maps)):
            raise UserError(
                f"{option}: {name!r} takes its code from another repository, {elsewhere}, at a revision that nobody "
                "names; copy the code into a folder beside the weights, and load that"
            )
        if not is_folder:
            commit = config.get("_commit_hash")
            at = f"{revision} (commit {commit})" if commit and commit != revision else revision
            print(f"{option}: code of {name} may run, at revision {at}", file=sys.stderr)
    return {**options, "trust_remote_code": trust_remote_code}


def load_model(
    name_or_path: str,
    *,
    auto_class: type | Callable[[PreTrainedConfig], type] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    needs_tokenizer: bool = True,
    may_lack: Callable[[str], bool] | None = None,
    option: str = "model",
) -> tuple[PreTrainedModel, Tokenizer | None]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: run folder, model folder, `.gguf` file or Hub id.
        auto_class: class to load with, or a function that chooses one by the configuration, such as
            `language_model_class`; by default the class that the model was saved with, see `saved_class`.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code that the repository brings may run. For a Hub id the revision must be named,
            since the code of a branch can change between two runs; which one runs is printed to standard error.
        dtype: number format of the weights; by default the saved one.
        device: where the model goes; by default an accelerator if there is one.
        device_map: how accelerate spreads the model over devices, for instance `"auto"`, in place of `device`.
        attn_implementation: attention kernel, for instance `"eager"`; by default the library's choice.
        needs_tokenizer: whether a missing tokenizer is a mistake. If not, it is `None` where there is none.
        may_lack: by its name, whether a tensor may be absent from the files, so that it keeps random values; by default
            none may.
        option: what the caller names the argument, for messages.

    Raises:
        UserError: in one line, whatever goes wrong: no such model, no access, no network, code that is not trusted,
            files that do not fit or lack a tensor, no tokenizer, no such device.
    """
    name, options = locate(name_or_path, option)
    is_folder = Path(name).is_dir()
    is_gguf = bool(options)
    options |= source_options(name, revision, weights=not is_gguf, trust_remote_code=trust_remote_code, option=option)
    model_options: dict[str, Any] = {} if is_gguf else {"use_safetensors": True}
    if dtype is not None:
        model_options["dtype"] = dtype
    if attn_implementation is not None:
        model_options["attn_implementation"] = attn_implementation
    if device_map is not None:
        model_options["device_map"] = device_map
    try:
        config = AutoConfig.from_pretrained(name, **options)
        loader: Any = auto_class or saved_class
        loader = loader if hasattr(loader, "from_pretrained") else loader(config)
        model, loaded = loader.from_pretrained(name, **options, **model_options, output_loading_info=True)
    except LOADING_ERRORS as error:
        source = "" if is_folder else "there is no such folder, and as a Hub id: "
        reason = one_line(error)[:300]
        if "trust_remote_code" in str(error):
            source, reason = "", "it brings code of its own, which runs only with trust_remote_code"
        raise UserError(f"{option}: cannot load {name_or_path!r}: {source}{reason}") from error
    lacking = sorted(key for key in loaded["missing_keys"] if may_lack is None or not may_lack(key))
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{option}: the weights of {name_or_path!r} lack {lacking[0]}{more}, which a {type(model).__name__} has; "
            "random values would stand in for them"
        )
    tokenizer = None
    if needs_tokenizer or not is_folder or any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except (*LOADING_ERRORS, AttributeError, TypeError) as error:
            if needs_tokenizer or is_folder:
                message = f"{option}: cannot load the tokenizer of {name_or_path!r}: {one_line(error)[:300]}"
                raise UserError(message) from error
    if device_map is not None:
        return model.eval(), tokenizer
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or "cpu"
    try:
        return model.to(device).eval(), tokenizer
    except RuntimeError as error:
        raise UserError(f"--device: cannot put the model on {device}: {one_line(error)[:200]}") from error

"""Repositories of the Hub: brought into the cache whole or refused in one line, and never waited for without end."""

import functools
import re
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, set_client_factory, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # the ancestor of error answers and lost connections alike, whichever HTTP library the client uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from .errors import UserError, one_line
from .redaction import known_tokens, redact

# Files of a repository that `from_pretrained` reads beside the weights and the code.
READ_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".spm")
PICKLED_WEIGHTS = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
NO_PICKLES = (
    "the weights of {} are pickles (pytorch_model.bin), which can hold code; they are read as model.safetensors only: "
    "convert them with save_pretrained of a program that you trust with them"
)
LONGEST_SILENCE = 60.0  # seconds without a byte, after which a connection counts as lost


@functools.cache
def limit_silence() -> None:
    """Give every request of the Hub's client a time limit; most have none of their own, and would wait for ever."""

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            part: min(limits.get(part) or LONGEST_SILENCE, LONGEST_SILENCE)
            for part in ("connect", "read", "write", "pool")
        }

    def make_client() -> Any:
        client = default_client_factory()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
        return client

    set_client_factory(make_client)


def into_cache(
    name: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    trust_remote_code: bool = False,
    option: str = "model",
) -> dict[str, Any]:
    """Bring what loading reads from a Hub repository into the cache; the revision with which it is read there.

    Left to itself, `from_pretrained` takes an optional file that the Hub does not give at the moment for one that does
    not exist: the tokenizer loses its settings, the model those of generation, and nothing is said. Here the files are
    listed and each must arrive; the client repeats requests that a busy Hub refused.

    Args:
        name: Hub id, or a folder, which is left as it is.
        revision: branch, tag or commit.
        weights: whether weights are needed, or the tokenizer alone.
        trust_remote_code: whether code is needed too.
        option: what the caller names the argument, for messages.

    Returns:
        Keyword arguments for `from_pretrained`: the commit, if the Hub could be asked. If not, the copy in the cache,
        and a line on standard error says so. For a name that the Hub does not know, or without network by the user's
        own wish (`HF_HUB_OFFLINE`), the revision as given: `from_pretrained` has the words for that.

    Raises:
        UserError: if the Hub answers with an error or the connection fails, and the cache has no copy; and for weights
            that are there as pickles alone.
    """
    if Path(name).is_dir():
        return {"revision": revision}
    limit_silence()
    try:
        info = HfApi().model_info(name, revision=revision)
    except (HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError):
        return {"revision": revision}
    except (HTTPError, OSError) as error:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            raise UserError(f"{option}: the Hub does not give {name!r} at the moment: {_refusal(error)}") from error
        print(f"{option}: the Hub does not answer ({_refusal(error)}): {name} is read from the cache", file=sys.stderr)
        return {"revision": revision, "local_files_only": True}
    names = [file.rfilename for file in info.siblings or ()]
    read = [file for file in names if file.endswith(READ_SUFFIXES) and "/" not in file]
    read += [file for file in names if file.endswith(".py") and trust_remote_code]
    if weights:
        safe = [file for file in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file)]
        if not safe and any(PICKLED_WEIGHTS.fullmatch(file) for file in names):
            raise UserError(f"{option}: {NO_PICKLES.format(repr(name))}")
        read += safe
    # The configuration comes last and by its branch: a later command that finds it in the cache finds all the others.
    last = ["config.json"] if "config.json" in read else []
    try:
        for file in read:
            if file not in last:
                hf_hub_download(name, file, revision=info.sha)
        for file in last:
            hf_hub_download(name, file, revision=revision)
    except RepositoryNotFoundError:
        return {"revision": revision}
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{option}: the Hub does not give {file} of {name!r} at the moment: {_refusal(error)}"
        ) from error
    return {"revision": info.sha}


def _refusal(error: BaseException) -> str:
    """In a few words what the Hub answered, or what became of the connection, without a token it may have repeated."""
    if getattr(error, "response", None) is None and isinstance(error.__cause__, (HTTPError, OSError)):
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        return redact(one_line(error), *known_tokens())[:200]
    phrases = {status.value: f" {status.phrase}" for status in HTTPStatus}
    return f"{response.status_code}{phrases.get(response.status_code, '')}"

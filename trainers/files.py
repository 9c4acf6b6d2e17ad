"""Writing files so that nothing half-written is ever seen, and knowing later that they are still what was written."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError

CHECKSUMS_NAME = "checksums.json"
LOCK_NAME = ".lock"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path aside to write to; renamed to `path` when the block ends well, deleted when it does not.

    A reader sees the old file or the whole new one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        with writing_to(path):
            yield aside
            os.chmod(aside, 0o644)
            with aside.open("rb") as file:
                os.fsync(file.fileno())  # a file that has its name is whole, also after a power cut
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, below: bool = False) -> None:
    """Delete what a killed process was writing aside in a folder, see [`replacing`]. Nobody may be at work there.

    Args:
        folder: may be missing.
        below: look into its folders, too.
    """
    for path in folder.rglob(".*") if below else folder.glob(".*"):
        found = re.fullmatch(r"\..+(?P<suffix>\.\w+)\.[a-z0-9_]{8}(?P=suffix)", path.name)
        if found is not None:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Let what fails because a file cannot be written fail like Python's `open`, whichever library writes.

    Args:
        place: the file or folder that is written.

    Raises:
        OSError: with the name of a file, at least `place`, and with the system's reason if the library tells it, else
            with the one that is most likely.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(place)
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers
        if told is not None:
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(place)) from error
        words = "inline_container|PytorchStreamWriter|iostream error"  # torch, by how many bytes were missing
        if isinstance(error, RuntimeError) and re.search(words, str(error)):
            reason = "a file was not written to its end; is the disk full?"
            raise OSError(errno.ENOSPC, reason, str(place)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text aside, then rename; see [`replacing`]."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write a file of JSON lines, see [`json_line`]."""
    write_text(path, "".join(map(json_line, records)))


def read_records(path: Path) -> list[Any]:
    """The records of a file of JSON lines.

    Raises:
        OSError: if it cannot be read.
        ValueError: if a line is no JSON, or the file no UTF-8.
    """
    # Not splitlines: a string in JSON may hold a line separator that str.splitlines would break at.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Note the SHA-256 of files in `checksums.json` of their folder, beside those that are noted there already."""
    noted = folder / CHECKSUMS_NAME
    sums = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    write_text(noted, json_text(sums | {path.name: _sha256(path) for path in sorted(files)}))


def damaged_file(folder: Path) -> str | None:
    """The name of a file that is no longer what `checksums.json` of its folder notes, or `None` if all are.

    A folder without notes has none to break.
    """
    try:
        sums = json.loads((folder / CHECKSUMS_NAME).read_text(encoding="utf-8"))
        damaged = (name for name, noted in sums.items() if _sha256(folder / name) != noted)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return CHECKSUMS_NAME
    try:
        return next(damaged, None)
    except OSError as error:
        return Path(error.filename).name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def only_user_of(folder: Path) -> Iterator[None]:
    """Keep other processes that ask the same out of a folder. The system frees it if this process is killed.

    What a killed process was writing there is deleted first.

    Raises:
        UserError: if another process holds it.
    """
    lock = FileLock(folder / LOCK_NAME, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another process is at work in this folder; wait for it, or choose another"
        ) from None
    try:
        remove_leftovers(folder)
        yield
    finally:
        # Removed while it is held, so that nobody can wait at a file that is gone.
        (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()


def json_text(value: Any) -> str:
    """A value as indented JSON. JSON has no infinity and no NaN: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """A value as JSON on one line that ends in a line break; a number that is not finite becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Work that is killed between two operations on files, chosen by their number."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MAKING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.copyfile")


class End(NamedTuple):
    """How a copy of this process ended.

    Attributes:
        signal: the signal that ended it, or 0.
        code: what the work returned; 99 if it raised.
        operations: number of operations on files that the work had begun.
        errors: what it wrote to standard error.
    """

    signal: int
    code: int
    operations: int
    errors: str


def in_a_copy(work: Callable[[], Any], folder: Path, kill_at: int = 0) -> End:
    """Do work in a copy of this process, and kill that just before an operation on a file below a folder.

    Args:
        work: returns an exit code, or nothing.
        folder: what is changed below it counts.
        kill_at: the operation's number, from 1; 0 lets the work end.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as count:
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            operations = 0

            def watch(event: str, arguments: tuple) -> None:
                nonlocal operations
                opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & MAKING
                if not opened and event not in CHANGES:
                    return
                path = arguments[0]
                if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # relative to an open folder
                    path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
                if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(str(folder)):
                    operations += 1
                    if operations == kill_at:
                        os.kill(os.getpid(), 9)

            sys.addaudithook(watch)
            code = 99
            try:
                code = int(work() or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os.write(count.fileno(), str(operations).encode())
                os._exit(code)
        _, status = os.waitpid(process, 0)
        errors.seek(0)
        count.seek(0)
        killed = os.WIFSIGNALED(status)
        return End(
            os.WTERMSIG(status) if killed else 0,
            -1 if killed else os.WEXITSTATUS(status),
            int(count.read() or 0),
            errors.read().decode(errors="replace"),
        )

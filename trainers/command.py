"""What all commands do alike: read a command line, and turn what ends them into a line and an exit code."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from .errors import UserError, one_line


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes no abbreviations and whose errors are `UserError`s."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str):
        raise UserError(message)


def explain(error: BaseException, batch_option: str = "--batch_size") -> str:
    """One line about what ended a command: a mistake in what it was given, a file, or the device's memory.

    Args:
        error: what was raised.
        batch_option: what a user makes smaller to need less memory.
    """
    if isinstance(error, UserError):
        return str(error)
    message = one_line(error)
    if isinstance(error, OSError) and error.strerror is not None:
        message = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    elif isinstance(error, torch.OutOfMemoryError):
        message = f"{batch_option}: too large for the device's memory: {message}"
    return str(UserError(message))


def run_command(
    work: Callable[[], int],
    *,
    after_interrupt: str = "",
    batch_option: str = "--batch_size",
    debug: bool = False,
) -> int:
    """Call the work of a command, and tell in one line what ended it.

    Under a launcher a `UserError` is met by every process alike, and the first one tells; other errors are told by each
    process that meets them.

    Args:
        work: reads the command line and does what it says. Returns the exit code.
        after_interrupt: what a user who pressed Ctrl-C may want to know.
        batch_option: as for [`explain`].
        debug: let errors through, for their traceback.

    Returns:
        What `work` returned; 2 for a mistake the user can mend, 130 for Ctrl-C.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\ninterrupted{'; ' if after_interrupt else ''}{after_interrupt}", file=sys.stderr)
        return 130
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        if debug:
            raise
        if int(os.environ.get("RANK") or 0) == 0 or not isinstance(error, UserError):
            print(f"error: {explain(error, batch_option)}", file=sys.stderr)
        return 2

"""What all commands do alike: read a command line, and turn what ends them into a line and an exit code."""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import dataloader

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
        # A process that loads data hands an error on with its whole traceback as the message.
        return re.sub(r"^Caught .* in DataLoader worker process \d+\..*UserError: ", "", str(error)).removesuffix("\\n")
    message = one_line(error)
    if is_dead_worker(error):
        message = (
            "a process that loads data (training.dataloader_num_workers) ended, perhaps for want of memory; --resume "
            f"goes on from the last checkpoint: {message}"
        )
    elif isinstance(error, OSError) and error.strerror is not None:
        place = error.filename if error.filename2 is None else error.filename2  # of a copy, where it goes
        message = ": ".join(str(part) for part in (place, error.strerror) if part is not None)
    elif isinstance(error, torch.OutOfMemoryError):
        message = f"{batch_option}: too large for the device's memory: {message}"
    return str(UserError(message))


def is_told(error: BaseException) -> bool:
    """Whether what ended a command is the user's or the machine's doing, for one line, and no bug of ours."""
    return isinstance(error, UserError | OSError | torch.OutOfMemoryError) or is_dead_worker(error)


def is_dead_worker(error: BaseException) -> bool:
    """Whether a process that loads data ended unasked; torch has no class of its own for that."""
    if isinstance(error, RuntimeError):
        return re.match(r"DataLoader worker \(pid", str(error)) is not None
    # It may also end while it hands its data over.
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, ConnectionError | EOFError) and any(
        code.co_filename == dataloader.__file__ and code.co_name == "_try_get_data" for code in frames
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Treat the signal that ends a process politely like Ctrl-C: what is under way is tidied up, and a line says so."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interruptible_alone() -> contextlib.AbstractContextManager[None]:
    """[`interruptible`], but for one of several processes nothing.

    A process that waits for the others in a collective operation would not hear the signal; it had better end at once.
    """
    return interruptible() if int(os.environ.get("WORLD_SIZE") or 1) == 1 else contextlib.nullcontext()


def print_anything() -> None:
    """Let standard output show escaped what its encoding lacks, as standard error does, instead of failing."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


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
        What `work` returned; 2 for a mistake the user can mend, 130 for Ctrl-C or SIGTERM.
    """
    print_anything()
    try:
        with interruptible_alone():
            return work()
    except KeyboardInterrupt:
        print(f"\ninterrupted{'; ' if after_interrupt else ''}{after_interrupt}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not is_told(error):
            raise
        if int(os.environ.get("RANK") or 0) == 0 or not isinstance(error, UserError):
            print(f"error: {explain(error, batch_option)}", file=sys.stderr)
        return 2

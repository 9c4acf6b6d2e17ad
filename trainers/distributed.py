"""What the processes of one run decide together, so that none goes on, or waits, alone."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import UserError, one_line

T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the main process alone and give its result to all. No process returns before it has ended.

    Args:
        function: what touches files, or decides by their state; its result must be picklable.

    Raises:
        UserError: on every process, if the function raises it. Any other exception is raised on the main process, and
            a `UserError` that repeats it on the others, which would wait for ever otherwise.
    """
    outcome: list[Any] = [None, None]
    cause: Exception | None = None
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            cause, outcome[1] = error, one_line(error)
    broadcast_object_list(outcome)
    result, mistake = outcome
    if mistake is not None:
        raise cause or UserError(mistake)
    return result


def on_every_process(function: Callable[[], T]) -> T:
    """Call a function on every process; a mistake that one of them meets ends all of them.

    Args:
        function: holds no collective operation, so that a process that fails in it leaves no other waiting.

    Raises:
        UserError: on every process, the first one's, if the function raises it anywhere. Any other exception is raised
            where it is met, and a `UserError` that repeats it elsewhere.
    """
    result: Any = None
    cause: Exception | None = None
    try:
        result = function()
    except Exception as error:
        cause = error
    mistakes = gather_object([None if cause is None else one_line(cause)])
    first = next((mistake for mistake in mistakes if mistake is not None), None)
    if first is not None:
        raise cause or UserError(first)
    return result

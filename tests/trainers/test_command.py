"""What every command does alike: one line and an exit code, whatever ends it."""

from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader

from trainers.command import CommandParser, run_command
from trainers.errors import UserError


def ending(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("--limit is 0; it must be at least 1"), 2, "error: --limit is 0; it must be at least 1"),
        (OSError(28, "No space left on device", "weights"), 2, "error: weights: No space left on device"),
        (torch.OutOfMemoryError("tried 1 GiB\nmore"), 2, "error: --batch_size: too large for the device's memory"),
        (KeyboardInterrupt(), 130, "interrupted; go on"),
    ],
)
def test_what_ends_a_command_is_told_in_one_line(capsys, error, code, shown):
    assert run_command(ending(error), after_interrupt="go on") == code
    told = capsys.readouterr().err.strip()
    assert told.startswith(shown)
    assert "\n" not in told


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_process_that_dies_while_it_hands_data_over(capsys, broken):
    """The connection to it breaks, which is another error than that it is gone."""
    loader = iter(DataLoader(range(4), num_workers=1))

    def work() -> None:
        with mock.patch.object(loader._data_queue, "get", side_effect=broken):
            next(loader)

    assert run_command(work) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: a process that loads data (training.dataloader_num_workers) ended")
    assert run_command(ending(ConnectionResetError(104, "Connection reset by peer"))) == 2
    assert capsys.readouterr().err.strip() == "error: Connection reset by peer"


def test_the_code_of_the_work_is_returned():
    assert run_command(lambda: 1) == 1


def test_debug_lets_errors_through():
    with pytest.raises(UserError, match="wrong"):
        run_command(ending(UserError("wrong")), debug=True)


def test_one_process_of_many_tells_of_a_mistake_and_each_of_its_own_trouble(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_command(ending(UserError("wrong"))) == 2
    assert capsys.readouterr().err == ""
    assert run_command(ending(OSError(28, "No space left on device", "weights"))) == 2
    assert "No space left" in capsys.readouterr().err


def test_a_parser_takes_no_abbreviation_and_raises(capsys):
    parser = CommandParser(prog="test")
    parser.add_argument("--output_dir")
    with pytest.raises(UserError, match="--output"):
        parser.parse_args(["--output", "x"])
    assert capsys.readouterr().err == ""

"""What processes decide together, on one of them; `test_distributed.py` has two."""

import pytest

from trainers.distributed import on_every_process, on_main_process
from trainers.errors import UserError


@pytest.mark.parametrize("together", [on_main_process, on_every_process])
def test_the_process_that_fails_raises_what_it_met(together):
    for error in (UserError("wrong"), OSError(28, "No space left on device"), KeyError("bug")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            together(fail)
        assert raised.value is error
    assert together(lambda: 3) == 3

"""Forward pass, loss and gradients of every class stay on the device of the model, eager and sdpa."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf_models.pretended_gpu import DEVICE, SUITES, Forgetful

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    f"{suite.__name__} {model_class.__name__} {implementation}"
    for suite in SUITES
    for model_class in suite.classes
    for implementation in ("eager", "sdpa")
]


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """What became of every training step on the pretended GPU: nothing to tell, or an error."""
    command = [sys.executable, "-m", "tests.hf_models.pretended_gpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_training_step_mixes_no_devices(found, case):
    assert found[case] is None


def test_tensor_left_on_the_cpu_is_noticed(found):
    errors = [error for name, error in found.items() if name.startswith(Forgetful.__name__)]
    assert len(errors) == 2
    # torch's words for it differ from version to version
    assert all("two" in error and "devices" in error and DEVICE in error and "cpu" in error for error in errors)

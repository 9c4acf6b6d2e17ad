"""The session set-up keeps its promises: no network, a private cache, and no skip unseen."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests import skips

ROOT = Path(__file__).parent.parent


def test_caches_are_private_and_offline():
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert os.environ["HF_HOME"] == huggingface_hub.constants.HF_HOME
    assert Path(os.environ["HF_HOME"]).name.startswith("hf-home-")


@pytest.mark.parametrize(
    "reach",
    [
        # 192.0.2.0/24 is reserved for documentation: no host answers there.
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect_ex(("192.0.2.1", 80)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53)),
        lambda: socket.getaddrinfo("huggingface.co", 443),
    ],
    ids=["connect", "connect_ex", "sendto", "getaddrinfo"],
)
def test_network_is_refused(reach, no_network):
    with pytest.raises(RuntimeError, match="loopback interface only"):
        reach()
    assert len(no_network) == 1
    no_network.clear()


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            with socket.create_connection((host, server.getsockname()[1]), timeout=10):
                server.accept()[0].close()


@pytest.mark.parametrize("processes", [0, 2])
def test_outcomes_of_a_run(tmp_path, processes):
    (tmp_path / "test_sample.py").write_text(
        f"""
import socket
import pytest

def test_permitted_skip():
    pytest.skip({skips.NO_CUDA!r})

@pytest.mark.skipif(True, reason={skips.NO_CUDA!r})
def test_permitted_mark():
    pass

def test_unlisted_skip():
    pytest.skip("some other reason")

@pytest.mark.xfail(reason="known to fail")
def test_unlisted_expected_failure():
    assert False

def test_swallowed_network_access():
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    except RuntimeError:
        pass

class TestArchitecture:
    not_applicable = {{"test_declared": "it has no such part"}}

    @classmethod
    def declarations(cls):
        return {{f"{{cls.__name__}}: {{name}}": reason for name, reason in cls.not_applicable.items()}}

    def test_declared(self):
        assert False

@pytest.fixture(scope="module")
def made():
    with open("made", "a") as file:
        file.write("x")

@pytest.mark.parametrize("number", range(20))
def test_shares_a_fixture(made, number):
    pass
"""
    )
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--tb=short"]
    run = subprocess.run(
        [
            *command,
            f"-n{processes}",
            "--dist=loadscope",
            "--continue-on-collection-errors",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    for line in (
        "test_unlisted_skip was skipped for a reason that tests/skips.py does not list: 'some other reason'",
        "test_unlisted_expected_failure was skipped for a reason that tests/skips.py does not list: 'known to fail'",
        "test_module.py was skipped for a reason that tests/skips.py does not list",
        "the test reached for the network: 192.0.2.1",
        "TestArchitecture: test_declared: it has no such part",
    ):
        assert line in run.stdout, run.stdout
    summary = run.stdout.strip().splitlines()[-1]
    for count in ("2 failed", "21 passed", "2 skipped", "2 errors", *(["1 deselected"] if not processes else [])):
        assert count in summary, run.stdout
    assert (tmp_path / "made").read_text() == "x"

"""Session set-up: no network, private caches, one thread, and no test left out unseen.

* The Hugging Face libraries read their settings when they are imported, so the settings are made here, before any
  test module is. `HF_HOME` is an empty temporary folder and `HF_HUB_OFFLINE` is set; a test that talks to a Hub server
  on the loopback interface does so in a child process with settings of its own.
* A socket to anything but the loopback interface is refused, and the test that tried it fails even if the error was
  swallowed on the way.
* A skip or an expected failure whose reason is not listed in `skips.py` counts as a failure.
* Checks of the shared model tests which an architecture declares as not applicable are taken out of the run and
  printed in one list at its end.
"""

import atexit
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests import skips

if "huggingface_hub" in sys.modules:
    raise pytest.UsageError(
        "huggingface_hub was imported before tests/conftest.py could set HF_HOME and HF_HUB_OFFLINE"
    )

_hf_home = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, _hf_home, ignore_errors=True)
for _name in [
    name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_"))
]:
    del os.environ[_name]
os.environ.update(
    HF_HOME=_hf_home,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
)
# Children inherit it; more threads only cost time on models this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# The same examples in every run; `--hypothesis-profile default` draws others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
pytest.register_assert_rewrite("tests.hf_models.model_tests")


class NetworkAccessError(RuntimeError):
    """A test reached for the network."""


_refused: list[str] = []
_connect, _connect_ex, _sendto = socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto
_getaddrinfo = socket.getaddrinfo


def _is_local(host: str | bytes | None) -> bool:
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else host
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        return False


def _require_local(host: str | bytes | None) -> None:
    if not _is_local(host):
        _refused.append(str(host))
        raise NetworkAccessError(f"tests may use the loopback interface only, not {host!r}")


def _require_local_address(connection: socket.socket, address: object) -> None:
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        _require_local(address[0])  # type: ignore[index]


def _guarded_connect(self, address):
    _require_local_address(self, address)
    return _connect(self, address)


def _guarded_connect_ex(self, address):
    _require_local_address(self, address)
    return _connect_ex(self, address)


def _guarded_sendto(self, data, *arguments):
    _require_local_address(self, arguments[-1])
    return _sendto(self, data, *arguments)


def _guarded_getaddrinfo(host, *arguments, **keywords):
    _require_local(host)
    return _getaddrinfo(host, *arguments, **keywords)


def pytest_configure(config: pytest.Config) -> None:
    socket.socket.connect = _guarded_connect
    socket.socket.connect_ex = _guarded_connect_ex
    socket.socket.sendto = _guarded_sendto
    socket.getaddrinfo = _guarded_getaddrinfo


def pytest_unconfigure(config: pytest.Config) -> None:
    socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto = _connect, _connect_ex, _sendto
    socket.getaddrinfo = _getaddrinfo


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """Fails the test that reached for a host outside the loopback interface. Yields the hosts refused so far."""
    _refused.clear()
    yield _refused
    assert not _refused, f"the test reached for the network: {', '.join(_refused)}"


def _refuse_unlisted_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped:
        return
    reason = getattr(report, "wasxfail", None)
    if reason is None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ").removeprefix("reason: ")
    if reason not in skips.PERMITTED:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped for a reason that tests/skips.py does not list: {reason!r}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    _refuse_unlisted_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    _refuse_unlisted_skip(report)
    return report


_declarations = pytest.StashKey[dict[str, str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    declared = config.stash.setdefault(_declarations, {})
    kept, left_out = [], []
    for item in items:
        test_class = getattr(item, "cls", None)
        if not hasattr(test_class, "declarations"):
            kept.append(item)
            continue
        declared.update(test_class.declarations())
        known = test_class.not_applicable
        (left_out if item.name in known or item.originalname in known else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A process of pytest-xdist ends: what it collected is told by the one that holds the terminal."""
    declared = node.config.stash.setdefault(_declarations, {})
    declared.update(getattr(node, "workeroutput", {}).get("declarations", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["declarations"] = session.config.stash.get(_declarations, {})


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    declared = config.stash.get(_declarations, {})
    if declared:
        terminalreporter.section("declared not applicable")
        for what, reason in sorted(declared.items()):
            terminalreporter.line(f"{what}: {reason}")

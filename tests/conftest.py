"""What all tests share: a place of their own to run in, coordinators, and the check that nothing is left behind."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import settings

from coordinator_process import CoordinatorProcess, Serve
from leftovers import MARK, left_behind, unused_shared_memory

# A loaded machine is no failure, and no examples are kept in the checkout.
settings.register_profile("suite", deadline=None, database=None)
settings.load_profile("suite")

_shared_memory_before: Final = pytest.StashKey[set[str]]()


@pytest.fixture
def endpoint() -> Iterator[str]:
    """The path of an endpoint that is not there yet. It is short: a socket's path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="e-") as directory:
        yield os.path.join(directory, "endpoint")


@pytest.fixture
def serve(endpoint: str) -> Iterator[Serve]:
    """A function that starts a coordinator, at `endpoint` unless told otherwise. All end with the test."""
    started: list[CoordinatorProcess] = []
    own_endpoint = endpoint

    def start(*options: str, endpoint: str | None = None, size: str = "4MiB") -> CoordinatorProcess:
        started.append(CoordinatorProcess(endpoint or own_endpoint, "--size", size, "--debug", *options))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for coordinator in started:
        coordinator.close()


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP, and all children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if hasattr(config, "workerinput"):
        return  # a worker has all this from the process that started it
    root = tempfile.mkdtemp(prefix="dax-mp-tests-")
    os.mkdir(f"{root}/runtime", 0o700)
    os.environ[MARK] = os.environ["TMPDIR"] = tempfile.tempdir = root
    os.environ["XDG_RUNTIME_DIR"] = f"{root}/runtime"
    os.environ["PYTHONSAFEPATH"] = "1"  # a child that is started in the checkout imports what we import
    os.environ.pop("DAX_MP_ENDPOINT", None)
    config.stash[_shared_memory_before] = unused_shared_memory()


@pytest.hookimpl(trylast=True)  # the workers have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    _end_multiprocessing()
    left = left_behind(os.environ[MARK], session.config.stash[_shared_memory_before])
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        _report_error(session.config, "\n".join(left))


def _end_multiprocessing() -> None:
    """Where tests ran in this very process: what multiprocessing keeps until that ends is not left by the tests."""
    from multiprocessing import forkserver, resource_tracker, util

    for server in (forkserver, resource_tracker):
        vars(server)[f"_{server.__name__.rpartition('.')[2]}"]._stop()
    vars(util)["_run_finalizers"]()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[MARK], ignore_errors=True)


def _report_error(config: pytest.Config, text: str) -> None:
    """Show it as an error of the run, counted in the last line too."""
    name = "nothing is left behind"
    report = pytest.TestReport(name, ("tests/conftest.py", None, name), {}, "failed", text, "teardown")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None, "without pytest's terminal plugin nobody sees what is left"
    reporter.stats.setdefault("error", []).append(report)

"""Coordinators, sessions and other processes for the tests of the client library."""

from collections.abc import Iterator

import pytest

import dax_mp
from command_line import CommandLine
from dax_mp.clients import shared_session as session_module
from script_process import Script, ScriptProcess


@pytest.fixture(scope="session")
def daemon() -> Iterator[dax_mp.Daemon]:
    """One coordinator for all tests of a worker; what they do to it must not matter to the next."""
    with dax_mp.launch(size="64MiB", debug=True) as daemon:
        yield daemon


@pytest.fixture
def session(daemon: dax_mp.Daemon) -> Iterator[dax_mp.Session]:
    """A session at `daemon`, without any file at first."""
    with dax_mp.connect(daemon.endpoint) as session:
        for name in session.listdir():
            session.unlink(name)
        yield session


@pytest.fixture
def command(session: dax_mp.Session) -> CommandLine:
    """The command line at the coordinator of `session`, which has no file at first."""
    return CommandLine(session.endpoint)


@pytest.fixture(autouse=True)
def no_shared_session_outlives_a_test() -> Iterator[None]:
    """Others count the sessions that there are."""
    yield
    shared = vars(session_module)["_shared"]
    while shared:
        shared.popitem()[1].close()


@pytest.fixture
def script() -> Iterator[Script]:
    """A function that starts a ScriptProcess. All end with the test."""
    started: list[ScriptProcess] = []

    def start(text: str, *arguments: str) -> ScriptProcess:
        started.append(ScriptProcess(text, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.close()

"""Sessions and files go to other processes by name."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

import dax_mp
from coordinator_process import Serve
from dax_mp.clients.shared_session import shared_session
from script_process import Script


def test_a_session_pickles_as_the_shared_session_of_its_endpoint(session: dax_mp.Session) -> None:
    copies = [pickle.loads(pickle.dumps(session)) for _ in range(2)]
    assert copies[0] is copies[1] is shared_session(session.endpoint)
    assert copies[0] is not session
    assert copies[0].endpoint == session.endpoint
    dax_mp.connect(session.endpoint).close()
    assert not copies[0].closed


def test_a_shared_session_is_made_anew(session: dax_mp.Session, serve: Serve) -> None:
    first = shared_session(session.endpoint)
    first.close()
    second = shared_session(session.endpoint)
    assert second is not first
    assert second.listdir() == []
    coordinator = serve()
    at_other = shared_session(coordinator.endpoint)
    assert at_other is not second
    assert shared_session(session.endpoint) is second
    coordinator.end()
    serve()
    assert at_other.counters() is not None
    while at_other.usable:  # its pager hears of the end in its own time
        pass
    assert shared_session(coordinator.endpoint).listdir() == []
    at_other.close()
    shared_session(coordinator.endpoint).close()


def test_threads_get_one_shared_session(session: dax_mp.Session) -> None:
    shared_session(session.endpoint).close()
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(shared_session, [session.endpoint] * 32))) == 1


def test_a_shared_session_of_nowhere(endpoint: str) -> None:
    with pytest.raises(dax_mp.errors.NoCoordinatorError):
        shared_session(endpoint)


@pytest.mark.parametrize("mode", ["r", "r+", "w", "w+", "x", "x+", "a", "a+"])
def test_a_file_is_opened_anew(session: dax_mp.Session, mode: str) -> None:
    """At its position, with its mode, and without truncating or creating again."""
    if mode[0] == "r":
        session.open("file", "x").close()
    with session.open("file", mode) as file, session.open("file", "r+") as writer:
        writer.write(b"0123456789")
        file.seek(4)
        with pickle.loads(pickle.dumps(file)) as other, copy.copy(file) as third:
            for again in (other, third):
                assert isinstance(again, dax_mp.DaxFile)
                assert (again.name, again.mode, again.tell(), again.size) == ("file", file.mode, 4, 10)
                assert (again.readable(), again.writable()) == (file.readable(), file.writable())
            if file.readable():
                assert other.read(2) == b"45"
            if mode[0] == "a":
                other.write(b"more")
                assert writer.pread(99, 10) == b"more"
        assert file.tell() == 4


def test_a_file_is_found_by_its_name_of_now(session: dax_mp.Session) -> None:
    with session.open("file", "w+") as file:
        file.write(b"data")
        session.rename("file", "renamed")
        with pickle.loads(pickle.dumps(file)) as again:
            assert again.name == "renamed"
            assert again.pread(9, 0) == b"data"


def test_a_file_that_is_gone(session: dax_mp.Session) -> None:
    with session.open("file", "w+") as file:
        before = pickle.dumps(file)
        session.unlink("file")
        for pickled in (before, pickle.dumps(file)):
            with pytest.raises(FileNotFoundError):
                pickle.loads(pickled)
        with session.open("file", "x"), pytest.raises(FileNotFoundError):  # another file
            pickle.loads(before)
    with pytest.raises(ValueError, match="closed file"):
        pickle.dumps(file)


def test_in_another_process(session: dax_mp.Session, script: Script) -> None:
    with session.open("file", "w+") as file:
        file.write(b"0123456789")
        file.seek(3)
        process = script(
            """
import pickle, sys
with pickle.loads(bytes.fromhex(sys.argv[1])) as file:
    print(file.read(4), file.tell())
""",
            pickle.dumps(file).hex(),
        )
        assert process.end() == (0, "b'3456' 7\n", "")

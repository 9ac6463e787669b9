"""SharedMemory, ShareableList and SharedMemoryManager beside the standard library's."""

import functools
import multiprocessing
import multiprocessing.managers
import multiprocessing.shared_memory
import os
import pickle
import secrets
import struct
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

import dax_mp
from coordinator_process import wait_until
from in_children import Counter, add, square_in_list, use_shared
from script_process import Script
from side_by_side import outcomes

PAGE: Final = os.sysconf("SC_PAGESIZE")
METHODS: Final = [pytest.param("fork", marks=pytest.mark.forks), "forkserver", "spawn"]


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def run_both(session: dax_mp.Session, text: str) -> None:
    """The same outcomes, of statements that use S (SharedMemory), L (ShareableList), and N, a name that is free."""
    statements = text.split("; ")
    outcomes_of: dict[str, list[Any]] = {}
    shm = multiprocessing.shared_memory
    name = f"psm_{secrets.token_hex(4)}"
    ours: dict[str, Any] = {
        "S": functools.partial(dax_mp.SharedMemory, session=session),
        "L": functools.partial(dax_mp.ShareableList, session=session),
    }
    theirs: dict[str, Any] = {"S": shm.SharedMemory, "L": shm.ShareableList}
    for who, names in (("ours", ours), ("theirs", theirs)):
        space = {**names, "N": name, "pickle": pickle, "PAGE": PAGE}
        outcomes_of[who] = outcomes("\n".join(statements), space)
        for statement in ("del v", "del a", "del b, l, k"):
            outcomes(statement, space)
        outcomes("S(N).unlink()", space)
        space.clear()
    Path(f"/dev/shm/{name}").unlink(missing_ok=True)  # theirs leaves it where the size is no number
    for statement, here, there in zip(statements, outcomes_of["ours"], outcomes_of["theirs"], strict=True):
        assert here == there, statement
    assert session.listdir() == []


SHARED_MEMORY: Final = """
S()
S(None)
S(None, False)
S(create=True)
S(create=True, size=0)
S(N, True)
S(N, True, 0)
S(N, create=True, size=-1)
S(create=True, size=-1)
S(N, size=-1)
S(N, True, -2**70)
S(N, True, 2**63)
S(N, True, 2**60)
S(N, True, 10.5)
S(N, True, '10')
S(N, True, None)
S(N, True, float('nan'))
S(N, True, True).unlink()
S(N)
S(N, False, 10)
S('')
S('', True, 10)
S('/')
S('a/b')
S('a/b', True, 10)
S('x' * 300)
S('x' * 300, True, 10)
S(5)
S(5, True, 10)
S(b'name')
S(b'name', True, 10)
S(N, True, 10, True, 5)
S(N, unknown=1)
a = S(N, True, 10000); a.name == N; a.size; len(a.buf); a.buf.readonly; a.buf.format; bytes(a.buf[:3]); a.unlink()
a = S(N, True, 1); a.size; S(N).size; len(S(N).buf); a.close(); a.unlink()
a = S(N, True, PAGE); a.size; S(N).size; a.close(); a.unlink()
a = S(N, True, 10); S(N, True, 10); S(N, True, 20); S(N).size; a.unlink()
a = S(N, True, 10); b = S(N, False, 5); b.size; b.buf[0] = 7; a.buf[0]; b.close(); a.buf[1] = 8; S(N).buf[1]; a.unlink()
a = S('/' + N, True, 10); a.name == '/' + N; S(N).size; S('/' + N).size; a.close(); a.unlink()
a = S(N, True, 10); a.unlink(); a.unlink(); S(N); a.buf[0] = 5; a.buf[0]; a.close(); a.unlink()
a = S(N, True, 10); b = S(N); a.unlink(); b.unlink(); b.buf[5] = 1; a.buf[5]; a.close(); b.buf[5]; b.close()
a = S(N, True, 10); a.unlink(); b = S(N, True, 20); b.size; a.size; b.buf[0] = 1; a.buf[0]; b.unlink()
a = S(N, True, 10); a.close(); a.close(); a.buf; a.size; a.name == N; a.buf[0]; S(N).size; a.unlink(); N in repr(a)
a = S(N, True, 10); v = a.buf[2:5]; a.close(); a.buf; v[0] = 1; v.release(); a.close(); bytes(S(N).buf[:4]); a.unlink()
a = S(N, True, 10); v = a.buf; a.close(); v[0]; a.unlink()
a = S(N, True, 10); v = memoryview(a.buf); a.close(); v.release(); a.close(); a.unlink()
a = S(N, True, 10); a.buf[10]; a.buf[10] = 1; a.buf[0] = 256; a.buf[0:2] = b'abc'; a.buf[:] = bytes(10); a.unlink()
a = S(N, True, 10); a.name = 'x'; a.size = 5; a.buf = b''; a.unlink()
a = S(N, True, 10); b = pickle.loads(pickle.dumps(a)); b.name == N; b.size; b.buf[0] = 9; a.buf[0]; a.unlink()
a = S(N, True, 10); a.close(); b = pickle.loads(pickle.dumps(a)); b.size; b.close(); a.unlink()
a = S(N, True, 10); v = pickle.dumps(a); a.unlink(); pickle.loads(v)
a = S(create=True, size=10); a.name.startswith('psm_'); len(a.name) > 5; a.close(); a.unlink()
a = S(N, True, 10); a == S(N); a == a; hash(a) == hash(a); a.unlink(1); a.close(1); a.unlink()
a = S(N, True, 10); isinstance(str(a), str); del a; b = S(N); b.size; b.unlink()
"""


@pytest.mark.parametrize("text", lines(SHARED_MEMORY))
def test_shared_memory(session: dax_mp.Session, text: str) -> None:
    run_both(session, text)


SHAREABLE_LIST: Final = """
l = L([1, 2.5, 'three', b'four', True, False, None, -2**63]); list(l); len(l); l[2]; l[-1]; l[3]; l.format; l.shm.size
l = L([]); len(l); list(l); l[0]
l = L(()); len(l)
l = L(range(5)); list(l); l[2] = 77; list(l); l[7]; l[7] = 1; l[-5]; l[-6]
l = L('abc'); list(l); l.count('a'); l.index('b'); l.index('x')
l = L(['short']); l[0] = 'x' * 8; l[0]; l[0] = 'x' * 9; l[0]; l[0] = ''; l[0]
l = L(['äöü€']); l[0]; l[0] = 'ßß'; l[0]
l = L([1]); l[0] = 'text'; l[0] = 2.5; l[0]; l[0] = None; l[0]; l[0] = b'12345678'; l[0]; l[0] = True; l[0]
l = L([{}])
l = L([1, [2]])
l = L(5)
l = L(); len(l); list(l)
L(name=N)
l = L([1, 2], name=N); list(l); L([1], name=N); k = L(name=N); k[0] = 5; list(l); l.shm.name == N; k.shm.close()
l = L([1, 2, 'x'], name=N); k = pickle.loads(pickle.dumps(l)); k[2] = 'y'; list(l); list(k); k.shm.close()
l = L([1, 2, 3]); l[0:2]; l['0']; l[None]; 2 in l; 9 in l; sum(l); max(l); sorted(l); l.count(2); l.index(3)
l = L([1, 2, 3]); l.append(4); l == [1, 2, 3]; del l[0]
l = L([1, 2], name=N); repr(l) == f'ShareableList([1, 2], name={N!r})'
l = L([b'end\\0', 'end\\0']); l[0]; l[1]
l = L([1]); l.shm.close(); l[0]; len(l)
l = L([1], name=N); l.shm.unlink(); l[0]; L(name=N); l[0] = 2; l[0]
"""


@pytest.mark.parametrize("text", lines(SHAREABLE_LIST))
def test_shareable_list(session: dax_mp.Session, text: str) -> None:
    run_both(session, f"{text}; l.shm.unlink()" if text.startswith("l =") else text)


@pytest.mark.parametrize("name", ["SharedMemory", "ShareableList"])
def test_nothing_is_missing(name: str) -> None:
    theirs, ours = getattr(multiprocessing.shared_memory, name), getattr(dax_mp, name)
    assert {attribute for attribute in dir(theirs) if not attribute.startswith("_")} - set(dir(ours)) == set()


# --- in several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_by_name_in_another_process(session: dax_mp.Session, method: str) -> None:
    """With exactly the size that was asked for."""
    shared = dax_mp.SharedMemory(create=True, size=PAGE + 1, session=session)
    shared.buf[5] = 55
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=use_shared, args=(shared, 5))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert shared.buf[6] == 5
    shared.close()
    shared.unlink()


@pytest.mark.parametrize("method", METHODS)
def test_in_a_pool(session: dax_mp.Session, method: str) -> None:
    shared = dax_mp.SharedMemory(create=True, size=1000, session=session)
    numbers: Any = dax_mp.ShareableList([0] * 10, session=session)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        found = list(pool.map(use_shared, [shared] * 10, range(0, 20, 2)))
        assert found == [(1000, 1000, 0)] * 10
        assert list(pool.map(square_in_list, [numbers] * 10, range(10))) == [10] * 10
    assert bytes(shared.buf[1:20:2]) == bytes(range(0, 20, 2))
    assert list(numbers) == [number * number for number in range(10)]
    for block in (shared, numbers.shm):
        block.close()
        block.unlink()


def test_a_subclass(session: dax_mp.Session) -> None:
    counter = Counter(create=True, size=1, session=session)
    assert counter.add() == 1
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(add, counter).result() == 2
    counter.close()
    counter.unlink()


def test_resize(session: dax_mp.Session, script: Script) -> None:
    shared = dax_mp.SharedMemory("block", True, 1000, session=session)
    view, first = memoryview(shared.buf), shared.buf
    process = script(
        """
import sys
import dax_mp
shared = dax_mp.SharedMemory("block", endpoint=sys.argv[1])
print(shared.size, flush=True)
input()
shared.resize()
print(shared.size, len(shared.buf), shared.buf[900_000], flush=True)
shared.resize(2_000_000)
shared.buf[1_999_999] = 9
shared.resize(500)
shared.close()
""",
        session.endpoint,
    )
    assert process.line() == "1000"
    shared.resize(1_000_000)
    shared.buf[900_000] = 8
    assert (shared.size, len(shared.buf), len(view), len(first)) == (1_000_000, 1_000_000, 1000, 1000)
    view[999] = 7
    assert shared.buf[999] == 7
    process.go_on()
    assert process.end() == (0, "1000000 1000000 8\n", "")
    assert session.stat("block").size_bytes == 500
    assert shared.size == 1_000_000
    shared.resize()
    assert (shared.size, shared.buf[499], view[499]) == (500, 0, 0)
    with pytest.raises(BufferError):
        shared.close()
    assert shared.buf is None
    view.release()
    first.release()
    shared.close()
    for size in (None, 10):
        with pytest.raises(ValueError):
            shared.resize(size)
    shared.unlink()


def test_what_is_no_size(session: dax_mp.Session) -> None:
    shared = dax_mp.SharedMemory("block", True, 1000, session=session)
    for size, error in (
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        ("1", TypeError),
        (1 << 63, OverflowError),
    ):
        with pytest.raises(error):
            shared.resize(size)  # type: ignore[arg-type]
        assert (shared.size, len(shared.buf), session.stat("block").size_bytes) == (1000, 1000, 1000)
    shared.close()
    shared.unlink()


def test_taking_over_a_size_truncates_nothing(session: dax_mp.Session) -> None:
    """It is the mapping that follows the file, not the file that is set to what was seen of it."""
    one = dax_mp.SharedMemory("block", True, 1000, session=session)
    other = dax_mp.SharedMemory("block", session=session)
    with session.open("block", "r+") as file:
        one.resize(5000)
        other.resize()
        assert (other.size, file.size) == (5000, 5000)
        file.truncate(10)
        other.resize()
        assert (other.size, file.size, one.size) == (10, 10, 5000)
        file.truncate(0)
        with pytest.raises(ValueError):
            other.resize()
    for block in (one, other):
        block.close()
    one.unlink()


# --- how long it lives ------------------------------------------------------------------------------------------------

CREATOR: Final = """
import sys, multiprocessing.resource_tracker as tracker
import dax_mp
shared = dax_mp.SharedMemory("block", True, 10, endpoint=sys.argv[1], ephemeral=bool(sys.argv[2:]))
numbers = dax_mp.ShareableList([1], name="list", endpoint=sys.argv[1], ephemeral=bool(sys.argv[2:]))
shared.buf[0] = 7
print("created", tracker._resource_tracker._pid, flush=True)
input()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_it_outlives_its_creator(session: dax_mp.Session, script: Script, killed: bool) -> None:
    """And nobody tracks it, nor warns of it."""
    process = script(CREATOR, session.endpoint)
    assert process.line() == "created None"
    if killed:
        process.close()
    else:
        process.go_on()
        assert process.end() == (0, "", "")
    wait_until(lambda: session.statfs().sessions == 1)
    assert session.listdir() == ["block", "list"]
    shared = dax_mp.SharedMemory("block", session=session)
    assert (shared.buf[0], shared.size) == (7, 10)
    shared.close()
    for name in session.listdir():
        session.unlink(name)


@pytest.mark.parametrize("killed", [False, True])
def test_an_ephemeral_one_goes_with_its_last_process(session: dax_mp.Session, script: Script, killed: bool) -> None:
    free = session.statfs().pages_free
    process = script(CREATOR, session.endpoint, "ephemeral")
    assert process.line() == "created None"
    shared = dax_mp.SharedMemory("block", session=session)
    if killed:
        process.close()
    else:
        process.go_on()
        assert process.end() == (0, "", "")
    wait_until(lambda: session.statfs().sessions == 1)
    assert session.listdir() == ["block"]  # which we have
    again = pickle.loads(pickle.dumps(shared))
    shared.close()
    assert (again.buf[0], session.listdir()) == (7, ["block"])
    again.close()
    assert session.listdir() == []
    with pytest.raises(FileNotFoundError):
        dax_mp.SharedMemory("block", session=session)
    with pytest.raises(FileNotFoundError):
        again.unlink()
    assert session.statfs().pages_free == free


def test_an_ephemeral_one_is_unlinked(session: dax_mp.Session) -> None:
    shared = dax_mp.SharedMemory("block", True, 10, session=session, ephemeral=True)
    shared.unlink()
    other = dax_mp.SharedMemory("block", True, 20, session=session)
    shared.close()
    assert session.listdir() == ["block"]  # the other
    other.close()
    other.unlink()


@pytest.mark.parametrize(
    "making",
    [
        "dax_mp.SharedMemory('made', create=True, size=100_000, session=session)",
        "dax_mp.ndarray(session, 'made', 100_000, 'u1').any()",
    ],
)
def test_nothing_hidden_is_left_of_what_a_process_killed_by_kill_9_was_making(
    session: dax_mp.Session, script: Script, making: str
) -> None:
    """It kills itself at one line of the library after the other: there is all of it then, or nothing."""
    before_pages = session.statfs().pages_free
    maker = script(
        f"""if True:
        import os, signal, sys, warnings
        import dax_mp
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        session = dax_mp.connect(sys.argv[1])
        {making}
        session.unlink("made")
        lines = 0
        def count(frame, event, argument):
            global lines
            if "/dax_mp/clients/" not in frame.f_code.co_filename:
                return None
            lines += event == "line"
            if lines > fatal_line:
                os.kill(os.getpid(), signal.SIGKILL)
            return count
        for fatal_line in range(0, 100_000, 7):
            pid = os.fork()
            if not pid:
                sys.settrace(count)
                {making}
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            names = session.listdir()
            if names == ["made"]:
                assert session.stat("made").size_bytes == 100_000
                {making.replace("create=True, size=100_000, ", "").replace(", 100_000, 'u1'", "")}
                session.unlink("made")
            print(*names, flush=True)
            if not status:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
        session.close()
        """,
        session.endpoint,
    )
    code, output, errors = maker.end()
    assert (code, errors) == (0, "")
    found = output.splitlines()
    assert len(found) > 10
    assert found[0] == ""
    assert found[-1] == "made"
    assert set(found) == {"", "made"}
    assert session.statfs().pages_free == before_pages


def test_what_cannot_be_made_leaves_nothing(session: dax_mp.Session) -> None:
    free = session.statfs().pages_free
    for size in (1 << 62, 1 << 50):
        with pytest.raises(OSError):
            dax_mp.SharedMemory("block", True, size, session=session)
    with pytest.raises(TypeError):
        dax_mp.SharedMemory("block", True, "10", session=session)  # type: ignore[arg-type]
    with pytest.raises(struct.error):
        dax_mp.ShareableList([2**63], name="block", session=session)
    session.open("block", "x").close()
    with pytest.raises(FileExistsError):
        dax_mp.SharedMemory("block", True, 10, session=session)
    with pytest.raises(ValueError):
        dax_mp.SharedMemory("block", session=session)  # an empty file
    assert session.listdir() == ["block"]
    assert (session.statfs().pages_free, session.statfs().vmas) == (free, 0)


def test_what_is_raised_names_it(session: dax_mp.Session) -> None:
    shared = dax_mp.SharedMemory("block", True, 2 * PAGE, session=session)
    with session.open("block", "r+") as file:
        file.truncate(1)
    with pytest.raises(dax_mp.BusError) as raised:
        bytes(shared.buf)
    assert raised.value.filename == "block"
    del raised
    with pytest.raises(OSError) as error:
        shared.resize((1 << 63) - 1 - PAGE)
    assert error.value.filename == "block"
    assert shared.size == len(shared.buf) == 2 * PAGE
    shared.close()
    shared.unlink()


def test_it_moves_where_it_cannot_grow_in_its_place(session: dax_mp.Session) -> None:
    """Only where nobody has a view."""
    shared = dax_mp.SharedMemory("block", True, PAGE, session=session)
    shared.buf[0] = 7
    size = 1 << 40
    view = shared.buf
    with pytest.raises(BufferError):
        shared.resize(size)
    assert (view[0], shared.buf[0], shared.size, session.stat("block").size_bytes) == (7, 7, PAGE, PAGE)
    del view
    shared.resize(size)
    assert (shared.buf[0], shared.buf[size - 1], shared.size) == (7, 0, size)
    shared.close()
    shared.unlink()


def test_a_name_with_a_null(session: dax_mp.Session) -> None:
    """shm_open would take what is before it."""
    for create in (False, True):
        with pytest.raises(ValueError):
            dax_mp.SharedMemory("a\0b", create, 10, session=session)


def test_by_endpoint(daemon: dax_mp.Daemon, session: dax_mp.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a session of one's own: the process's, at the endpoint of the environment."""
    monkeypatch.setenv("DAX_MP_ENDPOINT", daemon.endpoint)
    shared = dax_mp.SharedMemory("block", True, 10)
    assert shared.session is dax_mp.shared_session(daemon.endpoint)
    assert dax_mp.SharedMemory("block").session is shared.session
    shared.close()
    shared.unlink()
    monkeypatch.setenv("DAX_MP_ENDPOINT", daemon.endpoint + "-none")
    with pytest.raises(dax_mp.errors.NoCoordinatorError):
        dax_mp.SharedMemory("block", True, 10)


# --- the manager ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_manager(session: dax_mp.Session, method: str) -> None:
    with dax_mp.SharedMemoryManager(ctx=multiprocessing.get_context(method), endpoint=session.endpoint) as manager:
        shared = manager.SharedMemory(100)
        numbers: Any = manager.ShareableList([1, "two"])
        assert (shared.size, list(numbers)) == (100, [1, "two"])
        kept, name = manager.SharedMemory(50), shared.name
        shared.close()
        numbers.shm.close()
        assert len(session.listdir()) == 3  # the manager has them
        again = dax_mp.SharedMemory(name, session=session)
        again.buf[0] = 1
    assert session.listdir() == []  # also those that are still in use
    again.buf[1] = kept.buf[0] = 1
    again.close()
    kept.close()


MANAGER: Final = """
m.SharedMemory(10)
m.ShareableList([1])
m.start(); a = m.SharedMemory(10); a.size; a.name.startswith('psm_'); a.close(); m.shutdown(); m.SharedMemory(10)
m.start(); m.SharedMemory(0); m.SharedMemory(-1); m.ShareableList([{}]); m.shutdown()
m.start(); m.start(); m.shutdown(); m.shutdown(); m.start()
m.start(); a = m.ShareableList([1, 2]); list(a); len(a); a.shm.close(); m.shutdown()
isinstance(m, multiprocessing.managers.BaseManager); m.address
"""


@pytest.mark.parametrize("text", lines(MANAGER))
def test_manager_beside_theirs(session: dax_mp.Session, text: str) -> None:
    statements = "\n".join(text.split("; "))
    context = multiprocessing.get_context("spawn")
    managers: list[Any] = [
        dax_mp.SharedMemoryManager(ctx=context, endpoint=session.endpoint),
        multiprocessing.managers.SharedMemoryManager(ctx=context),
    ]
    ours, theirs = (outcomes(statements, {"m": manager, "multiprocessing": multiprocessing}) for manager in managers)
    assert ours == theirs
    assert session.listdir() == []


def test_a_manager_that_is_killed(session: dax_mp.Session, script: Script, tmp_path: Path) -> None:
    """Its blocks go with the last process that has them."""
    process = script(
        """
import sys
import dax_mp
manager = dax_mp.SharedMemoryManager(address=sys.argv[2], endpoint=sys.argv[1])
manager.start()
blocks = [manager.SharedMemory(10), manager.SharedMemory(20)]
blocks.pop().close()
print(manager._process.pid, blocks[0].name, flush=True)
input()
blocks[0].close()
print("closed", flush=True)
""",
        session.endpoint,
        str(tmp_path / "manager"),
    )
    pid, name = process.line().split()
    assert len(session.listdir()) == 2
    os.kill(int(pid), 9)
    wait_until(lambda: session.listdir() == [name])
    process.go_on()
    assert process.end()[:2] == (0, "closed\n")
    assert session.listdir() == []

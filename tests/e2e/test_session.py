"""Sessions: how one begins, serves many threads, and ends; whatever happens to the coordinator or to this process."""

import concurrent.futures
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

import dax_mp
from dax_mp import messages
from dax_mp.clients.launch import module_environment
from dax_mp.endpoint import Record, lock_path
from dax_mp.errors import NoCoordinatorError, ProtocolError
from dax_mp.limits import LIST_ENTRIES_MAX, NAME_BYTES_MAX
from dax_mp.requests import MAPPED_ENTRIES_MAX
from script_process import Script, ScriptProcess

PAGE: Final = os.sysconf("SC_PAGESIZE")
TIMEOUT_S: Final = 60


# --- beginning --------------------------------------------------------------------------------------------------------


def test_no_coordinator(endpoint: str) -> None:
    """One line that says how to start one."""
    with pytest.raises(NoCoordinatorError) as raised:
        dax_mp.connect(endpoint)
    assert raised.value.errno == errno.ECONNREFUSED
    assert raised.value.filename == endpoint
    assert f"dax-mp serve --endpoint {endpoint}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_coordinator_in_what_is_no_endpoint(endpoint: str) -> None:
    parent = Path(endpoint).parent
    (parent / "file").touch()
    for path in (parent, parent / "file" / "below"):
        with pytest.raises(NoCoordinatorError):
            dax_mp.connect(path)


def test_a_killed_coordinators_endpoint() -> None:
    with dax_mp.launch("4MiB") as other:
        pidfd = os.pidfd_open(other.pid)
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        os.close(pidfd)
        with pytest.raises(NoCoordinatorError):
            dax_mp.connect(other.endpoint)


def test_an_endpoint_too_deep_for_a_socket() -> None:
    with pytest.raises(OSError) as raised:
        dax_mp.connect("/tmp/" + "d" * 200)
    assert raised.value.errno == errno.ENAMETOOLONG


def test_the_default_endpoint(daemon: dax_mp.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAX_MP_ENDPOINT", daemon.endpoint)
    with dax_mp.connect() as session:
        assert session.endpoint == daemon.endpoint
        assert session.coordinator_pid == daemon.pid
        assert session.page_size == PAGE


def test_a_relative_endpoint_stays_where_it_is(
    daemon: dax_mp.Daemon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(os.path.dirname(daemon.endpoint))
    with dax_mp.connect(os.path.basename(daemon.endpoint)) as session:
        monkeypatch.chdir(tmp_path)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: session.listdir(), range(50)))


def test_another_protocol_version(daemon: dax_mp.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PROTOCOL_VERSION", 77)
    with pytest.raises(ProtocolError, match="version 77") as raised:
        dax_mp.connect(daemon.endpoint)
    assert raised.value.errno == errno.EPROTO
    assert os.listdir(os.path.join(daemon.endpoint, "sessions")) == []


def test_another_page_size(daemon: dax_mp.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _name: 2 * PAGE)
    with pytest.raises(ProtocolError, match=f"pages have {PAGE} bytes"):
        dax_mp.connect(daemon.endpoint)


def test_a_region_that_is_not_the_coordinators() -> None:
    """Someone else's object of that name is not mapped."""
    with dax_mp.launch("4MiB") as daemon:
        with open(lock_path(daemon.endpoint), "rb") as lock:
            record = Record.decode(lock.read())
        assert record is not None
        (name,) = record.region_names
        region = f"/dev/shm{name}"
        with open(region, "r+b") as stream:
            stream.seek(8)
            stream.write(os.urandom(40))
        with pytest.raises(ProtocolError, match="not the pmem region"):
            dax_mp.connect(daemon.endpoint)
        os.unlink(region)
        with pytest.raises(OSError, match="cannot be opened"):
            dax_mp.connect(daemon.endpoint)


def test_a_coordinator_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dax_mp.clients.session.CONNECT_TIMEOUT_S", 0.2)
    with dax_mp.launch("4MiB") as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError, match="does not answer"):
                dax_mp.connect(daemon.endpoint)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert os.listdir(os.path.join(daemon.endpoint, "sessions")) == []


# --- files by name ----------------------------------------------------------------------------------------------------


def test_names(session: dax_mp.Session) -> None:
    for name in ("b", "a", "ä", "with space", "\n", "x" * NAME_BYTES_MAX, "-", "..."):
        session.open(name, "x").close()
    assert session.listdir() == sorted(["b", "a", "ä", "with space", "\n", "x" * NAME_BYTES_MAX, "-", "..."])
    session.rename("b", "c")
    session.unlink(Path("a"))
    assert session.stat("c").name == "c"
    assert session.stat(Path("ä")).size_bytes == 0
    assert "b" not in session.listdir()


@pytest.mark.parametrize(
    ("name", "error", "code"),
    [
        ("", FileNotFoundError, errno.ENOENT),
        ("x" * (NAME_BYTES_MAX + 1), OSError, errno.ENAMETOOLONG),
        ("ä" * (NAME_BYTES_MAX // 2 + 1), OSError, errno.ENAMETOOLONG),
        ("a/b", OSError, errno.EINVAL),
        ("/", OSError, errno.EINVAL),
        (".", OSError, errno.EINVAL),
        ("..", OSError, errno.EINVAL),
        ("nul\0", ValueError, None),
        ("\udc80", ValueError, None),
        (b"bytes", TypeError, None),
        (7, TypeError, None),
    ],
)
def test_bad_names(session: dax_mp.Session, name: Any, error: type[Exception], code: int | None) -> None:
    session.open("good", "x").close()
    for call in (lambda: session.open(name, "w"), lambda: session.rename("good", name)):
        with pytest.raises(error) as raised:
            call()
        assert getattr(raised.value, "errno", None) == code
    assert session.listdir() == ["good"]


def test_nul_in_a_name_is_a_value_error(session: dax_mp.Session) -> None:
    """As for open(); wherever a name, an attribute's name or an endpoint is taken."""
    session.open("good", "x").close()
    calls: list[Callable[[], Any]] = [
        *(lambda mode=mode: session.open("a\0", mode) for mode in ("r", "w", "x", "a", "r+")),
        lambda: session.stat("a\0"),
        lambda: session.maps("a\0"),
        lambda: session.unlink("a\0"),
        lambda: session.rename("a\0", "good"),
        lambda: session.rename("good", "a\0"),
        lambda: dax_mp.SharedMemory("a\0", session=session),
        lambda: dax_mp.SharedMemory("a\0", create=True, size=1, session=session),
        lambda: dax_mp.connect("/tmp/a\0"),
        lambda: dax_mp.shared_session("/tmp/a\0"),
        lambda: dax_mp.launch(endpoint="/tmp/a\0", size="4MiB"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="embedded null"):
            call()
    assert session.listdir() == ["good"]
    with pytest.raises(OSError, match="NUL") as raised:  # the coordinator trusts no client in that
        session.channel.request(messages.Open, "a\0", int(messages.OpenFlag.CREATE))
    assert raised.value.errno == errno.EINVAL


def test_names_that_are_not_there(session: dax_mp.Session) -> None:
    for call in (session.open, session.stat, session.unlink, session.maps):
        with pytest.raises(FileNotFoundError) as raised:
            call("missing")
        assert raised.value.filename == "missing"
    with pytest.raises(FileNotFoundError) as raised:
        session.rename("missing", "other")
    assert (raised.value.filename, raised.value.filename2) == ("missing", "other")
    session.open("there", "x").close()
    with pytest.raises(FileExistsError) as exists:
        session.open("there", "x")
    assert exists.value.filename == "there"


def test_rename_replaces(session: dax_mp.Session) -> None:
    with session.open("old", "w+") as old, session.open("new", "w+") as new:
        old.write(b"old")
        new.write(b"new")
        session.rename("old", "new")
        assert session.listdir() == ["new"]
        assert session.stat("new").ino == old.stat().ino
        new.seek(0)
        assert new.read() == b"new"


def test_more_files_than_one_reply_takes() -> None:
    names = [f"file-{index:05}" for index in range(2 * LIST_ENTRIES_MAX + 3)]
    with dax_mp.launch("4MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
        for name in names:
            session.open(name, "x").close()
        assert session.listdir() == names
        assert [stat.name for stat in session.scandir()] == names


def test_status(session: dax_mp.Session) -> None:
    before = session.statfs()
    with session.open("file", "w+") as file:
        file.write(b"x" * (PAGE + 1))
        stat = session.stat("file")
        assert (stat.name, stat.size_bytes, stat.blocks, stat.nlink, stat.mappers) == ("file", PAGE + 1, 2, 1, [])
        with file.mmap() as mapping:
            assert mapping[PAGE] == ord("x")
            assert session.stat("file").mappers == [(os.getpid(), 1)]
            (vma,) = session.maps("file")
            assert (vma.pid, vma.length_pages, vma.access) == (os.getpid(), 2, 3)
            device = session.statfs()
            assert device.vmas == before.vmas + 1
            assert device.counters["faults"] > before.counters["faults"]
        assert session.maps("file") == []
    after = session.statfs()
    assert (after.files, after.vmas) == (before.files + 1, before.vmas)
    assert after.pages_free == before.pages_free - 2
    assert session.counters()["faults"] >= 1


# --- many threads, and requests that wait -----------------------------------------------------------------------------


def test_threads_share_a_session(session: dax_mp.Session) -> None:
    def work(number: int) -> bytes:
        with session.open(f"of-{number}", "w+") as file:
            for index in range(20):
                file.write(bytes([number]) * index)
            file.seek(0)
            return file.read()

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        results = list(threads.map(work, range(64)))
    assert results == [bytes([number]) * sum(range(20)) for number in range(64)]


def test_a_request_in_the_middle_of_a_request(session: dax_mp.Session) -> None:
    """A signal handler that uses the session finds no lock that its own thread holds."""
    seen: list[list[str]] = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(session.listdir()))
    try:
        while len(seen) < 100:
            signal.setitimer(signal.ITIMER_REAL, 0.0002)  # once: on a slow machine the handler itself takes longer
            session.open("file", "w").close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert {name for names in seen for name in names} == {"file"}


class Waiting(NamedTuple):
    """A truncate that waits for a process which does not let go of the page."""

    daemon: dax_mp.Daemon
    session: dax_mp.Session
    observer: dax_mp.Session
    holder: ScriptProcess
    truncate: Callable[[], object]
    """Truncates, and so waits for as long as `holder` is stopped."""

    def until_it_waits(self) -> None:
        while self.observer.statfs().counters["unmaps"] == 0:
            pass


@pytest.fixture
def waiting(script: Script) -> Iterator[Waiting]:
    """Nothing waits yet; the test calls `truncate`."""
    with (
        dax_mp.launch("4MiB", ack_timeout=TIMEOUT_S) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        dax_mp.connect(daemon.endpoint) as observer,
    ):
        with session.open("file", "w+") as file:
            file.write(b"x" * PAGE)
        holder = script(
            """
import dax_mp, sys
with dax_mp.connect(sys.argv[1]) as session, session.open("file") as file:
    mapping = file.mmap(access=dax_mp.ACCESS_READ)
    print(mapping[0], flush=True)
    input()
""",
            daemon.endpoint,
        )
        assert holder.line() == str(ord("x"))
        holder.stop()
        file = session.open("file", "r+")
        yield Waiting(daemon, session, observer, holder, lambda: file.truncate(0))
        holder.process.kill()
        holder.end()


def test_a_request_that_waits_holds_up_no_other(waiting: Waiting) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(waiting.truncate)
        waiting.until_it_waits()
        assert waiting.session.listdir() == ["file"]
        waiting.session.open("other", "x").close()
        assert not future.done()
        waiting.holder.resume()
        future.result(TIMEOUT_S)
    assert waiting.session.stat("file").size_bytes == 0


def test_an_interrupted_request_leaves_the_session_in_order(waiting: Waiting) -> None:
    """The next request gets its own answer, not the late one of the interrupted request."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt() -> None:
        waiting.until_it_waits()
        signal.pthread_kill(main_thread, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.truncate()
    interrupter.join()
    assert waiting.session.listdir() == ["file"]
    waiting.holder.resume()
    while waiting.observer.stat("file").size_bytes:
        pass  # it is carried out all the same
    assert waiting.session.listdir() == ["file"]
    with waiting.session.open("file", "r+") as file:
        assert file.write(b"12") == 2


def test_close_ends_a_request_that_waits(waiting: Waiting) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(waiting.truncate)
        waiting.until_it_waits()
        waiting.session.close()
        with pytest.raises(ValueError, match="closed"):
            future.result(TIMEOUT_S)


def test_a_coordinator_that_dies_ends_a_request_that_waits(waiting: Waiting) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(waiting.truncate)
        waiting.until_it_waits()
        os.kill(waiting.daemon.pid, signal.SIGKILL)
        with pytest.raises(ConnectionResetError, match="has ended"):
            future.result(TIMEOUT_S)
    with pytest.raises(ConnectionResetError, match="connect\\(\\) again"):
        waiting.session.listdir()


def test_an_evicted_session_says_so(script: Script) -> None:
    """A process that is stopped for too long loses its session, not its life."""
    with dax_mp.launch("4MiB", ack_timeout=0.2) as daemon, dax_mp.connect(daemon.endpoint) as session:
        with session.open("file", "w+") as file:
            file.write(b"x" * PAGE)
            holder = script(
                """
import dax_mp, sys
with dax_mp.connect(sys.argv[1]) as session, session.open("file") as file:
    mapping = file.mmap(access=dax_mp.ACCESS_READ)
    print(mapping[0], flush=True)
    input()
    for call in (lambda: mapping[0], session.listdir, file.read, mapping.size):
        try:
            while True:  # until the pager has read that it is evicted
                call()
        except OSError as error:
            print(type(error).__name__, error.errno)
""",
                daemon.endpoint,
            )
            assert holder.line() == str(ord("x"))
            holder.stop()
            file.truncate(0)
            assert session.statfs().counters["evictions"] == 1
            holder.resume()
            holder.go_on()
            code, output, errors = holder.end()
        assert (code, errors) == (0, "")
        assert output.splitlines() == [f"BusError {errno.ESTALE}"] + [f"OSError {errno.ESTALE}"] * 3
        assert session.statfs().pages_quarantined == 0


# --- the end ----------------------------------------------------------------------------------------------------------


def test_close(daemon: dax_mp.Daemon) -> None:
    session = dax_mp.connect(daemon.endpoint)
    sessions = os.path.join(daemon.endpoint, "sessions")
    assert len(os.listdir(sessions)) == 1
    descriptors = len(os.listdir("/proc/self/fd"))
    file = session.open("file", "w+")
    file.truncate(PAGE)
    mapping = file.mmap()
    session.close()
    session.close()
    assert session.closed
    assert file.closed
    assert mapping.closed
    assert "closed" in repr(session)
    assert os.listdir(sessions) == []
    assert len(os.listdir("/proc/self/fd")) < descriptors
    calls: list[Callable[[], Any]] = [
        session.listdir,
        session.statfs,
        lambda: session.open("file"),
        lambda: session.stat("file"),
        lambda: session.maps("file"),
        lambda: session.unlink("file"),
        lambda: session.rename("file", "other"),
        session.__enter__,
        file.read,
        mapping.size,
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    with dax_mp.connect(daemon.endpoint) as again:
        assert again.stat("file").mappers == []
        again.unlink("file")


def test_nothing_is_left_of_many_sessions(daemon: dax_mp.Daemon) -> None:
    with dax_mp.connect(daemon.endpoint):
        gc.collect()
        descriptors, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        for _ in range(20):
            with dax_mp.connect(daemon.endpoint) as session, session.open("file", "w+") as file:
                file.truncate(PAGE)
                file.mmap()[0] = 1
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert len(os.listdir("/proc/self/task")) == threads


def test_a_forgotten_session_is_closed(daemon: dax_mp.Daemon) -> None:
    session = dax_mp.connect(daemon.endpoint)
    with pytest.warns(ResourceWarning, match="unclosed session"):
        del session
    assert os.listdir(os.path.join(daemon.endpoint, "sessions")) == []


def test_a_failed_connect_leaves_nothing(daemon: dax_mp.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_welcome: object) -> None:
        raise ProtocolError("refused")

    with dax_mp.connect(daemon.endpoint) as session:
        monkeypatch.setattr("dax_mp.clients.attach.check_welcome", refuse)
        gc.collect()
        descriptors, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        with pytest.raises(ProtocolError, match="refused"):
            dax_mp.connect(daemon.endpoint)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert len(os.listdir("/proc/self/task")) == threads
        assert session.statfs().sessions == 1


def test_the_end_of_the_process_closes_what_is_open(script: Script) -> None:
    """In order: sessions before the coordinators that launch() started. And without waiting for what is busy."""
    process = script(
        """
import dax_mp, threading, time
first = dax_mp.launch("4MiB")
one = dax_mp.connect(first.endpoint)
second = dax_mp.launch("4MiB")
two = dax_mp.connect(second.endpoint)
file = two.open("file", "w+")
file.truncate(1 << 20)
view = memoryview(file.mmap())
view[0] = 1

def work():
    while True:
        two.listdir()

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
print(first.endpoint, second.endpoint, flush=True)
"""
    )
    endpoints = process.line().split()
    code, _, errors = process.end()
    assert code == 0
    assert "Fatal" not in errors
    assert [os.path.exists(endpoint) for endpoint in endpoints] == [False, False]


# --- the package ------------------------------------------------------------------------------------------------------


def run_python(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=module_environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return result.stdout + result.stderr


def test_import_does_not_load_what_few_need() -> None:
    """And the coordinator's half of the package does not load the clients' half."""
    loaded = run_python("-c", "import sys, dax_mp; dax_mp.connect; dax_mp.launch; print(*sys.modules)").split()
    assert not {"subprocess", "tempfile", "click", "rich", "numpy", "asyncio"} & set(loaded)
    assert "dax_mp.mmu._mmu" in loaded
    loaded = run_python("-c", "import sys, dax_mp.coordinator; print(*sys.modules)").split()
    assert not {"zmq", "dax_mp.clients", "dax_mp.mmu"} & set(loaded)


def test_the_maps_of_many_pieces() -> None:
    """More of them than one reply has. (Not at a coordinator that checks all of them after each of these faults.)"""
    pages = MAPPED_ENTRIES_MAX + 10
    with (
        dax_mp.launch(size="32MiB") as daemon,
        dax_mp.connect(daemon.endpoint) as session,
        session.open("file", "w+") as file,
    ):
        file.truncate(2 * pages * session.page_size)
        with file.mmap() as mapping, file.mmap(access=dax_mp.ACCESS_COPY) as private:
            for page in range(pages):
                mapping[2 * page * session.page_size] = 1
            assert private[0] == 1
            shared, copy = session.maps("file")
            assert (shared.private, copy.private) == (False, True)
            assert [piece.pgoff for piece in shared.mapped] == list(range(0, 2 * pages, 2))

"""fork(2) in all the ways that Python makes one: what the parent had, the child has too."""

import mmap
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from typing import Final

import pytest

import dax_mp
from coordinator_process import Serve
from in_children import write_pid
from script_process import Script

pytestmark = pytest.mark.forks

HEAD: Final = """
import errno, gc, os, signal, sys, threading, time, warnings
import dax_mp
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def fork(child):
    "The exit code of a child that calls the function, and ends as interpreters do."
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    child()
    sys.exit(0)

session = dax_mp.connect(sys.argv[1])
"""


def run(script: Script, daemon: dax_mp.Daemon, text: str) -> list[str]:
    """The lines that it prints, begun without any file. It must end well and say nothing else."""
    with dax_mp.connect(daemon.endpoint) as session:
        for name in session.listdir():
            session.unlink(name)
    code, output, errors = script(HEAD + text, daemon.endpoint).end()
    assert (code, errors) == (0, ""), output
    return output.splitlines()


def test_the_child_has_what_the_parent_had(daemon: dax_mp.Daemon, script: Script) -> None:
    lines = run(
        script,
        daemon,
        """
file = session.open("forked", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
mapping[0] = 7
view = memoryview(mapping)
file.seek(5)

def child():
    global view
    print(mapping[0], int(view[0]), mapping[900_000], file.tell(), session.listdir(), len(file.stat().mappers))
    view[1] = 8
    file.write(b"written")
    try:
        mapping[1 << 20]
    except IndexError:
        print("IndexError")
    session.open("of the child", "x").close()
    view.release()
    del view
    mapping.close()
    file.close()
    session.close()
    gc.collect()
    sys.stdout.flush()

print(fork(child), flush=True)
print(view[1], mapping[5:12], file.tell(), session.listdir(), len(file.stat().mappers), session.statfs().sessions)
view.release()
file.close()
for name in session.listdir():
    session.unlink(name)
session.close()
""",
    )
    assert lines == [
        "7 7 0 5 ['forked'] 2",
        "IndexError",
        "0",
        "8 b'written' 5 ['forked', 'of the child'] 1 1",
    ]


def test_the_child_is_unmapped_as_any_other_process(daemon: dax_mp.Daemon, script: Script) -> None:
    """Its translations are the coordinator's to take back: a truncate by the parent ends its access."""
    lines = run(
        script,
        daemon,
        """
file = session.open("forked", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
mapping[500_000] = 7
reader, writer = os.pipe()
back, mapped = os.pipe()

def child():
    print(mapping[500_000], flush=True)
    os.write(mapped, b"x")
    os.read(reader, 1)
    try:
        mapping[500_000]
    except dax_mp.BusError as error:
        print(errno.errorcode[error.errno], error.filename, flush=True)

thread = threading.Thread(target=lambda: (os.read(back, 1), file.truncate(4096), os.write(writer, b"x")))
thread.start()
print(fork(child))
thread.join()
mapping.close()
file.close()
session.unlink("forked")
session.close()
""",
    )
    assert lines == ["7", "EFAULT forked", "0"]


def test_a_child_of_a_child(daemon: dax_mp.Daemon, script: Script) -> None:
    lines = run(
        script,
        daemon,
        """
file = session.open("forked", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
view = memoryview(mapping)

def child(depth=1):
    view[depth] = depth
    if depth < 4 and fork(lambda: child(depth + 1)):
        raise SystemExit(1)

print(fork(child), mapping[:6], session.statfs().sessions)
view.release()
file.close()
session.unlink("forked")
session.close()
""",
    )
    assert lines == [r"0 b'\x00\x01\x02\x03\x04\x00' 1"]


def test_the_parent_ends_at_once(daemon: dax_mp.Daemon, script: Script) -> None:
    """As a daemon is made: an ephemeral file, whose last user the parent would be, is there for the child."""
    process = script(
        HEAD
        + """
file = session.open("forked", "w+", ephemeral=True)
file.truncate(4096)
mapping = file.mmap()
mapping[:5] = b"hello"
if os.fork():
    os._exit(0)
if os.fork():
    os._exit(0)
input()
print(mapping[:5], session.listdir(), flush=True)
session.close()
print(file.closed, flush=True)
""",
        daemon.endpoint,
    )
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.go_on()
    assert process.end() == (0, "b'hello' ['forked']\nTrue\n", "")


def test_of_two_sessions_each_is_taken_over(daemon: dax_mp.Daemon, serve: Serve, script: Script) -> None:
    other = serve()
    process = script(
        HEAD
        + """
closed = dax_mp.connect(sys.argv[1])
closed.close()
other = dax_mp.connect(sys.argv[2])
files = [where.open("forked", "w+", ephemeral=True) for where in (session, other)]
files[0].write(b"one")
files[1].write(b"other")
print(fork(lambda: print([file.pread(9, 0) for file in files], closed.closed, flush=True)))
for file in files:
    file.close()
print(session.listdir(), other.listdir())
other.close()
session.close()
""",
        daemon.endpoint,
        other.endpoint,
    )
    assert process.end() == (0, "[b'one', b'other'] True\n0\n[] []\n", "")


def test_fork_in_the_middle_of_other_threads_requests(daemon: dax_mp.Daemon, script: Script) -> None:
    """Locks that other threads hold at the fork are never released in the child: it must not wait for them. And what
    they open, map and close is in the child's session as it is in the child's memory."""
    lines = run(
        script,
        daemon,
        """
file = session.open("busy", "w+")
file.write(bytes(1 << 20))
mapping = file.mmap()
stop = threading.Event()

def read():
    while not stop.is_set():
        file.seek(0)
        file.read(100)

def store():
    while not stop.is_set():
        mapping[5000] = 1
        file.punch_hole(4096, 4096)

def open_and_map():
    while not stop.is_set():
        with session.open("busy", "r+") as again, again.mmap(4096) as other:
            other[0]

threads = [threading.Thread(target=work) for work in (read, read, store, open_and_map, open_and_map)]
for thread in threads:
    thread.start()

def child():
    mapping[9000] = 5
    assert file.pread(1, 9000) == bytes([5])
    with session.open("busy") as again:
        assert again.size == 1 << 20

codes = {fork(child) for _ in range(20)}
stop.set()
for thread in threads:
    thread.join()
mapping.close()
file.close()
print(codes, session.statfs().sessions, session.statfs().vmas)
session.unlink("busy")
session.close()
""",
    )
    assert lines == ["{0} 1 0"]


def test_fork_in_the_middle_of_another_threads_resize(daemon: dax_mp.Daemon, script: Script) -> None:
    """The child resizes the mapping too, whatever the thread that is not there was about to do."""
    lines = run(
        script,
        daemon,
        """
file = session.open("grows", "w+")
file.truncate(4096)
mapping = file.mmap()
stop = threading.Event()

def resize():
    while not stop.is_set():
        mapping.resize(1 << 20)
        mapping.resize(4096)

thread = threading.Thread(target=resize)
thread.start()

def child():
    signal.alarm(30)  # it would wait for ever
    mapping.resize(2 << 20)
    os._exit(len(mapping) == 2 << 20)

codes = {fork(child) for _ in range(20)}
stop.set()
thread.join()
mapping.close()
file.close()
print(codes)
session.unlink("grows")
session.close()
""",
    )
    assert lines == ["{1}"]


def test_a_fork_does_not_come_in_the_middle_of_a_remap(daemon: dax_mp.Daemon, script: Script) -> None:
    """What the child's mapping has is what its VMA has."""
    lines = run(
        script,
        daemon,
        """
file = session.open("long", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
stop = threading.Event()

def remap():
    while not stop.is_set():
        mapping.remap(1 << 20)
        mapping.remap(1 << 14)

thread = threading.Thread(target=remap)
thread.start()
lengths = set()

def child():
    length = len(mapping)
    mapping[length - 1]
    os._exit(length >> 14)

for _ in range(100):
    lengths.add(fork(child))
stop.set()
thread.join()
mapping.close()
file.close()
print(lengths <= {1, 64})
session.unlink("long")
session.close()
""",
    )
    assert lines == ["True"]


def test_a_truncate_before_the_child_has_its_session(session: dax_mp.Session, script: Script) -> None:
    """Nobody tells the child of it: it has to look itself what is left of its private copies."""
    with session.open("cut", "w+") as file:
        file.write(bytes(4 * mmap.PAGESIZE))
        process = script(
            f"""
import os, sys
def before_it_adopts():
    print("forked", flush=True)
    sys.stdin.buffer.raw.read(1)
os.register_at_fork(after_in_child=before_it_adopts)
import dax_mp
session = dax_mp.connect(sys.argv[1])
mapping = session.open("cut").mmap(access=dax_mp.ACCESS_COPY)
mapping[0] = mapping[3 * {mmap.PAGESIZE}] = 7
pid = os.fork()
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(mapping[0])
try:
    print(mapping[3 * {mmap.PAGESIZE}])
except dax_mp.BusError:
    print("BusError", flush=True)
os._exit(0)
""",
            session.endpoint,
        )
        assert process.line() == "forked"
        file.truncate(100)
        process.go_on()
        assert process.end()[:2] == (0, "7\nBusError\n")


def test_a_bus_error_pending_at_a_fork_is_raised_in_the_parent(session: dax_mp.Session, script: Script) -> None:
    """And the child has its session."""
    process = script(
        """
import os, sys, warnings
import dax_mp
import numpy as np
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
session = dax_mp.connect(sys.argv[1])
file = session.open("file", "w+")
file.truncate(4096)
mapping, beyond = file.mmap(), np.frombuffer(file.mmap(8192, past_eof=True), "u1")
for _ in range(20):
    parent, raised, child = os.getpid(), False, None
    try:
        beyond[4096] = 1; child = os.fork()
        pass
    except dax_mp.BusError:
        raised = True
    if os.getpid() != parent:
        mapping[5] += 1
        os._exit(raised)
    while True:
        try:
            _, status = os.wait()
            break
        except dax_mp.BusError:
            raised = True
    assert raised and not status, (raised, status)
print(mapping[5])
""",
        session.endpoint,
    )
    assert process.end() == (0, "20\n", "")


def test_ctrl_c_during_a_fork_is_raised_when_the_child_has_its_session(session: dax_mp.Session, script: Script) -> None:
    """Also where somebody else's Python code runs in the parent after the library's. The parent exits at once, and the
    child has its file all the same: the interrupt has not ended the wait for it.
    """
    process = script(
        """
import os, signal, sys, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def before_it_adopts():
    print("forked", flush=True)
    sys.stdin.buffer.raw.read(1)

def of_somebody_else():
    for _ in range(1000):
        abs(1)

def interrupt(number, frame):
    print("interrupted", flush=True)
    raise KeyboardInterrupt

os.register_at_fork(after_in_child=before_it_adopts)
import dax_mp
os.register_at_fork(after_in_parent=of_somebody_else)
session = dax_mp.connect(sys.argv[1])
file = session.open("forked", "w+", ephemeral=True)
signal.signal(signal.SIGINT, interrupt)
try:
    pid = os.fork()
    if not pid:
        print(session.listdir(), file.write(b"x"), flush=True)
    os._exit(0)
except KeyboardInterrupt:
    os._exit(7)
""",
        session.endpoint,
    )
    assert process.line() == "forked"
    process.process.send_signal(signal.SIGINT)
    assert process.line() == "interrupted"
    process.go_on()
    assert process.end() == (7, "['forked'] 1\n", "")


def test_threads_fork_at_once(daemon: dax_mp.Daemon, script: Script) -> None:
    lines = run(
        script,
        daemon,
        """
file = session.open("forked", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
codes = []

def work(number):
    for turn in range(4):
        def child():
            mapping[number * 4096 + turn] = 1
            os._exit(7)
        codes.append(fork(child))

threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(codes == [7] * 16, mapping[:].count(1), session.statfs().sessions)
file.close()
session.unlink("forked")
session.close()
""",
    )
    assert lines == ["True 16 1"]


STALE: Final = """
file = session.open("forked", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
view = memoryview(mapping)
mapping[0] = 7
print("ready", flush=True)
input()

def child():
    calls = [session.listdir, session.__enter__, file.read, lambda: file.truncate(0), mapping.size, lambda: mapping[0],
             lambda: mapping[900_000], lambda: session.open("forked")]
    for call in calls:
        try:
            print("no error", call())
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EIO):  # EIO: the parent had heard of the coordinator's end
                print(error)
    view.release()
    mapping.close()
    file.close()
    session.close()
    print("child ends", flush=True)

print(fork(child))
"""


def test_a_coordinator_that_is_gone(serve: Serve, script: Script) -> None:
    coordinator = serve()
    process = script(HEAD + STALE, coordinator.endpoint)
    assert process.line() == "ready"
    coordinator.end()
    process.go_on()
    assert process.end() == (0, "child ends\n0\n", "")


def test_a_coordinator_that_does_not_answer(serve: Serve, script: Script) -> None:
    """The fork takes some seconds, and goes on."""
    coordinator = serve()
    process = script(HEAD + STALE + "\nprint(os.getpid(), flush=True)\nsession.close()\n", coordinator.endpoint)
    assert process.line() == "ready"
    os.kill(coordinator.pid, signal.SIGSTOP)
    try:
        process.go_on()
        assert process.line() == "child ends"
        assert process.line() == "0"
        assert process.line() == str(process.pid)
    finally:
        os.kill(coordinator.pid, signal.SIGCONT)
    assert process.end() == (0, "", "")


def test_a_fork_that_fails_in_the_child(daemon: dax_mp.Daemon, script: Script) -> None:
    """No descriptors left in the child: it goes on without a session, and so does the parent with its own."""
    lines = run(
        script,
        daemon,
        """
import resource
file = session.open("forked", "w+")
file.write(b"data")
hard = resource.getrlimit(resource.RLIMIT_NOFILE)
used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard[1]))

def child():
    try:
        session.listdir()
    except OSError as error:
        os._exit(error.errno == errno.ESTALE)

code = fork(child)
resource.setrlimit(resource.RLIMIT_NOFILE, hard)
print(code, file.pread(4, 0))
file.close()
session.unlink("forked")
session.close()
""",
    )
    assert lines == ["1 b'data'"]


def test_subprocess(daemon: dax_mp.Daemon, script: Script) -> None:
    """Also with a preexec_fn, which Python code runs in a forked child: it connects to nothing."""
    lines = run(
        script,
        daemon,
        """
import subprocess
file = session.open("forked", "w+")
file.write(b"data")
mapping = file.mmap()
mapping[0]

def before():
    try:
        mapping[0]
    except dax_mp.BusError as error:
        os.write(1, errno.errorcode[error.errno].encode())

for options in ({}, {"preexec_fn": before}, {"preexec_fn": os.setsid, "close_fds": False}):
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    print(session.statfs().sessions, len(file.stat().mappers), child.communicate(b"")[0])
mapping.close()
file.close()
session.unlink("forked")
session.close()
""",
    )
    assert lines == ["1 1 b''", "1 1 b'ESTALE'", "1 1 b''"]


def _add_one(mapping: dax_mp.Mapping, index: int) -> int:
    mapping[index] = mapping[index] + 1
    return os.getpid()


def test_multiprocessing_by_fork(session: dax_mp.Session) -> None:
    context = multiprocessing.get_context("fork")
    with session.open("counters", "w+") as file:
        file.truncate(8192)
        with file.mmap() as mapping:
            view = memoryview(mapping)
            processes = [context.Process(target=_add_one, args=(mapping, index)) for index in range(4)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                assert process.exitcode == 0
            assert bytes(view[:5]) == bytes([1, 1, 1, 1, 0])
            view.release()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_process_pool(session: dax_mp.Session, method: str) -> None:
    """A file goes to the workers, pickled, and they find what the others have written."""
    with session.open("counters", "w+") as file:
        file.truncate(100)
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            pids = list(pool.map(write_pid, [file] * 10, range(10)))
        assert os.getpid() not in pids
        assert file.pread(10, 0) == bytes(range(1, 11))


@pytest.mark.forks
@pytest.mark.parametrize("others", [0, 20])
def test_a_truncate_down_and_up_between_fork_and_adopt_takes_the_childs_private_copies_too(
    session: dax_mp.Session, script: Script, others: int
) -> None:
    page = session.page_size
    with session.open("file", "x+") as file:
        file.truncate(4 * page)
        process = script(
            """if True:
            import os, sys
            armed = False
            def between():
                if armed:
                    print("forked", flush=True)
                    input()
            os.register_at_fork(after_in_child=between)  # it runs before the library's own
            import dax_mp
            page = int(sys.argv[2])
            session = dax_mp.connect(sys.argv[1])
            with session.open("file", "r+") as file:
                mapping = file.mmap(access=dax_mp.ACCESS_COPY)
            for index in range(4):
                mapping[index * page] = 5 + index
            armed = True
            pid = os.fork()
            if not pid:
                print(*(mapping[index * page] for index in range(4)), flush=True)
                mapping[3 * page] = 9
                print(*(mapping[index * page] for index in range(4)), flush=True)
                os._exit(0)
            os.waitpid(pid, 0)
            print(*(mapping[index * page] for index in range(4)), flush=True)
            mapping.close()
            session.close()
            """,
            session.endpoint,
            str(page),
        )
        assert process.line() == "forked"
        for turn in range(others + 1):
            file.truncate((3 - turn % 2) * page)
            file.truncate(4 * page)
        expected = ["5 6 7 0", "5 6 7 9"] if not others else ["5 6 0 0", "5 6 0 9"]
        process.go_on()
        assert [process.line() for _ in range(3)] == [*expected, expected[0]]
        assert process.end()[0] == 0

"""Faults that arrive through userfaultfd(2): what SIGSEGV cannot serve, and where it is not to be had.

All else that memory does runs over both ways: `DAX_MP_FAULTS=userfaultfd make test TESTS=...`.
"""

import errno

import pytest

import dax_mp
from script_process import Script

HEAD = """
import ctypes, errno, mmap, os, signal, struct, sys, threading
import dax_mp
import numpy as np

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
errors = []

def in_thread_that_blocks_signals(function):
    def run():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            function()
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

def forbid(nr, value, when_not=None):
    '''A seccomp filter: the system call fails with `value`; when_not: unless its first argument has that bit.'''
    load, jump_eq, jump_set, give = 0x20, 0x15, 0x45, 0x06
    program = [(load, 0, 0, 0), (jump_eq, 0, 3, nr), (load, 0, 0, 16), (jump_set, 1, 0, when_not or 0),
               (give, 0, 0, 0x50000 | value), (give, 0, 0, 0x7fff0000)]
    if nr == "ioctl":  # of /dev/userfaultfd: USERFAULTFD_IOC_NEW
        program = [(load, 0, 0, 0), (jump_eq, 0, 3, IOCTL), (load, 0, 0, 24), (jump_eq, 0, 1, 0xaa00),
                   (give, 0, 0, 0x50000 | value), (give, 0, 0, 0x7fff0000)]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)), 16)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(head)) == 0, os.strerror(ctypes.get_errno())

USERFAULTFD, IOCTL, READ = {"x86_64": (323, 16, 0), "aarch64": (282, 29, 63)}[os.uname().machine]
"""
MAPPED = """
session = dax_mp.connect(sys.argv[1], faults="userfaultfd")
file = session.open("way", "w+")
file.truncate(1 << 24)
mapping = file.mmap()
array = np.frombuffer(mapping, np.uint8)
"""
END = """
assert not errors, errors
del array
session.close()
print("end")
"""
PASSED = (0, "end\n", "")


def run(script: Script, daemon: dax_mp.Daemon, text: str) -> tuple[int, str, str]:
    return script(HEAD + MAPPED + text + END, daemon.endpoint).end()


def test_a_thread_that_blocks_all_signals_loads_and_stores(daemon: dax_mp.Daemon, script: Script) -> None:
    text = """
def work():
    assert int(array[:: PAGE].sum()) == 0
    array[1 :: PAGE] = 3
    assert mapping[5 * PAGE + 1] == 3
    mapping[6 * PAGE] = 4
in_thread_that_blocks_signals(work)
assert file.pread(2, 6 * PAGE) == b"\\x04\\x03"
"""
    assert run(script, daemon, text) == PASSED


def test_a_zmq_socket_sends_a_fresh_mapping_without_a_copy(daemon: dax_mp.Daemon, script: Script) -> None:
    """libzmq's I/O thread reads the pages, and blocks all signals."""
    text = """
import zmq
file.pwrite(b"x" * (1 << 20), 1 << 20)
file.pwrite(b"y", (1 << 24) - 1)
with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
    port = push.bind_to_random_port("tcp://127.0.0.1")
    pull.connect(f"tcp://127.0.0.1:{port}")
    push.send(mapping, copy=False)
    received = pull.recv(copy=True)
    assert received == bytes(1 << 20) + b"x" * (1 << 20) + bytes(14 * (1 << 20) - 1) + b"y"
    assert received == file.pread(1 << 24, 0)
"""
    assert run(script, daemon, text) == PASSED


SIGSEGV_HANDLERS = {
    "in python": "signal.signal(signal.SIGSEGV, lambda number, frame: errors.append(number))",
    "in c": """
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def handler(number):
    os._exit(7)
libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
libc.signal.restype = ctypes.c_void_p
libc.signal(signal.SIGSEGV, ctypes.cast(handler, ctypes.c_void_p))
""",
    "SIG_DFL": "import faulthandler; faulthandler.disable(); libc.signal(signal.SIGSEGV, 0)",
    "SIG_IGN": "libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p; libc.signal(signal.SIGSEGV, 1)",
}


@pytest.mark.parametrize("handler", SIGSEGV_HANDLERS)
def test_a_program_with_its_own_sigsegv_handler(daemon: dax_mp.Daemon, script: Script, handler: str) -> None:
    """It is not called for page faults, whenever it was installed, and nothing takes its place."""
    text = f"""
{SIGSEGV_HANDLERS[handler]}
def handled():
    with open("/proc/self/status") as status:
        lines = [line for line in status if line.startswith(("SigIgn", "SigCgt"))]
    return [int(line.split()[1], 16) >> (signal.SIGSEGV - 1) & 1 for line in lines]
before = handled()
array[PAGE] = 3
mapping[2 * PAGE : 2 * PAGE + 5] = b"hello"
with file.mmap() as other:
    assert other[PAGE] == 3
    assert int(other[1 << 23]) == 0
file.punch_hole(0, 1 << 20)
assert array[PAGE] == 0
assert handled() == before
"""
    assert run(script, daemon, text) == PASSED


def test_a_failed_access_raises_in_the_thread_that_made_it(daemon: dax_mp.Daemon, script: Script) -> None:
    text = """
def checked():
    pass

def raises(access):
    try:
        access()
        checked()
    except dax_mp.BusError as error:
        assert error.errno == errno.EFAULT
        return error.offset_bytes
    raise AssertionError("no BusError")

file.truncate(PAGE)
at = 9 * PAGE + 7
def work():
    assert raises(lambda: mapping[at]) == at
    assert raises(lambda: mapping[at - 5 : at + 5]) in range(at - 5, at + 5)
    assert raises(lambda: mapping.__setitem__(slice(0, 5 * PAGE), b"z" * 5 * PAGE)) in range(PAGE, 5 * PAGE)
    assert raises(lambda: array[at]) == at
    assert raises(lambda: array.__setitem__(at, 1)) == at
    assert raises(lambda: array.sum()) >= PAGE
    assert raises(lambda: mapping.populate()) == PAGE
work()
thread = threading.Thread(target=lambda: (work(), errors.append("done")))
thread.start()
thread.join()
assert errors.pop() == "done"
"""
    assert run(script, daemon, text) == PASSED


def test_a_failed_access_of_a_thread_that_blocks_signals(daemon: dax_mp.Daemon, script: Script) -> None:
    """Methods and slices raise at once; a raw access raises in its thread too, a little later."""
    text = """
file.truncate(PAGE)
def precise():
    try:
        mapping[3 * PAGE]
    except dax_mp.BusError as error:
        assert error.offset_bytes == 3 * PAGE
        assert signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return
    raise AssertionError("no BusError")
in_thread_that_blocks_signals(precise)

def late():
    try:
        array[5 * PAGE] = 1
        while True:
            pass
    except dax_mp.BusError as error:
        assert error.offset_bytes == 5 * PAGE
in_thread_that_blocks_signals(late)
file.truncate(1 << 24)
assert array[5 * PAGE] == 0, "what was stored has gone nowhere"
"""
    assert run(script, daemon, text) == PASSED


def test_system_calls_fault_where_the_kernel_allows_it(daemon: dax_mp.Daemon, script: Script) -> None:
    """With connect(system_calls=False): else they are to hear of a missing page."""
    text = """
def load(address, length):
    return libc.syscall(READ, zero, ctypes.c_void_p(address), ctypes.c_size_t(length))
zero = os.open("/dev/zero", os.O_RDONLY)
mapping[0] = 1
array[1 << 20] = 2
read = load(mapping.address + PAGE // 2, 3 * PAGE)
assert read == (3 * PAGE if session.system_calls_fault else PAGE // 2), (read, session.system_calls_fault)
if session.system_calls_fault:
    assert load(mapping.address + (1 << 22), PAGE) == PAGE
    assert file.pread(1, 0) == b"\\x01" and file.stat().blocks >= 4
    file.truncate(PAGE)
    try:
        load(mapping.address + PAGE // 2, PAGE)
        while True:
            pass
    except dax_mp.BusError as error:
        assert error.errno == errno.EFAULT
    for part in (b"x" * (1 << 21), mapping[:PAGE] + bytes((1 << 21) - PAGE)):
        file.pwrite(part, 0)
    with file.mmap() as other, memoryview(other) as view:  # a buffer that is not mapped, with frames lent
        assert file.pread(1 << 21, 0) == part
        assert file.readinto(view) == 1 << 21
        assert file.pwrite(view, 0) == 1 << 21
    assert file.pread(1 << 21, 0) == part
os.close(zero)
"""
    mapped = MAPPED.replace(", faults=", ", system_calls=False, faults=")
    assert script(HEAD + mapped + text + END, daemon.endpoint).end() == PASSED


def test_interposed_system_calls_say_why_there_is_no_page(daemon: dax_mp.Daemon, script: Script) -> None:
    """They do not move the bytes of a scratch page, also where the kernel would wait for one."""
    text = """
import tempfile
reader, writer = os.pipe()
assert not session.system_calls_fault
file.truncate(PAGE)
def error_of(call, *args):
    try:
        call(*args)
    except OSError as error:
        assert type(error) is OSError, repr(error)
        return error.errno
os.write(writer, b"data")
assert error_of(os.write, writer, array[PAGE:]) == errno.EFAULT
assert error_of(os.readv, reader, [array[PAGE:]]) == errno.EFAULT
assert os.read(reader, 9) == b"data", "nothing was lost, and no zeroes were written"
with tempfile.TemporaryFile(buffering=0) as data:
    data.write(b"k" * 2 * PAGE)
    data.seek(0)
    assert data.readinto(array[:2 * PAGE]) == PAGE
assert bytes(array[:PAGE]) == b"k" * PAGE
dax_mp.check()
"""
    assert run(script, daemon, text) == PASSED


def test_loads_and_stores_after_the_mapping_was_closed(daemon: dax_mp.Daemon, script: Script) -> None:
    """A store may follow a load before the exception of that is raised: it is a fault like any other."""
    text = """
with file.mmap() as closed:
    late = np.ndarray((1 << 24,), np.uint8, buffer=closed)
def load_and_store():
    late[0]; late[1] = 1; late[1 << 20]; late[1 << 20] = 1
def fails(call):
    try:
        with dax_mp.bus_errors():
            call()
    except dax_mp.BusError as error:
        return error.errno == errno.ESTALE
for call in (load_and_store, lambda: late[:].sum(), lambda: np.add(late, 1, out=late), load_and_store):
    assert fails(call)
del late
"""
    assert run(script, daemon, text) == PASSED


def test_an_append_from_data_and_holes_is_one_write(daemon: dax_mp.Daemon, script: Script) -> None:
    """All pages are looked at before: also holes behind data, which are mapped only when they are asked for."""
    text = """
import tempfile
file.truncate(64 * PAGE)
for page in range(0, 64, 3):
    file.pwrite(b"d" * PAGE, page * PAGE)
with tempfile.NamedTemporaryFile(buffering=0) as log, open("/proc/self/io") as io:
    def writes():
        io.seek(0)
        return int(dict(line.split(": ") for line in io.read().splitlines())["syscw"])
    fd = os.open(log.name, os.O_WRONLY | os.O_APPEND)
    data = array[:64 * PAGE]
    before = writes()
    assert os.write(fd, data) == 64 * PAGE
    after = writes()
    os.close(fd)
    with open(log.name, "rb") as written:
        assert written.read() == bytes(data)
print(after - before)
"""
    code, output, errors = run(script, daemon, text)
    assert (code, errors) == (0, "")
    assert output == "1\nend\n"


def test_an_ordinary_users_descriptor_serves_user_mode_only(daemon: dax_mp.Daemon, script: Script) -> None:
    """The kernel refuses the one that serves system calls too, as it refuses it to an ordinary user."""
    process = script(
        HEAD
        + "forbid(USERFAULTFD, errno.EPERM, when_not=1)\nforbid('ioctl', errno.EPERM)\n"
        + MAPPED
        + "assert not session.system_calls_fault\nassert array[PAGE] == 0\nmapping[0] = 1\n"
        + END,
        daemon.endpoint,
    )
    assert process.end() == PASSED


@pytest.mark.parametrize(("code", "says"), [("EPERM", "seccomp"), ("ENOSYS", "CONFIG_USERFAULTFD")])
def test_where_userfaultfd_is_not_to_be_had_connect_says_so(
    daemon: dax_mp.Daemon, script: Script, code: str, says: str
) -> None:
    process = script(
        HEAD
        + f"""
forbid(USERFAULTFD, errno.{code})
forbid("ioctl", errno.{code})
try:
    dax_mp.connect(sys.argv[1], faults="userfaultfd")
except OSError as error:
    assert error.errno == errno.{code}
    print(error)
with dax_mp.connect(sys.argv[1]) as session:
    assert session.faults == "signals"
""",
        daemon.endpoint,
    )
    code_of_end, output, errors = process.end()
    assert (code_of_end, errors) == (0, "")
    assert says in output and "faults='signals'" in output


def test_the_environment_chooses_the_way(daemon: dax_mp.Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAX_MP_FAULTS", "userfaultfd")
    with dax_mp.connect(daemon.endpoint) as session:
        assert session.faults == "userfaultfd"
    with dax_mp.connect(daemon.endpoint, faults="signals") as session:
        assert (session.faults, session.system_calls_fault) == ("signals", False)
    monkeypatch.delenv("DAX_MP_FAULTS")
    with dax_mp.connect(daemon.endpoint) as session:
        assert session.faults == "signals"
    monkeypatch.setenv("DAX_MP_FAULTS", "polling")
    with pytest.raises(ValueError, match="DAX_MP_FAULTS"):
        dax_mp.connect(daemon.endpoint)
    with pytest.raises(ValueError, match="polling"):
        dax_mp.connect(daemon.endpoint, faults="polling")


def test_both_ways_in_one_process(daemon: dax_mp.Daemon, session: dax_mp.Session) -> None:
    with session.open("both", "w+") as file:
        file.truncate(1 << 16)
        with (
            dax_mp.connect(daemon.endpoint, faults="userfaultfd") as other,
            other.open("both", "r+") as same,
            file.mmap() as by_signal,
            same.mmap() as by_userfaultfd,
        ):
            assert by_userfaultfd[5] == by_signal[5] == 0
            by_userfaultfd[5] = 1
            assert by_signal[5] == 1
            by_signal[40_000] = 2
            assert by_userfaultfd[40_000] == 2
            file.truncate(4096)
            for mapping in by_signal, by_userfaultfd:
                with pytest.raises(dax_mp.BusError) as caught:
                    mapping[40_000]
                assert caught.value.errno == errno.EFAULT

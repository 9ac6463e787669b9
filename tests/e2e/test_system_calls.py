"""System calls whose buffer lies in pages of a mapping that nobody has touched yet (issue 7: "System calls")."""

import asyncio
import ctypes
import errno
import io
import mmap
import os
import pickle
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from coordinator_process import Serve
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")
PAGES: Final = 40
LENGTH: Final = PAGES * PAGE - 100
"""Of the mappings, in bytes: many pages, and the last one not whole."""


def libc(name: str, *args: int | bytes) -> int:
    """Calls the libc's function. It is looked up after the session has begun: what was before stays as it was."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    function.restype = ctypes.c_int if name == "mprotect" else ctypes.c_ssize_t
    result: int = function(
        *(argument if isinstance(argument, bytes) else ctypes.c_void_p(argument) for argument in args)
    )
    return result


@pytest.fixture(scope="module", params=["zero", "page-cache"])
def session(request: pytest.FixtureRequest) -> Iterator[dax_mp.Session]:
    with (
        dax_mp.launch("64MiB", request.param, "1MiB" if request.param == "page-cache" else None, debug=True) as daemon,
        dax_mp.connect(daemon.endpoint) as session,
    ):
        yield session


def contents() -> bytes:
    """Every third page of the file is a hole."""
    random = np.random.default_rng(7)
    pages = [bytes(PAGE) if page % 3 == 1 else random.bytes(PAGE) for page in range(PAGES)]
    return b"".join(pages)[:LENGTH]


@pytest.fixture
def file(session: dax_mp.Session) -> Iterator[dax_mp.DaxFile]:
    for name in session.listdir():
        session.unlink(name)
    with session.open("file", "x+") as file:
        data = contents()
        for page in range(PAGES):
            if page % 3 != 1:
                file.pwrite(data[page * PAGE : (page + 1) * PAGE], page * PAGE)
        file.truncate(LENGTH)
        yield file


def received(send: Callable[[socket.socket], object], family: int = socket.AF_UNIX) -> bytes:
    """What comes out of the other end of a stream while `send` writes into it and until it has returned."""
    with ExitStack() as stack:
        if family == socket.AF_UNIX:
            near, far = socket.socketpair()
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        stack.enter_context(far)
        with ThreadPoolExecutor(1) as pool:
            with near:
                data = pool.submit(read_all, far)
                send(near)
            return data.result()


def read_all(far: socket.socket) -> bytes:
    with far.makefile("rb") as stream:
        return bytes(stream.read())


# --- calls that load from the buffer ---------------------------------------------------------------------------------


def by_write(m: Any, path: Path) -> bytes:
    with path.open("wb", buffering=0) as other:
        assert os.write(other.fileno(), m) == len(m)
    return path.read_bytes()


def by_pwrite(m: Any, path: Path) -> bytes:
    with path.open("wb", buffering=0) as other:
        assert os.pwrite(other.fileno(), m, 3) == len(m)
    return path.read_bytes()[3:]


def by_writev(m: Any, path: Path) -> bytes:
    with path.open("wb", buffering=0) as other, memoryview(m) as view:
        assert os.writev(other.fileno(), [b"abc", view[:9000], b"", view[9000:]]) == 3 + len(m)
    return path.read_bytes()[3:]


def by_pwritev(m: Any, path: Path) -> bytes:
    with path.open("wb", buffering=0) as other, memoryview(m) as view:
        assert os.pwritev(other.fileno(), [view[:9000], view[9000:]], 5) == len(m)
    return path.read_bytes()[5:]


def by_file_object(m: Any, path: Path) -> bytes:
    with path.open("wb") as other:
        other.write(b"abc")
        assert other.write(m) == len(m)
    return path.read_bytes()[3:]


def by_tofile(m: Any, path: Path) -> bytes:
    np.frombuffer(m, np.uint8).tofile(path)
    return path.read_bytes()


def by_numpy_save(m: Any, path: Path) -> bytes:
    np.save(path.with_suffix(".npy"), np.frombuffer(m, np.uint8))
    loaded: bytes = np.load(path.with_suffix(".npy")).tobytes()
    return loaded


def by_pickle(m: Any, path: Path) -> bytes:
    with path.open("wb") as other:
        pickle.dump(np.frombuffer(m, np.uint8), other, protocol=5)
    loaded: bytes = pickle.loads(path.read_bytes()).tobytes()
    return loaded


def by_subprocess(m: Any, path: Path) -> bytes:
    return bytes(subprocess.run(["cat"], input=m, stdout=subprocess.PIPE, check=True).stdout)


def by_sendall(m: Any, path: Path) -> bytes:
    return received(lambda near: near.sendall(m))


def by_tcp(m: Any, path: Path) -> bytes:
    return received(lambda near: near.sendall(m), socket.AF_INET)


def by_sendmsg(m: Any, path: Path) -> bytes:
    def send(near: socket.socket) -> None:
        with memoryview(m) as view:
            sent = near.sendmsg([view[:100], b"", view[100:]])
            near.sendall(view[sent:])

    return received(send)


def by_timeout_socket(m: Any, path: Path) -> bytes:
    """One that does not block: a short result is what there was room for."""

    def send(near: socket.socket) -> None:
        near.settimeout(60)
        near.sendall(m)

    return received(send)


def by_asyncio(m: Any, path: Path) -> bytes:
    def send(near: socket.socket) -> None:
        near.setblocking(False)

        async def run() -> None:
            await asyncio.get_running_loop().sock_sendall(near, m)

        asyncio.run(run())

    return received(send)


def by_asyncio_stream(m: Any, path: Path) -> bytes:
    async def run() -> bytes:
        data = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data.set_result(await reader.read())
            writer.close()

        async with await asyncio.start_unix_server(serve, path):
            _, writer = await asyncio.open_unix_connection(path)
            with memoryview(m) as view:
                writer.write(view)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
            result: bytes = await data
            return result

    return asyncio.run(run())


def by_datagrams(m: Any, path: Path) -> bytes:
    parts: list[bytes] = []
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, memoryview(m) as view:
        for start in range(0, len(m), 30_000):
            assert near.send(view[start : start + 30_000]) == len(view[start : start + 30_000])
            parts.append(far.recv(100_000))
    return b"".join(parts)


def by_udp(m: Any, path: Path) -> bytes:
    parts: list[bytes] = []
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far,
        memoryview(m) as view,
    ):
        far.bind(("127.0.0.1", 0))
        for start in range(0, len(m), 30_000):
            near.sendto(view[start : start + 30_000], far.getsockname())
            parts.append(far.recv(100_000))
    return b"".join(parts)


def by_c_write(m: Any, path: Path) -> bytes:
    with path.open("wb", buffering=0) as other:
        assert libc("write", other.fileno(), m.address, len(m)) == len(m)
    return path.read_bytes()


def by_c_fwrite(m: Any, path: Path) -> bytes:
    with path.open("wb", buffering=0) as other:
        stream = libc("fdopen", os.dup(other.fileno()), b"w")
        assert libc("fwrite", b"abc", 1, 3, stream) == 3
        assert libc("fwrite", m.address, 1, len(m), stream) == len(m)
        assert not libc("fclose", stream)
    return path.read_bytes()[3:]


LOADS: Final = [
    by_write,
    by_pwrite,
    by_writev,
    by_pwritev,
    by_file_object,
    by_tofile,
    by_numpy_save,
    by_pickle,
    by_subprocess,
    by_sendall,
    by_tcp,
    by_sendmsg,
    by_timeout_socket,
    by_asyncio,
    by_asyncio_stream,
    by_datagrams,
    by_udp,
    by_c_write,
    by_c_fwrite,
]
ACCESSES: Final = {"shared": dax_mp.ACCESS_WRITE, "private": dax_mp.ACCESS_COPY, "read-only": dax_mp.ACCESS_READ}


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("way", LOADS, ids=lambda way: way.__name__)
def test_system_calls_that_load_from_untouched_pages(
    file: dax_mp.DaxFile, tmp_path: Path, way: Callable[[Any, Path], bytes], access: str
) -> None:
    blocks = file.stat().blocks
    mapping = file.mmap(access=ACCESSES[access])
    assert way(mapping, tmp_path / "other") == contents()
    assert file.stat().blocks == blocks  # a hole is read as one


# --- calls that store into the buffer --------------------------------------------------------------------------------


def given(data: bytes, take: Callable[[socket.socket], object], family: int = socket.AF_UNIX) -> None:
    """Calls `take` with a stream that has `data` and then its end."""
    with ExitStack() as stack:
        if family == socket.AF_UNIX:
            near, far = socket.socketpair()
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        stack.enter_context(near)

        def send() -> None:
            with far:
                far.sendall(data)

        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(send)
            take(near)
            sent.result()


def into_readinto(m: Any, data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with path.open("rb", buffering=0) as other:
        assert other.readinto(m) == len(data)


def into_buffered_readinto(m: Any, data: bytes, path: Path) -> None:
    path.write_bytes(b"abc" + data)
    with path.open("rb") as other:
        other.read(3)
        assert other.readinto(m) == len(data)


def into_readv(m: Any, data: bytes, path: Path) -> None:
    path.write_bytes(b"abc" + data)
    with path.open("rb", buffering=0) as other, memoryview(m) as view:
        assert os.readv(other.fileno(), [bytearray(3), view[:9000], view[9000:]]) == 3 + len(data)


def into_preadv(m: Any, data: bytes, path: Path) -> None:
    path.write_bytes(b"abcde" + data)
    with path.open("rb", buffering=0) as other, memoryview(m) as view:
        assert os.preadv(other.fileno(), [view[:9000], view[9000:]], 5) == len(data)


def into_recv_into(m: Any, data: bytes, path: Path, family: int = socket.AF_UNIX) -> None:
    def take(near: socket.socket) -> None:
        done = 0
        with memoryview(m) as view:
            while count := near.recv_into(view[done:]) if done < len(view) else 0:
                done += count

    given(data, take, family)


def into_tcp(m: Any, data: bytes, path: Path) -> None:
    into_recv_into(m, data, path, socket.AF_INET)


def into_waitall(m: Any, data: bytes, path: Path) -> None:
    def take(near: socket.socket) -> None:
        assert near.recv_into(m, len(data), socket.MSG_WAITALL) == len(data)

    given(data, take)
    m[:] = bytes(len(m))
    given(data, take, socket.AF_INET)


def into_recvmsg(m: Any, data: bytes, path: Path) -> None:
    def take(near: socket.socket) -> None:
        done = 0
        with memoryview(m) as view:
            while done < len(view):
                count, _, flags, _ = near.recvmsg_into([view[done : done + 10], view[done + 10 :]])
                assert count
                assert not flags
                done += count

    given(data, take)


def into_asyncio(m: Any, data: bytes, path: Path) -> None:
    def take(near: socket.socket) -> None:
        near.setblocking(False)

        async def run() -> None:
            done = 0
            with memoryview(m) as view:
                while done < len(view):
                    done += await asyncio.get_running_loop().sock_recv_into(near, view[done:])

        asyncio.run(run())

    given(data, take)


def into_pipe(m: Any, data: bytes, path: Path) -> None:
    with subprocess.Popen(["cat"], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None

        def send(stream: Any) -> None:
            with io.BufferedWriter(stream) as buffered:
                buffered.write(data)

        with ThreadPoolExecutor(1) as pool, memoryview(m) as view:
            sent = pool.submit(send, cat.stdin)
            done = 0
            while count := os.readv(cat.stdout.fileno(), [view[done:]]) if done < len(view) else 0:
                done += count
            sent.result()


def into_datagrams(m: Any, data: bytes, path: Path) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, memoryview(m) as view:
        for start in range(0, len(data), 30_000):
            far.send(data[start : start + 30_000])
            assert near.recv_into(view[start:]) == len(data[start : start + 30_000])


def into_udp(m: Any, data: bytes, path: Path) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as near,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far,
        memoryview(m) as view,
    ):
        near.bind(("127.0.0.1", 0))
        far.connect(near.getsockname())
        for start in range(0, len(data), 30_000):
            far.send(data[start : start + 30_000])
            count, address = near.recvfrom_into(view[start:])
            assert count == len(data[start : start + 30_000])
            assert address == far.getsockname()


def into_c_read(m: Any, data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with path.open("rb", buffering=0) as other:
        assert libc("read", other.fileno(), m.address, len(m)) == len(data)


def into_c_fread(m: Any, data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with path.open("rb", buffering=0) as other:
        stream = libc("fdopen", os.dup(other.fileno()), b"r")
        address = m.address
        assert libc("fread", address, 1, 7, stream) == 7
        assert libc("fread", address + 7, 1, len(m), stream) == len(data) - 7
        assert libc("feof", stream)
        assert not libc("ferror", stream)
        assert not libc("fclose", stream)


STORES: Final = [
    into_readinto,
    into_buffered_readinto,
    into_readv,
    into_preadv,
    into_recv_into,
    into_tcp,
    into_waitall,
    into_recvmsg,
    into_asyncio,
    into_pipe,
    into_datagrams,
    into_udp,
    into_c_read,
    into_c_fread,
]


@pytest.mark.parametrize("access", ["shared", "private"])
@pytest.mark.parametrize("way", STORES, ids=lambda way: way.__name__)
def test_system_calls_that_store_into_untouched_pages(
    file: dax_mp.DaxFile, tmp_path: Path, way: Callable[[Any, bytes, Path], None], access: str
) -> None:
    data = np.random.default_rng(8).bytes(LENGTH)
    before = contents()
    mapping = file.mmap(access=ACCESSES[access])
    way(mapping, data, tmp_path / "other")
    assert mapping[:] == data
    assert file.pread(LENGTH, 0) == (data if access == "shared" else before)


TOUCHING: Final = [
    by_file_object,  # which copies what fits into its buffer
    by_numpy_save,
    by_pickle,
    into_buffered_readinto,
]


@pytest.mark.parametrize("way", [way for way in [*LOADS, *STORES] if way not in TOUCHING], ids=lambda way: way.__name__)
def test_system_calls_of_a_thread_that_blocks_all_signals(file: dax_mp.DaxFile, tmp_path: Path, way: Any) -> None:
    """A fault of its own would be its process's end: the pages are asked for, and not touched."""
    data = np.random.default_rng(9).bytes(LENGTH)
    mapping: Any = file.mmap()

    def run() -> Any:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return way(mapping, data, tmp_path / "other") if way in STORES else way(mapping, tmp_path / "other")

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run).result()
    if way in STORES:
        assert mapping[:] == data
    else:
        assert result == contents()


# --- what cannot be mapped -------------------------------------------------------------------------------------------


def error_of(call: Callable[..., object], *args: object) -> int | None:
    caught: OSError | None = None
    try:
        call(*args)
    except OSError as error:  # (pytest.raises would keep what it was called with)
        caught = error.with_traceback(None)
    assert type(caught) is not dax_mp.BusError
    return None if caught is None else caught.errno


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_system_calls_without_a_page_say_why(
    session: dax_mp.Session, file: dax_mp.DaxFile, pipe: tuple[int, int]
) -> None:
    """The errno is that of the BusError which an access would raise; and no BusError comes later."""
    reader, writer = pipe
    os.write(writer, b"data")
    file.truncate(2 * PAGE)
    with file.mmap(4 * PAGE, past_eof=True) as mapping, memoryview(mapping) as view:
        assert error_of(os.readv, reader, [view[2 * PAGE :]]) == errno.EFAULT
        assert error_of(os.write, writer, view[2 * PAGE :]) == errno.EFAULT
        assert os.write(writer, view[PAGE:]) == PAGE  # what there is, as the kernel has it
        assert os.read(reader, 4) == b"data"  # nothing was lost
        assert os.read(reader, 2 * PAGE) == contents()[PAGE : 2 * PAGE]
        os.write(writer, b"data")
        with session.open("rest", "x") as rest:
            rest.fallocate(0, session.statfs().pages_free * PAGE)
            file.truncate(4 * PAGE)
            assert error_of(os.readv, reader, [view[2 * PAGE :]]) == errno.ENOSPC
        session.unlink("rest")
        assert os.readv(reader, [view[2 * PAGE :]]) == 4
        for _ in range(100):
            str(len(view))  # a BusError that is pending would be raised here
    assert file.pread(4, 2 * PAGE) == b"data"


def test_system_calls_do_not_store_into_a_read_only_mapping(file: dax_mp.DaxFile, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"data")
    with file.mmap(access=dax_mp.ACCESS_READ) as mapping:
        for _ in range(2):
            ctypes.set_errno(0)
            assert libc("read", reader, mapping.address, 4) == -1
            assert ctypes.get_errno() == errno.EFAULT
            assert mapping[0] == contents()[0]  # mapped now, and not writable
    assert os.read(reader, 9) == b"data"


def test_a_datagram_without_a_page_is_not_lost(file: dax_mp.DaxFile) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far, file.mmap(LENGTH + 2 * PAGE, past_eof=True) as mapping, memoryview(mapping) as view:
        far.send(b"data" * 2000)
        past_eof = view[PAGES * PAGE :]
        assert error_of(near.recv_into, past_eof) == errno.EFAULT
        assert near.recv_into(view[:PAGE]) == PAGE  # cut off, as anywhere
        far.send(b"")
        assert near.recv_into(view) == 0
        assert mapping[:PAGE] == b"data" * (PAGE // 4)
        past_eof.release()


def test_a_large_sparse_buffer_gets_no_blocks_for_what_does_not_come(
    session: dax_mp.Session, file: dax_mp.DaxFile, pipe: tuple[int, int], tmp_path: Path
) -> None:
    reader, writer = pipe
    (tmp_path / "other").write_bytes(b"x" * 100)
    near, far = socket.socketpair()
    udp_near, udp_far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with session.open("sparse", "x+") as sparse, near, far, udp_near, udp_far:
        sparse.truncate(16 << 30)
        buffer: Any = sparse.mmap()
        with memoryview(buffer) as view, (tmp_path / "other").open("rb", buffering=0) as other:
            os.write(writer, b"x" * 100)
            far.send(b"x" * 100)
            udp_far.send(b"x" * 100)
            assert other.readinto(view[1 << 30 :]) == 100
            assert os.readv(reader, [view[2 << 30 :]]) == 100
            assert near.recv_into(view[3 << 30 :]) == 100
            assert udp_near.recv_into(view[4 << 30 :]) == 100
        assert sparse.stat().blocks == 4
    session.unlink("sparse")


def test_a_long_file_is_read_as_a_whole(session: dax_mp.Session, file: dax_mp.DaxFile, tmp_path: Path) -> None:
    """Into pages of which none, some and all are mapped; a short read would be one too few for many programs."""
    data = np.random.default_rng(10).bytes(10_000_000)
    (tmp_path / "other").write_bytes(data)
    file.truncate(12_000_000)
    with file.mmap() as mapping, (tmp_path / "other").open("rb+", buffering=0) as other:
        view = memoryview(mapping)
        for start in range(0, len(mapping), 700_000):
            view[start] = 1
        assert os.preadv(other.fileno(), [view], 0) == len(data)
        assert view[: len(data)] == data
        assert other.readinto(view) == len(data)
        assert other.readinto(view) == 0
        assert os.pwrite(other.fileno(), view, 0) == len(view)
        assert (tmp_path / "other").stat().st_size == len(view)
        view.release()


def test_what_is_appended_is_appended_as_a_whole(file: dax_mp.DaxFile, tmp_path: Path) -> None:
    """write(2) with O_APPEND is atomic for the kernel, so one call must remain one."""
    data, calls = contents(), 50
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def append() -> None:
        for _ in range(calls):
            with file.mmap() as mapping, memoryview(mapping) as view:
                assert os.write(log, view) == len(data)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(append) for _ in range(2)]:
            done.result()
    os.close(log)
    assert (tmp_path / "log").read_bytes() == data * (2 * calls)


def test_peeking_takes_nothing(file: dax_mp.DaxFile) -> None:
    near, far = socket.socketpair()
    with near, far, file.mmap() as mapping, memoryview(mapping) as view:
        far.sendall(b"0123456789" * 1000)
        assert near.recv_into(view[PAGE - 5 :], 10_000, socket.MSG_PEEK) == 10_000
        assert near.recv_into(view[20 * PAGE :], 10_000) == 10_000
        assert view[PAGE - 5 :][:10_000] == view[20 * PAGE :][:10_000] == b"0123456789" * 1000


def test_a_descriptor_goes_with_its_bytes_once(file: dax_mp.DaxFile) -> None:
    near, far = socket.socketpair()
    with near, far, file.mmap() as mapping, memoryview(mapping) as view:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, np.array([near.fileno()], "i4").tobytes())]
        assert near.sendmsg([view[:20_000]], rights) == 20_000
        count, ancillary, flags, _ = far.recvmsg_into([view[20 * PAGE :]], 100)
        assert (count, len(ancillary), flags) == (20_000, 1, 0)
        os.close(int(np.frombuffer(ancillary[0][2], "i4")[0]))
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)
    assert file.pread(20_000, 20 * PAGE) == contents()[:20_000]


def test_eventfd_terminals_and_devices(file: dax_mp.DaxFile) -> None:
    """What these give is lost where it does not fit."""
    event = os.eventfd(7)
    master, slave = os.openpty()
    zero = os.open("/dev/zero", os.O_RDONLY)
    with file.mmap() as mapping, memoryview(mapping) as view:
        assert os.readv(event, [view[PAGE - 4 : PAGE + 4]]) == 8
        assert int(np.frombuffer(view[PAGE - 4 : PAGE + 4], "u8")[0]) == 7
        os.write(master, b"line\n")
        assert os.readv(slave, [view[4 * PAGE - 2 :]]) == 5
        assert mapping[4 * PAGE - 2 :][:5] == b"line\n"
        assert os.readv(zero, [view]) == len(view)
        assert view == bytes(len(view))
    for descriptor in (event, master, slave, zero):
        os.close(descriptor)


def test_holes_more_than_the_page_cache_has_room_for(session: dax_mp.Session, tmp_path: Path) -> None:
    """Where each page that is mapped takes the place of another, a call moves on by what there is room for."""
    length = 8 << 20
    with session.open("holes", "x+") as file:
        file.truncate(length)
        file.pwrite(b"end", length - 3)
        with file.mmap() as mapping, memoryview(mapping) as view:
            with (tmp_path / "other").open("xb", buffering=0) as other:
                assert os.write(other.fileno(), view) == length
            near, far = socket.socketpair()
            with near, far, ThreadPoolExecutor(1) as pool:
                data = pool.submit(read_all, far)
                near.sendall(view)
                near.close()
                assert data.result() == (tmp_path / "other").read_bytes() == bytes(length - 3) + b"end"
    session.unlink("holes")


@pytest.mark.parametrize("access", ["shared", "private"])
def test_mprotect_of_the_program_holds_after_the_next_fault(
    file: dax_mp.DaxFile, pipe: tuple[int, int], access: str
) -> None:
    reader, writer = pipe
    mapping: Any = file.mmap(access=ACCESSES[access])
    with memoryview(mapping) as view:
        ours = view[2 * PAGE : 4 * PAGE]
        assert not libc("mprotect", mapping.address + 2 * PAGE, PAGE, mmap.PROT_READ)
        for _ in range(2):
            os.write(writer, b"data")
            assert error_of(os.readv, reader, [ours]) == errno.EFAULT
            assert os.read(reader, 4) == b"data"
            assert os.write(writer, ours[: PAGE // 2]) == PAGE // 2
            assert os.read(reader, PAGE) == mapping[2 * PAGE : 2 * PAGE + PAGE // 2]
            file.punch_hole(2 * PAGE, PAGE)  # unmapped: what comes now is a fault
        assert libc("mprotect", mapping.address + 2 * PAGE, PAGE, 0) == 0
        assert error_of(os.write, writer, ours) == errno.EFAULT
        assert libc("mprotect", mapping.address + 2 * PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        os.write(writer, b"data")
        assert os.readv(reader, [ours]) == 4
        assert libc("mprotect", mapping.address + 1, PAGE, mmap.PROT_READ) == -1
        assert ctypes.get_errno() == errno.EINVAL
        ours.release()
    assert mapping[2 * PAGE : 2 * PAGE + 5] == b"data\0"
    memory = mmap.mmap(-1, PAGE)
    assert libc("mprotect", ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGE, mmap.PROT_READ) == 0
    os.write(writer, b"data")
    assert error_of(os.readv, reader, [memory]) == errno.EFAULT
    assert os.read(reader, 4) == b"data"


# --- while others change the file ------------------------------------------------------------------------------------


def test_system_calls_while_pages_are_taken_away(session: dax_mp.Session, file: dax_mp.DaxFile, tmp_path: Path) -> None:
    """A page that goes between its mapping and the call is mapped again."""
    mapping: Any = file.mmap()
    other = os.open(tmp_path / "other", os.O_CREAT | os.O_RDWR)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ended = threading.Event()

    def punch() -> int:
        count = 0
        while not ended.is_set():
            file.punch_hole(count % PAGES * PAGE, 2 * PAGE)
            file.pwrite(b"x", (count + 1) % PAGES * PAGE)
            count += 1
        return count

    with near, far, ThreadPoolExecutor(1) as pool, memoryview(mapping) as view:
        punches = pool.submit(punch)
        try:
            for _ in range(200):
                assert os.pwrite(other, view, 0) == LENGTH
                assert os.preadv(other, [view], 0) == LENGTH
                assert near.send(view[:50_000]) == 50_000
                assert far.recv_into(view[100:]) == 50_000
        finally:
            ended.set()
        assert punches.result()
    os.close(other)


# --- processes -------------------------------------------------------------------------------------------------------


def test_system_calls_false_leaves_the_process_alone(serve: Serve, script: Script) -> None:
    """As long as all sessions say so."""
    endpoint = serve().endpoint
    process = script(
        """
import ctypes, errno, os, sys
import dax_mp

before = ctypes.cast(ctypes.CDLL(None).read, ctypes.c_void_p).value

def address_of_read():
    return ctypes.cast(ctypes.CDLL(None).read, ctypes.c_void_p).value

def write(mapping):
    try:
        return os.write(writer, mapping)
    except OSError as error:
        return errno.errorcode[error.errno]

reader, writer = os.pipe()
with dax_mp.connect(sys.argv[1], system_calls=False) as session, session.open("file", "w+") as file:
    file.truncate(4096)
    with file.mmap() as mapping:
        print(write(mapping), address_of_read() == before)
        with dax_mp.connect(sys.argv[1]):
            print(write(mapping), address_of_read() == before)
        assert mapping.pin
""",
        endpoint,
    )
    assert process.line() == "EFAULT True"
    assert process.line() == "4096 False"
    assert process.end() == (0, "", "")


@pytest.mark.parametrize("bind", ["lazily", "now"])
def test_system_calls_of_libraries_loaded_later(
    serve: Serve, script: Script, monkeypatch: pytest.MonkeyPatch, bind: str
) -> None:
    """And of what calls through slots that the loader has filled, or not yet, and made read-only, or not."""
    if bind == "now":
        monkeypatch.setenv("LD_BIND_NOW", "1")
    endpoint = serve().endpoint
    process = script(
        """
import os, sys, tempfile
import dax_mp

with dax_mp.connect(sys.argv[1]) as session, session.open("file", "w+") as file:
    file.truncate(1 << 20)
    assert "numpy" not in sys.modules
    import numpy
    with tempfile.TemporaryFile() as other:
        numpy.frombuffer(file.mmap(), "u1").tofile(other)
        print(os.fstat(other.fileno()).st_size)
        other.seek(0)
        print(os.readv(other.fileno(), [file.mmap()]))
""",
        endpoint,
    )
    assert process.end() == (0, f"{1 << 20}\n{1 << 20}\n", "")


@pytest.mark.forks
def test_system_calls_in_the_child_of_a_fork(serve: Serve, script: Script) -> None:
    """In one that adopts its parent's session, and in one that has none."""
    endpoint = serve().endpoint
    process = script(
        """
import ctypes, errno, os, sys, warnings
import dax_mp

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
reader, writer = os.pipe()

def child(libc_fork):
    pid = ctypes.CDLL(None)[libc_fork]() if libc_fork else os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os._exit(os.write(writer, view) // 1000)
    except OSError as error:
        os._exit(error.errno)

with dax_mp.connect(sys.argv[1]) as session, session.open("file", "w+") as file:
    file.truncate(4096)
    with file.mmap() as mapping, memoryview(mapping) as view:
        print(child(None), child("fork") == errno.ESTALE, child("_Fork") == errno.EFAULT, os.write(writer, view))
""",
        endpoint,
    )
    assert process.end() == (0, "4 True True 4096\n", "")


def test_mmap_populate_maps_all_pages_at_once(session: dax_mp.Session, file: dax_mp.DaxFile) -> None:
    """Holes too, up to the end of the file, and for what is not interposed."""
    for access in ACCESSES.values():
        with file.mmap(2 * LENGTH, access=access, past_eof=True, populate=True) as mapping:
            faults = session.counters()["faults"]
            assert mapping[:LENGTH] == contents()
            assert session.counters()["faults"] == faults
    with file.mmap(PAGE, PAGES * PAGE, past_eof=True, populate=True) as mapping:
        assert not mapping.page_table()
    with file.mmap(populate=False) as mapping:
        assert not mapping.page_table()

"""Who gets the error of a raw access, and when: bus_errors(), check(), and the threads of a native library's pool."""

import asyncio
import contextlib
import errno
import os
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from script_process import Script

PAGE: Final = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def array(session: dax_mp.Session) -> Any:
    """Of a mapping of 8 pages whose file has one. It ends with the last traceback that it is in."""
    with session.open("file", "x+") as file:
        file.truncate(PAGE)
        mapping: Any = file.mmap(8 * PAGE, past_eof=True)
        return np.frombuffer(mapping, np.uint8)


def nothing() -> None:
    """The interpreter looks for asynchronous exceptions where a function begins."""


def test_a_lone_store_raises_at_the_end_of_the_block(array: Any) -> None:
    with pytest.raises(dax_mp.BusError) as raised, dax_mp.bus_errors():
        array[3 * PAGE] = 1
    assert (raised.value.errno, raised.value.offset_bytes) == (errno.EFAULT, 3 * PAGE)
    nothing()  # and it does not come a second time
    with contextlib.suppress(dax_mp.BusError), dax_mp.bus_errors():
        array[3 * PAGE] = 1
    nothing()
    dax_mp.check()


def test_calls_after_which_the_interpreter_does_not_look(array: Any) -> None:
    def store_and_go_on() -> None:
        seen: list[Any] = []
        array[3 * PAGE] = 1
        seen.append(len(seen))
        seen.append(isinstance(seen, list))

    def store_and_check() -> None:
        array[3 * PAGE] = 1
        dax_mp.check()

    with pytest.raises(dax_mp.BusError), dax_mp.bus_errors():
        store_and_go_on()
    with pytest.raises(dax_mp.BusError):
        store_and_check()
    nothing()
    dax_mp.check()


def test_blocks_in_blocks_raise_once(array: Any) -> None:
    raised = 0
    with dax_mp.bus_errors():
        try:
            with dax_mp.bus_errors():
                array[3 * PAGE] = 1
        except dax_mp.BusError:
            raised += 1
    assert raised == 1
    nothing()
    block = dax_mp.bus_errors()
    with block, pytest.raises(RuntimeError):
        block.__enter__()


def store_and_raise(array: Any, error: BaseException) -> None:
    with dax_mp.bus_errors():
        array[3 * PAGE] = 1
        raise error


def test_an_exception_under_way_is_the_context(array: Any) -> None:
    with pytest.raises(dax_mp.BusError) as raised:
        store_and_raise(array, ValueError())
    assert isinstance(raised.value.__context__, ValueError)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        store_and_raise(array, KeyboardInterrupt())
    assert isinstance(interrupted.value.__context__, dax_mp.BusError)
    nothing()


def test_in_a_generator_and_in_tasks(array: Any) -> None:

    def generate() -> Generator[int, None, None]:
        with dax_mp.bus_errors():
            yield 1
            array[3 * PAGE] = 1

    generator = generate()
    assert next(generator) == 1
    with pytest.raises(dax_mp.BusError):
        next(generator)
    left = generate()
    next(left)
    left.close()

    async def store(page: int) -> None:
        with dax_mp.bus_errors():
            await asyncio.sleep(0)
            array[page * PAGE] = 1

    async def both() -> Any:
        return await asyncio.gather(store(3), store(0), return_exceptions=True)

    failed, good = asyncio.run(both())
    assert isinstance(failed, dax_mp.BusError)
    assert good is None


POOL: Final = """
#include <pthread.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char *to;
static size_t count;
static int started, done = 1;

static void *run(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (done)
            pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);
        memset(to, 1, count);
        pthread_mutex_lock(&lock);
        done = 1;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* In the one thread of a pool, while the caller waits. */
void fill(char *first, size_t bytes)
{
    pthread_t thread;

    if (!started++)
        pthread_create(&thread, NULL, run, NULL);
    pthread_mutex_lock(&lock);
    to = first;
    count = bytes;
    done = 0;
    pthread_cond_broadcast(&changed);
    while (!done)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}
"""

CALL: Final = """
import ctypes, sys, threading, time
import numpy as np
import dax_mp

endpoint, library, page, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
loader = ctypes.PyDLL if "gil" in how else ctypes.CDLL
fill = loader(library).fill
fill.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

def nothing():
    pass

def call(address):
    fill(address, 2 * page)
    for _ in range(1000 if "later" in how else 0):
        time.sleep(0.001)

def call_in_block(address):
    with dax_mp.bus_errors():
        fill(address, 2 * page)

def call_and_check(address):
    fill(address, 2 * page)
    dax_mp.check()

def error_of(function, *arguments):
    try:
        function(*arguments)
        nothing()
    except dax_mp.BusError as error:
        return error.errno, error.offset_bytes
    return None

with dax_mp.connect(endpoint) as session, session.open("file", "r+") as file:
    with file.mmap(16 * page, past_eof=True) as mapping:
        good = np.zeros(2 * page, np.uint8)
        fill(good.ctypes.data, 2 * page)  # the pool is started by this thread, which does not call it any more
        address = mapping.address + 4 * page
        function = call_in_block if "block" in how else call_and_check if "check" in how else call
        results, ended = [], threading.Event()

        def work():
            results.append(error_of(function, address))
            results.append(error_of(nothing))
            ended.set()

        def wait():
            while not ended.is_set():  # innocent, though it is in a call of C of its own
                time.sleep(0.0001)

        thread = threading.Thread(target=work)
        thread.start()
        main = error_of(wait if "block" in how else thread.join)
        thread.join()
        assert good.all()
        print(results, main, error_of(nothing), flush=True)
"""


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pool")
    (directory / "pool.c").write_text(POOL)
    library = directory / "pool.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-pthread", "-o", library, directory / "pool.c"], check=True)
    return library


@pytest.mark.parametrize("how", ["later", "later, gil", "block", "block, gil", "check, gil"])
def test_who_called_the_native_pool_gets_its_error(
    daemon: dax_mp.Daemon, session: dax_mp.Session, script: Script, pool: Path, how: str
) -> None:
    """And nobody else, and once: not the main thread, which had nothing to do with it."""
    with session.open("file", "x+") as file:
        file.truncate(PAGE)
        code, output, errors = script(CALL, daemon.endpoint, str(pool), str(PAGE), how).end()
        assert (code, errors) == (0, "")
        assert output == f"[({errno.EFAULT}, {4 * PAGE}), None] None None\n"
        session.unlink("file")

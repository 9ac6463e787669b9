"""Arrays that keep no export of a mapping, after its close: BusError (ESTALE) that says so, and never other memory."""

import errno
import mmap
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
import pytest

import dax_mp
from script_process import Script

LENGTH: Final = 1 << 20
Array = np.ndarray[Any, np.dtype[np.uint8]]


def closed_by_mapping(session: dax_mp.Session) -> Array:
    with session.open("file", "w+") as file, file.mmap(LENGTH, past_eof=True) as mapping:
        file.truncate(LENGTH)
        return np.ndarray(LENGTH, np.uint8, buffer=cast(Any, mapping))


def closed_by_session(session: dax_mp.Session) -> Array:
    with dax_mp.connect(session.endpoint) as other, other.open("file", "w+") as file:
        file.truncate(LENGTH)
        return np.ndarray(LENGTH, np.uint8, buffer=cast(Any, file.mmap()))


def closed_by_shared_memory(session: dax_mp.Session) -> Array:
    shared = dax_mp.SharedMemory("file", create=True, size=LENGTH, session=session)
    array: Array = np.ndarray(LENGTH, np.uint8, buffer=shared.buf)
    shared.close()
    return array


@pytest.mark.parametrize("closed", [closed_by_mapping, closed_by_session, closed_by_shared_memory])
def test_an_array_over_a_buffer_after_close(session: dax_mp.Session, closed: Callable[[dax_mp.Session], Array]) -> None:
    array = closed(session)
    with session.open("next", "w+") as file, mmap.mmap(-1, 1 << 30) as foreign:
        file.truncate(LENGTH)
        with file.mmap() as mapping:
            for each in (array, array[4096:], array.reshape(1024, 1024)[::2].T):
                for access in (each.sum, lambda each=each: each.fill(7)):
                    with pytest.raises(dax_mp.BusError, match="the mapping was closed") as raised:
                        access()
                    assert (raised.value.errno, raised.value.filename) == (errno.ESTALE, "file")
            assert not mapping[:].strip(b"\0")
        assert not foreign[:LENGTH].strip(b"\0")


@pytest.mark.parametrize("end", ["", "mapping.close()", "session.close()", "shared.close()", "del mapping, shared"])
def test_arrays_over_buffers_at_the_interpreters_exit(daemon: dax_mp.Daemon, script: Script, end: str) -> None:
    """In destructors, and in threads that are in the middle of an access."""
    text = f"""
import sys, threading
import dax_mp, numpy as np
session = dax_mp.connect(sys.argv[1])
with session.open("left", "w+") as file:
    file.truncate({LENGTH})
    mapping = file.mmap()
shared = dax_mp.SharedMemory(create=True, size={LENGTH}, session=session, ephemeral=True)
arrays = [np.ndarray({LENGTH}, np.uint8, buffer=mapping), np.ndarray({LENGTH}, np.uint8, buffer=shared.buf)]

class AtTheEnd:
    def __init__(self, array):
        self.array = array
    def __del__(self, BusError=dax_mp.BusError):
        try:
            self.array.sum()
            self.array.fill(1)
        except BusError:
            pass
        print("ended")

def work(array, BusError=dax_mp.BusError):
    while True:
        try:
            array.sum()
            array.fill(1)
        except BusError:
            pass

if sys.argv[2] == "threads":
    for array in arrays:
        threading.Thread(target=work, args=(array,), daemon=True).start()
else:
    at_the_end = [AtTheEnd(array) for array in arrays]
    arrays[0].fill(arrays[1].sum())
{end}
"""
    assert script(text, daemon.endpoint, "destructors").end() == (0, "ended\nended\n", "")
    assert script(text, daemon.endpoint, "threads").end() == (0, "", "")


def test_an_array_over_a_mapping_that_has_moved(session: dax_mp.Session) -> None:
    with session.open("file", "w+") as file, file.mmap(LENGTH, past_eof=True) as mapping:
        file.truncate(LENGTH)
        array: Array = np.ndarray(LENGTH, np.uint8, buffer=cast(Any, mapping))
        array[5] = 7
        mapping.resize(1 << 45)  # more than there can be behind it
        with pytest.raises(dax_mp.BusError, match="the mapping has moved") as raised:
            array.sum()
        assert (raised.value.errno, raised.value.filename) == (errno.ESTALE, "file")
        assert mapping[5] == 7
        mapping.resize(LENGTH)

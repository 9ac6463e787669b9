"""dax_mp.ndarray: a numpy array by its name, with its shape and dtype, in every process."""

import errno
import functools
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from in_children import square
from script_process import Script

STRUCTURED: Final = np.dtype([("name", "U10"), ("position", "f8", (2, 3)), ("inner", [("a", "<i2"), ("b", ">u4")])])
ALIGNED: Final = np.dtype([("small", "u1"), ("large", "f8")], align=True)
TITLED: Final = np.dtype([(("the title", "field"), "i4"), ("other", "S3")])


def test_made_and_attached(session: dax_mp.Session, script: Script) -> None:
    array = dax_mp.ndarray(session, "array", (100, 3), "f4")
    assert (array.shape, array.dtype.str, array.flags.writeable) == ((100, 3), "<f4", True)
    assert isinstance(array, np.ndarray)
    assert not array.any()
    array[7] = 1, 2, 3
    process = script(
        """
import sys
import dax_mp
with dax_mp.connect(sys.argv[1]) as session:
    array = dax_mp.ndarray(session, "array")
    print(array.shape, array.dtype, array[7].tolist())
    array[8] = array[7] * 2
    del array
""",
        session.endpoint,
    )
    assert process.end() == (0, "(100, 3) float32 [1.0, 2.0, 3.0]\n", "")
    assert array[8].tolist() == [2, 4, 6]
    assert session.listdir() == ["array"]
    assert session.stat("array").size_bytes == 1200


@pytest.mark.parametrize("shape", [(), 5, (5,), [2, 3], (1, 2, 3, 4), np.int64(7), (np.int8(2), 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes(session: dax_mp.Session, shape: Any, order: Any) -> None:
    array = dax_mp.ndarray(session, "array", shape, "i4", order=order)
    like = np.zeros(shape, "i4", order=order)
    for each in (array, like):
        each[...] = np.arange(like.size).reshape(like.shape)
    for attached in (dax_mp.ndarray(session, "array"), dax_mp.ndarray(session, "array", shape, np.int32, order=order)):
        assert (attached.shape, attached.strides, attached.dtype) == (like.shape, like.strides, like.dtype)
        assert np.array_equal(attached, like)
        assert attached.flags.c_contiguous == like.flags.c_contiguous
        assert attached.flags.f_contiguous == like.flags.f_contiguous


@pytest.mark.parametrize("shape", [0, (3, 0), (0, 0, 5)])
def test_arrays_of_nothing(session: dax_mp.Session, shape: Any) -> None:
    for array in (dax_mp.ndarray(session, "array", shape, "i8"), dax_mp.ndarray(session, "array")):
        assert (array.shape, array.dtype.str, array.size) == (np.zeros(shape).shape, "<i8", 0)
    with pytest.raises(ValueError):
        dax_mp.ndarray(session, "array", 5)
    assert session.stat("array").size_bytes == 0


@pytest.mark.parametrize(
    "dtype",
    [None, "?", "u1", ">i2", "e", "D", "g", "S5", "U7", "V3", "M8[ns]", "m8[D]", STRUCTURED, ALIGNED, TITLED, "i4,f8"],
    ids=str,
)
def test_dtypes(session: dax_mp.Session, dtype: Any) -> None:
    array = dax_mp.ndarray(session, "array", 4, dtype)
    assert array.dtype == np.dtype(dtype)
    ones = np.zeros(4, dtype)
    ones.view("u1")[:] = 1
    array.view("u1")[:] = 1
    attached = dax_mp.ndarray(session, "array", dtype=dtype)
    assert attached.dtype == np.dtype(dtype)
    assert attached.dtype.fields == np.dtype(dtype).fields
    assert attached.tobytes() == ones.tobytes()


def test_a_dtype_with_a_shape(session: dax_mp.Session) -> None:
    """As for np.zeros, its dimensions are the array's last."""
    array = dax_mp.ndarray(session, "array", (4,), "(2,3)i4")
    assert (array.shape, array.dtype.str) == ((4, 2, 3), "<i4")
    assert dax_mp.ndarray(session, "array", (4,), "(2,3)i4").shape == (4, 2, 3)


def test_what_does_not_agree(session: dax_mp.Session) -> None:
    array = dax_mp.ndarray(session, "array", (2, 3), "f4")
    mistakes: list[dict[str, Any]] = [
        {"shape": (3, 2)},
        {"shape": 6},
        {"shape": (2, 3, 1)},
        {"dtype": "f8"},
        {"dtype": ">f4"},
        {"dtype": "i4"},
        {"dtype": STRUCTURED},
        {"order": "F"},
        {"shape": (2, 3), "dtype": "u4"},
        {"shape": (2, 3), "order": "F", "readonly": True},
    ]
    for mistake in mistakes:
        with pytest.raises(ValueError, match="the array 'array' has"):
            dax_mp.ndarray(session, "array", **mistake)
    assert len(session.stat("array").mappers) == 1
    assert session.stat("array").mappers[0].vmas == 1
    del array


def test_what_cannot_be_made(session: dax_mp.Session) -> None:
    mistakes: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"shape": -1}),
        (ValueError, {"shape": (2, -3)}),
        (TypeError, {"shape": 1.5}),
        (TypeError, {"shape": "ab"}),
        (TypeError, {"shape": (1.5,)}),
        (ValueError, {"shape": (1 << 40, 1 << 40)}),
        (ValueError, {"shape": (1,) * 100}),
        (OSError, {"shape": 1 << 58}),
        (ValueError, {"shape": 3, "dtype": object}),
        (ValueError, {"shape": 3, "dtype": [("a", "O")]}),
        (TypeError, {"shape": 3, "dtype": "nonsense"}),
        (ValueError, {"shape": 3, "order": "A"}),
        (ValueError, {"create": True}),
        (FileNotFoundError, {}),
        (FileNotFoundError, {"readonly": True}),
        (FileNotFoundError, {"shape": 3, "create": False}),
    ]
    free = session.statfs().pages_free
    for error, mistake in mistakes:
        with pytest.raises(error):
            dax_mp.ndarray(session, "array", **mistake)
        assert session.listdir() == [], mistake
    for name, number in (("", errno.ENOENT), ("x" * 300, errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as raised:
            dax_mp.ndarray(session, name, 5)
        assert raised.value.errno == number
    assert (session.statfs().pages_free, session.statfs().vmas) == (free, 0)


def test_create(session: dax_mp.Session) -> None:
    first = dax_mp.ndarray(session, "array", 5, create=True)
    first[0] = 7
    with pytest.raises(FileExistsError) as raised:
        dax_mp.ndarray(session, "array", 5, create=True)
    assert (raised.value.errno, raised.value.filename) == (errno.EEXIST, "array")
    assert dax_mp.ndarray(session, "array", 5)[0] == 7
    assert dax_mp.ndarray(session, "array", 5, create=False)[0] == 7
    session.unlink("array")
    second = dax_mp.ndarray(session, "array", 6, create=True)
    assert (first[0], second[0], session.listdir()) == (7, 0, ["array"])


def test_files_that_hold_no_array(session: dax_mp.Session) -> None:
    with session.open("file", "x+") as file:
        file.write(bytes(80))
        for shape in (None, 10):
            with pytest.raises(ValueError, match="holds no array"):
                dax_mp.ndarray(session, "file", shape)
    array = dax_mp.ndarray(session, "array", 1000)
    with session.open("array", "r+") as file:
        file.truncate(7999)
        with pytest.raises(ValueError, match="shorter"):
            dax_mp.ndarray(session, "array")
        file.truncate(9000)
        assert dax_mp.ndarray(session, "array").shape == (1000,)
    del array


def test_readonly(session: dax_mp.Session) -> None:
    array = dax_mp.ndarray(session, "array", 5)
    reader = dax_mp.ndarray(session, "array", readonly=True)
    array[3] = 9
    assert (reader[3], reader.flags.writeable) == (9, False)
    with pytest.raises(ValueError):
        reader[0] = 1
    assert not dax_mp.ndarray(session, "zeroes", 5, readonly=True).flags.writeable


def test_it_keeps_its_file(session: dax_mp.Session) -> None:
    free = session.statfs().pages_free
    array = dax_mp.ndarray(session, "array", 10_000)
    session.unlink("array")
    part = array[5_000:]
    part[:] = 3
    del array
    gc.collect()
    assert part.sum() == 15_000
    assert session.statfs().pages_free < free
    del part
    gc.collect()
    assert session.statfs().pages_free == free


def test_a_file_that_shrinks_under_it(session: dax_mp.Session) -> None:
    for array in (dax_mp.ndarray(session, "array", 10_000), dax_mp.ndarray(session, "array")):
        with session.open("array", "r+") as file:
            file.truncate(8)
            with pytest.raises(dax_mp.BusError) as raised:
                array.sum()
            assert raised.value.filename == "array"
            file.truncate(80_000)
        assert array.sum() == 0


def test_an_array_is_not_used_after_unmap(session: dax_mp.Session) -> None:
    """It holds its mapping open; the session's end takes what is mapped, and not the address range."""
    with dax_mp.connect(session.endpoint) as other:
        made, attached = dax_mp.ndarray(other, "array", 1000), dax_mp.ndarray(other, "array")
        made[0] = 1
        for mapping in other.channel.holdings.mappings():
            with pytest.raises(BufferError):
                mapping.close()
        assert (made[0], attached[0]) == (1, 1)
    for array in (made, attached, made[10:], attached.reshape(10, 100).T):
        with pytest.raises(dax_mp.BusError) as raised:
            array.sum()
        assert (raised.value.errno, raised.value.filename) == (errno.ESTALE, "array")
        with pytest.raises(dax_mp.BusError) as raised:
            array.fill(1)
        assert raised.value.errno == errno.ESTALE
    assert dax_mp.ndarray(session, "array")[0] == 1


@pytest.mark.parametrize("end", ["", "del session", "session.close()"])
def test_an_array_at_the_interpreters_exit(session: dax_mp.Session, script: Script, end: str) -> None:
    process = script(
        f"""
import sys
import dax_mp
session = dax_mp.connect(sys.argv[1])
array = dax_mp.ndarray(session, "array", 1_000_000)

class AtTheEnd:
    def __del__(self, array=array, BusError=dax_mp.BusError):
        try:
            array.sum()
            array.fill(1)
        except BusError:
            pass
        print("ended")

array.fill(array.sum())  # numpy imports what it calls at the first call
at_the_end = AtTheEnd()
{end}
""",
        session.endpoint,
    )
    assert process.end() == (0, "ended\n", "")


def test_an_array_in_a_thread_at_the_interpreters_exit(session: dax_mp.Session, script: Script) -> None:
    process = script(
        """
import sys, threading
import dax_mp
session = dax_mp.connect(sys.argv[1])
array = dax_mp.ndarray(session, "array", 1_000_000)

def work(array=array, BusError=dax_mp.BusError):
    while True:
        try:
            array.sum()
            array.fill(1)
        except BusError:
            pass

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
array.fill(1)
""",
        session.endpoint,
    )
    assert process.end() == (0, "", "")


def test_several_make_it_at_once(session: dax_mp.Session) -> None:
    """One makes it, and all have the same."""
    with ThreadPoolExecutor(8) as threads:
        arrays = list(threads.map(lambda index: dax_mp.ndarray(session, "array", 8, "i8"), range(8)))
    for index, array in enumerate(arrays):
        array[index] = index + 1
    assert arrays[0].tolist() == list(range(1, 9))
    assert session.listdir() == ["array"]


@pytest.mark.parametrize("method", [pytest.param("fork", marks=pytest.mark.forks), "forkserver", "spawn"])
def test_in_workers(session: dax_mp.Session, method: str) -> None:
    """They attach by session and name, which pickle."""
    array = dax_mp.ndarray(session, "array", 10, "i8")
    attach = functools.partial(dax_mp.ndarray, session, "array")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(square, [attach] * 10, range(10))) == [10] * 10
    assert array.tolist() == [index * index for index in range(10)]


def test_an_array_from_before_a_fork(session: dax_mp.Session, script: Script) -> None:
    process = script(
        """
import os, sys, warnings
import dax_mp
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
with dax_mp.connect(sys.argv[1]) as session:
    array = dax_mp.ndarray(session, "array", 100_000)
    if not (pid := os.fork()):
        array[50_000] = 5
        os._exit(0)
    os.waitpid(pid, 0)
    print(array.sum())
    del array
""",
        session.endpoint,
    )
    assert process.end() == (0, "5.0\n", "")

"""Arrays in files go to other processes by reference, and what numpy makes of them is what it seems."""

import copy
import errno
import gc
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import dax_mp
from dax_mp.clients.dax_array import DaxArray
from in_children import set_all
from script_process import Script

VIEWS: Final[dict[str, Callable[[Any], Any]]] = {
    "itself": lambda array: array,
    "a slice": lambda array: array[10:20],
    "a step": lambda array: array[5:50:7, ::2],
    "backwards": lambda array: array[::-1, ::-3],
    "transposed": lambda array: array[3:9].T,
    "one element": lambda array: array[7, 2, ...],
    "reshaped": lambda array: array.reshape(-1, 5),
    "other bytes": lambda array: array.view("u1"),
    "a view of a view of a view": lambda array: array[10:][::2].T[1:],
    "a new axis": lambda array: array[:, None, 4],
    "nothing": lambda array: array[4:4],
    "broadcast": lambda array: np.broadcast_to(array[3, 3, ...], (4, 5), subok=True),
}


@pytest.fixture
def array(session: dax_mp.Session) -> Any:
    array = dax_mp.ndarray(session, "array", (100, 10), "i4")
    array[...] = np.arange(1000).reshape(100, 10)
    return array


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS)
def test_pickled_by_reference(array: Any, view_of: Callable[[Any], Any], protocol: int) -> None:
    view = view_of(array)
    data = pickle.dumps(view, protocol)
    other = pickle.loads(data)
    assert type(other) is DaxArray
    assert (other.shape, other.dtype, other.flags.writeable) == (view.shape, view.dtype, view.flags.writeable)
    assert np.array_equal(other, view)
    assert len(data) < 1000
    if view.size and view.flags.writeable:
        other[...] = 77
        assert (view == 77).all()
        assert array.tobytes().count(bytes([77])) >= view.size


def test_many_views_in_one_pickle_share_a_mapping(session: dax_mp.Session, array: Any) -> None:
    others = pickle.loads(pickle.dumps([array[row] for row in range(100)]))
    assert sum(mapper.vmas for mapper in session.stat("array").mappers) == 2
    assert [int(other[0]) for other in others] == list(range(0, 1000, 10))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_in_workers_without_a_copy(array: Any, method: str) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert all(pool.map(set_all, [array[row] for row in range(100)], range(100)))
    assert np.array_equal(array, np.repeat(np.arange(100), 10).reshape(100, 10))


@pytest.mark.parametrize(
    "dtype", ["?", ">i8", "S5", "M8[ns]", [("a", "i4"), ("b", "f8", (2, 2)), ("c", "U3")]], ids=str
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_dtypes_and_orders_are_kept(session: dax_mp.Session, dtype: Any, order: Any) -> None:
    array = dax_mp.ndarray(session, "array", (3, 4), dtype, order=order)
    other = pickle.loads(pickle.dumps(array))
    assert (other.dtype, other.strides, other.flags.f_contiguous) == (array.dtype, array.strides, order == "F")
    other[1, 2] = np.ones((), dtype)[()]
    assert array[1, 2] == np.ones((), dtype)[()]
    if array.dtype.names:
        field = pickle.loads(pickle.dumps(array["b"]))
        field[1, 2] = 5
        assert (array["b"][1, 2] == 5).all()


def test_arrays_of_no_dimensions_and_of_nothing(session: dax_mp.Session) -> None:
    point = dax_mp.ndarray(session, "point", (), "f8")
    point[...] = 2.5
    other = pickle.loads(pickle.dumps(point))
    other[...] = 3.5
    assert (point[()], other.shape, type(other)) == (3.5, (), DaxArray)
    nothing = dax_mp.ndarray(session, "nothing", (0, 3), "f8")
    assert pickle.loads(pickle.dumps(nothing)).shape == (0, 3)
    for each in (point, nothing):
        each.populate(write=True)
        with each.pin() as pinned:
            assert pinned is each
        assert each.copy().shape == each.shape


def test_a_copy_is_an_ordinary_array(array: Any) -> None:
    for made in (
        array.copy(),
        array[3:5].copy("F"),
        copy.copy(array),
        copy.deepcopy(array),
        np.array(array),
        np.copy(array),
        array + 1,
        -array,
        np.sqrt(array),
        array @ array.T,
        array[array > 5],
        array[[1, 2, 3]],
        np.add(array, array.copy()),
    ):
        assert type(made) is np.ndarray
        assert not np.shares_memory(made, array)
        copied = pickle.loads(pickle.dumps(made))
        assert type(copied) is np.ndarray
        assert np.array_equal(copied, made)
    for made in (array.flatten(), array.astype("f8"), np.concatenate([array, array]), array.take([1, 2])):
        assert getattr(made, "mapping", None) is None
        assert type(pickle.loads(pickle.dumps(made))) is np.ndarray
    assert [*copy.deepcopy({"array": array[1]})["array"]] == list(range(10, 20))


def test_what_numpy_makes_of_it(array: Any) -> None:
    for scalar in (array.sum(), array.max(), array[3, 4], array.mean(), np.add.reduce(array, axis=None)):
        assert isinstance(scalar, np.generic)
    assert array.sum(axis=0).shape == (10,)
    before = array
    array += 1
    assert array is before
    assert np.add(array, 1, out=array) is array
    assert type(array.sum(axis=0, out=array[5])) is DaxArray
    assert type(np.asarray(array)) is np.ndarray
    assert np.shares_memory(np.asarray(array), array)
    assert type(np.ma.masked_array(array)[3:]) is np.ma.MaskedArray
    view = memoryview(array)
    assert (view.shape, view.format) == ((100, 10), "i")
    view.release()
    assert repr(array[0, :2]).startswith("DaxArray([")


def test_saved_and_loaded(array: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", array)
    np.savez(tmp_path / "array.npz", array=array)
    assert np.array_equal(np.load(tmp_path / "array.npy"), array)
    with np.load(tmp_path / "array.npz") as saved:
        assert np.array_equal(saved["array"], array)
    assert io.BytesIO(array).getvalue() == array.tobytes()


def test_populate_and_pin(session: dax_mp.Session) -> None:
    array = dax_mp.ndarray(session, "array", 100_000, "u1")
    array[4096:8192].populate(write=True)
    blocks = session.stat("array").blocks
    assert blocks >= 1
    with array[::-1][50_000:].pin() as pinned, session.open("array", "r+") as file:
        assert session.stat("array").blocks >= 13
        assert pinned.shape == (50_000,)
        with pytest.raises(OSError) as raised:
            file.truncate(0)
        assert raised.value.errno == errno.EBUSY
    reader = dax_mp.ndarray(session, "array", readonly=True)
    reader.populate()
    with pytest.raises(TypeError):
        reader.populate(write=True)


def test_read_only_stays_read_only(session: dax_mp.Session, array: Any) -> None:
    frozen = array[3:]
    frozen.flags.writeable = False
    for view in (dax_mp.ndarray(session, "array", readonly=True), frozen):
        other = pickle.loads(pickle.dumps(view))
        assert not other.flags.writeable
        with pytest.raises(ValueError):
            other[0] = 1


def test_what_cannot_go_by_reference_goes_as_a_copy(session: dax_mp.Session, array: Any) -> None:
    session.unlink("array")
    copied = pickle.loads(pickle.dumps(array[3:5]))
    assert type(copied) is np.ndarray
    assert copied.tolist() == array[3:5].tolist()
    other = dax_mp.ndarray(session, "array", 5)
    data = pickle.dumps(other)
    session.unlink("array")
    dax_mp.ndarray(session, "array", 5)
    with pytest.raises(FileNotFoundError):  # another file has the name: not that array
        pickle.loads(data)


def test_an_array_of_a_session_that_has_ended_is_not_pickled(session: dax_mp.Session) -> None:
    with dax_mp.connect(session.endpoint) as other:
        array = dax_mp.ndarray(other, "array", 1000)
    with pytest.raises(dax_mp.BusError):
        str(pickle.dumps(array))


def test_reserve_takes_all_blocks_at_once(session: dax_mp.Session) -> None:
    """Where they cannot be had, nothing is made."""
    array = dax_mp.ndarray(session, "array", 1 << 20, "u1", reserve=True)
    shared = dax_mp.SharedMemory("shared", create=True, size=100_000, session=session, reserve=True)
    dax_mp.ndarray(session, "sparse", 1 << 16, "u1")
    assert [session.stat(name).blocks for name in session.listdir()] == [256, 25, 0]
    dax_mp.ndarray(session, "sparse", reserve=True)
    assert session.stat("sparse").blocks == 16
    free = session.statfs().pages_free
    makers: list[Callable[[], object]] = [
        lambda: dax_mp.ndarray(session, "large", 1 << 30, "u1", reserve=True),
        lambda: dax_mp.SharedMemory("large", create=True, size=1 << 30, session=session, reserve=True),
    ]
    for make in makers:
        with pytest.raises(OSError) as raised:
            make()
        assert raised.value.errno == errno.ENOSPC
    gc.collect()
    assert session.listdir() == ["array", "shared", "sparse"]
    assert session.statfs().pages_free == free
    with session.open("filler", "x+") as filler:
        filler.fallocate(0, free * session.page_size)
        array[:] = 1
        shared.buf[:] = bytes(100_000)
    with pytest.raises(ValueError, match="reserve"):
        dax_mp.ndarray(session, "array", readonly=True, reserve=True)
    shared.close()


def test_posix_fallocate_of_shared_memory_says_what_to_do(session: dax_mp.Session) -> None:
    shared = dax_mp.SharedMemory(create=True, size=1000, session=session, ephemeral=True)
    with pytest.raises(AttributeError, match="reserve=True"):
        shared._fd  # noqa: B018
    shared.close()


USE: Final = """
import sys, warnings
warnings.simplefilter("ignore")  # theirs, in development mode
import dax_mp

def set_all(array, value):
    array[...] = value
    return array.mapping is not None
"""


def test_joblib_workers_get_it_without_a_copy(session: dax_mp.Session, array: Any, script: Script) -> None:
    pytest.importorskip("joblib", reason="not needed for anything else")
    process = script(
        USE
        + """
import joblib
with dax_mp.connect(sys.argv[1]) as session:
    array = dax_mp.ndarray(session, "array")
    print(all(joblib.Parallel(2)(joblib.delayed(set_all)(array[row], row) for row in range(100))))
    print(array[:, 3].tolist() == list(range(100)))
    del array
""",
        session.endpoint,
    )
    assert process.end()[:2] == (0, "True\nTrue\n")


def test_dask_workers_get_it_and_give_it_without_a_copy(
    session: dax_mp.Session, array: Any, script: Script, tmp_path: Path
) -> None:
    pytest.importorskip("distributed", reason="not needed for anything else")
    process = script(
        USE
        + """
import os
os.environ["DASK_TEMPORARY_DIRECTORY"] = sys.argv[2]
import dask.array, distributed
options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
if __name__ == "__main__":
    with (
        dax_mp.connect(sys.argv[1]) as session,
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
    ):
        array = dax_mp.ndarray(session, "array")
        print(all(client.gather(client.map(set_all, [array[row] for row in range(100)], range(100)))))
        print(array[:, 3].tolist() == list(range(100)))
        given = client.submit(lambda array: array[5], client.scatter(array)).result()
        given[...] = -1
        print(array[5].tolist() == [-1] * 10)
        array[...] = 1
        print(int(dask.array.from_array(array, chunks=(25, 10)).sum().compute()))
        del array, given
""",
        session.endpoint,
        str(tmp_path),
    )
    code, output, errors = process.end()
    assert (code, output) == (0, "True\nTrue\nTrue\n1000\n"), errors

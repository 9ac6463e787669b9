"""The class of arrays in files: an ndarray that goes to other processes by reference.

An array is pickled as where its memory is: the mapping, which pickles by the file's name, and the offset, shape,
strides and dtype in it. So a slice, a transposed array or a field of it goes by reference too. Nothing of that is kept
with the array. It is looked up when it is needed: the chain of `base` ends at a memoryview of the mapping, where the
array's memory is a mapping's. So whatever numpy makes of an array is right: what shares its memory is in the mapping as
well, and what does not is an ordinary array, here and pickled.

The array keeps the memoryview, and that the mapping open (np.ndarray(buffer=mapping) would not).
"""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Self, cast

import numpy as np

from dax_mp.clients.mapping import Mapping

_DASK: Final = "distributed.protocol.serialize"
_taught: list[bool] = []


class DaxArray(np.ndarray[Any, Any]):
    """An ndarray whose memory is a mapping's; `dax_mp.ndarray` makes one.

    Pickled, or sent to a process of multiprocessing, joblib or Dask, it is the same memory there, and so are its views;
    `copy()` gives an ordinary array. What ufuncs and fancy indexing make of it are ordinary arrays too.

        >>> array = dax_mp.ndarray(session, "samples", 1000, "i8")
        >>> other = pickle.loads(pickle.dumps(array[::2]))  # in another process, likely
        >>> other[3] = 7
        >>> int(array[6]), type(array + 1) is type(array.copy())
        (7, True)
        >>> del array, other
    """

    @property
    def mapping(self) -> Mapping | None:
        """What its memory is in; None where that is ordinary memory, as a copy's is."""
        base: Any = self
        while isinstance(base, np.ndarray):
            base = base.base
        return base.obj if isinstance(base, memoryview) and isinstance(base.obj, Mapping) else None

    def populate(self, write: bool = False) -> None:
        """Map every page of it now, for stores if `write`. Raises BusError; TypeError for one that is read-only."""
        if (mapping := self.mapping) is not None and self.size:
            first, end = _bytes_in(mapping, self)
            mapping.populate(first, end - first, write)

    @contextmanager
    def pin(self) -> Iterator[Self]:
        """The array, whose pages are mapped and stay so until the end of the `with`. Raises as `Mapping.pin`."""
        mapping = self.mapping
        if mapping is None or not self.size:
            yield self
            return
        first, end = _bytes_in(mapping, self)
        with mapping.pin(first, end - first):
            yield self

    def copy(self, order: Any = "C") -> Any:
        """An ordinary array, of memory of its own."""
        return self.view(np.ndarray).copy(order)

    def __copy__(self) -> Any:
        return self.copy("K")

    def __deepcopy__(self, memo: Any, /) -> Any:
        return self.copy("K")

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """What a ufunc gives: `out` where that is ours, else an ordinary array, or a scalar."""
        if array is self:
            return array
        if return_scalar or array.shape == ():
            return array[()]
        return array.view(np.ndarray)

    def __getitem__(self, key: Any) -> Any:
        item = super().__getitem__(key)
        return item.view(np.ndarray) if type(item) is DaxArray and item.mapping is None else item

    def __reduce_ex__(self, protocol: Any) -> Any:
        mapping = self.mapping
        if mapping is None or not _can_be_found(mapping):
            return self.view(np.ndarray).__reduce_ex__(protocol)
        first = self.__array_interface__["data"][0] - mapping.address
        return _attach, (mapping, self.shape, self.dtype, first, self.strides, self.flags.writeable)

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


def array_in(
    mapping: Mapping,
    shape: tuple[int, ...],
    dtype: "np.dtype[Any]",
    offset_bytes: int = 0,
    strides: tuple[int, ...] | None = None,
    order: Any = "C",
) -> DaxArray:
    """An array of the mapping's memory."""
    _teach_dask()
    memory = np.frombuffer(cast(Any, mapping), np.uint8)  # holds an export of it
    return DaxArray(shape, dtype, cast(Any, memory), offset_bytes, strides, order)


def _bytes_in(mapping: Mapping, array: DaxArray) -> tuple[int, int]:
    """The first byte of the mapping that the array has, and the one after its last."""
    bounds = getattr(np.lib, "array_utils", np).byte_bounds(array)  # numpy 2 has moved it
    return bounds[0] - mapping.address, bounds[1] - mapping.address


def _can_be_found(mapping: Mapping) -> bool:
    """Whether other processes can map the same. If not, what it holds is pickled, or raises that it cannot be read."""
    try:
        return mapping.has_name()
    except (OSError, ValueError):
        return False


def _attach(mapping: Mapping, shape: Any, dtype: Any, offset_bytes: int, strides: Any, writeable: bool) -> DaxArray:
    array = array_in(mapping, shape, dtype, offset_bytes, strides)
    if not writeable:
        array.flags.writeable = False
    return array


def _teach_dask() -> None:
    """Have Dask's workers exchange these arrays pickled. It would send what they hold, as it does with any ndarray."""
    if _taught or _DASK not in sys.modules:
        return
    _taught.append(True)
    protocol = sys.modules[_DASK]
    protocol.dask_serialize.register(DaxArray, _dask_serialize)
    protocol.dask_deserialize.register(DaxArray, _dask_deserialize)


def _dask_serialize(array: DaxArray) -> tuple[dict[str, Any], list[bytes]]:
    return {}, [pickle.dumps(array)]


def _dask_deserialize(header: dict[str, Any], frames: list[Any]) -> Any:
    return pickle.loads(frames[0])

"""numpy arrays in files: shape and dtype are kept with the file, as an attribute, so that a name is all it takes.

Nobody ever sees one half made, and of one whose maker is killed nothing is left: the file is made without a name
(O_TMPFILE), gets its size and attribute, and is then linked, unless the name is taken.
"""

import errno
import json
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from dax_mp.clients.file import DaxFile
from dax_mp.clients.new_file import NewFile
from dax_mp.clients.session import Session
from dax_mp.errors import os_error
from dax_mp.limits import OFFSET_BYTES_MAX

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

    from dax_mp.clients.dax_array import DaxArray
    from dax_mp.clients.mapping import Mapping

ATTRIBUTE: Final = "dax_mp.ndarray"
"""JSON: shape, order, and dtype as numpy.lib.format has it in the header of a .npy file."""


def ndarray(
    session: Session,
    name: str,
    shape: int | Sequence[int] | None = None,
    dtype: "DTypeLike | None" = None,
    *,
    order: Literal["C", "F"] | None = None,
    create: bool | None = None,
    readonly: bool = False,
    reserve: bool = False,
) -> "DaxArray":
    """The array in the file `name`: made, all zeroes, where there is none and a shape is given; else attached to.

    dtype, order: float64 and C where not given for a new one. create: True: it must be new (FileExistsError); False: it
    must be there (FileNotFoundError). readonly: map it for loads alone. reserve: allocate all blocks now (OSError
    ENOSPC), so that no later store finds the device full. The array keeps its mapping, and that the file.
    It is a DaxArray: an ndarray that pickles by reference, as its views do, and has `populate` and `pin`;
    `array.copy()` is an ordinary array.

        >>> array = dax_mp.ndarray(session, "samples", (1000, 3), "f4")
        >>> array[7] = 1, 2, 3
        >>> dax_mp.ndarray(session, "samples")[7].tolist()  # in another process, likely
        [1.0, 2.0, 3.0]

    Raises ValueError where shape, dtype or order are given and are not the file's, where the dtype holds Python
    objects, where the file holds no array, and for `readonly` with `reserve`; OSError as `Session.open`.
    """
    if readonly and reserve:
        raise ValueError("an array that is read-only takes no blocks: reserve is not for it")
    wanted = _wanted(shape, dtype, order)
    if wanted.shape is not None and create is not False:
        try:
            return _create(session, name, _Layout(wanted.shape, wanted.dtype, wanted.order or "C"), readonly, reserve)
        except FileExistsError:
            if create:
                raise
    elif create:
        raise ValueError("a new array needs a shape")
    with session.open(name, "r" if readonly else "r+") as file:
        layout = _layout_of(file)
        _check(name, layout, wanted, dtype is not None)
        if reserve and layout.size_bytes:
            file.fallocate(0, layout.size_bytes)
        return layout.array(_map(file, layout, readonly))


class _Layout(NamedTuple):
    """How an array lies in its file."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    order: Literal["C", "F"]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, mapping: "Mapping | None") -> "DaxArray":
        """Without a mapping where it has no bytes."""
        from dax_mp.clients.dax_array import DaxArray, array_in

        if mapping is None:
            return DaxArray(self.shape, self.dtype, order=self.order)
        return array_in(mapping, self.shape, self.dtype, order=self.order)

    def as_json(self) -> bytes:
        import numpy as np

        dtype = np.lib.format.dtype_to_descr(self.dtype)
        return json.dumps({"shape": self.shape, "order": self.order, "dtype": dtype}).encode()


class _Wanted(NamedTuple):
    """What the caller gives; None: nothing."""

    shape: tuple[int, ...] | None
    dtype: "np.dtype[Any]"
    order: Literal["C", "F"] | None


def _wanted(shape: int | Sequence[int] | None, dtype: "DTypeLike | None", order: Any) -> _Wanted:
    import numpy as np

    if order not in (None, "C", "F"):
        raise ValueError(f"order must be 'C' or 'F', not {order!r}")
    wanted: np.dtype[Any] = np.dtype(dtype)
    if shape is None:
        return _Wanted(None, wanted, order)
    dimensions = (operator.index(shape),) if hasattr(shape, "__index__") else tuple(map(operator.index, shape))
    if min(dimensions, default=0) < 0:
        raise ValueError("negative dimensions are not allowed")
    if wanted.subdtype is not None:  # as for numpy's own: its dimensions are the array's last
        wanted, inner = wanted.subdtype
        dimensions += inner
    return _Wanted(dimensions, wanted, order)


def _create(session: Session, name: str, layout: _Layout, readonly: bool, reserve: bool) -> "DaxArray":
    if layout.dtype.hasobject:
        raise ValueError(f"{layout.dtype} holds Python objects, which no other process could read")
    if layout.size_bytes > OFFSET_BYTES_MAX:
        raise ValueError("the array is too big")
    if _is_there(session, name):  # asked first, so that attaching makes nothing
        raise os_error(errno.EEXIST, filename=name)
    return NewFile(session, name).make(_fill, layout, readonly, reserve)


def _fill(file: DaxFile, layout: _Layout, readonly: bool, reserve: bool) -> "DaxArray":
    file.truncate(layout.size_bytes)
    if reserve and layout.size_bytes:
        file.fallocate(0, layout.size_bytes)
    file.setxattr(ATTRIBUTE, layout.as_json())
    array = layout.array(_map(file, layout, readonly))
    file.link()
    return array


def _is_there(session: Session, name: str) -> bool:
    try:
        session.stat(name)
    except FileNotFoundError:
        return False
    return True


def _map(file: DaxFile, layout: _Layout, readonly: bool) -> "Mapping | None":
    from dax_mp.clients.mapping import ACCESS_READ, ACCESS_WRITE

    if not layout.size_bytes:
        return None
    return file.mmap(layout.size_bytes, access=ACCESS_READ if readonly else ACCESS_WRITE)


def _layout_of(file: DaxFile) -> _Layout:
    import numpy as np

    try:
        description = json.loads(file.getxattr(ATTRIBUTE))
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        raise ValueError(f"the file {file.name!r} holds no array: it has no attribute {ATTRIBUTE}") from error
    dtype = np.lib.format.descr_to_dtype(_with_tuples(description["dtype"]))
    layout = _Layout(tuple(description["shape"]), dtype, description["order"])
    if file.size < layout.size_bytes:
        raise ValueError(f"the file {file.name!r} is shorter than the array in it, of {layout.size_bytes} bytes")
    return layout


def _with_tuples(description: Any) -> Any:
    """A dtype's description, of which JSON has made lists of tuples."""
    if isinstance(description, str):
        return description
    fields = []
    for field in description:
        name = tuple(field[0]) if isinstance(field[0], list) else field[0]
        fields.append((name, _with_tuples(field[1]), *(tuple(shape) for shape in field[2:])))
    return fields


def _check(name: str, layout: _Layout, wanted: _Wanted, with_dtype: bool) -> None:
    if wanted.shape is not None and wanted.shape != layout.shape:
        raise ValueError(f"the array {name!r} has shape {layout.shape}, not {wanted.shape}")
    if with_dtype and wanted.dtype != layout.dtype:
        raise ValueError(f"the array {name!r} has dtype {layout.dtype}, not {wanted.dtype}")
    if wanted.order is not None and wanted.order != layout.order:
        raise ValueError(f"the array {name!r} has order {layout.order}, not {wanted.order}")

"""numpy arrays in files: shape and dtype are kept with the file, as an attribute, so that a name is all it takes.

Nobody ever sees one half made: the file is made under a name that nobody knows, gets its size and attribute, and is
then renamed, unless the name is taken.
"""

import json
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from dax_mp.clients.file import DaxFile
from dax_mp.clients.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

ATTRIBUTE: Final = "dax_mp.ndarray"
"""JSON: shape, order, and dtype as numpy.lib.format has it in the header of a .npy file."""


def ndarray(
    session: Session,
    name: str,
    shape: int | Sequence[int] | None = None,
    dtype: "DTypeLike | None" = None,
    *,
    order: Literal["C", "F"] = "C",
    create: bool | None = None,
    readonly: bool = False,
) -> "NDArray[Any]":
    """The array in the file `name`: made, all zeroes, where there is none and a shape is given; else attached to.

    dtype: float64 where not given for a new one. create: True: it must be new (FileExistsError); False: it must be
    there (FileNotFoundError). readonly: map it for loads alone. The array keeps its mapping, and that the file.

        >>> array = ndarray(session, "samples", (1000, 3), "f4")
        >>> array[7] = 1, 2, 3
        >>> ndarray(session, "samples")[7].tolist()  # in another process, likely
        [1.0, 2.0, 3.0]

    Raises ValueError where shape, dtype or order are given and are not the file's, where the dtype holds Python
    objects, where the array would have no bytes, and where the file holds no array; OSError as `Session.open`.
    """
    import numpy as np

    if shape is not None and create is not False:
        wanted = np.dtype(dtype)
        dimensions = (shape,) if isinstance(shape, int) else tuple(int(length) for length in shape)
        try:
            return _create(session, name, dimensions, wanted, order, readonly)
        except FileExistsError:
            if create:
                raise
    elif create:
        raise ValueError("a new array needs a shape")
    with session.open(name, "r" if readonly else "r+") as file:
        array = _attach(file, readonly)
    _check(name, array, shape, dtype)
    return array


def _create(
    session: Session,
    name: str,
    shape: tuple[int, ...],
    dtype: "np.dtype[Any]",
    order: Literal["C", "F"],
    readonly: bool,
) -> "NDArray[Any]":
    import numpy as np

    if dtype.hasobject:
        raise ValueError(f"{dtype} holds Python objects, which no other process could read")
    size_bytes = dtype.itemsize
    for length in shape:
        if length < 0:
            raise ValueError("negative dimensions are not allowed")
        size_bytes *= length
    if not size_bytes:
        raise ValueError(f"an array of shape {shape} and {dtype} has no bytes")
    if any(stat.name == name for stat in _stat(session, name)):
        raise FileExistsError(name)
    description = {"shape": shape, "order": order, "dtype": np.lib.format.dtype_to_descr(dtype)}
    with session.open(f".ndarray-{secrets.token_hex(8)}", "x+", ephemeral=False) as file:
        try:
            file.truncate(size_bytes)
            file.setxattr(ATTRIBUTE, json.dumps(description).encode())
            array = _attach(file, readonly)
            session.rename(file.name, name, replace=False)
        except BaseException:
            session.unlink(file.name)
            raise
        return array


def _stat(session: Session, name: str) -> list[Any]:
    """The file's, if it is there: asked first, so that attaching makes nothing."""
    try:
        return [session.stat(name)]
    except FileNotFoundError:
        return []


def _attach(file: DaxFile, readonly: bool) -> "NDArray[Any]":
    import numpy as np

    from dax_mp.clients.mapping import ACCESS_READ, ACCESS_WRITE

    try:
        description = json.loads(file.getxattr(ATTRIBUTE))
    except OSError as error:
        raise ValueError(f"the file {file.name!r} holds no array: it has no attribute {ATTRIBUTE}") from error
    dtype = np.lib.format.descr_to_dtype(_with_tuples(description["dtype"]))
    mapping = file.mmap(access=ACCESS_READ if readonly else ACCESS_WRITE)
    shape = tuple(description["shape"])
    return np.ndarray(shape, dtype, buffer=cast(Any, mapping), order=description["order"])


def _with_tuples(description: Any) -> Any:
    """A dtype's description, of which JSON has made lists of tuples."""
    if isinstance(description, str):
        return description
    fields = []
    for field in description:
        name = tuple(field[0]) if isinstance(field[0], list) else field[0]
        fields.append((name, _with_tuples(field[1]), *(tuple(shape) for shape in field[2:])))
    return fields


def _check(name: str, array: "NDArray[Any]", shape: int | Sequence[int] | None, dtype: "DTypeLike | None") -> None:
    import numpy as np

    if shape is not None and array.shape != ((shape,) if isinstance(shape, int) else tuple(shape)):
        raise ValueError(f"the array {name!r} has shape {array.shape}, not {shape}")
    if dtype is not None and array.dtype != np.dtype(dtype):
        raise ValueError(f"the array {name!r} has dtype {array.dtype}, not {np.dtype(dtype)}")

"""How a file is opened: modes, and what stands between the caller and the raw file.

The arguments are those of the built-in `open`, and so are their mistakes and what they give, with one difference: where
nothing is said about buffering, a file is the raw one, for what one process writes is to be seen by the others at once.
For the same reason a mode without b and t is binary, unless something is said about the text.

The layers are the standard library's (io.BufferedReader and so on, io.TextIOWrapper). What a layer holds back is
written when it is flushed or closed, or when the session is, at the end of the process at the latest (`flush_layers`).
"""

import io
import operator
import os
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, overload

if TYPE_CHECKING:
    from _typeshed import OpenBinaryModeReading, OpenBinaryModeUpdating, OpenBinaryModeWriting

    from dax_mp.clients.file import DaxFile

Name = str | os.PathLike[str]
PlainReading = Literal["r"]
PlainWriting = Literal["w", "x", "a"]
PlainUpdating = Literal["r+", "+r", "w+", "+w", "x+", "+x", "a+", "+a"]
PlainMode = PlainReading | PlainWriting | PlainUpdating
# fmt: off
TextMode = Literal[
    "rt", "tr", "rt+", "r+t", "+rt", "tr+", "t+r", "+tr",
    "wt", "tw", "wt+", "w+t", "+wt", "tw+", "t+w", "+tw",
    "xt", "tx", "xt+", "x+t", "+xt", "tx+", "t+x", "+tx",
    "at", "ta", "at+", "a+t", "+at", "ta+", "t+a", "+ta",
]
# fmt: on

Layer = io.BufferedReader | io.BufferedWriter | io.BufferedRandom | io.TextIOWrapper

LINE_BUFFERING: Final = 1


class OpenMode(NamedTuple):
    """What a mode says."""

    kind: str
    """r, w, x or a."""
    updating: bool
    """With a plus."""
    text: bool
    """With a t."""
    binary: bool
    """With a b. Without either it is open which of the two is meant."""


def parse_mode(mode: str) -> OpenMode:
    """Raises as open()."""
    if not isinstance(mode, str):
        raise TypeError(f"open() argument 'mode' must be str, not {type(mode).__name__}")
    if len(set(mode)) != len(mode) or not set(mode) <= set("rwxabt+"):
        raise ValueError(f"invalid mode: {mode!r}")
    if {"b", "t"} <= set(mode):
        raise ValueError("can't have text and binary mode at once")
    kinds = set(mode) & set("rwxa")
    if len(kinds) != 1:
        raise ValueError("must have exactly one of create/read/write/append mode")
    return OpenMode(kinds.pop(), "+" in mode, "t" in mode, "b" in mode)


class Opens(ABC):
    """What can open files: the session."""

    @abstractmethod
    def _open_raw(self, name: Name, mode: str, ephemeral: bool) -> "DaxFile": ...

    @overload
    def open(
        self,
        name: Name,
        mode: TextMode,
        buffering: int | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        ephemeral: bool = False,
    ) -> io.TextIOWrapper: ...

    @overload
    def open(  # type: ignore[overload-overlap]  # a variable that is 0 has the type of a buffer size
        self,
        name: Name,
        mode: "PlainMode | OpenBinaryModeReading | OpenBinaryModeWriting | OpenBinaryModeUpdating" = "r",
        buffering: Literal[0] | None = None,
        encoding: None = None,
        errors: None = None,
        newline: None = None,
        *,
        ephemeral: bool = False,
    ) -> "DaxFile": ...

    @overload
    def open(
        self,
        name: Name,
        mode: "PlainReading | OpenBinaryModeReading",
        buffering: int,
        *,
        ephemeral: bool = False,
    ) -> io.BufferedReader: ...

    @overload
    def open(
        self,
        name: Name,
        mode: "PlainWriting | OpenBinaryModeWriting",
        buffering: int,
        *,
        ephemeral: bool = False,
    ) -> io.BufferedWriter: ...

    @overload
    def open(
        self,
        name: Name,
        mode: "PlainUpdating | OpenBinaryModeUpdating",
        buffering: int,
        *,
        ephemeral: bool = False,
    ) -> io.BufferedRandom: ...

    @overload
    def open(
        self,
        name: Name,
        mode: PlainMode = "r",
        buffering: int | None = None,
        *,
        encoding: str,
        errors: str | None = None,
        newline: str | None = None,
        ephemeral: bool = False,
    ) -> io.TextIOWrapper: ...

    @overload
    def open(
        self,
        name: Name,
        mode: str = "r",
        buffering: int | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        ephemeral: bool = False,
    ) -> Any: ...

    def open(
        self,
        name: Name,
        mode: str = "r",
        buffering: int | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        ephemeral: bool = False,
    ) -> "DaxFile | Layer":
        """Open a file. All arguments are as of the built-in open, but for the two that are left out most.

        mode: r, r+, w, w+, x, x+, a, a+, each also with b or t. With a t, or where encoding, errors or newline is
        given, it is a text file, an io.TextIOWrapper; else a binary one, also without b.
        buffering: None, of a binary file, is 0: a DaxFile, whose writes others see at once; of a text file it is -1.
        -1: a buffer of io.DEFAULT_BUFFER_SIZE bytes, and a number above 1: one of that many; a binary file is an
        io.BufferedReader, BufferedWriter or BufferedRandom then. 1: a text file is flushed at each newline. Others see
        what is in a buffer when it is flushed, full, or closed; closing the session flushes too. The DaxFile is
        the layer's `raw`, a text file's `buffer.raw`: `file.buffer.raw.mmap()`. Flush before what is in the buffer is
        to be seen there.
        encoding, errors, newline: of text. ephemeral: a file that this creates loses its name when its last user,
        handle or mapping, is gone, however that process ended.

        Raises FileNotFoundError, FileExistsError, OSError (EINVAL, ENAMETOOLONG: not a name), ValueError (the mode;
        arguments that do not go together; a NUL in the name), LookupError (no such encoding).

            >>> with session.open("table.csv", "wt", encoding="utf-8", newline="") as file:
            ...     csv.writer(file).writerow(["größe", 2])
            9
            >>> with session.open("table.csv", encoding="utf-8") as file:
            ...     list(csv.reader(file))
            [['größe', '2']]
        """
        parsed = parse_mode(mode)
        _check_types(encoding=encoding, errors=errors, newline=newline)
        size_bytes = None if buffering is None else operator.index(buffering)
        if not parsed.text and (parsed.binary or encoding is errors is newline is None):
            _check_binary(size_bytes, encoding=encoding, errors=errors, newline=newline)
            raw = self._open_raw(name, mode, ephemeral)
            return _buffered(raw, parsed, size_bytes) if size_bytes else raw
        if size_bytes == 0:
            raise ValueError("can't have unbuffered text I/O")
        encoding = io.text_encoding(encoding)
        raw = self._open_raw(name, mode, ephemeral)
        try:
            buffer = _buffered(raw, parsed, -1 if size_bytes is None else size_bytes)
            file = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=size_bytes == LINE_BUFFERING)
        except BaseException:
            raw.close()
            raise
        file.mode = mode  # type: ignore[misc]  # as the built-in open does
        raw.layers.insert(0, weakref.ref(file))
        return file


def _check_types(**arguments: str | None) -> None:
    for argument, value in arguments.items():
        if not isinstance(value, str | None):
            raise TypeError(f"open() argument {argument!r} must be str or None, not {type(value).__name__}")


def _check_binary(size_bytes: int | None, **arguments: str | None) -> None:
    for argument, value in arguments.items():
        if value is not None:
            article = "an" if argument[0] in "e" else "a"
            raise ValueError(f"binary mode doesn't take {article} {argument} argument")
    if size_bytes == LINE_BUFFERING:
        text = "line buffering (buffering=1) isn't supported in binary mode, the default buffer size will be used"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _buffered(
    raw: "DaxFile", mode: OpenMode, size_bytes: int
) -> io.BufferedReader | io.BufferedWriter | io.BufferedRandom:
    """size_bytes: as `buffering`, not 0."""
    if size_bytes < 0 or size_bytes == LINE_BUFFERING:
        size_bytes = io.DEFAULT_BUFFER_SIZE
    layer: Callable[..., Any]
    layer = io.BufferedRandom if mode.updating else io.BufferedReader if mode.kind == "r" else io.BufferedWriter
    try:
        buffer: io.BufferedReader | io.BufferedWriter | io.BufferedRandom = layer(raw, size_bytes)
    except BaseException:
        raw.close()  # no memory for so large a buffer
        raise
    raw.layers.append(weakref.ref(buffer))
    return buffer


def flush_layers(files: "Iterable[DaxFile]") -> None:
    """Write what the layers of these files hold back. What cannot be written is lost, as at the end of a process."""
    for file in files:
        for reference in file.layers:
            layer = reference()
            try:
                if layer is not None and not layer.closed:
                    layer.flush()
            except (ConnectionError, TimeoutError):
                return  # nor will the coordinator take the others
            except (OSError, ValueError, RuntimeError):
                pass  # a full device; a layer that was detached; one that this very thread is in the middle of

"""Session.open against the built-in open: the same statements, the same layers, results and mistakes."""

import csv
import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import dax_mp
from script_process import Script

Open = Callable[..., Any]

TEXT: Final = "größe\nsecond line\r\nthird\rlast without an end"
KINDS: Final = ["r", "r+", "w", "w+", "x", "x+", "a", "a+"]


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns, or what the built-in open's exception says."""
    try:
        return function()
    except OSError as error:
        return type(error), error.errno
    except Exception as error:
        return type(error), str(error)


@pytest.fixture
def both(session: dax_mp.Session, tmp_path: Path) -> tuple[Open, Open]:
    """(the built-in open in a directory, ours); a file `there` is in both places."""

    def real(name: str, *arguments: Any, **named: Any) -> Any:
        return open(tmp_path / name, *arguments, **named)

    for opened in (real, session.open):
        with opened("there", "wb") as file:
            file.write(TEXT.encode())
    return real, session.open


def same(both: tuple[Open, Open], statements: Callable[[Open], Any]) -> Any:
    real, ours = (outcome(partial(statements, opened)) for opened in both)
    assert ours == real
    return ours


def content(opened: Open, name: str) -> bytes:
    with opened(name, "rb") as file:
        data: bytes = file.read()
        return data


# --- which layer ---------------------------------------------------------------------------------------------------


def layer(opened: Open, name: str, mode: str, buffering: int) -> tuple[Any, ...]:
    with opened(name, mode, buffering) as file:
        inner = [file.buffer] if isinstance(file, io.TextIOWrapper) else []
        line_buffering = getattr(file, "line_buffering", None)
        can = file.readable(), file.writable(), file.seekable(), file.closed, file.isatty()
        named = os.path.basename(file.name), file.mode
        return type(file), [type(buffer) for buffer in inner], line_buffering, can, named, file.tell()


@pytest.mark.parametrize("name", ["there", "new"])
@pytest.mark.parametrize("buffering", [-1, 2, 5000, 1, -7])
@pytest.mark.parametrize("mode", [kind + letter for kind in KINDS for letter in "bt"])
def test_the_layer_is_the_built_in_opens(both: tuple[Open, Open], mode: str, buffering: int, name: str) -> None:
    if buffering == 1 and "b" in mode:
        for opened in both:
            with pytest.warns(RuntimeWarning, match="line buffering"):
                outcome(partial(layer, opened, name, mode, 1))
    else:
        same(both, lambda opened: layer(opened, name, mode, buffering))
    assert same(both, lambda opened: content(opened, name)) is not None


@pytest.mark.parametrize("mode", KINDS)
def test_a_file_is_raw_and_binary_unless_told_otherwise(session: dax_mp.Session, mode: str) -> None:
    """What one process writes, others see at once."""
    ways: list[Any] = [(mode,), (mode, 0), (mode + "b",), (mode + "b", None), (mode, None)]
    for number, how in enumerate(ways):
        name = f"file {number}"
        if mode[0] == "r":
            session.open(name, "w").close()
        with session.open(name, *how) as file:
            assert type(file) is dax_mp.DaxFile


def test_text_is_asked_for_by_any_argument_about_it(session: dax_mp.Session) -> None:
    session.open("file", "w").close()
    arguments: list[dict[str, Any]] = [{"encoding": "utf-8"}, {"errors": "replace"}, {"newline": ""}]
    for argument in arguments:
        with session.open("file", "r+", **argument) as file:
            assert type(file) is io.TextIOWrapper
            assert type(file.buffer) is io.BufferedRandom
            assert file.mode == "r+"


def test_no_argument_is_a_buffer_of_text_as_the_built_in_open_has_it(both: tuple[Open, Open]) -> None:
    same(both, lambda opened: layer(opened, "there", "rt", -1))
    same(both, lambda opened: text_attributes(opened("there", "rt")))


def text_attributes(file: io.TextIOWrapper) -> tuple[Any, ...]:
    with file:
        return file.encoding, file.errors, file.newlines, file.line_buffering, file.write_through


def test_types_are_those_that_the_overloads_say(session: dax_mp.Session) -> None:
    """For mypy as much as for the run."""
    raw: dax_mp.DaxFile = session.open("file", "w+")
    writer: io.BufferedWriter = session.open("file", "ab", -1)
    reader: io.BufferedReader = session.open("file", "rb", buffering=-1)
    both: io.BufferedRandom = session.open("file", "r+b", -1)
    some: io.BufferedReader = session.open("file", "rb", 1 << 16)
    text: io.TextIOWrapper = session.open("file", "r+t")
    encoded: io.TextIOWrapper = session.open("file", encoding="utf-8")
    kinds = [type(file).__name__ for file in (raw, writer, reader, both, some, text, encoded)]
    for file in (raw, writer, reader, both, some, text, encoded):
        file.close()
    assert kinds == ["DaxFile", "BufferedWriter", "BufferedReader", "BufferedRandom", "BufferedReader"] + 2 * [
        "TextIOWrapper"
    ]


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("rb", {"encoding": "utf-8"}),
        ("rb", {"errors": "strict"}),
        ("rb", {"newline": ""}),
        ("wb", {"encoding": "utf-8", "errors": "strict"}),
        ("rt", {"buffering": 0}),
        ("rt", {"newline": "x"}),
        ("rt", {"newline": 3}),
        ("rt", {"encoding": 3}),
        ("rt", {"errors": b"strict"}),
        ("rt", {"buffering": "1"}),
        ("rb", {"buffering": 1.0}),
        ("rt", {"encoding": "no such encoding"}),
        ("rt", {"encoding": "hex"}),
        ("rbt", {}),
        ("wtb", {"buffering": -1}),
        ("rtt", {}),
        ("rwt", {}),
        ("Ut", {}),
        (3, {}),
    ],
)
def test_mistakes_are_the_built_in_opens(
    session: dax_mp.Session, both: tuple[Open, Open], mode: Any, arguments: dict[str, Any]
) -> None:
    """The same exception in the same words; nothing stays open."""
    kind, _text = same(both, lambda opened: opened("there", mode, **arguments))
    assert issubclass(kind, ValueError | TypeError | LookupError)
    assert all(file.closed for file in session.channel.holdings.files())
    assert same(both, lambda opened: content(opened, "there")) == TEXT.encode()


def test_unbuffered_text_is_refused_before_anything_is_truncated(session: dax_mp.Session) -> None:
    with session.open("kept", "w") as file:
        file.write(b"kept")
    with pytest.raises(ValueError, match="unbuffered text"):
        session.open("kept", "wt", 0)
    assert content(session.open, "kept") == b"kept"


def test_a_buffer_too_large_for_memory_leaves_nothing_open(session: dax_mp.Session) -> None:
    session.open("file", "w").close()
    with pytest.raises(MemoryError):
        session.open("file", "rb", sys.maxsize)
    with pytest.raises(OverflowError):
        session.open("file", "rb", 1 << 80)
    assert all(file.closed for file in session.channel.holdings.files())


# --- the same statements -------------------------------------------------------------------------------------------


def read_as_text(opened: Open, newline: str | None) -> Any:
    with opened("there", "rt", encoding="utf-8", newline=newline) as file:
        lines = [file.readline()]
        cookie = file.tell()
        lines += list(file)
        file.seek(cookie)
        return lines, cookie, file.read(), file.newlines


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
def test_newlines_of_text(both: tuple[Open, Open], newline: str | None) -> None:
    same(both, lambda opened: read_as_text(opened, newline))

    def write(opened: Open) -> bytes:
        with opened("written", "w", encoding="utf-16", newline=newline) as file:
            file.write(TEXT)
            file.writelines(["a\n", "b\n"])
        return content(opened, "written")

    same(both, write)


@pytest.mark.parametrize("errors", [None, "strict", "replace", "ignore", "surrogateescape", "backslashreplace"])
def test_errors_of_text(both: tuple[Open, Open], errors: str | None) -> None:
    def statements(opened: Open) -> Any:
        with opened("bytes", "wb") as file:
            file.write(b"ok \xff\xfe ok")
        with opened("bytes", "rt", encoding="utf-8", errors=errors) as file:
            return file.read()

    same(both, statements)


def append_text(opened: Open) -> Any:
    with opened("there", "at+", encoding="utf-8") as file:
        places = [file.tell()]
        file.write(" more\n")
        places.append(file.tell())
        file.seek(0)
        return places, file.read()


def update_in_place(opened: Open) -> Any:
    with opened("there", "r+b", 16) as file:
        seen = [file.read(3), file.write(b"XYZ"), file.tell(), file.peek(1)[:1], file.read1(4)]
        seen += [file.seek(-4, os.SEEK_END), file.truncate(), file.tell(), file.seek(1), file.readline()]
        target = bytearray(5)
        seen += [file.readinto(target), target, file.seek(0), file.read()]
        return seen


def write_csv(opened: Open) -> Any:
    with opened("table", "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["name", "size"])
        writer.writeheader()
        writer.writerows({"name": f"größe {number}", "size": number} for number in range(3000))
    with opened("table", "rt", newline="", encoding="utf-8") as file:
        return content(opened, "table"), list(csv.reader(file))


def dump_json(opened: Open) -> Any:
    with opened("json", "wt", encoding="utf-8") as file:
        json.dump({"größe": list(range(5000))}, file, ensure_ascii=False)
    with opened("json", "rb", -1) as file:
        return json.load(file)


def compress(opened: Open) -> Any:
    with opened("gz", "wb", -1) as file, gzip.GzipFile("name", "wb", fileobj=file, mtime=0) as compressed:
        compressed.write(TEXT.encode() * 10_000)
    with opened("gz", "rb", -1) as file, gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        return content(opened, "gz"), text.read() == TEXT * 10_000


def zip_files(opened: Open) -> Any:
    with opened("zip", "w+b", -1) as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("one"), TEXT)
            archive.writestr(zipfile.ZipInfo("two"), bytes(100_000), zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(zipfile.ZipInfo("three"), "3")
        with zipfile.ZipFile(file) as archive:
            return content(opened, "zip"), archive.testzip(), archive.namelist(), archive.read("one")


def tar_files(opened: Open) -> Any:
    with opened("tar", "wb", -1) as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("nothing"))
    with opened("tar", "rb", -1) as file, tarfile.open(fileobj=file) as archive:
        return archive.getnames()


def pickle_to_a_file(opened: Open) -> Any:
    with opened("pickle", "wb", -1) as file:
        pickle.dump({"a": [1, 2, 3] * 1000}, file)
    with opened("pickle", "rb", -1) as file:
        return pickle.load(file)


def copy_between(opened: Open) -> Any:
    with opened("there", "rb", -1) as source, opened("copy", "wb", -1) as target:
        shutil.copyfileobj(source, target)
    return content(opened, "copy")


def flush_at_a_newline(opened: Open) -> Any:
    seen = []
    with opened("lines", "wt", 1, encoding="utf-8") as file:
        for text in ("no end", " yet\n", "next"):
            file.write(text)
            seen.append(content(opened, "lines"))
        file.reconfigure(line_buffering=False, write_through=True)
        file.write("!")
        file.flush()
    return seen, content(opened, "lines")


def detach(opened: Open) -> Any:
    file = opened("detached", "wt", encoding="utf-8")
    file.write("text")
    buffer = file.detach()
    gone = outcome(lambda: file.write("more"))
    buffer.write(b" and bytes")
    raw = buffer.detach()
    raw.write(b", raw")
    raw.close()
    return gone, type(buffer), raw.closed, content(opened, "detached")


def close_it(opened: Open) -> Any:
    file = opened("closed", "wt", encoding="utf-8")
    file.write("data")
    buffer, raw = file.buffer, file.buffer.raw
    file.close()
    file.close()
    calls = [file.read, file.flush, file.tell, lambda: file.write("x"), buffer.flush, lambda: raw.write(b"x")]
    return file.closed, buffer.closed, raw.closed, [outcome(call)[0] for call in calls], content(opened, "closed")


def wrong_direction(opened: Open) -> Any:
    seen = []
    for mode, calls in {"rt": ["write"], "wt": ["read"], "rb": ["write"], "wb": ["read", "readinto"]}.items():
        with opened("direction", "ab"), opened("direction", mode, -1) as file:
            for call in calls:
                argument: Any = "x" if mode == "rt" else bytearray(1) if call != "read" else 1
                seen.append(outcome(partial(getattr(file, call), argument))[0])
    return seen


@pytest.mark.parametrize(
    "statements",
    [
        append_text,
        update_in_place,
        write_csv,
        dump_json,
        compress,
        zip_files,
        tar_files,
        pickle_to_a_file,
        copy_between,
        flush_at_a_newline,
        detach,
        close_it,
        wrong_direction,
    ],
)
def test_the_same_statements_do_the_same(both: tuple[Open, Open], statements: Callable[[Open], Any]) -> None:
    result = same(both, statements)
    assert not (isinstance(result, tuple) and isinstance(result[0], type)), result


@pytest.mark.parametrize(("mode", "buffering"), [("r+b", -1), ("rb", -1), ("wb", -1), ("r+t", -1)])
def test_pickling_a_layer_is_refused_as_the_built_in_opens(both: tuple[Open, Open], mode: str, buffering: int) -> None:
    def statements(opened: Open) -> Any:
        with opened("there", mode, buffering) as file:
            return outcome(lambda: pickle.dumps(file))

    kind, text = same(both, statements)
    assert kind is TypeError
    assert "pickle" in text


# --- the file below ------------------------------------------------------------------------------------------------


def test_the_file_below_is_mapped(session: dax_mp.Session) -> None:
    with session.open("file", "w+t", encoding="utf-8") as text:
        text.write("one\n" * 10)
        text.flush()
        assert isinstance(text.buffer, io.BufferedRandom)
        raw = text.buffer.raw
        assert isinstance(raw, dax_mp.DaxFile)
        with raw.mmap() as mapping:
            mapping[0:3] = b"ONE"
        text.seek(0)
        assert text.readline() == "ONE\n"
        for file in (text, text.buffer, raw):
            with pytest.raises(io.UnsupportedOperation):
                file.fileno()


def test_a_full_device_is_heard_of_when_the_buffer_is_flushed(session: dax_mp.Session) -> None:
    file = session.open("large", "wb", 1 << 16)
    assert isinstance(file.raw, dax_mp.DaxFile)
    file.raw.fallocate(0, session.statfs().pages_free * session.page_size)
    file.raw.seek(0, os.SEEK_END)
    assert file.write(b"more") == 4
    with pytest.raises(OSError, match="No space left"):
        file.flush()
    session.unlink("large")
    file.raw.close()


def test_what_is_in_buffers_is_written_when_the_session_is_closed(daemon: dax_mp.Daemon) -> None:
    with dax_mp.connect(daemon.endpoint) as session:
        text = session.open("text", "wt", encoding="utf-8")
        buffered = session.open("buffered", "wb", -1)
        detached = session.open("detached", "wt", encoding="utf-8")
        text.write("text")
        buffered.write(b"buffered")
        buffer = detached.detach()
        buffer.write(b"detached")
    assert text.closed
    assert buffered.closed
    with dax_mp.connect(daemon.endpoint) as session:
        assert [content(session.open, name) for name in ("text", "buffered", "detached")] == [
            b"text",
            b"buffered",
            b"detached",
        ]


AT_THE_END: Final = """
import dax_mp, os, sys
session = dax_mp.connect(sys.argv[1])
file = session.open("at the end", "wt")
file.write("by the parent\\n")
if sys.argv[2:]:
    file.flush()
    if os.fork() == 0:
        file.write("by the child\\n")
        sys.exit(0)
    os.wait()
    session.stat("at the end")
"""


@pytest.mark.parametrize("forked", [False, True])
def test_what_is_in_buffers_is_written_at_the_end_of_the_process(
    session: dax_mp.Session, script: Script, forked: bool
) -> None:
    """As by the built-in open's files; of a fork's child too, which goes on where the parent was."""
    process = script(AT_THE_END, session.endpoint, *(["forked"] if forked else []))
    assert process.end()[0] == 0
    assert content(session.open, "at the end") == b"by the parent\n" + (b"by the child\n" if forked else b"")


def test_a_layer_that_is_forgotten_is_written_and_warned_of(session: dax_mp.Session) -> None:
    file = session.open("file", "wb", -1)
    file.write(b"data")
    with pytest.warns(ResourceWarning, match="unclosed file <_io.BufferedWriter name='file'>"):
        del file
    assert content(session.open, "file") == b"data"

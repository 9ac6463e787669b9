"""The times of files, as users see them: by the coordinator's clock, in nanoseconds."""

import errno
import json
import time

import pytest

import dax_mp
from command_line import CommandLine


def after(moment_ns: int) -> int:
    """A later moment, for the clock that files go by."""
    while (now_ns := time.time_ns()) <= moment_ns:
        pass
    return now_ns


def test_mtime_of_a_store_through_a_mapping(session: dax_mp.Session) -> None:
    """xfstests generic/080 and 215: at the write fault, and at msync."""
    with session.open("file", "x+") as file:
        file.truncate(4096)
        with file.mmap() as mapping:
            before_ns = after(file.stat().mtime_ns)
            mapping[0] = 1
            stat = file.stat()
            assert stat.mtime_ns == stat.ctime_ns >= before_ns
            between_ns = after(stat.mtime_ns)
            mapping[0] = 2
            mapping.flush()
            assert file.stat().mtime_ns >= between_ns
            assert file.stat().ctime_ns >= between_ns


def test_times_are_of_now(session: dax_mp.Session) -> None:
    before_ns = time.time_ns()
    with session.open("file", "x+") as file:
        file.write(b"data")
        stat = session.stat("file")
        made_ns = stat.atime_ns
        assert before_ns <= made_ns <= stat.mtime_ns == stat.ctime_ns <= time.time_ns()
        after(stat.mtime_ns)
        assert file.pread(4, 0) == b"data"
        assert file.stat().atime_ns > stat.mtime_ns
        assert file.stat().mtime_ns == stat.mtime_ns


def test_utime(session: dax_mp.Session) -> None:
    session.open("file", "x").close()
    session.utime("file", ns=(1_000_000_001, 2_000_000_002))
    stat = session.stat("file")
    assert (stat.atime_ns, stat.mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert stat.ctime_ns > stat.mtime_ns
    session.utime("file")
    assert session.stat("file").atime_ns == session.stat("file").mtime_ns > stat.mtime_ns
    for times in ((-1, 0), (0, 1 << 63)):
        with pytest.raises(OSError) as raised:
            session.utime("file", ns=times)
        assert raised.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        session.utime("other")


def test_the_command_line_shows_them(session: dax_mp.Session) -> None:
    session.open("file", "x").close()
    session.utime("file", ns=(1_000_000_001, 86_400 * 10**9 + 5))
    command = CommandLine(session.endpoint)
    command.environment["TZ"] = "UTC"
    fields = json.loads(command.succeed("stat", "--json", "file"))
    assert (fields["atime_ns"], fields["mtime_ns"]) == (1_000_000_001, 86_400 * 10**9 + 5)
    text = command.succeed("stat", "file").decode()
    assert "1970-01-01 00:00:01.000000001 +0000" in text
    assert "1970-01-02 00:00:00.000000005 +0000" in text


def test_extents_with_those_that_are_unwritten(session: dax_mp.Session) -> None:
    page = session.page_size
    with session.open("file", "x+") as file:
        file.fallocate(0, 4 * page)
        file.pwrite(b"x", page)
        written = [(extent.offset_bytes, extent.length_bytes, extent.unwritten) for extent in file.extents()]
        assert written == [(page, page, False)]
        both = [(extent.offset_bytes, extent.length_bytes, extent.unwritten) for extent in file.extents(unwritten=True)]
        assert both == [(0, page, True), (page, page, False), (2 * page, 2 * page, True)]

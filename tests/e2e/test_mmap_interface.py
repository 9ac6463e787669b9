"""A mapping beside mmap.mmap: the same statements over both, with the same results, mistakes and contents."""

import errno
import io
import mmap
import os
import pickle
import random
import tempfile
from collections.abc import Iterator
from typing import Any, Final

import pytest

import dax_mp
from side_by_side import outcomes

PAGE: Final = os.sysconf("SC_PAGESIZE")
LINES: Final = b"".join(b"line %d of the text\n" % number for number in range(1000))
CONTENTS: Final = LINES[: 2 * PAGE + 1000]
"""Not whole pages, and no newline at the end."""


class Index:
    """A number to who asks for its index."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number


NAMES: Final[dict[str, Any]] = {
    "PAGE": PAGE,
    "SIZE": len(CONTENTS),
    "I": Index,
    "mmap": mmap,
    "io": io,
    "os": os,
    **{name: value for name, value in vars(mmap).items() if name.startswith(("ACCESS_", "MADV_", "MAP_", "PROT_"))},
}


class Twin:
    """A file here and its like in tmpfs; `map` maps either with the arguments of mmap.mmap."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.names = {**NAMES, "map": self.map, "set_size": file.truncate}
        file.write(CONTENTS)
        file.seek(0)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def run(self, text: str) -> list[Any]:
        return outcomes(text.replace("; ", "\n"), self.names)

    def contents(self) -> bytes:
        self.file.seek(0)
        data: bytes = self.file.read()
        return data


class Ours(Twin):
    def map(self, *args: Any, **kwargs: Any) -> Any:
        """Of arguments by position, mmap.mmap has flags and prot before the rest, and a file's method has no fileno."""
        return self.file.mmap(*args, **kwargs)


class Theirs(Twin):
    def map(self, length: Any = 0, **kwargs: Any) -> Any:
        return mmap.mmap(self.file.fileno(), length, **kwargs)


@pytest.fixture
def ours(session: dax_mp.Session) -> Iterator[Ours]:
    with session.open("file", "x+") as file:
        twin = Ours(file)
        yield twin
        twin.names.clear()


@pytest.fixture
def theirs() -> Iterator[Theirs]:
    with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
        twin = Theirs(file)
        yield twin
        twin.names.clear()


def compare(ours: Ours, theirs: Theirs, text: str) -> None:
    for statement, here, there in zip(text.split("; "), ours.run(text), theirs.run(text), strict=True):
        if statement.startswith("m.seek(") and there == ("NoneType", None):
            assert here[0] == "int", statement  # as from Python 3.13 on
        else:
            assert here == there, statement
    assert ours.contents() == theirs.contents()


def test_nothing_is_missing() -> None:
    """Every name that mmap.mmap has, under the Python that runs."""
    assert set(dir(mmap.mmap)) - set(dir(dax_mp.Mapping)) == set()
    for name in ("ACCESS_DEFAULT", "ACCESS_READ", "ACCESS_WRITE", "ACCESS_COPY"):
        assert getattr(dax_mp, name) == getattr(mmap, name)


# --- making one -------------------------------------------------------------------------------------------------------

MAKING: Final = """
map()
map(0)
map(1)
map(length=PAGE)
map(SIZE)
map(SIZE + 1)
map(4 * PAGE)
map(I(7))
map(-1)
map(-2**63)
map(2**63 - 1)
map(2**63)
map(2**64)
map(-2**63 - 1)
map(2**63 - 1, offset=PAGE)
map(2**63 - PAGE, offset=PAGE)
map(1.0)
map('1')
map(None)
map(True)
map(0, offset=PAGE)
map(0, offset=2 * PAGE)
map(0, offset=3 * PAGE)
map(0, offset=SIZE)
map(0, offset=1)
map(10, offset=1)
map(PAGE, offset=2 * PAGE)
map(1000, offset=2 * PAGE)
map(1001, offset=2 * PAGE)
map(1, offset=3 * PAGE)
map(0, offset=-1)
map(0, offset=-PAGE)
map(-1, offset=-1)
map(-1, offset=1)
map(SIZE + 1, offset=1)
map(0, offset=2**62)
map(0, offset=2**63 - 1)
map(0, offset=2**63)
map(0, offset=-2**63)
map(0, offset=-2**63 - 1)
map(0, offset=2**63 - PAGE)
map(1, offset=2**63 - PAGE)
map(0, offset=1.5)
map(0, offset='0')
map(0, offset=None)
map(0, offset=I(PAGE))
map(0, access=ACCESS_DEFAULT)
map(0, access=ACCESS_READ)
map(0, access=ACCESS_WRITE)
map(0, access=ACCESS_COPY)
map(0, access=4)
map(0, access=-1)
map(0, access=2**31)
map(0, access=2**63)
map(0, access='r')
map(0, access=None)
map(0, access=1.0)
map(-1, access=9)
map(0, access=9, offset=1)
map(0, flags=MAP_SHARED)
map(0, flags=MAP_PRIVATE)
map(0, flags=MAP_SHARED | MAP_POPULATE)
map(0, flags=MAP_PRIVATE | MAP_POPULATE)
map(0, flags=MAP_SHARED | MAP_DENYWRITE)
map(0, flags=0)
map(0, flags=MAP_SHARED | MAP_PRIVATE)
map(0, flags=-1)
map(0, flags=2**31)
map(0, flags='x')
map(0, flags=None)
map(0, prot=PROT_READ)
map(0, prot=PROT_WRITE)
map(0, prot=PROT_READ | PROT_WRITE)
map(0, prot=2**31)
map(0, prot='x')
map(0, prot=None)
map(0, prot=None, flags=None)
map(0, flags=MAP_PRIVATE, prot=PROT_READ)
map(0, flags=MAP_PRIVATE, prot=PROT_READ | PROT_WRITE)
map(0, flags=MAP_PRIVATE, access=ACCESS_READ)
map(0, flags=MAP_PRIVATE, access=ACCESS_WRITE)
map(0, flags=MAP_PRIVATE, access=ACCESS_COPY)
map(0, flags=MAP_PRIVATE, access=ACCESS_DEFAULT)
map(0, flags=MAP_SHARED, access=ACCESS_READ)
map(0, flags=MAP_SHARED, access=ACCESS_WRITE)
map(0, flags=MAP_SHARED, access=ACCESS_COPY)
map(0, prot=PROT_READ, access=ACCESS_READ)
map(0, prot=PROT_READ, access=ACCESS_WRITE)
map(0, prot=PROT_READ | PROT_WRITE, access=ACCESS_READ)
map(0, prot=PROT_READ, flags=MAP_SHARED, access=9)
map(0, flags=0, access=9)
map(0, unknown=1)
"""


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


@pytest.mark.parametrize("text", lines(MAKING))
def test_making_one(ours: Ours, theirs: Theirs, text: str) -> None:
    """The same length, and the same rights; or the same mistake, after which nothing is mapped."""
    compare(ours, theirs, f"m = {text}; len(m); m[:]; m[0] = 255; m[-1]; m.write(b'x')")
    if "MAP_PRIVATE" not in text:
        compare(ours, theirs, "m.resize(PAGE); len(m); m[:]")
    ours.names.clear()
    assert ours.file.stat().mappers == []


EMPTY: Final = """
map()
map(0)
map(1)
map(0, offset=PAGE)
map(0, offset=1)
map(-1)
map(0, access=ACCESS_READ)
map(0, access=9)
map(0, flags=0)
"""


@pytest.mark.parametrize("text", lines(EMPTY))
def test_making_one_of_an_empty_file(ours: Ours, theirs: Theirs, text: str) -> None:
    compare(ours, theirs, f"set_size(0); {text}")


# --- using one --------------------------------------------------------------------------------------------------------

INDEXES: Final = """
m[0]
m[-1]
m[77]
m[SIZE - 1]
m[SIZE]
m[-SIZE]
m[-SIZE - 1]
m[2**63]
m[-2**63]
m[-2**64]
m[I(5)]
m[True]
m[1.0]
m['0']
m[None]
m[0, 1]
m[...]
m[:]
m[5:20]
m[20:5]
m[5:5]
m[-10:]
m[:-10]
m[-10:-20]
m[PAGE - 3:PAGE + 3]
m[SIZE:]
m[SIZE + 5:SIZE + 10]
m[:2**70]
m[-2**70:10]
m[::3]
m[::-1]
m[::-3]
m[100:5:-7]
m[5:100:-7]
m[1::PAGE]
m[-1:0:-PAGE]
m[::2**70]
m[::-2**70]
m[::0]
m[1.0:]
m['a':]
m[I(3):I(9):I(2)]
m[0] = 255
m[0] = 0
m[-1] = 65
m[0] = I(7)
m[0] = True
m[5] = 256
m[5] = -1
m[5] = 2**70
m[5] = b'x'
m[5] = 'x'
m[5] = 1.0
m[5] = None
m[SIZE] = 1
m[-SIZE - 1] = 1
m[1.0] = 1
m['0'] = 1
m[10:15] = b'hello'
m[10:15] = bytearray(b'hello')
m[10:15] = memoryview(b'hello')
m[10:15] = memoryview(b'h.e.l.l.o.')[::2]
m[10:15] = b'hell'
m[10:15] = b'hello!'
m[10:15] = b''
m[10:10] = b''
m[10:10] = b'x'
m[15:10] = b''
m[15:10] = b'x'
m[PAGE - 2:PAGE + 3] = b'hello'
m[:] = bytes(SIZE)
m[:] = bytes(SIZE - 1)
m[0:20:4] = b'abcde'
m[0:20:4] = b'abcd'
m[20:0:-4] = b'abcde'
m[::-1] = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)
m[1::PAGE] = b'abc'
m[1::PAGE] = b'ab'
m[10:15] = 'hello'
m[10:15] = 5
m[10:15] = None
m[10:15] = [1, 2, 3, 4, 5]
m[::0] = b''
m[5:10] = m[0:5]
m[0:PAGE] = m[PAGE:2 * PAGE]
del m[0]
del m[0:5]
del m[1.0]
del m[SIZE]
len(m)
bool(m)
m.__len__()
list(m)[:30]
list(m) == [bytes([byte]) for byte in m[:]]
[type(item) for item in m][:3]
next(iter(m))
b'l' in m
b'\\xff' in m
b'line' in m
108 in m
10 in m
'l' in m
None in m
b'' in m
next(reversed(m))
bytes(m)
bytearray(m)[:9]
bytes(memoryview(m)[5:9])
memoryview(m).format, memoryview(m).nbytes, memoryview(m).readonly, memoryview(m).c_contiguous
hash(m) == hash(m)
m == m
m != m
m == m[:]
m < m
m + m
m * 2
m @ m
sorted(m)[:3]
m.closed
m.closed = True
m.__enter__() is m
b'abc'.join([m])
b''.join([m]) == m[:]
io.BytesIO(m).read(9)
b'x' + m
int(m)
str(m, 'latin')[:9]
"""

BACKWARDS: Final = """
m.find(b'', 10, 5)
m.rfind(b'', 10, 5)
"""
"""Python 3.11.2 finds nothing at an end of a range that has none; later ones do not find it, nor do we."""

METHODS: Final = f"""
{BACKWARDS if mmap.mmap(-1, 20).find(b"", 10, 5) == -1 else ""}
m.tell()
m.tell(1)
m.read()
m.read(None)
m.read(-1)
m.read(-2**63)
m.read(-2**63 - 1)
m.read(2**63 - 1)
m.read(2**63)
m.read(0)
m.read(5); m.tell(); m.read(5); m.tell()
m.read(SIZE + 1); m.tell(); m.read(1); m.read(); m.read(0); m.read(-1)
m.read(I(3))
m.read('3')
m.read(3.0)
m.read(1, 2)
m.read(n=3)
m.seek(SIZE - 5); m.read(100); m.tell()
m.read_byte(); m.read_byte(); m.tell()
m.seek(SIZE - 1); m.read_byte(); m.read_byte(); m.tell()
m.read_byte(1)
m.readline(); m.tell(); m.readline(); m.tell()
m.seek(3); m.readline()
m.seek(-5, 2); m.readline(); m.readline(); m.tell()
m.seek(PAGE - 4); m.readline(); m.readline()
m.readline(3)
m.seek(0)
m.seek(10); m.tell()
m.seek(SIZE); m.tell()
m.seek(SIZE + 1); m.tell()
m.seek(-1); m.tell()
m.seek(5); m.seek(-1); m.tell()
m.seek(5, 0); m.tell()
m.seek(5); m.seek(3, 1); m.tell()
m.seek(5); m.seek(-5, 1); m.tell()
m.seek(5); m.seek(-6, 1); m.tell()
m.seek(5); m.seek(SIZE, 1); m.tell()
m.seek(5); m.seek(2**63 - 1, 1); m.tell()
m.seek(0, 2); m.tell()
m.seek(-1, 2); m.tell()
m.seek(-SIZE, 2); m.tell()
m.seek(-SIZE - 1, 2); m.tell()
m.seek(1, 2); m.tell()
m.seek(2**63 - 1, 2)
m.seek(-2**63, 2)
m.seek(2**63)
m.seek(-2**63 - 1)
m.seek(2**63 - 1)
m.seek(0, os.SEEK_DATA); m.tell()
m.seek(0, os.SEEK_HOLE); m.tell()
m.seek(0, 5)
m.seek(0, -1)
m.seek(0, 2**31)
m.seek(0, 2**63)
m.seek(0, '0')
m.seek(0, None)
m.seek(0, 1.0)
m.seek(I(4), I(0)); m.tell()
m.seek('0')
m.seek(None)
m.seek(1.0)
m.seek()
m.seek(0, 0, 0)
m.seek(pos=0)
m.write(b'hello'); m.tell(); m[:10]
m.write(b''); m.tell()
m.write(bytearray(b'hello')); m.tell()
m.write(memoryview(b'hello')); m.tell()
m.write(memoryview(b'h.e.l.l.o.')[::2]); m.tell()
m.write(memoryview(b'12345678').cast('I')); m.tell()
m.write('hello'); m.tell()
m.write(5)
m.write(None)
m.write([1])
m.write()
m.write(b'a', b'b')
m.seek(SIZE - 3); m.write(b'abc'); m.tell(); m.write(b''); m.write(b'x')
m.seek(SIZE - 3); m.write(b'abcd'); m.tell()
m.seek(PAGE - 3); m.write(b'across'); m.tell()
m.write(bytes(SIZE)); m.tell(); m.write(b'x')
m.write(m[5:10])
m.write_byte(65); m.write_byte(66); m.tell(); m[:4]
m.write_byte(0)
m.write_byte(255)
m.write_byte(256); m.tell()
m.write_byte(-1); m.tell()
m.write_byte(2**70)
m.write_byte(-2**70)
m.write_byte(I(65))
m.write_byte(True)
m.write_byte(65.0)
m.write_byte(b'A')
m.write_byte('A')
m.write_byte(None)
m.write_byte()
m.seek(SIZE); m.write_byte(65); m.tell()
m.seek(SIZE); m.write_byte(256); m.tell()
m.seek(SIZE - 1); m.write_byte(65); m.tell()
m.find(b'line')
m.find(b'line', 1)
m.find(b'of'); m.seek(30); m.find(b'of'); m.tell()
m.find(b'line 99 ')
m.find(b'none such')
m.find(b'')
m.find(b'', 5)
m.find(b'', SIZE)
m.find(b'', SIZE + 1)
m.seek(7); m.find(b'')
m.find(b'line', 5, 10)
m.find(b'line', 20, 24)
m.find(b'line', 20, 25)
m.find(b'line', -100)
m.find(b'line', -100, -50)
m.find(b'line', -100, -99)
m.find(b'line', -2**62)
m.find(b'line', 0, 2**62)
m.find(b'line', 2**62)
m.find(b'line', 0, -2**62)
m.find(b'line', 0, SIZE)
m.find(b'line', 100, 50)
m.find(b'line', 2**63)
m.find(b'line', 0, 2**63)
m.find(b'line', -2**63 - 1)
m.find(b'line', 1.0)
m.find(b'line', '1')
m.find(b'line', I(1), I(100))
m.find(m[PAGE - 5:PAGE + 5])
m.find(m[-30:])
m.find(m[:])
m.find(bytes(SIZE + 1))
m.find(bytearray(b'of'))
m.find(memoryview(b'of'))
m.find('line')
m.find(108)
m.find(None)
m.find()
m.find(b'a', 1, 2, 3)
m.find(sub=b'a')
m.rfind(b'line')
m.rfind(b'line', 1)
m.rfind(b'line', 0, 100)
m.rfind(b'line', 0, 20)
m.rfind(b'line', 5, 24)
m.rfind(b'line', 5, 25)
m.rfind(b'line', -100)
m.rfind(b'line', -100, -50)
m.rfind(b'line', 0, -SIZE)
m.rfind(b'line', 0, -2**62)
m.rfind(b'line', -2**62, 2**62)
m.rfind(b'none such')
m.rfind(b'')
m.rfind(b'', 5)
m.rfind(b'', 5, 10)
m.rfind(b'', SIZE + 1)
m.seek(SIZE - 10); m.rfind(b'line'); m.seek(SIZE); m.rfind(b'l'); m.rfind(b'')
m.rfind(m[PAGE - 5:PAGE + 5])
m.rfind(m[:])
m.rfind(b'line', 2**63)
m.rfind('line')
m.rfind()
m.move(0, 100, 50)
m.move(100, 0, 50)
m.move(10, 0, 100)
m.move(0, 10, 100)
m.move(0, PAGE - 10, PAGE)
m.move(PAGE, 0, PAGE + 1000)
m.move(PAGE, 0, PAGE + 1001)
m.move(0, 0, SIZE)
m.move(0, 0, 0)
m.move(SIZE, SIZE, 0)
m.move(SIZE + 1, 0, 0)
m.move(0, SIZE, 1)
m.move(SIZE, 0, 1)
m.move(-1, 0, 1)
m.move(0, -1, 1)
m.move(0, 0, -1)
m.move(2**62, 0, 2**62)
m.move(0, 2**63 - 1, 2**63 - 1)
m.move(2**63, 0, 1)
m.move(0, 0, 1.0)
m.move('0', 0, 0)
m.move(0, 1)
m.move(I(0), I(5), I(5))
m.size()
m.size(1)
m.seek(5); m.resize(PAGE); m.size(); len(m); m.tell()
m.seek(-1, 2); m.resize(PAGE); m.tell(); m.read(); m.read(3); m.read_byte(); m.write(b''); m.write(b'x'); m.readline()
m.seek(-1, 2); m.resize(PAGE); m.write_byte(1); m.find(b'l'); m.rfind(b'l'); m.seek(0, 1); m.seek(-PAGE, 1)
m.resize(5 * PAGE); m.size(); len(m); m[SIZE:] == bytes(5 * PAGE - SIZE); m[-1] = 1; m[-1]
m.resize(100); m.size(); m[:]; m.resize(SIZE); m[90:110]
m.resize(SIZE)
m.resize(1); m[:]
m.resize(-1)
m.resize(-2**63)
m.resize(2**63)
m.resize(-2**63 - 1)
m.resize(1.0)
m.resize('1')
m.resize(None)
m.resize(I(PAGE)); len(m)
m.resize()
m.resize(1, 2)
m.resize(3 * PAGE); m.resize(PAGE); m.resize(3 * PAGE); m[PAGE:] == bytes(2 * PAGE)
m.flush()
m.flush(0)
m.flush(0, 0)
m.flush(0, PAGE)
m.flush(0, SIZE)
m.flush(0, SIZE + 1)
m.flush(PAGE)
m.flush(PAGE, PAGE)
m.flush(2 * PAGE, 1000)
m.flush(2 * PAGE, 1001)
m.flush(1)
m.flush(1, 1)
m.flush(-1)
m.flush(0, -1)
m.flush(-1, 1)
m.flush(SIZE)
m.flush(SIZE + 1)
m.flush(3 * PAGE)
m.flush(3 * PAGE, 0)
m.flush(2**63)
m.flush(0, 2**63)
m.flush(2**63 - 1, 2**63 - 1)
m.flush(-2**63)
m.flush(1.0)
m.flush('0')
m.flush(None)
m.flush(I(0), I(PAGE))
m.flush(0, 0, 0)
m.flush(offset=0)
m.madvise(MADV_NORMAL)
m.madvise(MADV_RANDOM)
m.madvise(MADV_SEQUENTIAL)
m.madvise(MADV_WILLNEED)
m.madvise(MADV_WILLNEED, PAGE, PAGE)
m.madvise(MADV_DONTNEED); m[:9]
m[0] = 5; m.madvise(MADV_DONTNEED); m[0]
m[0] = 5; m.madvise(MADV_DONTNEED, 0, 3); m[0]
m[0] = 5; m.madvise(MADV_DONTNEED, 0, 0); m[0]
m[-1] = 5; m.madvise(MADV_DONTNEED, 2 * PAGE, 1); m[-1]
m[PAGE] = 5; m[0] = 5; m.madvise(MADV_DONTNEED, PAGE, PAGE); m[PAGE]; m[0]
m.madvise(MADV_DONTNEED, 0, 5); m[:9]
m.madvise(MADV_HUGEPAGE)
m.madvise(MADV_NOHUGEPAGE)
m.madvise(MADV_DONTFORK); m.madvise(MADV_DOFORK)
m.madvise(MADV_DONTDUMP); m.madvise(MADV_DODUMP)
m.madvise(MADV_MERGEABLE)
m.madvise(MADV_UNMERGEABLE)
m.madvise(MADV_NORMAL, 0)
m.madvise(MADV_NORMAL, 0, 0)
m.madvise(MADV_NORMAL, 0, SIZE)
m.madvise(MADV_NORMAL, 0, SIZE + PAGE)
m.madvise(MADV_NORMAL, PAGE, 2**62)
m.madvise(MADV_NORMAL, 2 * PAGE)
m.madvise(MADV_NORMAL, 1)
m.madvise(MADV_NORMAL, -1)
m.madvise(MADV_NORMAL, SIZE)
m.madvise(MADV_NORMAL, SIZE - 1)
m.madvise(MADV_NORMAL, 0, -1)
m.madvise(MADV_NORMAL, -1, -1)
m.madvise(MADV_NORMAL, PAGE, 2**63 - 1)
m.madvise(MADV_NORMAL, 0, 2**63 - 1)
m.madvise(MADV_NORMAL, 2**63)
m.madvise(MADV_NORMAL, 0, 2**63)
m.madvise(-1)
m.madvise(12345)
m.madvise(12345, 1)
m.madvise(12345, SIZE)
m.madvise(12345, 0, 0)
m.madvise(2**31)
m.madvise(2**63)
m.madvise('x')
m.madvise(1.0)
m.madvise(None)
m.madvise(MADV_NORMAL, None)
m.madvise(MADV_NORMAL, 1.0)
m.madvise(MADV_NORMAL, '0')
m.madvise(I(MADV_NORMAL), I(0), I(PAGE))
m.madvise()
m.madvise(MADV_NORMAL, 0, PAGE, 0)
m.madvise(option=MADV_NORMAL)
getattr(m, 'seekable', lambda: True)()
m.close(); m.closed; m.close()
m.close(1)
v = memoryview(m); m.close(); m.closed; v.release(); m.close(); m.closed
v = memoryview(m); w = v[5:9]; v.release(); m.close(); w.release(); m.close()
v = memoryview(m); m.__exit__(None, None, None); m.closed; del v; m.close()
m.__exit__(); m.closed
m.__exit__(1, 2, 3); m.closed
m.__exit__(1, 2, 3, 4); m.closed
with m as n: n is m
m.closed; m[0]
io.TextIOWrapper(io.BytesIO(m)).readline()
"""

CLOSED: Final = """
m.closed
m[0]
m[0:5]
m[5:5]
m['x']
m[0] = 1
m[0:5] = b'hello'
m[0] = 'x'
del m[0]
len(m)
bool(m)
list(m)
b'l' in m
memoryview(m)
bytes(m)
m.tell()
m.seek(0)
m.seek('x')
m.seek(0, 9)
m.read()
m.read('x')
m.read_byte()
m.readline()
m.write(b'x')
m.write('x')
m.write_byte(1)
m.write_byte('x')
m.find(b'x')
m.find('x')
m.rfind(b'x')
m.move(0, 1, 2)
m.move('0', 1, 2)
m.size()
m.resize(PAGE)
m.resize('x')
m.resize(-1)
m.flush()
m.flush('x')
m.madvise(MADV_NORMAL)
m.madvise('x')
m.madvise(12345)
m.close()
m.__enter__()
m.__exit__(None, None, None)
with m: pass
m == m
repr(m) == ''
getattr(m, 'seekable', lambda: True)()
"""


@pytest.mark.parametrize("text", lines(INDEXES + METHODS))
def test_shared(ours: Ours, theirs: Theirs, text: str) -> None:
    compare(ours, theirs, f"m = map(); {text}; m[:]")


@pytest.mark.parametrize("text", lines(INDEXES + METHODS))
def test_read_only(ours: Ours, theirs: Theirs, text: str) -> None:
    compare(ours, theirs, f"m = map(access=ACCESS_READ); {text}; m[:]")


@pytest.mark.parametrize("text", lines(INDEXES + METHODS))
def test_private(ours: Ours, theirs: Theirs, text: str) -> None:
    compare(ours, theirs, f"m = map(access=ACCESS_COPY); {text}; m[:]")


REMOVE: Final = """
m.madvise(MADV_REMOVE); m[:9]; m[-9:]
m.madvise(MADV_REMOVE, PAGE); m[PAGE - 5:PAGE + 5]
m.madvise(MADV_REMOVE, PAGE, PAGE); m[PAGE - 5:PAGE + 5]; m[2 * PAGE - 5:2 * PAGE + 5]
m.madvise(MADV_REMOVE, PAGE, 1); m[PAGE - 5:PAGE + 5]; m[2 * PAGE - 5:2 * PAGE + 5]
m.madvise(MADV_REMOVE, PAGE, 0); m[PAGE - 5:PAGE + 5]
m.madvise(MADV_REMOVE, 1)
"""


@pytest.mark.parametrize("access", ["ACCESS_WRITE", "ACCESS_COPY"])
@pytest.mark.parametrize("text", lines(REMOVE))
def test_madv_remove(ours: Ours, theirs: Theirs, text: str, access: str) -> None:
    """A hole is punched, through the mapping; and what a private mapping shows is not its to punch."""
    compare(ours, theirs, f"m = map(access={access}); {text}; m[:]")


def test_searches_in_something_long(session: dax_mp.Session) -> None:
    """They go through it in pieces: what lies across the border of two is found all the same."""
    data = bytearray(random.Random(5).randbytes(3 << 20))
    for place in (1 << 20, 2 << 20):
        data[place - 3 : place + 3] = b"border"
    with session.open("long", "x+") as file:
        file.write(data)
        with file.mmap() as mapping:
            for needle in (b"border", b"b", b"r", bytes(data[1000 : 1000 + (1 << 20) + 5000]), b"none"):
                assert mapping.find(needle) == data.find(needle)
                assert mapping.find(needle, (1 << 20) - 2) == data.find(needle, (1 << 20) - 2)
                assert mapping.rfind(needle) == data.rfind(needle)
                assert mapping.rfind(needle, 0, (2 << 20) + 2) == data.rfind(needle, 0, (2 << 20) + 2)


@pytest.mark.parametrize("text", lines(CLOSED))
def test_closed(ours: Ours, theirs: Theirs, text: str) -> None:
    compare(ours, theirs, f"m = map(); m.close(); {text}")


# --- what differs, and why --------------------------------------------------------------------------------------------

DIFFERENCES: Final[dict[str, tuple[str, Any]]] = {
    # None is as good as an argument that is left out, everywhere, as later Pythons have it for some.
    "find": ("m.find(b'line', None, None), m.rfind(b'line 0', 0, None)", ("tuple", (0, 0))),
    "flush": ("m.flush(0, None)", ("NoneType", None)),
    "madvise": ("m.madvise(MADV_NORMAL, 0, None)", ("NoneType", None)),
    # Advice that means nothing here is no mistake; the kernel refuses MADV_FREE for files.
    "MADV_FREE": ("m.madvise(MADV_FREE)", ("NoneType", None)),
    # As madvise(2) says; newer kernels look at the rights of the file instead.
    "MADV_REMOVE of a read-only mapping": (
        "map(access=ACCESS_READ).madvise(MADV_REMOVE)",
        ("raised", "PermissionError", errno.EACCES),
    ),
    # A resize that fails changes nothing; mmap.mmap has truncated the file by then.
    "resize to nothing": ("m.resize(0), len(m)", ("raised", "OSError", errno.EINVAL)),
    "resize beyond all": ("m.resize(2**63 - 1)", ("raised", "OSError", errno.ENOMEM)),
    # Address space is reserved ahead, so that nobody has to let go of views for it; mmap.mmap raises BufferError.
    "resize with a view": (
        "[len(view) for view in [memoryview(m)] if not m.resize(PAGE)] and len(m)",
        ("int", PAGE),
    ),
    # A private mapping's length is its own; mmap.mmap's is shared when flags made it, and ACCESS_COPY did not.
    "resize a private mapping": ("map(flags=MAP_PRIVATE).resize(PAGE)", ("raised", "TypeError")),
    # Programs do not run from a device of data, as from a file system mounted noexec; and what has a file has a file.
    "PROT_EXEC": ("map(prot=4)", ("raised", "PermissionError", errno.EPERM)),
    "trackfd": (
        "map(trackfd=False).size()",
        ("raised", "ValueError"),
    ),
    # The flags whose meaning is not kept. The kernel does not know MAP_SYNC for memory; mmap.mmap passes the others on.
    "MAP_LOCKED": ("map(flags=MAP_SHARED | 0x2000)", ("raised", "OSError", errno.EOPNOTSUPP)),
    "MAP_GROWSDOWN": ("map(flags=MAP_SHARED | 0x100)", ("raised", "OSError", errno.EOPNOTSUPP)),
    "MAP_SYNC": ("map(flags=MAP_SHARED | 0x80000)", ("raised", "OSError", errno.EOPNOTSUPP)),
    "MAP_ANONYMOUS": ("map(flags=MAP_SHARED | MAP_ANONYMOUS)", ("raised", "OSError", errno.EINVAL)),
}


@pytest.mark.parametrize("flag", [0x10, 0x100000, 0x40, 0x40000, 0x4000000, 1 << 30])
def test_mmap_flags_whose_meaning_is_not_kept_are_refused(session: dax_mp.Session, flag: int) -> None:
    """MAP_FIXED (mmap.mmap would map over the program), MAP_FIXED_NOREPLACE, MAP_32BIT, MAP_HUGETLB, and others."""
    with session.open("file", "w+") as file:
        file.truncate(PAGE)
        for kind in (mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_SHARED | mmap.MAP_PRIVATE):
            with pytest.raises(OSError, match=f"{flag:#x}") as raised:
                file.mmap(flags=kind | flag)
            assert (raised.value.errno, raised.value.filename) == (errno.EOPNOTSUPP, "file")
        file.mmap(flags=mmap.MAP_SHARED | 0x4000 | 0x10000).close()  # MAP_NORESERVE, MAP_NONBLOCK
    assert session.maps("file") == []


def test_trackfd(session: dax_mp.Session) -> None:
    """As mmap.mmap has it from Python 3.13 on: `size` and `resize` raise, all else is as ever."""
    with session.open("file", "w+") as file:
        file.truncate(2 * PAGE)
        with file.mmap(trackfd=False) as mapping:
            mapping[0] = 7
            mapping.flush()
            mapping.madvise(mmap.MADV_WILLNEED)
            for misused in (mapping.size, lambda: mapping.resize(PAGE)):
                with pytest.raises(ValueError, match="trackfd=False"):
                    misused()
            copy = pickle.loads(pickle.dumps(mapping))
            with copy, pytest.raises(ValueError, match="trackfd=False"):
                copy.resize(PAGE)
            mapping.remap(PAGE)
            assert (len(mapping), file.size, file.pread(1, 0)) == (PAGE, 2 * PAGE, b"\x07")
        with file.mmap(trackfd=True) as mapping:
            assert mapping.size() == 2 * PAGE


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs(ours: Ours, theirs: Theirs, name: str) -> None:
    text, expected = DIFFERENCES[name]
    _, here = ours.run(f"m = map(); {text}")
    assert here == expected
    if here[0] == "raised":
        assert ours.contents() == CONTENTS
    _, there = theirs.run(f"m = map(); {text}")
    assert (there, theirs.file.seek(0, os.SEEK_END)) != (here, ours.file.size), "it does not differ any more"

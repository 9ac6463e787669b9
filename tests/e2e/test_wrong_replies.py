"""A coordinator whose replies are not what they should be: a ProtocolError, whatever the request, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest

import dax_mp
from coordinator_process import CoordinatorProcess
from dax_mp import messages
from dax_mp.errors import ProtocolError
from dax_mp.replies import REPLIES

PAGE: Final = os.sysconf("SC_PAGESIZE")
LARGE: Final = 2 << 20

LIAR: Final = """
import sys
import msgpack
from dax_mp.coordinator import Coordinator
from dax_mp.daemons import serve

path = sys.argv.pop(1)
kinds = {}
receive, reply = Coordinator.receive_control, Coordinator._reply

def remember(self, token, peer, request):
    kinds[peer, request.request_id] = type(request).__name__
    receive(self, token, peer, request)

def lie(self, peer, request_id, value):
    with open(path, "rb") as file:
        lies = msgpack.unpackb(file.read())
    reply(self, peer, request_id, lies.get(kinds.pop((peer, request_id)), value))

Coordinator.receive_control, Coordinator._reply = remember, lie
sys.exit(serve.main())
"""
"""A whole coordinator, its sockets, regions and all; but of some requests it says what a file tells it to."""

_NO_LIES: Final = msgpack.packb({})


class Liar:
    """Such a coordinator."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lies"
        self._path.write_bytes(_NO_LIES)
        self.endpoint = str(directory / "e")

    def reply(self, kind: str, value: Any) -> None:
        """From now on this is the value of the replies to these requests."""
        (self._path.parent / "next").write_bytes(msgpack.packb({kind: value}))
        os.replace(self._path.parent / "next", self._path)

    def be_honest(self) -> None:
        self._path.write_bytes(_NO_LIES)

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-P", "-c", LIAR, str(self._path), *options]


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Liar]:
    liar = Liar(tmp_path_factory.mktemp("l"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordinator_process.serve_command", liar.command)
        coordinator = CoordinatorProcess(liar.endpoint, "--size", "16MiB")
    try:
        coordinator.wait_ready()
        yield liar
    finally:
        coordinator.close()


WRONG: Final[list[Any]] = [
    *(None, True, 0, -1, 1 << 63, 1.5, "x", b"x" * 100_000, []),
    *(
        [None],
        [0],
        [0, 1],
        [1, 2, 3],
        [0, 0, 0, 0],
        [0, "x"],
        [0, [1]],
        [0, [-1, 1]],
        [0, [0, 1 << 62]],
        [[]],
        ["\0" * 300],
    ),
    *([0, 0, 0, [0, 1 << 62]], [0, 0, None, []], [0, 0, 1, None]),
    *({}, {"a": 1}, [{}], [{"name": "a"}], {"page_size": PAGE}, {"counters": 1, "mappers": [1], "mapped": [1]}),
]

NUMBER: Final[list[Any]] = [0]
NOTHING: Final[list[Any]] = [None]
EMPTY: Final[list[Any]] = [[]]
NEITHER: Final[list[Any]] = []

RIGHT: Final[dict[str, list[Any]]] = {
    **dict.fromkeys(["Write", "Seek", "CopyRange", "Mmap", "Pin"], NUMBER),
    "Open": [[1, 2, 3]],
    **dict.fromkeys(["List", "Maps", "Listxattr"], EMPTY),
    **dict.fromkeys(["Stat", "Fstat", "Statfs", "Hello", "Read", "Getxattr", "BeginRead", "BeginWrite"], NEITHER),
    "Extents": [[], [1, 2, 3]],
}
"""Of the wrong ones, those that are not wrong for a request of this kind; of all others it is None."""

Statement = Callable[[dax_mp.Session, dax_mp.DaxFile, dax_mp.Mapping], Any]


def link(session: dax_mp.Session) -> None:
    with session.tmpfile("unnamed") as file:
        file.link(replace=True)


def close(session: dax_mp.Session, *held: dax_mp.DaxFile | dax_mp.Mapping) -> None:
    """The coordinator is told of it by the next request at the latest."""
    for one in held:
        one.close()
    session.listdir()


def pin(mapping: dax_mp.Mapping) -> None:
    with mapping.pin(0, PAGE):
        pass


STATEMENTS: Final[dict[str, Statement]] = {
    "Open": lambda session, file, mapping: session.open("new", "w"),
    "Close": lambda session, file, mapping: close(session, mapping, file),
    "Stat": lambda session, file, mapping: session.stat("file"),
    "Fstat": lambda session, file, mapping: file.stat(),
    "List": lambda session, file, mapping: session.listdir(),
    "Unlink": lambda session, file, mapping: session.unlink("file"),
    "Rename": lambda session, file, mapping: session.rename("file", "other"),
    "Link": lambda session, file, mapping: link(session),
    "Truncate": lambda session, file, mapping: file.truncate(LARGE),
    "Fallocate": lambda session, file, mapping: file.fallocate(0, PAGE),
    "Read": lambda session, file, mapping: file.pread(10, 0),
    "Write": lambda session, file, mapping: file.pwrite(b"data", 0),
    "Seek": lambda session, file, mapping: file.seek(0, os.SEEK_HOLE),
    "Extents": lambda session, file, mapping: file.extents(),
    "Fsync": lambda session, file, mapping: file.fsync(),
    "Maps": lambda session, file, mapping: session.maps("file"),
    "Statfs": lambda session, file, mapping: session.statfs(),
    "CopyRange": lambda session, file, mapping: file.copy_range(0, file, LARGE, PAGE),
    "BeginWrite": lambda session, file, mapping: file.pwrite(bytes(LARGE), 0),
    "BeginRead": lambda session, file, mapping: file.readinto(bytearray(LARGE)),
    "EndIo": lambda session, file, mapping: file.pwrite(bytes(LARGE), 0),
    "Utime": lambda session, file, mapping: file.utime(),
    "Setxattr": lambda session, file, mapping: file.setxattr("user.new", b"value"),
    "Getxattr": lambda session, file, mapping: file.getxattr("user.there"),
    "Listxattr": lambda session, file, mapping: file.listxattr(),
    "Removexattr": lambda session, file, mapping: file.removexattr("user.there"),
    "Mmap": lambda session, file, mapping: file.mmap(),
    "Msync": lambda session, file, mapping: mapping.flush(),
    "Munmap": lambda session, file, mapping: close(session, mapping),
    "Mremap": lambda session, file, mapping: mapping.resize(LARGE),
    "MunmapRange": lambda session, file, mapping: mapping.unmap(0, PAGE),
    "Pin": lambda session, file, mapping: pin(mapping),
    "Unpin": lambda session, file, mapping: pin(mapping),
}
OTHERS: Final = {"Hello", "Bye", "Adopt", "Cuts", "Cancel"}


def wrong_for(kind: str) -> list[Any]:
    right = RIGHT.get(kind, NOTHING)
    return [value for value in WRONG if not any(type(value) is type(good) and value == good for good in right)]


def test_each_request_is_here() -> None:
    kinds = {kind.__name__ for kind, code in messages.CODES.items() if code >= 32 and code not in (64, 65)}
    assert {kind.__name__ for kind in REPLIES} == kinds
    assert set(STATEMENTS) | OTHERS == kinds


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_wrong_reply_is_a_protocol_error_and_ends_the_session(liar: Liar, kind: str) -> None:
    for value in wrong_for(kind):
        liar.be_honest()
        with dax_mp.connect(liar.endpoint) as session:
            file = session.open("file", "w+")
            file.truncate(2 * LARGE)
            file.setxattr("user.there", b"value")
            mapping = file.mmap()
            liar.reply(kind, value)
            with pytest.raises(ProtocolError, match=f"reply to {kind} is not as the protocol has it"):
                STATEMENTS[kind](session, file, mapping)
            assert not session.usable
            with pytest.raises(ProtocolError, match=f"reply to {kind} "):
                session.statfs()
            file.close()
            mapping.close()
    liar.be_honest()
    with dax_mp.connect(liar.endpoint) as session:
        assert session.statfs().vmas == 0


def test_a_wrong_welcome_is_a_protocol_error(liar: Liar) -> None:
    for value in WRONG:
        liar.reply("Hello", value)
        with pytest.raises(ProtocolError, match="reply to Hello is not"):
            dax_mp.connect(liar.endpoint)
    liar.be_honest()
    assert os.listdir(os.path.join(liar.endpoint, "sessions")) == []


def test_a_wrong_reply_to_bye_does_not_matter(liar: Liar) -> None:
    for value in wrong_for("Bye"):
        liar.be_honest()
        with dax_mp.connect(liar.endpoint):
            liar.reply("Bye", value)
    liar.be_honest()
    assert os.listdir(os.path.join(liar.endpoint, "sessions")) == []


FORK: Final = """
import dax_mp, os, sys
with dax_mp.connect(sys.argv[1]) as session:
    file = session.open("file", "w+")
    file.truncate(1 << 20)
    mapping = file.mmap()
    os.rename(sys.argv[2], sys.argv[3])
    if os.fork() == 0:
        try:
            session.listdir()
        except OSError as error:
            print(type(error).__name__, error.errno, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("value", [None, "x", [1], [None, None, None], [1 << 63] * 6, {"a": 1}])
@pytest.mark.parametrize("kind", ["Adopt", "Cuts"])
def test_a_wrong_reply_to_a_forks_child_leaves_it_without_a_session(liar: Liar, kind: str, value: Any) -> None:
    liar.be_honest()
    lies = Path(liar.endpoint).parent / "lies"
    prepared = lies.with_name("prepared")
    prepared.write_bytes(msgpack.packb({kind: value}))
    quiet = ("-W", "ignore::DeprecationWarning")  # Python 3.12 warns of a fork beside the thread of the pager
    command = [sys.executable, "-P", *quiet, "-c", FORK, liar.endpoint, str(prepared), str(lies)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    liar.be_honest()
    assert (ended.stdout, ended.stderr, ended.returncode) == ("OSError 116\n", "", 0)

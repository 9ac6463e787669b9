"""Cancel: what a request has acquired for a client that does not wait any more goes back, whenever it comes to it."""

import errno
from typing import Any, Final

import pytest

from dax_mp.coordinator import Coordinator
from dax_mp.device import Device
from dax_mp.effects import SendControl
from dax_mp.memory import ByteArrayMemory
from dax_mp.messages import (
    Access,
    BeginRead,
    BeginWrite,
    Cancel,
    Close,
    EndIo,
    Error,
    Fstat,
    Mmap,
    Open,
    OpenFlag,
    Pin,
    Reply,
    Truncate,
)
from dax_mp.session import Session

PAGE: Final = 4096
TOKEN: Final = b"t" * 16
OTHER: Final = b"o" * 16
LANE: Final = TOKEN + b"1"
READ_WRITE: Final = int(Access.READ | Access.WRITE)

ACQUIRING: Final[dict[str, Any]] = {
    "open": Open(9, "file", 0),
    "mmap": Mmap(9, 1, 0, 2, READ_WRITE, 0),
    "pin": Pin(9, 1, 0, 2),
    "begin read": BeginRead(9, 1, 0, 2 * PAGE),
    "begin write": BeginWrite(9, 1, 0, 0, 2 * PAGE),
}
WAITS: Final = ("pin", "begin read", "begin write")


class Rig:
    """A coordinator with a file of two pages, open as handle 1 in two sessions and mapped as VMA 1 of the first."""

    def __init__(self) -> None:
        self.coordinator = Coordinator(Device(PAGE, ByteArrayMemory(16 * PAGE), 16), 1.0, debug=True)
        for token in (TOKEN, OTHER):
            self.coordinator.session_opened(token, 1)
            self.ask(token + b"0", Open(1, "file", int(OpenFlag.CREATE)))
        self.ask(TOKEN + b"0", Truncate(1, 1, 2 * PAGE))
        assert self.ask(TOKEN + b"0", Mmap(1, 1, 0, 2, READ_WRITE, 0)) == 1

    @property
    def session(self) -> Session:
        return self.coordinator.sessions[TOKEN]

    def send(self, peer: bytes, request: Any) -> list[SendControl]:
        """Returns the answers that there are now, whoever asked."""
        self.coordinator.receive_control(peer[:16], peer, request)
        return [effect for effect in self.coordinator.take_effects() if isinstance(effect, SendControl)]

    def ask(self, peer: bytes, request: Any) -> Any:
        (answer,) = self.send(peer, request)
        assert isinstance(answer.message, Reply), answer
        return answer.message.value

    def has(self) -> tuple[int, ...]:
        """Handles, VMAs, pins, leases."""
        session = self.session
        return len(session.handles), len(session.vmas), len(session.pins), len(session.leases)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize("name", ACQUIRING)
def test_what_was_acquired_goes_back(rig: Rig, name: str) -> None:
    before = rig.has()
    rig.ask(LANE, ACQUIRING[name])
    assert rig.has() != before
    assert rig.ask(LANE, Cancel(10, 9)) is None
    assert rig.has() == before
    assert rig.ask(LANE, Cancel(11, 9)) is None, "a second one finds nothing"
    assert rig.ask(OTHER + b"0", Truncate(1, 1, 0)) is None, "nothing keeps others waiting"


@pytest.mark.parametrize("name", WAITS)
def test_what_is_under_way_goes_back_when_it_has_come_to_its_end(rig: Rig, name: str) -> None:
    before = rig.has()
    io_id = rig.ask(OTHER + b"0", BeginWrite(1, 1, 0, 0, PAGE))[0]
    assert rig.send(LANE, ACQUIRING[name]) == []
    assert rig.ask(LANE, Cancel(10, 9)) is None
    answers = rig.send(OTHER + b"0", EndIo(2, io_id, 0))
    errors = [answer.message for answer in answers if isinstance(answer.message, Error)]
    assert [(error.request_id, error.errno) for error in errors] == [(9, errno.ECANCELED)]
    assert rig.has() == before
    assert rig.ask(OTHER + b"0", Truncate(1, 1, 0)) is None


@pytest.mark.parametrize("name", ACQUIRING)
def test_the_next_one_says_that_the_answer_has_come(rig: Rig, name: str) -> None:
    rig.ask(LANE, ACQUIRING[name])
    rig.ask(LANE, Open(10, "other", int(OpenFlag.CREATE)))
    before = rig.has()
    assert rig.ask(LANE, Cancel(11, 9)) is None
    assert rig.has() == before
    assert rig.ask(LANE, Cancel(12, 10)) is None
    assert rig.has()[0] == before[0] - 1


def test_what_was_never_asked_or_is_another_sockets(rig: Rig) -> None:
    rig.ask(LANE, ACQUIRING["open"])
    before = rig.has()
    for peer, target in ((LANE, 8), (LANE, 10), (TOKEN + b"2", 9), (OTHER + b"1", 9)):
        assert rig.ask(peer, Cancel(20, target)) is None
        assert rig.has() == before


def test_what_was_refused_or_has_gone_back_already(rig: Rig) -> None:
    (answer,) = rig.send(LANE, Open(9, "missing", 0))
    assert isinstance(answer.message, Error)
    assert rig.ask(LANE, Cancel(10, 9)) is None
    handle = rig.ask(LANE, Open(11, "file", 0))[0]
    rig.ask(LANE, Close(12, handle))
    assert rig.ask(LANE, Cancel(13, 11)) is None
    assert rig.ask(LANE, Fstat(14, 1))["size_bytes"] == 2 * PAGE


def test_a_session_that_ends_with_one_under_way(rig: Rig) -> None:
    io_id = rig.ask(OTHER + b"0", BeginWrite(1, 1, 0, 0, PAGE))[0]
    assert rig.send(LANE, ACQUIRING["begin write"]) == []
    rig.ask(LANE, Cancel(10, 9))
    rig.coordinator.session_gone(TOKEN)
    rig.send(OTHER + b"0", EndIo(2, io_id, 0))
    assert rig.ask(OTHER + b"0", Truncate(1, 1, 0)) is None

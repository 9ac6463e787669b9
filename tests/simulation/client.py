"""A client process, as the native pager and the library make it.

Its translations are real: a load or a store goes through them to the region's bytes, whatever the coordinator believes.
Nothing of the coordinator's state is looked at here; all that passes between the two goes through the four channels.
"""

import errno
from collections import deque
from enum import Enum, auto
from typing import Any, Final, NamedTuple

from dax_mp.memory import Memory
from dax_mp.messages import (
    Access,
    BeginRead,
    BeginWrite,
    Bye,
    ControlAnswer,
    ControlRequest,
    Dropped,
    EndIo,
    Error,
    Evict,
    Fault,
    FaultError,
    Map,
    Mmap,
    Munmap,
    PagerOrder,
    PagerReady,
    PagerRequest,
    Target,
    Unmap,
    UnmapAck,
)

PAGE_SIZE: Final = 64
VALUE_BYTES: Final = 8


def page_bytes(value: int) -> bytes:
    """A whole page that holds `value`."""
    return value.to_bytes(VALUE_BYTES, "little") + bytes(PAGE_SIZE - VALUE_BYTES)


def page_value(data: bytes) -> int:
    return int.from_bytes(data[:VALUE_BYTES], "little")


class Load(NamedTuple):
    """Load the page's value through the VMA."""

    vma_id: int
    pgoff: int


class Store(NamedTuple):
    """Store a value into the page through the VMA."""

    vma_id: int
    pgoff: int
    value: int


class Call(NamedTuple):
    """A request on the control channel. Its id is filled in when it is sent."""

    request: ControlRequest


class DirectWrite(NamedTuple):
    """Have the blocks of these pages lent, store a value into each, and give them back."""

    handle: int
    pgoff: int
    values: tuple[int, ...]


class DirectRead(NamedTuple):
    """Have the blocks of these pages lent, load them, and give them back. Its outcome are the bytes."""

    handle: int
    pgoff: int
    length_pages: int


Direct = DirectWrite | DirectRead
Operation = Load | Store | Call | Direct


class Failed(NamedTuple):
    """An operation's outcome: BusError or OSError with this errno."""

    errno: int


class Translation(NamedTuple):
    """What one page of a window is mapped to."""

    target: int
    pfn: int
    access: int


class Window:
    """Reserved address space, and what is mapped there.

    copies: of a private window, the values of the pages that have been copied on write; None of a shared one.
    """

    def __init__(self, vma_id: int, pgoff: int, length_pages: int, private: bool = False) -> None:
        self.vma_id = vma_id
        self.pgoff = pgoff
        self.length_pages = length_pages
        self.translations: dict[int, Translation] = {}
        self.copies: dict[int, int] | None = {} if private else None

    def map(self, pgoff: int, length_pages: int, target: int, pfn: int, access: int) -> None:
        assert self.pgoff <= pgoff and pgoff + length_pages <= self.pgoff + self.length_pages, "mapped outside a window"
        for page in range(pgoff, pgoff + length_pages):
            frame = 0 if target == Target.ZERO else pfn + page - pgoff
            self.translations[page] = Translation(target, frame, access)

    def unmap(self, pgoff: int, length_pages: int, even_cows: bool = False) -> None:
        for pages in (self.translations, self.copies if even_cows else None):
            for page in [page for page in pages or () if pgoff <= page < pgoff + length_pages]:
                del pages[page]  # type: ignore[union-attr]  # None has no page


class Lent:
    """Blocks that a thread was lent: what of them it has not copied yet, and what it has read."""

    def __init__(self, io_id: int, flat: list[int]) -> None:
        self.io_id = io_id
        self.pieces = list(zip(flat[::2], flat[1::2], strict=True))
        self.done_bytes = 0
        self.data = b""


class State(Enum):
    READY = auto()
    """Its instruction can run, or run again."""
    FAULTING = auto()
    CALLING = auto()


class Thread:
    """Carries out `operations` one after the other; the first one is under way once it is `begun`."""

    def __init__(self) -> None:
        self.operations: deque[Operation] = deque()
        self.begun = False
        self.state = State.READY
        self.lent: Lent | None = None
        self.waits_for = 0
        """The id of its fault or request."""


class Ended(NamedTuple):
    """An operation has ended: the thread's number, and what came of it."""

    thread: int
    operation: Operation
    outcome: Any


class Client:
    """One process. pmem, dram: the regions. threads: how many."""

    def __init__(self, token: bytes, pmem: Memory, dram: Memory, threads: int) -> None:
        self.token = token
        self._memory = {int(Target.PMEM): pmem, int(Target.DRAM): dram}
        self.threads = [Thread() for _ in range(threads)]
        self.windows: dict[int, Window] = {}
        self.evict_errno = 0
        self.pager_ready = False
        self.requests: deque[ControlRequest] = deque()
        self.answers: deque[ControlAnswer] = deque()
        self.pager_requests: deque[PagerRequest] = deque()
        self.pager_orders: deque[PagerOrder] = deque()
        self.second_channel: deque[PagerOrder] | None = None
        """Where Unmaps come in, for a world whose protocol has two channels to a pager."""
        self._next_id = 1

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    # --- threads ------------------------------------------------------------------------------------------------------

    def run(self, number: int) -> Ended | None:
        """Let the thread go on until it waits or its operation has ended."""
        thread = self.threads[number]
        assert thread.state is State.READY, "only a thread that does not wait runs"
        thread.begun = True
        operation = thread.operations[0]
        if isinstance(operation, Call):
            self._send(thread, operation.request)
            return None
        if isinstance(operation, DirectWrite | DirectRead):
            return self._direct(number, thread, operation)
        return self._access(number, thread, operation)

    def _send(self, thread: Thread, request: ControlRequest) -> None:
        thread.state, thread.waits_for = State.CALLING, self._new_id()
        if isinstance(request, Munmap):
            self.windows.pop(request.vma_id, None)  # first the window, then the request: see messages.Munmap
        if isinstance(request, Bye):
            self.drop_everything()
        self.requests.append(request._replace(request_id=thread.waits_for))

    def _direct(self, number: int, thread: Thread, operation: Direct) -> Ended | None:
        """The next step of it: ask, copy one piece, give back."""
        if self.evict_errno:
            thread.lent = None
            return self._end(number, Failed(self.evict_errno))
        if thread.lent is None:
            handle, offset_bytes = operation.handle, operation.pgoff * PAGE_SIZE
            if isinstance(operation, DirectWrite):
                self._send(thread, BeginWrite(0, handle, offset_bytes, 0, len(operation.values) * PAGE_SIZE))
            else:
                self._send(thread, BeginRead(0, handle, offset_bytes, operation.length_pages * PAGE_SIZE))
        elif thread.lent.pieces:
            self._copy(thread.lent, operation)
        else:
            self._send(thread, EndIo(0, thread.lent.io_id, thread.lent.done_bytes))
        return None

    def _copy(self, lent: Lent, operation: Direct) -> None:
        address, length_bytes = lent.pieces.pop(0)
        memory = self._memory[int(Target.PMEM)]
        if isinstance(operation, DirectWrite):
            data = b"".join(page_bytes(value) for value in operation.values)
            memory.write(address, data[lent.done_bytes : lent.done_bytes + length_bytes])
        else:
            lent.data += memory.read(address, length_bytes) if address else bytes(length_bytes)
        lent.done_bytes += length_bytes

    def _access(self, number: int, thread: Thread, operation: Load | Store) -> Ended | None:
        window = self.windows.get(operation.vma_id)
        if self.evict_errno or window is None:
            return self._end(number, Failed(self.evict_errno or errno.ESTALE))
        if window.copies is not None and operation.pgoff in window.copies:
            return self._access_copy(number, window.copies, operation)
        write = isinstance(operation, Store) and window.copies is None
        wanted = Access.WRITE if write else Access.READ
        translation = window.translations.get(operation.pgoff)
        if translation is None or not translation.access & wanted:
            thread.state, thread.waits_for = State.FAULTING, self._new_id()
            self.pager_requests.append(Fault(thread.waits_for, operation.vma_id, operation.pgoff, int(write)))
            return None
        if isinstance(operation, Store) and window.copies is not None:
            return self._access_copy(number, window.copies, operation)
        if isinstance(operation, Store):
            address = translation.pfn * PAGE_SIZE
            self._memory[translation.target].write(address, operation.value.to_bytes(VALUE_BYTES, "little"))
            return self._end(number, None)
        return self._end(number, self._load(translation))

    def _access_copy(self, number: int, copies: dict[int, int], operation: Load | Store) -> Ended:
        """A page of a private window that has been copied, or is copied now: a store covers all of its value."""
        if isinstance(operation, Store):
            copies[operation.pgoff] = operation.value
            return self._end(number, None)
        return self._end(number, copies[operation.pgoff])

    def _load(self, translation: Translation) -> int:
        if translation.target == Target.ZERO:
            return 0
        return page_value(self._memory[translation.target].read(translation.pfn * PAGE_SIZE, VALUE_BYTES))

    def _end(self, number: int, outcome: Any) -> Ended:
        thread = self.threads[number]
        thread.state, thread.begun = State.READY, False
        return Ended(number, thread.operations.popleft(), outcome)

    def _waiting(self, state: State, waits_for: int) -> int | None:
        for number, thread in enumerate(self.threads):
            if thread.state is state and thread.waits_for == waits_for:
                return number
        return None

    # --- what comes from the coordinator ------------------------------------------------------------------------------

    def orders(self, channel: int) -> deque[PagerOrder]:
        return self.pager_orders if channel == 0 or self.second_channel is None else self.second_channel

    def use_second_channel(self) -> None:
        self.second_channel = deque()

    def deliver(self, order: PagerOrder) -> None:
        """It is on its way."""
        self.orders(int(isinstance(order, Unmap))).append(order)

    def receive_answer(self) -> Ended | None:
        """The library takes the oldest answer."""
        answer = self.answers.popleft()
        number = self._waiting(State.CALLING, answer.request_id)
        assert number is not None, f"an answer that nobody waits for: {answer}"
        thread = self.threads[number]
        operation = thread.operations[0]
        if isinstance(answer, Error):
            thread.lent = None
            return self._end(number, Failed(answer.errno))
        if isinstance(operation, DirectWrite | DirectRead):
            return self._direct_answer(number, thread, operation, answer.value)
        assert isinstance(operation, Call), f"an answer to {operation}"
        if isinstance(operation.request, Mmap) and not self.evict_errno:
            request = operation.request
            self.windows[answer.value] = Window(
                answer.value, request.pgoff, request.length_pages, bool(request.private)
            )
        return self._end(number, answer.value)

    def _direct_answer(self, number: int, thread: Thread, operation: Direct, value: Any) -> Ended | None:
        if thread.lent is None:
            thread.state, thread.lent = State.READY, Lent(value[0], value[-1])
            return None
        data, thread.lent = thread.lent.data, None
        return self._end(number, data if isinstance(operation, DirectRead) else None)

    def receive_order(self, channel: int = 0) -> list[Ended]:
        """The pager carries out the oldest order of a channel."""
        order = self.orders(channel).popleft()
        if isinstance(order, Map):
            self._map(order)
        elif isinstance(order, FaultError):
            number = self._waiting(State.FAULTING, order.fault_id)
            return [] if number is None else [self._end(number, Failed(order.errno))]
        elif isinstance(order, Unmap):
            self._unmap(order)
        elif isinstance(order, Evict):
            return self._evict(order)
        else:
            assert isinstance(order, PagerReady), f"an order that is none: {order}"
            self.pager_ready = True
        return []

    def _map(self, order: Map) -> None:
        if window := self.windows.get(order.vma_id):  # else it is closed, and its Munmap on the way
            for at in range(0, len(order.segments), 5):
                window.map(*order.segments[at : at + 5])
        number = self._waiting(State.FAULTING, order.fault_id)
        if number is not None:
            self.threads[number].state = State.READY

    def _unmap(self, order: Unmap) -> None:
        for at in range(0, len(order.ranges), 3):
            vma_id, pgoff, length_pages = order.ranges[at : at + 3]
            if window := self.windows.get(vma_id):
                window.unmap(pgoff, length_pages, bool(order.even_cows))
        self.pager_requests.append(UnmapAck(order.request_id))

    def _evict(self, order: Evict) -> list[Ended]:
        self.evict_errno = order.errno
        self.drop_everything()
        self.pager_requests.append(Dropped())
        faulting = [number for number, thread in enumerate(self.threads) if thread.state is State.FAULTING]
        return [self._end(number, Failed(order.errno)) for number in faulting]

    def drop_everything(self) -> None:
        for window in self.windows.values():
            window.translations.clear()

    def wake_faults_of_closed_windows(self) -> list[Ended]:
        """A thread that waits for a window which another thread has closed is not left asleep."""
        ended = []
        for number, thread in enumerate(self.threads):
            if thread.state is State.FAULTING:
                operation = thread.operations[0]
                assert isinstance(operation, Load | Store), f"a fault of {operation}"
                if operation.vma_id not in self.windows:
                    ended.append(self._end(number, Failed(errno.ESTALE)))
        return ended

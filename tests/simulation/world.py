"""One coordinator and its clients: which events are possible, what each does, and what must hold after it."""

from typing import Any, Final, NamedTuple

from dax_mp.address_space import PageTable, pte_fields
from dax_mp.coordinator import Coordinator
from dax_mp.device import FIRST_PFN, Device, HolePolicyName
from dax_mp.effects import Effect, SendControl, SendPager
from dax_mp.errors import ProtocolError, os_error
from dax_mp.frames import FrameAllocator
from dax_mp.inode import Inode
from dax_mp.memory import ByteArrayMemory
from dax_mp.messages import (
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    Access,
    ControlRequest,
    Fallocate,
    FallocateMode,
    Hello,
    Mmap,
    Open,
    OpenFlag,
    PagerHello,
    Read,
    Reply,
    Target,
    Truncate,
    Write,
)
from dax_mp.session import Session, SessionState
from dax_mp.validate import validate
from simulation.client import (
    PAGE_SIZE,
    Call,
    Client,
    DirectRead,
    DirectWrite,
    Ended,
    Failed,
    Load,
    Operation,
    State,
    Store,
    Translation,
    page_bytes,
    page_value,
)
from simulation.spec import Action, Page, explains

ACK_TIMEOUT_S: Final = 1.0
FATES: Final = frozenset({"die", "misbehave"})
"""Events that may never come. Each of World.fates comes at most once."""
READ_WRITE: Final = int(Access.READ | Access.WRITE)


class Event(NamedTuple):
    """Something that can happen next.

    run: a thread goes on. request, answer: the oldest message of a control channel arrives. fault, order: likewise of a
    pager channel, to and from the coordinator. die: the process is killed. misbehave: its pager breaks the protocol.
    """

    kind: str
    client: int
    thread: int = 0
    """Of an order: its channel, where there are two."""


class Moment(NamedTuple):
    """The beginning or the end of an operation, for the history."""

    ends: bool
    client: int
    thread: int
    ordinal: int
    """The thread's first operation has 0, and so on."""
    operation: Operation
    outcome: Any = None


class World:
    """clients and a coordinator, everything between them in channels.

    policy, pmem_pages, dram_pages: the device. fates: set by the test, see FATES.
    """

    def __init__(self, policy: HolePolicyName = "zero", pmem_pages: int = 4, dram_pages: int = 4) -> None:
        self.pmem = ByteArrayMemory((FIRST_PFN + pmem_pages) * PAGE_SIZE)
        self.dram = ByteArrayMemory((FIRST_PFN + dram_pages) * PAGE_SIZE)
        self.pmem.data[:] = b"\xee" * len(self.pmem.data)  # what nobody has zeroed shows
        self.dram.data[:] = b"\xdd" * len(self.dram.data)
        device = Device(PAGE_SIZE, self.pmem, pmem_pages, policy, self.dram, dram_pages)
        self.coordinator = Coordinator(device, ACK_TIMEOUT_S)
        self.clients: list[Client] = []
        self.alive: list[bool] = []
        self.stopped: set[int] = set()
        """Clients that take no order and no answer, and whose threads do not run; what they have sent arrives."""
        self.fates: list[Event] = []
        self.blind = False
        """Do not check invariants, only what the threads have seen."""
        self.history: list[Moment] = []
        self.ended_operations: dict[tuple[int, int], int] = {}
        """(client, thread): how many it has carried out."""
        self.ino_of_handle: dict[tuple[int, int], int] = {}
        self.ino_of_vma: dict[int, int] = {}
        self.private_vmas: set[int] = set()
        self.second_value = 0
        """What the page behind the first one holds, all the time: where a collapse makes it the first."""

    # --- making it ----------------------------------------------------------------------------------------------------

    def add_client(self, threads: int = 1) -> int:
        """A new process with a session whose pager serves. Returns its number."""
        number = len(self.clients)
        token = number.to_bytes(TOKEN_BYTES, "big")
        client = Client(token, self.pmem, self.dram, threads)
        self.clients.append(client)
        self.alive.append(True)
        self.coordinator.session_opened(token, 1000 + number)
        self.coordinator.receive_control(token, token + b"c", Hello(0, PROTOCOL_VERSION))
        self.coordinator.receive_pager(token, PagerHello(PROTOCOL_VERSION))
        self._carry_out()
        assert isinstance(client.answers.popleft(), Reply), "Hello was not answered"
        client.receive_order()
        assert client.pager_ready, "PagerHello was not answered"
        return number

    def call(self, client: int, request: ControlRequest) -> Any:
        """Have an idle thread make a request, and let everything run until it is answered. Raises OSError."""
        self.clients[client].threads[0].operations.append(Call(request))
        ended: list[Ended] = []
        while not ended:
            ended = [end for end in self.step(self._next()) if end.operation == Call(request)]
        outcome = ended[0].outcome
        if isinstance(outcome, Failed):
            raise os_error(outcome.errno)
        return outcome

    def access(self, client: int, operation: Load | Store) -> Any:
        """Have an idle thread load or store, and let everything run until it has. Returns the value or Failed."""
        self.clients[client].threads[0].operations.append(operation)
        while True:
            for end in self.step(self._next()):
                if end.operation == operation:
                    return end.outcome

    def _next(self) -> Event:
        events = self.events()
        assert events and events[0].kind not in FATES, "nothing can happen any more, and an operation has not ended"
        return events[0]

    def open(self, client: int, name: str, flags: int = int(OpenFlag.CREATE)) -> int:
        """Returns the handle."""
        handle, ino, _ = self.call(client, Open(0, name, flags))
        self.ino_of_handle[client, handle] = ino
        return int(handle)

    def map(
        self,
        client: int,
        handle: int,
        length_pages: int,
        pgoff: int = 0,
        access: int = READ_WRITE,
        private: bool = False,
    ) -> int:
        """Returns the VMA's id."""
        access = int(Access.READ) if private else access
        vma_id = int(self.call(client, Mmap(0, handle, pgoff, length_pages, access, int(private))))
        self.ino_of_vma[vma_id] = self.ino_of_handle[client, handle]
        if private:
            self.private_vmas.add(vma_id)
        return vma_id

    def begin_history(self) -> None:
        """What has happened so far was the preparation."""
        self.history.clear()
        self.ended_operations.clear()

    # --- events -------------------------------------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """All that can happen next; fates come last."""
        events: list[Event] = []
        for number, client in enumerate(self.clients):
            if not self.alive[number]:
                continue
            if client.requests:
                events.append(Event("request", number))
            if client.pager_requests:
                events.append(Event("fault", number))
            if number in self.stopped:
                continue
            for thread_number, thread in enumerate(client.threads):
                if thread.operations and thread.state is State.READY:
                    events.append(Event("run", number, thread_number))
            if client.answers:
                events.append(Event("answer", number))
            if client.pager_orders:
                events.append(Event("order", number))
            if client.second_channel:
                events.append(Event("order", number, 1))
        return events + [fate for fate in self.fates if self.alive[fate.client]]

    def step(self, event: Event) -> list[Ended]:
        """Let the event happen. Returns the operations that have ended by it."""
        number, client = event.client, self.clients[event.client]
        ended: list[Ended] = []
        match event.kind:
            case "run":
                ended = self._run(number, event.thread)
            case "request":
                peer = client.token + b"c"
                self.coordinator.receive_control(client.token, peer, client.requests.popleft())
            case "answer":
                end = client.receive_answer()
                ended = [end] if end is not None else []
            case "fault":
                self.coordinator.receive_pager(client.token, client.pager_requests.popleft())
            case "order":
                ended = client.receive_order(event.thread)
            case "die":
                self.fates = [fate for fate in self.fates if fate.client != number]
                self.kill(number)
            case "misbehave":
                self.fates.remove(event)
                self.coordinator.protocol_error(client.token, ProtocolError("broken on purpose"))
            case kind:
                raise ValueError(f"no such event: {kind}")
        for end in ended:
            self._record_end(number, end)
        self._carry_out()
        return ended

    def _run(self, number: int, thread_number: int) -> list[Ended]:
        client = self.clients[number]
        thread = client.threads[thread_number]
        if not thread.begun:
            ordinal = self.ended_operations.get((number, thread_number), 0)
            self.history.append(Moment(False, number, thread_number, ordinal, thread.operations[0]))
        end = client.run(thread_number)
        return ([end] if end is not None else []) + client.wake_faults_of_closed_windows()

    def _record_end(self, number: int, end: Ended) -> None:
        key = (number, end.thread)
        ordinal = self.ended_operations.get(key, 0)
        self.ended_operations[key] = ordinal + 1
        session = self.coordinator.sessions.get(self.clients[number].token)
        if session is None or not session.evicted or isinstance(end.outcome, Failed):
            self.history.append(Moment(True, *key, ordinal, end.operation, end.outcome))
        # else it does not know yet that it is evicted: nobody has to explain what it sees, or wait for what it stores

    def kill(self, number: int) -> None:
        """kill -9: its memory is gone, and what it has sent is lost where it was not received."""
        self.alive[number] = False
        client = self.clients[number]
        client.drop_everything()
        client.requests.clear()
        client.pager_requests.clear()
        client.answers.clear()
        client.pager_orders.clear()
        self.coordinator.session_gone(client.token)
        self._carry_out()

    def _carry_out(self) -> None:
        for effect in self.coordinator.take_effects():
            self.deliver(effect)

    def deliver(self, effect: Effect) -> None:
        """Put a message of the coordinator into its channel."""
        if isinstance(effect, SendPager):
            number = int.from_bytes(effect.token, "big")
            if self.alive[number]:
                self.clients[number].deliver(effect.message)
        elif isinstance(effect, SendControl):
            number = int.from_bytes(effect.peer[:TOKEN_BYTES], "big")
            if self.alive[number]:
                self.clients[number].answers.append(effect.message)

    def settle(self) -> None:
        """Let everything happen that can, but no fate."""
        while (events := self.events()) and events[0].kind not in FATES:
            self.step(events[0])

    # --- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the coordinator's own invariants, and from outside I1, I4 and I7 against the real translations."""
        if self.blind:
            return
        validate(self.coordinator.fs, self.coordinator.sessions)
        for number, client in enumerate(self.clients):
            session = self.coordinator.sessions.get(client.token)
            if session is None:
                assert not any(window.translations for window in client.windows.values()), f"{number} is gone and maps"
                continue
            for window in client.windows.values():
                for pgoff, translation in window.translations.items():
                    self._check_translation(session, window.vma_id, pgoff, translation)

    def _check_translation(self, session: Session, vma_id: int, pgoff: int, real: Translation) -> None:
        fs = self.coordinator.fs
        vma = session.vmas.get(vma_id)
        where = f"page {pgoff} of VMA {vma_id}"
        assert vma is not None, f"I7: {where} is mapped, and the coordinator does not know the VMA"
        assert session.state is not SessionState.DROPPED, f"{where} is mapped after Dropped"
        inode = vma.inode
        pieces = list(vma.page_table.pieces(pgoff, pgoff + 1))
        assert pieces, f"I7: {where} is mapped, and the rmap does not have it"
        if not session.evicted:
            entry = pieces[0][2]
            recorded = Translation(entry >> 2 & 3, entry >> 4, entry & 3)
            replaced = [
                Translation(*pte_fields(was))
                for request in session.unacknowledged.values()
                for entry, length_pages in request.replaced
                for was in (PageTable.advance(entry, step) for step in range(length_pages))
            ]
            assert real == recorded or real in replaced, f"I7: {where} is mapped to {real}, in the rmap to {recorded}"
        if real.target == Target.ZERO:
            assert not real.access & Access.WRITE, f"{where}: the zero page is writable"
        elif real.target == Target.PMEM:
            current = inode.block_map.get(pgoff)
            if current is None and session.evicted:
                current = inode.unwritten.get(pgoff)  # it is zeroed when it is written, whoever stores to it before
            self._check_frame(session, fs.device.frames, real.pfn, current, where)
        else:
            assert not real.access & Access.WRITE, f"{where}: a hole page is writable"
            assert fs.device.dram_frames is not None
            self._check_frame(session, fs.device.dram_frames, real.pfn, inode.mapping.i_pages.get(pgoff), where)
        if not session.evicted and real.target != Target.PMEM and inode.block_map.get(pgoff) is not None:
            busy = inode.invalidate_lock.exclusive or inode.entry_locks.held(pgoff)
            assert busy, f"I4: {where} is a hole page, and the file has a block there"

    def _check_frame(self, session: Session, frames: FrameAllocator, pfn: int, current: int | None, where: str) -> None:
        if pfn == current:
            return
        assert session.evicted, f"I1: {where} is mapped to frame {pfn}, which is not the file's; it has {current}"
        places = (frames.held.get(session.token), frames.quarantine)
        held = all(place is not None and any(place.pieces(pfn, pfn + 1)) for place in places)
        assert held, f"I1: evicted, {where} leads to frame {pfn}, which is neither the file's nor in quarantine for it"

    def check_quiescent(self) -> None:
        """Assert that nothing is under way: no thread waits, no lock is held, nobody is counted as a user twice."""
        for number, client in enumerate(self.clients):
            for thread in client.threads:
                assert not self.alive[number] or not thread.operations, f"a thread of client {number} hangs"
        fs = self.coordinator.fs
        assert not fs.unmapper.outstanding, "an Unmap is unanswered"
        assert not fs.scheduler.ready, "an operation is ready and does not run"
        sessions = self.coordinator.sessions.values()
        for session in sessions:
            assert session.faults == 0 and not session.unacknowledged, f"{session.token.hex()} has something under way"
        for inode in fs.inodes.values():
            assert inode.rwsem.idle, "rwsem is held or waited for"
            assert inode.invalidate_lock.idle, "invalidate_lock is held or waited for"
            assert not len(inode.entry_locks), "an entry lock is held"
            handles = sum(list(session.handles.values()).count(inode) for session in sessions)
            assert inode.users == handles + len(inode.mapping.i_mmap), f"inode {inode.ino} has a user too many"
        assert not fs.leases, "something is lent"

    # --- what was seen ------------------------------------------------------------------------------------------------

    def check_history(self, inode: Inode, pgoff: int, start: Page) -> None:
        """Assert that what all threads have seen of this page can be explained, `start` being its state at first."""
        actions = self._actions(inode.ino, pgoff)
        assert explains(start, actions), "\n".join(
            [f"what was seen of page {pgoff} has no explanation; it began as {start}", *map(str, actions)]
        )

    def _actions(self, ino: int, pgoff: int) -> list[Action]:
        begun: dict[tuple[int, int, int], Action] = {}
        for moment, (ends, client, thread, ordinal, operation, outcome) in enumerate(self.history):
            key = (client, thread, ordinal)
            if not ends:
                if (effect := self._effect(client, operation, ino, pgoff)) is not None:
                    begun[key] = Action(*effect, moment, None, None)
            elif key in begun:
                action = begun[key]
                if isinstance(operation, DirectWrite) and isinstance(outcome, Failed):
                    continue  # it may have stored before it failed
                if operation_is_of_a_copy(self.private_vmas, operation, outcome):
                    del begun[key]
                    continue
                if action.name == "read" and not isinstance(outcome, Failed):
                    outcome = page_value(outcome) if outcome else None  # noqa: PLW2901
                if action.name in ("write", "punch", "grow", "cut") and not isinstance(outcome, Failed):
                    outcome = None  # noqa: PLW2901
                begun[key] = action._replace(end=moment, outcome=outcome)
        return list(begun.values())

    def _effect(self, client: int, operation: Operation, ino: int, pgoff: int) -> tuple[str, int] | None:
        """What the operation does to that page, as (name, value) of an Action; None where nothing."""
        if isinstance(operation, Load | Store):
            if self.ino_of_vma[operation.vma_id] != ino or operation.pgoff != pgoff:
                return None
            if isinstance(operation, Store):
                return None if operation.vma_id in self.private_vmas else ("store", operation.value)
            return "load", 0
        if isinstance(operation, DirectWrite | DirectRead):
            if self.ino_of_handle[client, operation.handle] != ino or operation.pgoff != pgoff:
                return None
            return ("write", operation.values[0]) if isinstance(operation, DirectWrite) else ("read", 0)
        request = operation.request
        if isinstance(request, Read | Write | Truncate | Fallocate):
            if self.ino_of_handle[client, request.handle] != ino:
                return None
            return _effect_of_request(request, pgoff, self.second_value)
        return None

    def check_private(self, pgoff: int) -> None:
        """Assert that private copies of this page were there as long as no truncate has taken them."""
        copies: dict[tuple[int, int], int] = {}  # by thread: what it has stored, and not lost to a truncate
        cuts: set[tuple[int, int, int]] = set()
        for ends, client, thread, ordinal, operation, outcome in self.history:
            if isinstance(operation, Call):
                if isinstance(operation.request, Truncate) and operation.request.size_bytes <= pgoff * PAGE_SIZE:
                    (cuts.discard if ends else cuts.add)((client, thread, ordinal))
                    copies.clear()  # it may go at any time between the beginning and the end
            elif isinstance(operation, Load | Store) and operation.vma_id in self.private_vmas and ends:
                if isinstance(operation, Store) and outcome is None and not cuts:
                    copies[client, thread] = operation.value
                elif isinstance(operation, Load) and (client, thread) in copies:
                    assert outcome == copies[client, thread], f"client {client} has lost its copy, and sees {outcome}"


PRIVATE_VALUES: Final = 1000
"""Values from here on are stored into private mappings, and nowhere else."""


def operation_is_of_a_copy(private_vmas: set[int], operation: Operation, outcome: Any) -> bool:
    """Has it loaded what its process has stored privately?"""
    if not isinstance(operation, Load) or isinstance(outcome, Failed):
        return False
    return operation.vma_id in private_vmas and int(outcome) >= PRIVATE_VALUES


def _effect_of_request(
    request: Read | Write | Truncate | Fallocate, pgoff: int, second_value: int
) -> tuple[str, int] | None:
    start = pgoff * PAGE_SIZE
    if isinstance(request, Truncate):
        return ("cut", 0) if request.size_bytes <= start else ("grow", 0)
    end_bytes = request.offset_bytes + _length_bytes(request)
    if isinstance(request, Fallocate):
        if request.mode == 0:
            return ("grow", 0) if start < end_bytes else None
        if request.mode in (FallocateMode.COLLAPSE_RANGE, FallocateMode.INSERT_RANGE):
            assert pgoff == request.offset_bytes == 0, "only the first page is judged"
            return "write", second_value if request.mode == FallocateMode.COLLAPSE_RANGE else 0
    if not request.offset_bytes <= start < end_bytes:
        return None
    if isinstance(request, Read):
        return "read", 0
    if isinstance(request, Write):
        return "write", page_value(request.data[start - request.offset_bytes :])
    return ("punch", 0) if request.mode & FallocateMode.KEEP_SIZE else ("write", 0)


def _length_bytes(request: Read | Write | Fallocate) -> int:
    return len(request.data) if isinstance(request, Write) else request.length_bytes


def write_page(handle: int, pgoff: int, value: int) -> Write:
    return Write(0, handle, pgoff * PAGE_SIZE, 0, page_bytes(value))


def read_page(handle: int, pgoff: int) -> Read:
    return Read(0, handle, pgoff * PAGE_SIZE, PAGE_SIZE)

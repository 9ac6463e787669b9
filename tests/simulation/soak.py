"""One random, long order of events, from a seed: the same seed gives the same events and the same bytes.

Processes with two threads each open, map, load, store, read, write, truncate, rename and unlink a few files of a tiny
device, do all of fallocate(2) and direct I/O on them, map them privately and pin pages. They are killed at any moment,
stop taking orders until they are evicted, break the protocol, and drop translations by themselves. Each value that is
stored carries its file and page, so that a foreign one is known as such.
"""

import errno
import hashlib
from random import Random
from typing import Any, Final

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import HolePolicyName
from dax_mp.effects import Effect, EndSession
from dax_mp.errors import ProtocolError
from dax_mp.messages import (
    Bye,
    Close,
    Extents,
    Fallocate,
    FallocateMode,
    Fstat,
    Fsync,
    Link,
    List,
    Maps,
    Mmap,
    Munmap,
    Open,
    OpenFlag,
    Pin,
    Read,
    Rename,
    Seek,
    Stat,
    Statfs,
    Truncate,
    Unlink,
    Unpin,
    Write,
    decode,
    encode,
)
from simulation.changes import CELLS, FILE_PAGES, Change, Shift, change_of, pages_of
from simulation.client import (
    PAGE_SIZE,
    Call,
    DirectRead,
    DirectWrite,
    Ended,
    Failed,
    Load,
    Operation,
    Store,
    page_bytes,
    page_value,
)
from simulation.copies import Copies
from simulation.expected import File
from simulation.world import Event, World

NAMES: Final = ("a", "b", "c", "d")
THREADS: Final = 2
KEEP_SIZE: Final = int(FallocateMode.KEEP_SIZE)
ZERO_RANGE: Final = int(FallocateMode.ZERO_RANGE)
COLLAPSE_RANGE: Final = int(FallocateMode.COLLAPSE_RANGE)
INSERT_RANGE: Final = int(FallocateMode.INSERT_RANGE)
TICK_S: Final = 0.3

ALLOWED: Final = frozenset(
    {
        *(errno.EFAULT, errno.ENOSPC, errno.ENOMEM),
        errno.EBUSY,  # pinned
        *(errno.EBADF, errno.ENOENT, errno.EEXIST, errno.EINVAL, errno.ENXIO, errno.EMLINK),
        *(errno.ESTALE, errno.EPROTO),  # evicted, or the window closed by another thread
    }
)
"""How an operation may fail."""


class Soak(World):
    """seed, policy, pmem_pages, dram_pages: see the module. clients: how many live processes there are at a time."""

    def __init__(
        self, seed: int, policy: HolePolicyName, *, pmem_pages: int = 20, dram_pages: int = 3, clients: int = 4
    ) -> None:
        self._digest = hashlib.blake2b()
        super().__init__(policy, pmem_pages, dram_pages)
        self._random = Random(seed)
        self._clients_wanted = clients
        self._now_s = 0.0
        self._last_value = 0
        self._last_operation = 0
        self._operation_of: dict[tuple[int, int], int] = {}
        """(client, thread): the number of the operation that it has begun."""
        self._handles: dict[int, dict[int, int]] = {}
        """Of each client, the handles it may use, with the inode."""
        self._files: dict[int, File] = {}
        self._writable: set[int] = set()
        """VMAs that may be stored to."""
        self._copies: dict[int, Copies] = {}
        """Of each private VMA."""
        self._pins: dict[tuple[int, int], tuple[int, dict[int, int | None]]] = {}
        """(client, pin's id): the VMA, and the frame of each page."""
        self.operations_done: dict[str, int] = {}
        self.evicted_late = 0

    # --- the wire -----------------------------------------------------------------------------------------------------

    def deliver(self, effect: Effect) -> None:
        if isinstance(effect, EndSession):
            self._digest.update(effect.token)
            return
        data = encode(effect.message)
        self._digest.update(effect[0] + data)
        super().deliver(effect._replace(message=decode(data)))

    def digest(self) -> str:
        """Of every message that the coordinator has sent."""
        return self._digest.hexdigest()

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, events: int) -> None:
        for _ in range(events):
            self._one_event()
            self.check()
            if not self.history[200:]:
                continue
            self.history.clear()  # the judge here is `expected`

    def _living(self) -> list[int]:
        return [number for number, alive in enumerate(self.alive) if alive]

    def _one_event(self) -> None:
        living = self._living()
        if len(living) < self._clients_wanted:
            number = self.add_client(THREADS)
            self._handles[number] = {}
            return
        number = self._random.choice(living)
        match self._random.choices(
            ("step", "begin", "tick", "kill", "stop", "go on", "misbehave", "drop"), (800, 200, 20, 2, 3, 20, 1, 6)
        )[0]:
            case "step":
                if events := self.events():
                    self._step(self._random.choice(events))
                else:
                    self._begin(number, self._random.randrange(THREADS))
            case "begin":
                self._begin(number, self._random.randrange(THREADS))
            case "tick":
                self._tick()
            case "kill":
                self._kill(number)
            case "stop":
                self.stopped.add(number)
            case "go on":
                self.stopped.discard(number)
                if self.clients[number].evict_errno:
                    self._kill(number)  # it is of no use any more
            case "misbehave":
                self.coordinator.protocol_error(self.clients[number].token, ProtocolError("broken on purpose"))
                self._carry_out()
            case "drop":
                if windows := list(self.clients[number].windows.values()):
                    self._random.choice(windows).translations.clear()

    def _kill(self, number: int) -> None:
        self.stopped.discard(number)
        self._forget_pins_of(number)
        for thread in range(THREADS):
            if (operation_id := self._operation_of.pop((number, thread), None)) is not None:
                for file in self._files.values():
                    file.accesses.pop(operation_id, None)  # its changes may take effect yet
        self.kill(number)

    def _step(self, event: Event) -> None:
        client = self.clients[event.client]
        if event.kind == "run" and not client.threads[event.thread].begun:
            self._note_begin(event.client, event.thread, client.threads[event.thread].operations[0])
        for ended in self.step(event):
            self._note_end(event.client, ended)

    def check(self) -> None:
        super().check()
        for (number, pin_id), (vma_id, frames) in self._pins.items():
            session = self.coordinator.sessions[self.clients[number].token]
            if session.evicted:
                continue
            block_map = self.coordinator.fs.inodes[self.ino_of_vma[vma_id]].block_map
            for pgoff, pfn in frames.items():
                assert block_map.get(pgoff) == pfn, f"page {pgoff}, which pin {pin_id} holds, has moved"

    def _forget_pins_of(self, number: int, vma_id: int | None = None) -> None:
        """Of a client, or of one VMA of it."""
        for key, (pinned_vma_id, _) in list(self._pins.items()):
            if key[0] == number and vma_id in (None, pinned_vma_id):
                del self._pins[key]

    # --- what a thread does -------------------------------------------------------------------------------------------

    def _begin(self, number: int, thread_number: int) -> None:
        thread = self.clients[number].threads[thread_number]
        if thread.operations:
            return
        few = len(self._handles[number]) < 2
        choose = self._random.choices((self._access, self._file_operation, self._names), (16, 8, 10 if few else 1))[0]
        operation = choose(number)
        if operation is not None:
            thread.operations.append(operation)

    def _access(self, number: int) -> Operation | None:
        windows = list(self.clients[number].windows.values())
        if not windows:
            return None
        window = self._random.choice(windows)
        pgoff = window.pgoff + self._random.randrange(window.length_pages)
        if self._random.random() < 0.5 or window.vma_id not in self._writable:
            return Load(window.vma_id, pgoff)
        return Store(window.vma_id, pgoff, self._value(self.ino_of_vma[window.vma_id], pgoff))

    def _value(self, ino: int, pgoff: int) -> int:
        self._last_value += 1
        return ino << 48 | pgoff << 40 | self._last_value

    def _names(self, _number: int) -> Operation:
        name, other, flags = self._random.choice(NAMES), self._random.choice(NAMES), int(OpenFlag.CREATE)
        if self._random.random() < 0.1:
            flags |= int(OpenFlag.EXCLUSIVE)
        elif self._random.random() < 0.1:
            flags = int(OpenFlag.TMPFILE)
        choices = (
            *(Open(0, name, flags),) * 12,
            *(Unlink(0, name), Rename(0, name, other, 0)),
            *(Stat(0, name), Maps(0, name, 0, 0), List(0, ""), Statfs(0)),
        )
        return Call(self._random.choice(choices))

    def _file_operation(self, number: int) -> Operation | None:
        if not self._handles[number]:
            return None
        handle, ino = self._random.choice(list(self._handles[number].items()))
        start = self._random.randrange(FILE_PAGES)
        length = min(self._random.randint(1, 3), FILE_PAGES - start)
        offset_bytes, length_bytes = start * PAGE_SIZE, length * PAGE_SIZE
        # A size within a page, too, but not within the value that is a page's content.
        size_pages = self._random.choice((self._random.randrange(FILE_PAGES), FILE_PAGES - 1, FILE_PAGES - 1))
        size_bytes = size_pages * PAGE_SIZE + self._random.choice((0, PAGE_SIZE // 2, PAGE_SIZE))
        first = self._random.choice((0, 0, 0, start))
        window_pages = self._random.choice((FILE_PAGES - first, self._random.randint(1, FILE_PAGES - first)))
        data = b"".join(page_bytes(self._value(ino, pgoff)) for pgoff in range(start, start + length))
        windows = list(self.clients[number].windows)
        direct = self._direct(handle, ino, start, length)
        if self._random.random() < 0.15:
            return direct
        choices = [
            *[Truncate(0, handle, size_bytes)] * 3,
            *[Fallocate(0, handle, mode, offset_bytes, length_bytes) for mode in self._modes(ino, length)],
            *[Write(0, handle, offset_bytes, 0, data)] * 4,
            *[Read(0, handle, offset_bytes, length_bytes)] * 3,
            *[Mmap(0, handle, first, window_pages, *self._random.choice(((1, 0), (3, 0), (3, 0), (3, 0), (1, 1))))]
            * (6 if len(windows) < 3 else 1),
            *[Munmap(0, self._random.choice(windows)) for _ in range(1) if windows],
            *[self._pin(number) for _ in range(2) if windows],
            *[Unpin(0, pin_id) for client, pin_id in self._pins if client == number] * 6,
            self._random.choice((Close(0, handle), Fstat(0, handle), Extents(0, handle, 0), Fsync(0, handle))),
            Link(0, handle, self._random.choice(NAMES), self._random.randint(0, 1)),
            Seek(0, handle, offset_bytes, self._random.choice((3, 4))),
        ]
        return Call(self._random.choice(choices))

    def _modes(self, ino: int, length_pages: int) -> list[int]:
        """The modes of fallocate to choose from; pages are inserted only where the file stays short enough."""
        modes = (
            [PUNCH_HOLE] * 3 + [mode | keep for mode in (0, ZERO_RANGE) for keep in (0, KEEP_SIZE)] + [COLLAPSE_RANGE]
        )
        if max(self._files[ino].sizes_bytes()) + length_pages * PAGE_SIZE <= CELLS // 2 * PAGE_SIZE:
            modes.append(INSERT_RANGE)
        return modes

    def _direct(self, handle: int, ino: int, start: int, length_pages: int) -> Operation:
        if self._random.random() < 0.3:
            return DirectRead(handle, start, length_pages)
        return DirectWrite(
            handle, start, tuple(self._value(ino, pgoff) for pgoff in range(start, start + length_pages))
        )

    def _pin(self, number: int) -> Pin:
        window = self._random.choice(list(self.clients[number].windows.values()))
        first = self._random.randrange(window.length_pages)
        return Pin(0, window.vma_id, window.pgoff + first, self._random.randint(1, window.length_pages - first))

    # --- what is expected ---------------------------------------------------------------------------------------------

    def _note_begin(self, number: int, thread: int, operation: Operation) -> None:
        self._last_operation += 1
        operation_id = self._operation_of[number, thread] = self._last_operation
        if isinstance(operation, Load | Store):
            self._files[self.ino_of_vma[operation.vma_id]].begin_access(operation_id, range(0))
            return
        request: Any = operation.request if isinstance(operation, Call) else operation
        if isinstance(request, Close):
            self._handles[number].pop(request.handle, None)
        elif isinstance(request, Unpin):
            self._pins.pop((number, request.pin_id), None)
        elif isinstance(request, Munmap):
            self._forget_pins_of(number, request.vma_id)
        handle = getattr(request, "handle", None)
        ino = self.ino_of_handle.get((number, handle)) if handle is not None else None
        if ino is None:
            return
        if isinstance(request, Read):
            self._files[ino].begin_access(operation_id, pages_of(request.offset_bytes, request.length_bytes))
        elif isinstance(request, DirectRead):
            self._files[ino].begin_access(operation_id, range(request.pgoff, request.pgoff + request.length_pages))
        elif (change := change_of(request)) is not None:
            self._begin_change(ino, operation_id, change)

    def _begin_change(self, ino: int, operation_id: int, change: Change | Shift) -> None:
        if isinstance(change, Shift):
            self._files[ino].begin_shift(operation_id, change)
            cut = 0 if change.pages < 0 else None
        else:
            self._files[ino].begin(operation_id, change)
            cut = None if change.truncate_to_bytes is None else -(-change.truncate_to_bytes // PAGE_SIZE)
        if cut is not None:
            for copies in self._copies_of(ino):
                copies.begin_cut(operation_id, cut)

    def _end_change(self, ino: int, operation_id: int, operation: Any, change: Change | Shift, outcome: Any) -> None:
        failed = isinstance(outcome, Failed)
        unknown = failed and outcome.errno in (errno.ESTALE, errno.EPROTO)
        if isinstance(change, Shift):
            self._files[ino].end_shift(operation_id, took_effect=not failed)
        else:
            self._files[ino].end(operation_id, took_effect=None if unknown else not failed)
        took_all = isinstance(change, Change) and not failed
        for copies in self._copies_of(ino):
            copies.end_cut(operation_id, took_all)

    def _copies_of(self, ino: int) -> list[Copies]:
        return [copies for vma_id, copies in self._copies.items() if self.ino_of_vma[vma_id] == ino]

    def _note_end(self, number: int, ended: Ended) -> None:
        operation, outcome = ended.operation, ended.outcome
        operation_id = self._operation_of.pop((number, ended.thread))
        failed = isinstance(outcome, Failed)
        assert not failed or outcome.errno in ALLOWED, f"{operation} failed with {errno.errorcode[outcome.errno]}"
        kind = type(operation.request) if isinstance(operation, Call) else type(operation)
        done = kind.__name__ + (f" {errno.errorcode[outcome.errno]}" if failed else "")
        self.operations_done[done] = self.operations_done.get(done, 0) + 1
        if isinstance(operation, Load | Store):
            self._note_access(number, operation_id, operation, outcome)
        else:
            request = operation.request if isinstance(operation, Call) else operation
            self._note_answer(number, operation_id, request, outcome)

    def _note_access(self, number: int, operation_id: int, operation: Load | Store, outcome: Any) -> None:
        ino, pgoff = self.ino_of_vma[operation.vma_id], operation.pgoff
        file = self._files[ino]
        access = file.end_access(operation_id)
        if isinstance(outcome, Failed):
            file.failed(access, pgoff, outcome)
            return
        session = self.coordinator.sessions[self.clients[number].token]
        copies = self._copies.get(operation.vma_id)
        if isinstance(operation, Store):
            if copies is not None:
                copies.stored(pgoff, operation.value)
            else:
                file.stored(pgoff, operation.value, evicted=session.evicted)
            return
        self._assert_own(ino, pgoff, outcome)
        if not session.evicted and (copies is None or not copies.loaded(pgoff, outcome)):
            file.loaded(pgoff, outcome)

    def _note_answer(self, number: int, operation_id: int, request: Any, outcome: Any) -> None:
        failed = isinstance(outcome, Failed)
        if isinstance(request, Open) and not failed:
            handle, ino, _ = outcome
            self._handles[number][handle] = self.ino_of_handle[number, handle] = ino
            self._files.setdefault(ino, File())
        elif isinstance(request, Mmap) and not failed:
            self.ino_of_vma[outcome] = self.ino_of_handle[number, request.handle]
            if request.access & 2 or request.private:
                self._writable.add(outcome)
            if request.private:
                self._copies[outcome] = Copies()
        elif isinstance(request, Pin) and not failed:
            self._note_pin(number, request, outcome)
        elif isinstance(request, Read):
            self._note_read(self.ino_of_handle[number, request.handle], operation_id, request.offset_bytes, outcome)
        elif isinstance(request, DirectRead):
            self._note_read(
                self.ino_of_handle[number, request.handle], operation_id, request.pgoff * PAGE_SIZE, outcome
            )
        elif (change := change_of(request)) is not None:
            self._end_change(self.ino_of_handle[number, request.handle], operation_id, request, change, outcome)

    def _note_pin(self, number: int, request: Pin, pin_id: int) -> None:
        session = self.coordinator.sessions[self.clients[number].token]
        if pin_id in session.pins:  # else the mapping, or the session, is gone already
            block_map = session.pins[pin_id].vma.inode.block_map
            frames = {pgoff: block_map.get(pgoff) for pgoff in range(*session.pins[pin_id].pages)}
            if session.pins[pin_id].vma.keeps_holes:
                frames = {pgoff: pfn for pgoff, pfn in frames.items() if pfn is not None}
            assert None not in frames.values(), f"a page of {request} has no block"
            self._pins[number, pin_id] = (request.vma_id, frames)

    def _assert_own(self, ino: int, pgoff: int, value: int) -> None:
        """Assert that the value is no other file's, no other page's, and not what nobody has zeroed."""
        own = ino if self._files[ino].shifted else ino << 8 | pgoff
        assert not value or value >> (48 if self._files[ino].shifted else 40) == own, (
            f"page {pgoff} of inode {ino} shows a foreign {value:#x}"
        )

    def _note_read(self, ino: int, operation_id: int, offset_bytes: int, outcome: Any) -> None:
        access = self._files[ino].end_access(operation_id)
        if isinstance(outcome, Failed):
            return
        for pgoff in pages_of(offset_bytes, len(outcome)):
            value = page_value(outcome[pgoff * PAGE_SIZE - offset_bytes :])
            self._assert_own(ino, pgoff, value)
            assert value in access.values[pgoff], f"read {value:#x} in page {pgoff}, not one of {access.values[pgoff]}"

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let all come to rest; compare what everyone sees; end every session; assert that nothing is left."""
        for number in sorted(self.stopped):
            if self._random.random() < 0.5:
                self._kill(number)
        self.stopped.clear()
        self._come_to_rest()
        self.check()
        self.check_quiescent()
        for file in self._files.values():
            file.give_up()
        self._compare_views()
        for number in self._living():
            if self._random.random() < 0.5 and not self.clients[number].evict_errno:
                self._forget_pins_of(number)
                self.call(number, Bye(0))
                self.alive[number] = False
            else:
                self._kill(number)
        self._unlink_all()
        self._assert_nothing_left()

    def _come_to_rest(self) -> None:
        for _ in range(100_000):
            if events := self.events():
                self._step(events[0])
            elif self.coordinator.next_deadline_s() is not None:  # somebody waits for a pin
                self._tick()
            else:
                return

    def _tick(self) -> None:
        counters = self.coordinator.fs.counters
        before = counters["evictions"]
        self._now_s += TICK_S
        self.coordinator.tick(self._now_s)
        self.evicted_late += counters["evictions"] - before
        self._carry_out()

    def _compare_views(self) -> None:
        """Every file with a name, through a mapping of each process that is left, and by read(2)."""
        living = [number for number in self._living() if not self.clients[number].evict_errno]
        for name in [entry["name"] for entry in self._observer_call(living, List(0, ""))]:
            views = [self._view(number, name) for number in living]
            assert all(view == views[0] for view in views), f"processes see {name} differently: {views}"

    def _observer_call(self, living: list[int], request: Any) -> Any:
        return self.call(living[0], request) if living else []

    def _view(self, number: int, name: str) -> list[Any]:
        handle = self.open(number, name, 0)
        ino = self.ino_of_handle[number, handle]
        file = self._files.setdefault(ino, File())
        size_bytes = self.call(number, Fstat(0, handle))["size_bytes"]
        assert size_bytes in file.sizes_bytes(), f"{name} has {size_bytes} bytes, not {file.sizes_bytes()}"
        vma_id = self.map(number, handle, FILE_PAGES, access=1)
        data = self.call(number, Read(0, handle, 0, FILE_PAGES * PAGE_SIZE))
        values = [page_value(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE)]
        for pgoff in range(FILE_PAGES):
            seen = self.access(number, Load(vma_id, pgoff))
            if pgoff < len(values):
                file.loaded(pgoff, seen)
                self._assert_own(ino, pgoff, seen)
                assert seen == values[pgoff], f"load and read differ in page {pgoff} of {name}"
            else:
                assert seen == Failed(errno.EFAULT), f"page {pgoff} of {name} is past the end, and shows {seen}"
        return [size_bytes, *values]

    def _unlink_all(self) -> None:
        number = self.add_client()
        for entry in self.call(number, List(0, "")):
            self.call(number, Unlink(0, entry["name"]))
        self.call(number, Bye(0))
        self.alive[number] = False

    def _assert_nothing_left(self) -> None:
        fs = self.coordinator.fs
        assert not self.coordinator.sessions, "a session is left"
        assert not fs.inodes and not fs.names, f"files are left: {list(fs.inodes)}"
        for frames in (fs.device.frames, fs.device.dram_frames):
            if frames is not None:
                assert not frames.quarantine, "something is left in quarantine"
                assert frames.free_pages == frames.end_pfn - frames.first_pfn, "frames are lost"
        self.check()

"""One random, long order of events, from a seed: the same seed gives the same events and the same bytes.

Processes with two threads each open, map, load, store, read, write, truncate, punch, rename and unlink a few files of a
tiny device. They are killed at any moment, stop taking orders until they are evicted, break the protocol, and drop
translations by themselves. Each value that is stored carries its file and page, so that a foreign one is known as such.
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
    Fstat,
    Fsync,
    List,
    Maps,
    Mmap,
    Munmap,
    Open,
    OpenFlag,
    Read,
    Rename,
    Seek,
    Stat,
    Statfs,
    Truncate,
    Unlink,
    Write,
    decode,
    encode,
)
from simulation.client import PAGE_SIZE, Call, Ended, Failed, Load, Operation, Store, page_bytes, page_value
from simulation.expected import FILE_PAGES, Change, File
from simulation.world import Event, World

NAMES: Final = ("a", "b", "c", "d")
THREADS: Final = 2
TICK_S: Final = 0.3

ALLOWED: Final = frozenset(
    {
        *(errno.EFAULT, errno.ENOSPC, errno.ENOMEM),
        *(errno.EBADF, errno.ENOENT, errno.EEXIST, errno.EINVAL, errno.ENXIO),
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
        self.operations_done: dict[str, int] = {}

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
                self._now_s += TICK_S
                self.coordinator.tick(self._now_s)
                self._carry_out()
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
        choices = [
            *[Truncate(0, handle, size_bytes)] * 3,
            *[Fallocate(0, handle, PUNCH_HOLE, offset_bytes, length_bytes)] * 3,
            *[Write(0, handle, offset_bytes, 0, data)] * 4,
            *[Read(0, handle, offset_bytes, length_bytes)] * 3,
            *[Mmap(0, handle, first, window_pages, self._random.choice((1, 3, 3, 3)), 0)]
            * (6 if len(windows) < 3 else 1),
            *[Munmap(0, self._random.choice(windows)) for _ in range(1) if windows],
            self._random.choice((Close(0, handle), Fstat(0, handle), Extents(0, handle, 0), Fsync(0, handle))),
            Seek(0, handle, offset_bytes, self._random.choice((3, 4))),
        ]
        return Call(self._random.choice(choices))

    # --- what is expected ---------------------------------------------------------------------------------------------

    def _note_begin(self, number: int, thread: int, operation: Operation) -> None:
        self._last_operation += 1
        operation_id = self._operation_of[number, thread] = self._last_operation
        if not isinstance(operation, Call):
            self._files[self.ino_of_vma[operation.vma_id]].begin_access(operation_id, range(0))
            return
        request = operation.request
        if isinstance(request, Close):
            self._handles[number].pop(request.handle, None)
        handle = getattr(request, "handle", None)
        ino = self.ino_of_handle.get((number, handle)) if handle is not None else None
        if ino is None:
            return
        if isinstance(request, Read):
            self._files[ino].begin_access(operation_id, _pages(request.offset_bytes, request.length_bytes))
        elif (change := _change(request)) is not None:
            self._files[ino].begin(operation_id, change)

    def _note_end(self, number: int, ended: Ended) -> None:
        operation, outcome = ended.operation, ended.outcome
        operation_id = self._operation_of.pop((number, ended.thread))
        failed = isinstance(outcome, Failed)
        assert not failed or outcome.errno in ALLOWED, f"{operation} failed with {errno.errorcode[outcome.errno]}"
        kind = type(operation.request) if isinstance(operation, Call) else type(operation)
        done = kind.__name__ + (f" {errno.errorcode[outcome.errno]}" if failed else "")
        self.operations_done[done] = self.operations_done.get(done, 0) + 1
        if isinstance(operation, Call):
            self._note_answer(number, operation_id, operation.request, outcome)
        else:
            self._note_access(number, operation_id, operation, outcome)

    def _note_access(self, number: int, operation_id: int, operation: Load | Store, outcome: Any) -> None:
        ino, pgoff = self.ino_of_vma[operation.vma_id], operation.pgoff
        file = self._files[ino]
        access = file.end_access(operation_id)
        if isinstance(outcome, Failed):
            file.failed(access, pgoff, outcome)
            return
        session = self.coordinator.sessions[self.clients[number].token]
        if isinstance(operation, Store):
            file.stored(pgoff, operation.value, evicted=session.evicted)
            return
        assert_own(ino, pgoff, outcome)
        if not session.evicted:
            file.loaded(pgoff, outcome)

    def _note_answer(self, number: int, operation_id: int, request: Any, outcome: Any) -> None:
        failed = isinstance(outcome, Failed)
        if isinstance(request, Open) and not failed:
            handle, ino, _ = outcome
            self._handles[number][handle] = self.ino_of_handle[number, handle] = ino
            self._files.setdefault(ino, File())
        elif isinstance(request, Mmap) and not failed:
            self.ino_of_vma[outcome] = self.ino_of_handle[number, request.handle]
            if request.access & 2:
                self._writable.add(outcome)
        elif isinstance(request, Read):
            self._note_read(self.ino_of_handle[number, request.handle], operation_id, request, outcome)
        elif _change(request) is not None:
            self._files[self.ino_of_handle[number, request.handle]].end(operation_id, took_effect=not failed)

    def _note_read(self, ino: int, operation_id: int, request: Read, outcome: Any) -> None:
        access = self._files[ino].end_access(operation_id)
        if isinstance(outcome, Failed):
            return
        for pgoff in _pages(request.offset_bytes, len(outcome)):
            value = page_value(outcome[pgoff * PAGE_SIZE - request.offset_bytes :])
            assert_own(ino, pgoff, value)
            assert value in access.values[pgoff], f"read {value:#x} in page {pgoff}, not one of {access.values[pgoff]}"

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let all come to rest; compare what everyone sees; end every session; assert that nothing is left."""
        for number in sorted(self.stopped):
            if self._random.random() < 0.5:
                self._kill(number)
        self.stopped.clear()
        for _ in range(100_000):
            events = self.events()
            if not events:
                break
            self._step(events[0])
        self.check()
        self.check_quiescent()
        for file in self._files.values():
            file.give_up()
        self._compare_views()
        for number in self._living():
            if self._random.random() < 0.5 and not self.clients[number].evict_errno:
                self.call(number, Bye(0))
                self.alive[number] = False
            else:
                self._kill(number)
        self._unlink_all()
        self._assert_nothing_left()

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
                assert_own(ino, pgoff, seen)
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


def assert_own(ino: int, pgoff: int, value: int) -> None:
    """Assert that the value is no other file's or page's, and not what nobody has zeroed."""
    assert not value or value >> 40 == (ino << 8 | pgoff), f"page {pgoff} of inode {ino} shows a foreign {value:#x}"


def _pages(offset_bytes: int, length_bytes: int) -> range:
    return range(offset_bytes // PAGE_SIZE, -(-(offset_bytes + length_bytes) // PAGE_SIZE))


def _change(request: Any) -> Change | None:
    """What the request does to its file, if it succeeds."""
    if isinstance(request, Truncate):
        cut = range(-(-request.size_bytes // PAGE_SIZE), FILE_PAGES)
        return Change(dict.fromkeys(cut, 0), truncate_to_bytes=request.size_bytes)
    if isinstance(request, Fallocate):
        return Change(dict.fromkeys(_pages(request.offset_bytes, request.length_bytes), 0))
    if isinstance(request, Write):
        data, pages = request.data, _pages(request.offset_bytes, len(request.data))
        values = {p: page_value(data[p * PAGE_SIZE - request.offset_bytes :]) for p in pages}
        return Change(values, extend_to_bytes=request.offset_bytes + len(data))
    return None

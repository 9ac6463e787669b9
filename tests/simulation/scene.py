"""One file in several processes, and operations that are held at a step: a race played slowly, from a script.

`Stage` goes through every order of a few events; here one order is told, step by step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dax_mp.device import HolePolicyName
from dax_mp.inode import Inode
from dax_mp.messages import Truncate
from simulation.client import PAGE_SIZE, Call, Load, Operation, Store
from simulation.world import Event, World


class Running:
    """An operation that has begun."""

    def __init__(self, world: World, client: int, thread: int) -> None:
        self._world = world
        self._key = (client, thread, world.ended_operations.get((client, thread), 0))

    def _ends(self) -> list[Any]:
        return [end.outcome for end in self._world.history if end.ends and end[1:4] == self._key]

    @property
    def waits(self) -> bool:
        return not self._ends()

    @property
    def outcome(self) -> Any:
        (outcome,) = self._ends()
        return outcome


class Scene:
    """`clients` processes of two threads; each has the file "file" of `pages` pages open as handle 1, and mapped.

    All of the file is a hole at the start. vmas: of each client its VMA of the whole file.
    """

    handle = 1

    def __init__(
        self,
        clients: int = 2,
        *,
        pages: int = 4,
        policy: HolePolicyName = "zero",
        pmem_pages: int = 32,
        dram_pages: int = 8,
    ) -> None:
        self.world = World(policy, pmem_pages, dram_pages)
        self.vmas: list[int] = []
        for number in range(clients):
            self.world.add_client(threads=2)
            assert self.world.open(number, "file") == self.handle
            if not number and pages:
                self.call(0, Truncate(0, self.handle, pages * PAGE_SIZE))
            self.vmas.append(self.world.map(number, self.handle, max(pages, 1)))

    @property
    def file(self) -> Inode:
        return self.world.coordinator.fs.names["file"]

    # --- from the beginning to the end --------------------------------------------------------------------------------

    def load(self, client: int, pgoff: int = 0, vma: int | None = None) -> Any:
        return self.world.access(client, Load(self.vmas[client] if vma is None else vma, pgoff))

    def store(self, client: int, pgoff: int, value: int, vma: int | None = None) -> Any:
        return self.world.access(client, Store(self.vmas[client] if vma is None else vma, pgoff, value))

    def call(self, client: int, request: Any) -> Any:
        """Make a request, and let everything go on as far as it can. Raises OSError."""
        answer = self.world.call(client, request)
        self.go_on()
        return answer

    def poke(self, client: int, offset_bytes: int, data: bytes) -> None:
        """Store bytes through the client's translation, which is there and may be stored through."""
        pgoff, within = divmod(offset_bytes, PAGE_SIZE)
        translation = self.world.clients[client].windows[self.vmas[client]].translations[pgoff]
        assert translation.access & 2 and within + len(data) <= PAGE_SIZE
        self.world.pmem.write(translation.pfn * PAGE_SIZE + within, data)

    def peek(self, client: int, pgoff: int) -> bytes:
        """The bytes of a page as the client's mapping shows them now; it is faulted in where it is not there."""
        self.load(client, pgoff)
        translation = self.world.clients[client].windows[self.vmas[client]].translations[pgoff]
        memory = (self.world.pmem, self.world.dram, None)[translation.target]
        return bytes(PAGE_SIZE) if memory is None else memory.read(translation.pfn * PAGE_SIZE, PAGE_SIZE)

    def maps(self, client: int, pgoff: int, vma: int | None = None) -> bool:
        """Does the client have the page mapped?"""
        windows = self.world.clients[client].windows
        return pgoff in windows[self.vmas[client] if vma is None else vma].translations

    # --- step by step -------------------------------------------------------------------------------------------------

    def begin(self, client: int, operation: Any, thread: int = 1) -> Running:
        """Begin an operation, or a request, and let everything go on as far as it can."""
        running = Running(self.world, client, thread)
        call: Operation = operation if isinstance(operation, Load | Store) else Call(operation)
        self.world.clients[client].threads[thread].operations.append(call)
        self.go_on()
        return running

    def load_from(self, client: int, pgoff: int) -> Load:
        return Load(self.vmas[client], pgoff)

    def store_to(self, client: int, pgoff: int, value: int) -> Store:
        return Store(self.vmas[client], pgoff, value)

    def begin_load(self, client: int, pgoff: int = 0, thread: int = 1) -> Running:
        return self.begin(client, self.load_from(client, pgoff), thread)

    def begin_store(self, client: int, pgoff: int, value: int, thread: int = 1) -> Running:
        return self.begin(client, self.store_to(client, pgoff, value), thread)

    def send_fault(self, client: int, operation: Operation, thread: int = 1) -> Running:
        """Begin an access that faults, and leave the fault on its way to the coordinator."""
        running = Running(self.world, client, thread)
        self.world.clients[client].threads[thread].operations.append(operation)
        self.world.step(Event("run", client, thread))
        assert self.world.clients[client].pager_requests, "no fault"
        return running

    def go_on(self) -> None:
        """Let everything happen that can, with every invariant asserted at each step."""
        while events := self.world.events():
            self.world.step(events[0])
            self.world.check()

    def pass_by(self, step: str) -> None:
        """Hold no more operations at this step than are there."""
        self.world.coordinator.fs.delays.pass_by(step)

    @contextmanager
    def held(self, step: str) -> Iterator[None]:
        """Hold every operation that comes to this step; some must have come when they are let go."""
        self.world.coordinator.fs.delays.hold(step)
        yield
        assert self.world.coordinator.fs.delays.let_go(step), f"nothing came to {step}"
        self.world.coordinator.tick(0.0)
        self.world._carry_out()
        self.go_on()

    def end(self) -> None:
        """Assert that nothing is under way or broken."""
        self.go_on()
        self.world.check()
        self.world.check_quiescent()

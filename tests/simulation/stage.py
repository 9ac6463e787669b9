"""A small world to explore: one file that every client has mapped, and a program for each thread."""

from collections.abc import Sequence
from functools import partial

from dax_mp.device import HolePolicyName
from dax_mp.messages import Fallocate, Truncate
from simulation.client import PAGE_SIZE, Load, Operation, Store
from simulation.explore import Explored, explore
from simulation.spec import Page
from simulation.world import Event, World, read_page, write_page

BEFORE = 1
"""What a page that has a block holds at the start."""


class Stage:
    """`threads`: of each client, how many. block: does the file's first page have a block, or is it a hole?

    mapped: the clients that have loaded the first page before the start. private: those whose mapping is private.
    second: what the second page holds, where there is one that has a block. unwritten: the hole is allocated.
    """

    def __init__(
        self,
        policy: HolePolicyName,
        threads: Sequence[int],
        *,
        pages: int = 1,
        pmem_pages: int = 2,
        dram_pages: int = 2,
        block: bool = False,
        mapped: Sequence[int] = (),
        private: Sequence[int] = (),
        second: int = 0,
        unwritten: bool = False,
    ) -> None:
        self.world = World(policy, pmem_pages, dram_pages)
        self.clients = [self.world.add_client(count) for count in threads]
        self.handles = [self.world.open(client, "file") for client in self.clients]
        self.world.call(0, Truncate(0, self.handles[0], pages * PAGE_SIZE))
        self.vmas = [
            self.world.map(client, self.handles[client], pages, private=client in private) for client in self.clients
        ]
        self.first: list[Event] = []
        """The events that every order begins with."""
        self.start = Page(inside=True, value=BEFORE if block else 0)
        if block:
            self.world.call(0, write_page(self.handles[0], 0, BEFORE))
        if second:
            self.world.call(0, write_page(self.handles[0], 1, second))
            self.world.second_value = second
        if unwritten:
            self.world.call(0, Fallocate(0, self.handles[0], 0, 0, PAGE_SIZE))
        for client in mapped:
            self.world.access(client, Load(self.vmas[client], 0))
        self.world.begin_history()

    def load(self, client: int, pgoff: int = 0) -> Load:
        return Load(self.vmas[client], pgoff)

    def store(self, client: int, value: int, pgoff: int = 0) -> Store:
        return Store(self.vmas[client], pgoff, value)

    def does(self, client: int, *operations: Operation, thread: int = 0) -> None:
        """The program of one thread."""
        self.world.clients[client].threads[thread].operations += operations

    def faults_first(self, client: int) -> None:
        """Every order begins with the fault of the client's first access, as far as it goes without anybody else."""
        self.first += (Event("run", client), Event("fault", client))

    def explore(self) -> Explored:
        """Every order of events. At the end nothing is under way, and what was seen of the file's first page, by all
        clients once more and by read(2) too, has an explanation."""
        at_end = partial(_at_end, vmas=self.vmas, handles=self.handles, start=self.start)
        return explore(self.world, at_end, first=self.first)


def _at_end(world: World, vmas: list[int], handles: list[int], start: Page) -> None:
    world.check_quiescent()
    world.fates.clear()
    for client, vma_id in enumerate(vmas):
        if world.alive[client]:
            world.access(client, Load(vma_id, 0))
            if not world.clients[client].evict_errno:
                world.call(client, read_page(handles[client], 0))
    world.check()
    world.check_quiescent()
    (inode,) = (inode for inode in world.coordinator.fs.inodes.values() if inode.name == "file")
    world.check_history(inode, 0, start)
    world.check_private(0)

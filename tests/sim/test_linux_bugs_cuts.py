"""The hard bugs of Linux's DAX played again, as in `test_linux_bugs.py`: truncate, punch, pins, private copies, EOF."""

import errno
from collections.abc import Callable
from typing import Any, Final

import pytest

from dax_mp.control_messages import PUNCH_HOLE
from dax_mp.device import HolePolicyName
from dax_mp.messages import (
    BeginWrite,
    CopyRange,
    EndIo,
    Fallocate,
    FallocateMode,
    Pin,
    Read,
    Truncate,
    Unpin,
    Write,
)
from simulation.client import PAGE_SIZE, Failed
from simulation.scene import Scene
from simulation.world import ACK_TIMEOUT_S, write_page

P: Final = PAGE_SIZE
FILE: Final = Scene.handle
COLLAPSE: Final = int(FallocateMode.COLLAPSE_RANGE)
INSERT: Final = int(FallocateMode.INSERT_RANGE)
ZERO: Final = int(FallocateMode.ZERO_RANGE)
KEEP_SIZE: Final = int(FallocateMode.KEEP_SIZE)

policies = pytest.mark.parametrize("policy", ["zero", "page-cache"])


def punch(pgoff: int, pages: int = 1) -> Fallocate:
    return Fallocate(0, FILE, PUNCH_HOLE, pgoff * P, pages * P)


def filled(clients: int = 2, policy: HolePolicyName = "zero", pmem_pages: int = 32) -> Scene:
    """Page n of the file holds n + 1, and all clients have all of it mapped for stores."""
    scene = Scene(clients, policy=policy, pmem_pages=pmem_pages)
    for page in range(4):
        for client in range(clients):
            scene.store(client, page, page + 1)
    return scene


CUTS: Final[dict[str, Any]] = {
    "truncate": Truncate(0, FILE, 0),
    "punch": punch(0, 4),
    "zero": Fallocate(0, FILE, ZERO, 0, 4 * P),
    "collapse": Fallocate(0, FILE, COLLAPSE, 0, 3 * P),
    "insert": Fallocate(0, FILE, INSERT, 0, P),
    "write to holes": Write(0, FILE, 0, 0, bytes(4 * P)),
    "long write to holes": BeginWrite(0, FILE, 0, 0, 4 * P),
}


@policies
@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("at", [0, 2, 3])
def test_b15_who_maps_a_part_only(policy: HolePolicyName, how: str, at: int) -> None:
    """A mapped 2 MiB, B 4 KiB at an offset inside; the walk asked for the first page alone and missed B (06083a0921fd).
    Here every VMA that has any page of the range is told, wherever in it that is."""
    scene = Scene(2, policy=policy) if "holes" in how else filled(2, policy)
    vma = scene.world.map(1, FILE, 1, at)
    scene.load(1, at, vma=vma)
    scene.load(1, at)
    assert scene.maps(1, at, vma)
    answer = scene.call(0, CUTS[how])
    if how == "long write to holes":
        scene.call(0, EndIo(0, answer[0], 4 * P))
    assert not scene.maps(1, at, vma)
    assert not scene.maps(1, at)
    scene.end()


@policies
def test_b18_truncate_while_a_fault_has_passed_the_size_check(policy: HolePolicyName) -> None:
    """The truncate completed between the fault's check of i_size and its mapping of the block, which was freed
    (283307c7607d). Here the truncate waits for the fault, and has the page unmapped then."""
    scene = filled(3, policy)
    scene.world.clients[0].windows[scene.vmas[0]].translations.clear()
    with scene.held("fault.entry_locked"):
        load = scene.begin_load(0, 3)
        truncate = scene.begin(1, Truncate(0, FILE, P))
        assert load.waits and truncate.waits
        assert scene.file.size_bytes == 4 * P
    assert load.outcome == 4
    assert not truncate.waits
    assert not scene.maps(0, 3)
    assert scene.load(0, 3) == Failed(errno.EFAULT)
    scene.end()


@policies
@pytest.mark.parametrize("step", ["truncate.size_set", "truncate.unmapped"])
def test_b18_a_fault_in_the_middle_of_a_truncate(policy: HolePolicyName, step: str) -> None:
    """The same race, the other way round: whoever comes before the blocks are free gets none of them."""
    scene = filled(3, policy)
    scene.world.clients[0].windows[scene.vmas[0]].translations.clear()
    with scene.held(step):
        truncate = scene.begin(1, Truncate(0, FILE, P))
        load, store = scene.begin_load(0, 3), scene.begin_store(2, 0, 9)
        assert truncate.waits
        assert not store.waits, "what it has mapped before the end stays so"
    assert load.outcome == Failed(errno.EFAULT)
    assert scene.load(0, 0) == 9
    scene.end()


@policies
def test_b19_a_fault_in_the_middle_of_a_punch(policy: HolePolicyName) -> None:
    """A fault between "unmap" and "free" mapped the block that was about to be freed, and with it what another file
    then wrote there (ea3d7209ca01, CVE-2015-8839). Here it waits, and finds the hole."""
    scene = filled(3, policy, pmem_pages=4)
    other = scene.world.open(1, "other")
    with scene.held("punch.unmapped"):
        punched = scene.begin(1, punch(2))
        loads = [scene.begin_load(client, 2) for client in (0, 2)]
        assert punched.waits and all(load.waits for load in loads)
    assert [load.outcome for load in loads] == [0, 0]
    scene.call(1, write_page(other, 0, 99))  # the device has no other block
    assert [scene.load(client, 2) for client in range(3)] == [0, 0, 0]
    scene.end()


@policies
@pytest.mark.parametrize("mode", [COLLAPSE, INSERT])
def test_b19_a_fault_in_the_middle_of_a_shift(policy: HolePolicyName, mode: int) -> None:
    """The same with blocks that become another page's."""
    scene = filled(2, policy)
    with scene.held("shift.unmapped"):
        shift = scene.begin(1, Fallocate(0, FILE, mode, 0, P))
        load = scene.begin_load(0, 1)
        assert shift.waits and load.waits
    assert load.outcome == (3 if mode == COLLAPSE else 1)
    scene.end()


PINNED: Final = {how: CUTS[how] for how in ("truncate", "punch", "zero", "collapse", "insert")}


@pytest.mark.parametrize("how", PINNED)
def test_b20_blocks_that_a_device_may_store_to(how: str) -> None:
    """DMA went into a block that truncate had freed and another file had got (430657b6be89). Here the pin's blocks stay
    the file's until it is over."""
    scene = filled(2, pmem_pages=4)
    pin = scene.call(0, Pin(0, scene.vmas[0], 1, 2))
    cut = scene.begin(1, PINNED[how])
    assert cut.waits
    for page in (1, 2):
        assert scene.maps(0, page), "a pinned page is unmapped"
        scene.poke(0, page * P, b"from a device")
    scene.call(0, Unpin(0, pin))
    assert not cut.waits
    assert cut.outcome is None
    scene.end()


def test_b20_a_pin_that_stays() -> None:
    """... and a truncate does not wait for good."""
    scene = filled(2)
    scene.call(0, Pin(0, scene.vmas[0], 3, 1))
    cut = scene.begin(1, Truncate(0, FILE, 0))
    scene.world.coordinator.tick(ACK_TIMEOUT_S)
    scene.world._carry_out()
    scene.go_on()
    assert cut.outcome == Failed(errno.EBUSY)
    assert scene.load(1, 3) == 4


@policies
@pytest.mark.parametrize("how", [*CUTS, "pin"])
def test_b21_private_copies(policy: HolePolicyName, how: str) -> None:
    """The layout break of a punch unmapped copied pages as well, and what their process had stored was lost (dax:
    dax_layout_busy_page() should not unmap cow pages). Here a truncate drops copies past the end, and nothing else."""
    scene = Scene(2, policy=policy)
    private = scene.world.map(0, FILE, 4, private=True)
    for page in (0, 2):
        assert scene.store(0, page, 70 + page, vma=private) is None
    assert scene.load(0, 1, vma=private) == 0
    assert scene.load(1, 2) == 0, "a private store has come into the file"
    request = CUTS.get(how, Pin(0, scene.vmas[1], 0, 4))
    if how == "insert":
        scene.call(1, request._replace(offset_bytes=P))
    elif how == "collapse":
        scene.call(1, request._replace(length_bytes=P))
    else:
        answer = scene.call(1, request)
        if how == "long write to holes":
            scene.call(1, EndIo(0, answer[0], 4 * P))
    if how == "truncate":
        assert scene.load(0, 2, vma=private) == Failed(errno.EFAULT)
        scene.call(1, Truncate(0, FILE, 4 * P))
        assert [scene.load(0, page, vma=private) for page in (0, 2)] == [0, 0]
    else:
        assert [scene.load(0, page, vma=private) for page in (0, 2)] == [70, 72]
    scene.end()


@pytest.mark.parametrize("how", PINNED)
def test_b22_a_pin_under_way_when_the_pins_are_looked_for(how: str) -> None:
    """The scan for pinned pages skipped the locked ones, and the blocks went under the DMA (6be3e21d25ca). Here who
    looks for pins waits for one that is being made."""
    scene = Scene(2)
    scene.load(1)
    with scene.held("fill.allocated"):
        pin = scene.begin(0, Pin(0, scene.vmas[0], 0, 4))
        cut = scene.begin(1, PINNED[how])
        assert pin.waits and cut.waits
    assert not pin.waits
    assert cut.waits, "it has not seen the pin"
    scene.load(0)
    assert scene.maps(0, 0)
    scene.call(0, Unpin(0, pin.outcome))
    assert not cut.waits
    scene.end()


@policies
def test_b23_truncate_within_a_page(policy: HolePolicyName) -> None:
    """The cached page was not zeroed past the new end, and a later mapped read saw the old bytes (350976ae2187)."""
    scene = filled(2, policy)
    scene.poke(0, 3 * P, bytes(range(1, P + 1)))
    scene.call(1, Truncate(0, FILE, 3 * P + 10))
    assert scene.peek(0, 3) == scene.peek(1, 3) == bytes(range(1, 11)) + bytes(P - 10)
    scene.call(1, Truncate(0, FILE, 4 * P))
    assert scene.call(1, Read(0, FILE, 3 * P, P)) == bytes(range(1, 11)) + bytes(P - 10)
    scene.end()


def _long_write(scene: Scene, offset_bytes: int, length_bytes: int) -> None:
    io_id, _, _, flat = scene.call(1, BeginWrite(0, FILE, offset_bytes, 0, length_bytes))
    for address, length in zip(flat[::2], flat[1::2], strict=True):
        scene.world.pmem.write(address, b"w" * length)
    scene.call(1, EndIo(0, io_id, length_bytes))


CHANGES_OF_SIZE: Final[dict[str, Callable[[Scene], Any]]] = {
    "truncate up": lambda scene: scene.call(1, Truncate(0, FILE, 3 * P + 20)),
    "truncate up far": lambda scene: scene.call(1, Truncate(0, FILE, 8 * P)),
    "truncate down": lambda scene: scene.call(1, Truncate(0, FILE, 3 * P + 5)),
    "fallocate": lambda scene: scene.call(1, Fallocate(0, FILE, 0, 0, 3 * P + 20)),
    "fallocate far": lambda scene: scene.call(1, Fallocate(0, FILE, 0, 5 * P, P)),
    "zero range": lambda scene: scene.call(1, Fallocate(0, FILE, ZERO, 3 * P + 12, 8)),
    "zero range far": lambda scene: scene.call(1, Fallocate(0, FILE, ZERO, 5 * P, P)),
    "write": lambda scene: scene.call(1, Write(0, FILE, 3 * P + 10, 0, b"w" * 10)),
    "write behind": lambda scene: scene.call(1, Write(0, FILE, 3 * P + 18, 0, b"ww")),
    "write far": lambda scene: scene.call(1, Write(0, FILE, 6 * P, 0, b"w")),
    "append": lambda scene: scene.call(1, Write(0, FILE, 0, 1, b"w" * 10)),
    "long write": lambda scene: _long_write(scene, 0, 3 * P + 20),
    "long write behind": lambda scene: _long_write(scene, 3 * P + 15, 5),
    "long write far": lambda scene: _long_write(scene, 5 * P, P),
    "copy range": lambda scene: scene.call(1, CopyRange(0, FILE, 0, FILE, 3 * P + 10, 10)),
    "copy range far": lambda scene: scene.call(1, CopyRange(0, FILE, 0, FILE, 5 * P, 10)),
    "insert": lambda scene: scene.call(1, Fallocate(0, FILE, INSERT, 0, P)),
    "collapse": lambda scene: scene.call(1, Fallocate(0, FILE, COLLAPSE, 0, P)),
}


@policies
@pytest.mark.parametrize("how", CHANGES_OF_SIZE)
def test_b24_what_lies_past_the_end(policy: HolePolicyName, how: str) -> None:
    """A mapping can store past the end, into the last page; truncate, zero_range and collapse left that there, and the
    next extension made it part of the file (generic/499, 511, 363). Here any change of size has zeroed it."""
    scene = filled(2, policy)
    scene.call(1, Truncate(0, FILE, 3 * P + 10))
    scene.poke(0, 3 * P + 10, b"\xff" * (P - 10))
    CHANGES_OF_SIZE[how](scene)
    data = scene.call(1, Read(0, FILE, 0, 10 * P))
    assert b"\xff" not in data
    last = (len(data) - 1) // P
    assert b"\xff" not in scene.peek(0, min(last, 3))
    scene.call(1, Truncate(0, FILE, 9 * P))
    assert scene.call(1, Read(0, FILE, 0, 10 * P)) == data + bytes(9 * P - len(data))
    scene.end()


@policies
@pytest.mark.parametrize("source", ["hole", "unwritten", "page of the cache"])
def test_b25_a_copy_of_what_was_never_written(policy: HolePolicyName, source: str) -> None:
    """Unsharing a page whose source was a hole, or unwritten, left in the new block what had been there before; and a
    copy could not take a page's place that was mapped (f76b3a32879d). There is no sharing of blocks here, but
    copy_range has the same to do: the target's bytes are zero then, in all mappings."""
    scene = filled(2, policy)
    other = scene.world.open(0, "source")
    scene.call(0, Truncate(0, other, P))
    if source == "unwritten":
        scene.call(0, Fallocate(0, other, 0, 0, P))
    elif source == "page of the cache":
        scene.load(0, 0, vma=scene.world.map(0, other, 1))
    scene.call(0, CopyRange(0, other, 0, FILE, P, P))
    scene.call(0, CopyRange(0, other, 0, FILE, 2 * P, P // 2))
    assert [scene.load(1, page) for page in range(4)] == [1, 0, 0, 4]
    assert scene.call(1, Read(0, FILE, P, P)) == bytes(P)
    scene.end()


def test_b25_a_page_that_gets_another_block() -> None:
    """Where an evicted process may still store to a block that is to move, the page gets a copy, and all see that."""
    scene = filled(3)
    scene.world.stopped.add(0)
    shift = scene.begin(1, Fallocate(0, FILE, INSERT, 0, P))
    scene.world.coordinator.tick(ACK_TIMEOUT_S)
    scene.world._carry_out()
    scene.go_on()
    assert not shift.waits
    scene.poke(0, 0, b"late")
    assert scene.call(1, Read(0, FILE, 0, 5 * P))[::P] == bytes(range(5))
    assert [scene.load(2, page) for page in range(4)] == [0, 1, 2, 3]
    scene.world.stopped.clear()
    scene.end()

"""Interrupts each operation of the library before each of its bytecodes, and looks what is left (test_interrupts.py).

    python interrupted.py ENDPOINT OPERATION STRIDE [START]

The exception is raised before the n-th bytecode, whichever function that is in, the standard library's included. Then
another session asks the coordinator, in ways that leave nothing unseen: no VMA and no handle is there; the file can be
truncated at once, so that nobody has pinned or been lent any of it; and all blocks are free when the names are gone.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import dax_mp
import dax_mp.clients.dax_array  # now, and not in an operation
from interrupts import Interrupt, interrupt

PAGE: Final = 4096
LONG: Final = (1 << 20) + PAGE
"""One byte more than a message takes, and it is done by a lease."""

DATA: Final = bytes(range(256)) * 16
PROMPT_S: Final = 10.0
"""What takes longer has waited for the coordinator's ack timeout, which is twice that."""


KNOWN: Final = "file", "other", "new", "shared", "list", "array"

RETURNING: Final = frozenset(
    {
        ("interrupted.py", "<lambda>"),
        ("interrupted.py", "share"),
        ("interrupted.py", "listed"),
        ("interrupted.py", "arranged"),
        ("shared_memory.py", "__init__"),
        ("shareable_list.py", "__init__"),
        ("arrays.py", "ndarray"),
        ("arrays.py", "_create"),
        ("new_file.py", "make"),
    }
)
"""Files and functions that have nothing to do any more but to return what has been created."""


class Scene:
    """What the operations work on: a file of 3 pages, open and mapped, made anew for each interruption."""

    def __init__(self, session: dax_mp.Session, observer: dax_mp.Session) -> None:
        self.session = session
        self.observer = observer
        self.file = session.open("file", "w+")
        self.file.write(DATA * 3)
        self.file.seek(0)
        self.mapping = self.file.mmap()
        self.made: list[Any] = []
        self.long = bytearray(LONG)
        self.shared: Any = None
        self.where = ""
        self.innermost: tuple[str, str] | None = None
        """Where it was interrupted: file and function. None: what was raised there was lost, in a destructor."""

    def end(self) -> None:
        self.made.clear()
        self.mapping.close()
        self.file.close()


Operation = Callable[[Scene], Any]
OPERATIONS: dict[str, Operation] = {}
PREPARE: dict[str, Callable[[Scene], None]] = {}
CHECK: dict[str, Callable[[Scene], None]] = {}


def operation(name: str, run: Operation, prepare: Operation | None = None, check: Operation | None = None) -> None:
    OPERATIONS[name] = run
    if prepare is not None:
        PREPARE[name] = prepare
    if check is not None:
        CHECK[name] = check


def keep(scene: Scene, thing: Any) -> None:
    scene.made.append(thing)


def lengths_agree(scene: Scene) -> None:
    pages = -(-len(scene.mapping) // PAGE)
    (vma,) = scene.observer.maps("file")
    assert vma.length_pages == pages, f"the VMA has {vma.length_pages} pages, the mapping {pages}"


def sizes_agree(scene: Scene) -> None:
    lengths_agree(scene)
    assert scene.file.size == len(scene.mapping), f"the file has {scene.file.size}, the mapping {len(scene.mapping)}"
    scene.mapping[len(scene.mapping) - 1]


def pinned(scene: Scene) -> None:
    with scene.mapping.pin(0, 2 * PAGE) as view:
        view[0] = 1


def share(scene: Scene) -> dax_mp.SharedMemory:
    return dax_mp.SharedMemory("shared", create=True, size=2 * PAGE, session=scene.session)


def share_in(scene: Scene) -> None:
    """For the operations on what is there already."""
    scene.shared = share(scene)


def shared_sizes_agree(scene: Scene) -> None:
    shared, scene.shared = scene.shared, None
    assert shared is not None
    assert len(shared.buf) == shared.size
    assert shared.session.stat("shared").size_bytes in (shared.size, 2 * PAGE, 5 * PAGE)
    shared.buf[0] = 1
    shared.resize()
    assert len(shared.buf) == shared.size == shared.session.stat("shared").size_bytes
    shared.close()


def listed(scene: Scene) -> dax_mp.ShareableList[Any]:
    return dax_mp.ShareableList([1, "two", None, 4.0], name="list", session=scene.session)


def closed_list(scene: Scene) -> None:
    listed(scene).shm.close()


def arranged(scene: Scene) -> Any:
    return dax_mp.ndarray(scene.session, "array", (100, 100), "f8")


def is_whole_or_not_there(scene: Scene) -> None:
    """What has been created has its name only where all of it is there, and the caller is about to have it."""
    for name in scene.observer.listdir():
        if name == "file":
            continue
        returning = scene.innermost is None or scene.innermost in RETURNING
        assert returning, f"{name} has its name, though its creation was interrupted"
        if name == "array":
            assert dax_mp.ndarray(scene.observer, name).shape == (100, 100)
        elif name == "list":
            there: Any = dax_mp.ShareableList(name=name, session=scene.observer)
            assert list(there) == [1, "two", None, 4.0]
            there.shm.close()
        else:
            shared = dax_mp.SharedMemory(name, session=scene.observer)
            assert shared.size == 2 * PAGE
            shared.close()
            scene.observer.rename(name, "shared")


for mode in ("r", "r+", "w", "a", "w+"):
    operation(f"open {mode}", lambda scene, mode=mode: scene.session.open("file", mode))  # type: ignore[misc]
operation("open x", lambda scene: scene.session.open("new", "x"))
operation("close", lambda scene: scene.made.pop().close(), lambda scene: keep(scene, scene.session.open("file")))
operation("mmap", lambda scene: scene.file.mmap())
operation("mmap of a private mapping", lambda scene: scene.file.mmap(access=dax_mp.ACCESS_COPY))
operation("munmap", lambda scene: scene.made.pop().close(), lambda scene: keep(scene, scene.file.mmap()))
operation("munmap a range", lambda scene: scene.mapping.unmap(PAGE, PAGE))
operation("pin", pinned)
operation("resize up", lambda scene: scene.mapping.resize(5 * PAGE + 1), check=sizes_agree)
operation("resize down", lambda scene: scene.mapping.resize(PAGE + 1), check=sizes_agree)
operation("remap up", lambda scene: scene.mapping.remap(5 * PAGE), check=lengths_agree)
operation("remap down", lambda scene: scene.mapping.remap(PAGE), check=lengths_agree)
operation("truncate", lambda scene: scene.file.truncate(PAGE))
operation("fallocate", lambda scene: scene.file.fallocate(0, 8 * PAGE))
operation("punch", lambda scene: scene.file.punch_hole(0, PAGE))
operation("read", lambda scene: scene.file.read(100))
operation("write", lambda scene: scene.file.write(DATA))
operation("pread", lambda scene: scene.file.pread(100, 7))
operation("pwrite", lambda scene: scene.file.pwrite(DATA, 7))
operation("preadv", lambda scene: scene.file.preadv([bytearray(10), bytearray(10)], 7))
operation("pwritev", lambda scene: scene.file.pwritev([DATA, DATA], 7))
operation("long write", lambda scene: scene.file.write(scene.long))
operation("long read", lambda scene: scene.file.readinto(scene.long), lambda scene: scene.file.truncate(LONG))
operation("long read of bytes", lambda scene: scene.file.read(), lambda scene: scene.file.truncate(LONG))
operation(
    "long pwrite over blocks",
    lambda scene: scene.file.pwrite(scene.long, 0),
    lambda scene: scene.file.fallocate(0, LONG),
)
operation("copy", lambda scene: scene.file.copy_range(0, scene.file, 2 * PAGE, PAGE))
operation("seek", lambda scene: scene.file.seek(0, dax_mp.SEEK_HOLE))
operation("stat", lambda scene: scene.session.stat("file"))
operation("listdir", lambda scene: scene.session.listdir())
operation("rename", lambda scene: scene.session.rename("file", "other"))
operation("unlink", lambda scene: scene.session.unlink("file"))


operation("SharedMemory create", share, check=is_whole_or_not_there)
operation(
    "SharedMemory create without a name",
    lambda scene: dax_mp.SharedMemory(create=True, size=2 * PAGE, reserve=True, session=scene.session),
    check=is_whole_or_not_there,
)
operation(
    "SharedMemory attach",
    lambda scene: dax_mp.SharedMemory("shared", session=scene.session),
    lambda scene: share(scene).close(),
)
operation("SharedMemory close", lambda scene: scene.made.pop().close(), lambda scene: keep(scene, share(scene)))
operation("SharedMemory unlink", lambda scene: scene.made.pop().unlink(), lambda scene: keep(scene, share(scene)))
operation("SharedMemory resize up", lambda scene: scene.shared.resize(5 * PAGE), share_in, shared_sizes_agree)
operation("SharedMemory resize down", lambda scene: scene.shared.resize(PAGE), share_in, shared_sizes_agree)
operation("ShareableList create", listed, check=is_whole_or_not_there)
operation("ShareableList attach", lambda scene: dax_mp.ShareableList(name="list", session=scene.session), closed_list)
operation("ndarray create", arranged, check=is_whole_or_not_there)
operation(
    "ndarray attach",
    lambda scene: dax_mp.ndarray(scene.session, "array"),
    lambda scene: keep(scene, arranged(scene)),
)


def look(scene: Scene, name: str, free: int) -> None:
    """Assert that nothing is left. The scene's own things are there yet."""
    session, observer = scene.session, scene.observer
    scene.made.clear()
    session.statfs()  # it goes on, and tells what it has let go of
    scene.file.pwrite(b"x", 0)
    if name in CHECK:
        CHECK[name](scene)
    device = observer.statfs()
    assert device.vmas == 1, f"{device.vmas - 1} VMAs are left"
    assert_handles(scene, 1)
    assert device.sessions == 2, f"{device.sessions - 2} sessions are left"
    started_s = time.monotonic()
    for there in observer.listdir():
        with observer.open(there, "r+") as file:
            file.truncate(0)
    assert time.monotonic() - started_s < PROMPT_S, "the file stands still: a pin or a lease is left"
    scene.end()
    hidden = [there for there in observer.listdir() if there not in KNOWN]
    assert not hidden, f"left: {hidden}"
    for there in observer.listdir():
        observer.unlink(there)
    device = observer.statfs()
    assert_handles(scene, 0)
    assert device.pages_free == free, f"{free - device.pages_free} blocks are left"
    assert device.vmas == 0, "a VMA is left"
    assert device.counters["evictions"] == 0, "evicted"


def assert_handles(scene: Scene, expected: int) -> None:
    if scene.observer.statfs().handles > expected:
        gc.collect()  # an exception's traceback and its frames may hold each other, and a file
        scene.session.statfs()
    handles = scene.observer.statfs().handles
    assert handles == expected, f"{handles - expected} handles are left"


def interrupted(name: str, at: int, scene: Scene) -> bool:
    """Interrupt the operation there. Returns False where it has ended before."""
    if name in PREPARE:
        PREPARE[name](scene)
    exception = Interrupt()
    try:
        return interrupt(lambda: OPERATIONS[name](scene), at, exception)
    except Interrupt:
        frame = traceback.extract_tb(exception.__traceback__)[-2]  # the last is the tracing function's
        scene.innermost = os.path.basename(frame.filename), frame.name
        return True
    finally:
        scene.where = "".join(traceback.format_tb(exception.__traceback__))
        exception.__traceback__ = None  # its frames are held no longer, though the tracing function has the exception


def main(endpoint: str, name: str, stride: int, at: int = 1) -> None:
    gc.disable()
    sys.unraisablehook = lambda unraisable: None  # what comes in a destructor is lost, as ever
    with dax_mp.connect(endpoint) as observer, dax_mp.connect(endpoint) as session:
        free = observer.statfs().pages_free
        while True:
            scene = Scene(session, observer)
            try:
                if not interrupted(name, at, scene):
                    break
                look(scene, name, free)
            except (AssertionError, OSError, ValueError) as error:
                raise SystemExit(
                    f"{name!r} interrupted at {at}: {type(error).__name__}: {error}\n{scene.where}"
                ) from error
            at += stride
        scene.end()
    print(at)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))

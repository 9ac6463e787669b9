"""A session: one process at one coordinator.

`connect` takes these steps, and `Session.close` undoes them in the opposite order, whatever happens in between:

    coordinator's lock -> its pid -> a pidfd    so that its death is an event
    session file, locked                        so that ours is one for the coordinator
    channel: Hello                              the welcome says what the device is like
    regions                                     opened by name, checked, handed to the pager
    pager                                       from here on memory can be mapped

The pager ends before Bye is said: Bye means that no translation is left. Mappings whose buffers are still out survive
as objects; an access to one is then a BusError with ESTALE.

A fork copies the objects but not the session: record locks and the pager's thread stay the parent's. The child begins
a session of its own by the same steps, with Adopt after Hello, and the objects go on with that (`fork.py`).

A session pickles by its endpoint: the copy is its process's shared session there.
"""

import atexit
import errno
import functools
import math
import os
import threading
import warnings
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from dax_mp import messages, mmu
from dax_mp.clients import attach, fork
from dax_mp.clients import faults as ways
from dax_mp.clients.channel import Channel
from dax_mp.clients.file import DaxFile
from dax_mp.clients.names import check_name
from dax_mp.clients.open_modes import Opens, flush_layers
from dax_mp.clients.page_table import Backing, FileId
from dax_mp.clients.signals import keep_fault_handler_first
from dax_mp.clients.status import DeviceStat, FileStat, VmaMaps, read_list, read_maps
from dax_mp.clients.undo import Undo, close_all
from dax_mp.endpoint import pager_path
from dax_mp.errors import os_error

CONNECT_TIMEOUT_S: Final = 30.0
"""How long a coordinator that is alive may take to answer Hello."""

CLOSE_TIMEOUT_S: Final = 5.0
"""How long close waits for a coordinator that does not answer, and for threads in the middle of a request."""


def connect(
    endpoint: str | os.PathLike[str] | None = None,
    bus_error: str = "raise",
    system_calls: bool = True,
    timeout: float | None = None,
    faults: str | None = None,
) -> "Session":
    """A new session at the coordinator of `endpoint`; None: $DAX_MP_ENDPOINT, else the user's default.

    bus_error: what an access that has nothing to map ends in: `raise` a BusError, or `signal` SIGBUS, as in Linux.
    system_calls: have the libc's functions that take a buffer (read, write, recv, send, fread, fwrite and their kin)
    map the pages of it that are in a mapping. False leaves the process alone, as long as all its sessions say so.

    timeout: how many seconds to wait for a coordinator that is alive but does not answer; then an access is a BusError
    (EIO), a request a TimeoutError. None: 60, or four times its ack timeout where that is longer; math.inf: for ever.
    faults: how page faults arrive; None: $DAX_MP_FAULTS, else `signals`.
    `signals`: as SIGSEGV. Handlers of it that are set with `signal.signal`, and faulthandler's, come behind the
    library's. A thread that blocks SIGSEGV ends the process by its first fault, and so does, until the next mapping is
    made, a handler that C code installs by sigaction(2).
    `userfaultfd`: through userfaultfd(2), whatever a thread blocks and whoever handles SIGSEGV. It costs more a fault.
    Private mappings (ACCESS_COPY) are an OSError ENOTSUP, and raw accesses have no `timeout`. OSError EPERM, ENOSYS or
    ENOTSUP where it is not to be had.

    Raises NoCoordinatorError where none serves there, ProtocolError where it is of another version or page size,
    TimeoutError where it does not answer, OSError else.

        >>> with dax_mp.connect(daemon.endpoint) as session:
        ...     session.listdir()
        []
    """
    path = attach.user_endpoint() if endpoint is None else os.fspath(endpoint)
    return Session(path, bus_error, system_calls, timeout, faults)


class Session(Opens):
    """The files of one coordinator. `connect` makes one; threads may share it.

        >>> with session.open("notes", "w") as file:
        ...     file.write(b"text")
        4
        >>> session.rename("notes", "old notes")
        >>> session.listdir(), session.stat("old notes").size_bytes
        (['old notes'], 4)
        >>> session.unlink("old notes")

    Every method raises OSError for what the coordinator refuses, ConnectionError when it is gone, TimeoutError when it
    is alive but does not answer for `timeout` seconds (it may still do what was asked), ValueError when the session is
    closed, and OSError ESTALE when it was evicted or belongs to the parent process.
    """

    def __init__(
        self,
        endpoint: str,
        bus_error: str,
        system_calls: bool,
        timeout: float | None = None,
        faults: str | None = None,
    ) -> None:
        self._closed = True  # before anything can be raised
        if bus_error not in ("raise", "signal"):
            raise ValueError(f"bus_error must be 'raise' or 'signal', not {bus_error!r}")
        self.endpoint = os.path.abspath(endpoint)
        self.bus_error = bus_error
        """What an access that has nothing to map ends in: `raise` a BusError, or the kernel's `signal`, SIGBUS."""
        self.system_calls = system_calls
        """Whether it has the libc's functions map the pages of their buffers."""
        self.faults = ways.way(faults)
        """How page faults arrive: `signals` or `userfaultfd`."""
        self._wanted_timeout_s = attach.check_timeout(timeout)
        self._close_lock = threading.RLock()
        self._pid = os.getpid()
        self._undo = Undo()
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self))
        mmu.settled(self._settle_begin, self._begin)

    def _begin(self) -> None:
        self._attach(self._undo)
        # The interpreter ends sessions before the coordinators that launch() started, since those came first.
        atexit.register(self._at_exit)
        fork.register(self)
        self._closed = False

    def _settle_begin(self, failed: bool) -> None:
        if failed:
            self._closed = True
            atexit.unregister(self._at_exit)
            self._undo.close()

    def _attach(self, undo: Undo) -> None:
        self._coordinator = attach.find_coordinator(self.endpoint)
        undo.callback(close_all, [self._coordinator.pidfd])
        self._token = attach.new_token()
        self._lock_file(undo)
        self.channel = Channel(self._coordinator, self._token)
        """For the library's own modules."""
        undo.callback(self.channel.close, CLOSE_TIMEOUT_S)
        self._hello(undo, CONNECT_TIMEOUT_S)
        self._start_pager(undo, CONNECT_TIMEOUT_S)

    def _lock_file(self, undo: Undo) -> None:
        self._lock_fds: list[int] = []
        undo.callback(attach.unlock_session, self.endpoint, self._token, self._lock_fds)
        self._lock_fds.append(attach.lock_session(self.endpoint, self._token))

    def _hello(self, undo: Undo, timeout_s: float) -> None:
        undo.callback(self.channel.bye, CLOSE_TIMEOUT_S)
        self._welcome = self.channel.hello(timeout_s)
        attach.check_welcome(self._welcome)
        self.timeout = self.channel.timeout_s = attach.answer_timeout_s(self._welcome, self._wanted_timeout_s)
        """How many seconds an access or a request waits for a coordinator that is alive but does not answer."""

    def _start_pager(self, undo: Undo, timeout_s: float) -> None:
        keep_fault_handler_first()
        if self.system_calls:
            mmu.interpose_system_calls()
        self.regions: dict[FileId, Backing] = {}
        """The regions' objects, as /proc/self/maps names them. For the library's own modules."""
        with ExitStack() as open_regions, ways.explained(self.faults):
            self.pager = mmu.Pager(
                path=pager_path(self.endpoint),
                token=self._token,
                version=messages.PROTOCOL_VERSION,
                pmem_fd=self._open_region("pmem", open_regions),
                dram_fd=self._open_region("dram", open_regions),
                timeout_ms=round(timeout_s * 1000),
                sigbus=self.bus_error == "signal",
                userfaultfd=self.faults == "userfaultfd",
                answer_timeout_ms=-1 if self.timeout == math.inf else round(self.timeout * 1000),
            )
            """For the library's own modules."""
        undo.callback(self.pager.close)
        self.channel.holdings.closed_vmas = self.pager.closed_vmas

    def _open_region(self, kind: Backing, undo: ExitStack) -> int:
        """The region's descriptor, -1 where the coordinator has no such region."""
        fd, file_id = attach.open_region_of(self._welcome, kind, undo)
        if file_id is not None:
            self.regions[file_id] = kind
        return fd

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def coordinator_pid(self) -> int:
        return self._coordinator.pid

    @property
    def page_size(self) -> int:
        """In bytes; the system's."""
        page_size: int = self._welcome["page_size"]
        return page_size

    @property
    def hole_policy(self) -> str:
        """zero or page-cache."""
        policy: str = self._welcome["hole_policy"]
        return policy

    @property
    def usable(self) -> bool:
        """Not closed, not evicted, and the coordinator has not ended, as far as this process has heard."""
        return not self._closed and not self.pager.errno and self.channel.failure is None

    @property
    def system_calls_fault(self) -> bool:
        """Whether a system call that meets a page which is not mapped waits for it; else it fails with EFAULT."""
        return self.pager.serves_system_calls

    def counters(self) -> dict[str, int]:
        """What this process's pager has done: faults, bus_errors, maps, unmaps, drops."""
        return self.pager.counters()

    def __repr__(self) -> str:
        return f"<dax_mp.Session at {self.endpoint!r}, {'closed' if self.closed else 'open'}>"

    # --- files -----------------------------------------------------------------------------------------------------

    def _open_raw(self, name: str | os.PathLike[str], mode: str, ephemeral: bool) -> DaxFile:
        return DaxFile(self, check_name(name), mode, ephemeral)

    def tmpfile(self, name: str | os.PathLike[str] = "unnamed file", ephemeral: bool = False) -> DaxFile:
        """A new file without a name, open as by x+; `DaxFile.link` gives it one. Nobody else sees it before, and it is
        gone with its last user, however that process ended. name: what it is to be called. ephemeral: as `open`.

            >>> with session.tmpfile("report") as file:
            ...     _, listed, _ = file.write(b"all of it"), session.listdir(), file.link()
            >>> listed, session.listdir(), session.unlink("report")
            ([], ['report'], None)
        """
        return DaxFile(self, check_name(name), "x+", ephemeral, unnamed=True)

    def listdir(self) -> list[str]:
        """The names of all files, in order."""
        return [stat.name for stat in self.scandir() if stat.name is not None]

    def scandir(self) -> list[FileStat]:
        """All files that have a name, by name."""
        return read_list(self.channel.request)

    def stat(self, name: str | os.PathLike[str]) -> FileStat:
        """The file's size, blocks, and who has it mapped. Raises FileNotFoundError."""
        text = check_name(name)
        return FileStat.from_reply(self.channel.request(messages.Stat, text, filename=text))

    def utime(self, name: str | os.PathLike[str], ns: tuple[int, int] | None = None) -> None:
        """`DaxFile.utime` of the file of that name. Raises FileNotFoundError."""
        with self.open(name) as file:
            file.utime(ns)

    def unlink(self, name: str | os.PathLike[str]) -> None:
        """Take the name away. The file lives on until the last handle and mapping is gone. Raises FileNotFoundError."""
        text = check_name(name)
        self.channel.request(messages.Unlink, text, filename=text)

    def rename(self, old: str | os.PathLike[str], new: str | os.PathLike[str], replace: bool = True) -> None:
        """Give the file another name; a file that has it is unlinked, or, without `replace`, in the way.

        Raises FileNotFoundError, FileExistsError, OSError EINVAL.
        """
        old_text, new_text = check_name(old), check_name(new)
        flags = 0 if replace else int(messages.RenameFlag.NOREPLACE)
        try:
            self.channel.request(messages.Rename, old_text, new_text, flags)
        except OSError as error:
            if error.filename is None:
                error.filename, error.filename2 = old_text, new_text
            raise

    def maps(self, name: str | os.PathLike[str]) -> list[VmaMaps]:
        """Every VMA, of every process, that has the file mapped: the coordinator's rmap. Raises FileNotFoundError."""
        text = check_name(name)
        return read_maps(self.channel.request, text)

    def statfs(self) -> DeviceStat:
        """The device: how much is free, who is there, and what has happened since the coordinator started."""
        return DeviceStat.from_reply(self.channel.request(messages.Statfs))

    # --- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every file and mapping, and end the session. May be called again.

        What buffered and text files hold back is written; to hear that it could not be, close the file before.
        A mapping whose buffers are out (memoryview, array) stays an object; an access to it is a BusError (ESTALE).
        Requests under way in other threads end with a ValueError.
        """
        if self._pid == os.getpid():
            try:
                self._flush_layers()
            finally:
                mmu.locked(self._close_lock, mmu.settled, self._close, self._close)

    def _flush_layers(self) -> None:
        if not self._closed:
            self.channel.timeout_s = min(self.channel.timeout_s, CLOSE_TIMEOUT_S)
            flush_layers(self.channel.holdings.files())

    def _close(self, _failed: bool = False) -> None:
        """Called twice, and again where it is interrupted: what is done already has nothing to do any more."""
        self._closed = True
        atexit.unregister(self._at_exit)
        for file in self.channel.holdings.files():
            file.forget()
        for mapping in self.channel.holdings.mappings():
            try:
                mapping.close()
            except BufferError:
                pass
        self._undo.close()

    def __enter__(self) -> Self:
        self.channel.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and self._pid == os.getpid():
            warnings.warn(f"unclosed session {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        from dax_mp.clients.shared_session import shared_session

        return shared_session, (self.endpoint, self.bus_error, self.system_calls, self.faults)

    # --- fork ------------------------------------------------------------------------------------------------------

    def inherit(self, deadline_s: float | None) -> None:
        """In a fork's child: begin a session of its own that has what the parent's had at the fork.

        deadline_s: of time.monotonic(); None: do not. Without a session, because there is no coordinator or it does not
        answer in time, every request is an OSError with ESTALE, and every access a BusError with it.
        """
        self._pid = os.getpid()
        self._close_lock = threading.RLock()
        self._undo = Undo()  # what is in the parent's is the parent's to undo
        if self._closed:
            return
        for fd in self._lock_fds:
            os.close(fd)
        for file in self.channel.holdings.files():
            file.inherit()
        for mapping in self.channel.holdings.mappings():
            mapping.inherit()
        parent_token, self._token = self._token, attach.new_token()
        try:
            self.channel.inherit(self._token)
            if deadline_s is None:
                raise os_error(errno.ESTALE)
            mmu.settled(self._undo.close_if, self._adopt, self._undo, parent_token, deadline_s)
        except OSError:
            self.channel.set_stale()

    def _adopt(self, undo: Undo, parent_token: bytes, deadline_s: float) -> None:
        self._lock_file(undo)
        undo.callback(self.channel.close, CLOSE_TIMEOUT_S)
        self._hello(undo, attach.rest_s(deadline_s))
        last_unmap = self.pager.last_unmap
        self._start_pager(undo, attach.rest_s(deadline_s))  # before it has VMAs: it is asked to unmap some from then on
        flat = self.channel.request(messages.Adopt, parent_token, last_unmap, timeout_s=attach.rest_s(deadline_s))
        copies = dict(zip(flat[::2], flat[1::2], strict=True))
        holdings, mine = self.channel.holdings, {}
        for mapping in holdings.mappings():
            if not mapping.closed and mapping.vma_id in copies:
                vma_id = copies.pop(mapping.vma_id)
                holdings.renumber(mapping, vma_id)
                mapping.rebind(self.pager, vma_id)
                mine[vma_id] = mapping
        self.pager.closed_vmas.extend(copies.values())  # nobody's here
        cuts = self.channel.request(messages.Cuts, timeout_s=attach.rest_s(deadline_s))
        for vma_id, pgoff, length_pages in zip(cuts[::3], cuts[1::3], cuts[2::3], strict=True):
            if vma_id in mine:
                mine[vma_id].drop_pages(pgoff, length_pages)


def _close_at_exit(reference: "weakref.ref[Session]") -> None:
    session = reference()
    if session is not None and not session.closed:
        session.close()

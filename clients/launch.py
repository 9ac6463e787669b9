"""A coordinator of one's own, in a process of its own, for as long as it is wanted.

It ends with `Daemon.close`, and with this process (by an atexit function; and the coordinator watches its launcher,
so that even kill -9 ends both). It leaves nothing behind: what it cannot remove, because it is killed itself, a sweep
does.

It says that it serves, or why it cannot, in one line of JSON down a pipe; a pipe that ends without one is a crash.
"""

import atexit
import errno
import json
import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import dax_mp
from dax_mp.endpoint import SOCKET_PATH_BYTES_MAX, control_path
from dax_mp.errors import os_error
from dax_mp.sizes import parse_size

if TYPE_CHECKING:
    import subprocess

STOP_TIMEOUT_S: Final = 10.0
"""How long a coordinator has to end by itself before it is killed."""

HOLE_POLICIES: Final = ("zero", "page-cache")

_INSTALLED: Final = ("site-packages", "dist-packages")


class Daemon:
    """A running coordinator. `launch` makes one."""

    def __init__(self, process: "subprocess.Popen[bytes]", endpoint: str) -> None:
        self.endpoint = endpoint
        """Where it serves: the argument of `connect`."""
        self._process = process
        self._owner_pid = os.getpid()
        self._close_lock = threading.Lock()
        self._closed = False
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End it, and remove what it made. Sessions that are still there find it gone. May be called again.

        In a child that a fork made this does nothing: the coordinator is the parent's.
        """
        if os.getpid() != self._owner_pid:
            return
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        _end(self._process, self.endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<dax_mp.Daemon at {self.endpoint!r}, {'closed' if self._closed else f'pid {self.pid}'}>"


def launch(
    size: int | str = "1GiB",
    hole_policy: str = "zero",
    page_cache_size: int | str | None = None,
    reserve: bool = True,
    endpoint: str | os.PathLike[str] | None = None,
    ack_timeout: float | None = None,
    debug: bool = False,
) -> Daemon:
    """Start a coordinator and return when it serves. The arguments are those of `dax-mp serve`.

    size, page_cache_size: in bytes, or as "256MiB". hole_policy: zero or page-cache. reserve: take all memory now, so
    that none can be missing later. endpoint: the directory where it serves; None is a new one. ack_timeout: in
    seconds. debug: the coordinator checks every invariant after every event.
    Raises ValueError for a size or policy that is none, OSError with the coordinator's own words where it cannot serve.

        >>> with dax_mp.launch("16MiB") as daemon, dax_mp.connect(daemon.endpoint) as session:
        ...     session.statfs().pages * session.page_size
        16777216
    """
    if hole_policy not in HOLE_POLICIES:
        raise ValueError(f"not a hole policy: {hole_policy!r}; there are {' and '.join(HOLE_POLICIES)}")
    options = ["--size", str(_bytes(size)), "--hole-policy", hole_policy]
    if page_cache_size is not None:
        options += ["--page-cache-size", str(_bytes(page_cache_size))]
    if not reserve:
        options.append("--no-reserve")
    if ack_timeout is not None:
        options += ["--ack-timeout", str(ack_timeout)]
    if debug:
        options.append("--debug")
    endpoint = _new_endpoint() if endpoint is None else os.path.abspath(endpoint)
    return Daemon(_start(options, endpoint), endpoint)


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this very package. Raises OSError where Python cannot name itself."""
    if not sys.executable:
        raise os_error(errno.ENOENT, "sys.executable is empty: this Python cannot start another")
    # -P: what lies in the current directory is not to be taken for a module.
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment in which `module_command` finds this package, wherever it was imported from."""
    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(dax_mp.__file__)))
    environment = dict(os.environ)
    if os.path.basename(package_parent) not in _INSTALLED:  # a checkout, which only sys.path or the directory named
        paths = [package_parent, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _bytes(size: int | str) -> int:
    size_bytes = parse_size(size) if isinstance(size, str) else size
    if size_bytes < 1:
        raise ValueError(f"a region has at least one byte, not {size_bytes}")
    return size_bytes


def _new_endpoint() -> str:
    """The path of a directory that is not there, in the runtime or temp directory, or in /tmp where those are too deep.

    The coordinator makes it, so that whoever of the two lives longer removes it.
    """
    import tempfile

    name = f"dax-mp-{os.urandom(8).hex()}"
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        endpoint = os.path.join(parent, name)
        short = len(os.fsencode(control_path(endpoint))) <= SOCKET_PATH_BYTES_MAX
        if short and os.path.isabs(parent) and os.access(parent, os.W_OK):
            return endpoint
    return os.path.join("/tmp", name)


def _start(options: list[str], endpoint: str) -> "subprocess.Popen[bytes]":
    """The coordinator's process, serving. Raises OSError with what it said."""
    import subprocess

    ready_fd, daemon_fd = os.pipe()
    with open(ready_fd, "rb") as ready:
        try:
            ready_options = ("--endpoint", endpoint, "--exit-with", str(os.getpid()), "--ready-fd", str(daemon_fd))
            process = subprocess.Popen(
                module_command("dax_mp.daemons.serve", *options, *ready_options),
                env=module_environment(),
                pass_fds=[daemon_fd],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for us: our sessions end before the coordinator does
            )
        finally:
            os.close(daemon_fd)
        try:
            said = ready.readline()
        except BaseException:
            _end(process, endpoint)
            raise
    answer = json.loads(said) if said else {}
    if "pid" in answer:
        return process
    if "error" in answer:
        process.wait()
        raise os_error(answer["errno"] or errno.EIO, answer["error"])
    _end(process, endpoint)
    text = f"the coordinator ended with exit code {process.returncode} before it served"
    raise os_error(errno.ECONNREFUSED, text, endpoint)


def _end(process: "subprocess.Popen[bytes]", endpoint: str) -> None:
    """End it where it has not ended, and remove what it has left where it did not end in order."""
    import subprocess

    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.returncode != 0:
        subprocess.run(module_command("dax_mp.daemons.sweep", endpoint), env=module_environment(), check=False)

"""The coordinator's start and end, in order.

Directory claimed -> names written down -> regions made and reserved -> sockets bound -> signals let in -> ready; the
end undoes it in reverse, whatever ended it. Because names are written down before the things are made, and signals wait
(`daemons/signals.py`), there is no moment at which something is there that neither this process nor its successor
would remove.
"""

import argparse
import errno
import gc
import json
import logging
import os
import secrets
import socket
import traceback
from contextlib import ExitStack
from typing import Any, Final

from dax_mp.coordinator import Coordinator
from dax_mp.daemons.descriptors import Descriptors, raise_limit
from dax_mp.daemons.liveness import SessionProcesses, open_pidfd
from dax_mp.daemons.log import STDERR, Log, event
from dax_mp.daemons.loop import Loop
from dax_mp.daemons.region import PAGE_SIZE_BYTES, Region
from dax_mp.daemons.runtime_directory import RuntimeDirectory, open_directory, serving_pid
from dax_mp.daemons.signals import StopSignals
from dax_mp.daemons.sockets import Router
from dax_mp.device import Device
from dax_mp.endpoint import CONTROL_NAME, PAGER_NAME, default_endpoints, region_name
from dax_mp.errors import os_error
from dax_mp.limits import FAULTS_PER_SESSION_MAX
from dax_mp.messages import PROTOCOL_VERSION
from dax_mp.sizes import format_size
from dax_mp.superblock import Superblock

PAGE_CACHE_PAGES_MIN: Final = 64
PAGER_QUEUE_MESSAGES: Final = 2 * FAULTS_PER_SESSION_MAX
"""Every fault of a session answered at once, and as many orders again."""
CONTROL_QUEUE_MESSAGES: Final = 64
"""A control socket has one request under way; more than a few unread answers is a peer that does not read."""


class InternalError(Exception):
    """A bug in the coordinator; what was seen is on stderr."""


def serve(options: argparse.Namespace, signals: StopSignals) -> None:
    """Serve until told to stop.

    Raises OSError where it cannot start, Stopped where a signal comes before it serves, InternalError where it cannot
    go on.
    """
    os.umask(0o077)
    raise_limit()
    descriptors = Descriptors()
    if not __debug__:
        raise OSError(errno.EINVAL, "assertions guard other people's data: run Python without -O or PYTHONOPTIMIZE")
    with ExitStack() as stack:
        log = _start_log(options, stack)
        endpoint = options.endpoint or _own_endpoint()
        stop_fds = []
        if options.exit_with is not None:
            stop_fds.append(_watch_launcher(options.exit_with))
            stack.callback(os.close, stop_fds[0])
        directory = RuntimeDirectory.claim(endpoint)
        stack.callback(directory.remove)
        regions = _make_regions(options, directory, stack, signals)
        directory.make_sessions()
        coordinator = Coordinator(
            _device(options, regions), options.ack_timeout, _welcome(options, regions), debug=options.debug
        )
        for step, seconds in options.delay:
            coordinator.fs.delays.delay(step, seconds)
        pager = Router(directory.fd, PAGER_NAME, PAGER_QUEUE_MESSAGES, descriptors, counted=False)
        stack.callback(pager.close)
        control = Router(directory.fd, CONTROL_NAME, CONTROL_QUEUE_MESSAGES, descriptors, counted=True)
        stack.callback(control.close)
        signals.check()
        wakeups = stack.enter_context(signals.delivered_to_socket())
        processes = SessionProcesses(directory.path, stop_fds)
        stack.callback(processes.close)
        loop = Loop(coordinator, pager, control, processes, descriptors, wakeups, log, options.ack_timeout)
        gc.collect()
        gc.freeze()
        _announce(options, directory.path)
        try:
            ended_by = loop.run()
        except MemoryError:
            raise os_error(errno.ENOMEM, "there is no memory left for the coordinator; its files are gone") from None
        except Exception as error:  # a peer's mistakes have been dealt with inside
            traceback.print_exc()
            event(logging.ERROR, "bug", f"a bug in dax-mp: {error!r}")
            raise InternalError from error
        event(logging.INFO, "stop", f"stopped by {ended_by}; {len(coordinator.sessions)} sessions were there")


def _start_log(options: argparse.Namespace, stack: ExitStack) -> Log | None:
    """Open where it was asked for, and on stderr where somebody is there to read it."""
    path = options.log
    if path is None and (options.daemonize or options.ready_fd is not None):
        return None  # a launcher has its own way to say what happens
    path = path or STDERR
    log = Log(path, options.log_level or ("warning" if path == STDERR else "info"), as_json=options.log_json)
    stack.callback(log.close)
    return log


def _own_endpoint() -> str:
    """Of the default endpoints the first whose parent is there and, unless it is /tmp, ours.

    Raises OSError (EADDRINUSE) where a coordinator serves at another one: clients that name none are to find one, and
    always the same.
    """
    *better, last = candidates = default_endpoints(os.environ, os.geteuid())
    chosen = last
    for candidate in reversed(better):
        try:
            os.close(open_directory(os.path.dirname(candidate)))
        except OSError:
            continue
        chosen = candidate
    for candidate in candidates:
        if candidate != chosen and (pid := serving_pid(candidate)) is not None:
            text = f"a coordinator of yours (pid {pid}) serves at {candidate} already; stop it, or give an --endpoint"
            raise os_error(errno.EADDRINUSE, text)
    return chosen


def _watch_launcher(pid: int) -> int:
    """The launcher's pidfd. Raises OSError (ESRCH) where it is not our parent: it has ended before we could look."""
    pidfd = open_pidfd(pid)
    if os.getppid() != pid:
        os.close(pidfd)
        raise OSError(errno.ESRCH, f"--exit-with {pid}: that process is not the parent of this one, or not any more")
    return pidfd


def _make_regions(
    options: argparse.Namespace, directory: RuntimeDirectory, stack: ExitStack, signals: StopSignals
) -> dict[str, Region]:
    """By kind: pmem, and dram where the hole policy has one; removed when the stack unwinds."""
    sizes_bytes = {"pmem": options.size}
    if options.hole_policy == "page-cache":
        sizes_bytes["dram"] = max(options.page_cache_size or options.size // 8, PAGE_CACHE_PAGES_MIN * PAGE_SIZE_BYTES)
    elif options.page_cache_size is not None:
        raise OSError(errno.EINVAL, "--page-cache-size goes with --hole-policy page-cache")
    unique, uuid = secrets.token_hex(8), secrets.token_bytes(16)
    names = {kind: region_name(unique, kind) for kind in sizes_bytes}
    directory.record(list(names.values()))
    regions = {}
    for kind, size_bytes in sizes_bytes.items():
        signals.check()
        pages = -(-size_bytes // PAGE_SIZE_BYTES)
        region = Region(names[kind], Superblock(kind, PAGE_SIZE_BYTES, pages, uuid))
        stack.callback(region.remove)
        if not options.no_reserve:
            region.reserve(signals.check)
        regions[kind] = region
    return regions


def _device(options: argparse.Namespace, regions: dict[str, Region]) -> Device:
    pmem, dram = regions["pmem"], regions.get("dram")
    return Device(
        PAGE_SIZE_BYTES,
        pmem.memory,
        pmem.superblock.pages,
        options.hole_policy,
        dram.memory if dram else None,
        dram.superblock.pages if dram else 0,
    )


def _welcome(options: argparse.Namespace, regions: dict[str, Region]) -> dict[str, Any]:
    """The reply to Hello: all that a client needs to attach."""
    pmem, dram = regions["pmem"], regions.get("dram")
    return {
        "version": PROTOCOL_VERSION,
        "pid": os.getpid(),
        "page_size": PAGE_SIZE_BYTES,
        "pmem_name": pmem.name,
        "pmem_pages": pmem.superblock.pages,
        "dram_name": dram.name if dram else None,
        "dram_pages": dram.superblock.pages if dram else 0,
        "hole_policy": options.hole_policy,
        "uuid": pmem.superblock.uuid,
        "ack_timeout_s": options.ack_timeout,
    }


def _announce(options: argparse.Namespace, endpoint: str) -> None:
    text = f"serving {format_size(options.size)} at {endpoint} (pid {os.getpid()})"
    event(logging.INFO, "start", text, endpoint=endpoint, pid=os.getpid(), size_bytes=options.size)
    _notify_service_manager()
    if options.ready_fd is not None:
        report(options.ready_fd, {"endpoint": endpoint, "pid": os.getpid()})
        return
    try:
        print(f"{text}; Ctrl-C ends it", flush=True)
    except OSError:  # nobody reads it
        pass


def _notify_service_manager() -> None:
    """Tell systemd that we serve, where it has started us as Type=notify (sd_notify(3))."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            event(logging.WARNING, "notify", f"cannot tell the service manager: {error.strerror}")


def report(ready_fd: int | None, fields: dict[str, Any]) -> None:
    if ready_fd is None:
        return
    try:
        with open(ready_fd, "wb") as stream:
            stream.write(json.dumps(fields).encode() + b"\n")
    except OSError:  # the launcher has gone; --exit-with is how we learn that
        pass

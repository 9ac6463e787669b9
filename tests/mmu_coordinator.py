"""A coordinator of a few lines, in a process of its own, for the tests of the native part.

It is no device and has no rmap: it answers each fault by a rule, and sends what it is told to, right or wrong. A thread
of the faulting process could not take its place: the GIL is the faulting thread's.
"""

import errno
import json
import os
import subprocess
import sys
import time
from typing import Any

import zmq

from dax_mp import messages
from dax_mp.messages import Access, Target


class Coordinator:
    """The process, from the side of the one that started it. It ends with its starter, or at `close`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.event() == ["ready"]
        self.pidfd = os.pidfd_open(self.process.pid)

    def tell(self, *command: object) -> None:
        """`set NAME VALUE`, `send HEX...`, `unmap ID RANGES EVEN_COWS` and others: see `Rules.obey`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def set(self, **rules: object) -> None:
        for name, value in rules.items():
            self.tell("set", name, value)
            assert self.event() == ["set"]

    def write(self, pages: int) -> None:
        """These are no holes any more."""
        self.tell("write", pages)
        assert self.event() == ["written"]

    def event(self) -> list[Any]:
        """The next thing that it reports; fails when it has ended."""
        assert self.process.stdout is not None
        event: list[Any] = json.loads(self.process.stdout.readline())
        return event

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        os.close(self.pidfd)


class Rules:
    """The coordinator's side: page n of the one file is frame n + 1, and a hole until it is written to."""

    def __init__(self, router: "zmq.Socket[bytes]") -> None:
        self.router = router
        self.pager = b""
        self.written: set[int] = set()
        self.held: list[messages.Fault] = []
        # What `set` changes:
        self.hello = True  # answer PagerHello
        self.size_pages = 1 << 40
        self.span_pages = 1  # pages that one Map shows
        self.stride_pages = 0  # else: that many frames apart, as many single pages as a Map holds
        self.hold = False  # answer no fault until told
        self.error = 0  # answer each fault with this errno
        self.report = False  # report each fault
        self.report_acks = True

    def send(self, message: messages.PagerOrder) -> None:
        self.router.send_multipart([self.pager, messages.encode(message)])

    def receive(self) -> None:
        self.pager, data = self.router.recv_multipart()
        message = messages.decode(data)
        if isinstance(message, messages.Fault):
            if self.report:
                report("fault", *message)
            self.held.append(message)
            if not self.hold:
                self.answer()
        elif isinstance(message, messages.UnmapAck):
            if self.report_acks:
                report("ack", message.request_id, time.monotonic_ns())
        elif isinstance(message, messages.Dropped):
            report("dropped")
        elif self.hello:
            assert isinstance(message, messages.PagerHello)
            self.send(messages.PagerReady(message.version))

    def answer(self) -> None:
        for fault in self.held:
            if self.error or fault.pgoff >= self.size_pages:
                rest = (1 << 40) - fault.pgoff
                self.send(
                    messages.FaultError(fault.fault_id, fault.vma_id, fault.pgoff, rest, self.error or errno.EFAULT)
                )
            else:
                self.send(messages.Map(fault.fault_id, fault.vma_id, self.segments(fault)))
        self.held.clear()

    def segments(self, fault: messages.Fault) -> list[int]:
        if self.stride_pages:
            starts = range(fault.pgoff, fault.pgoff + 64 * self.stride_pages, self.stride_pages)
            return [
                field for pgoff in starts for field in (pgoff, 1, Target.PMEM, pgoff + 1, Access.READ | Access.WRITE)
            ]
        length_pages = min(self.span_pages, self.size_pages - fault.pgoff)
        if fault.write:
            self.written.update(range(fault.pgoff, fault.pgoff + length_pages))
        if fault.pgoff in self.written:
            return [fault.pgoff, length_pages, Target.PMEM, fault.pgoff + 1, Access.READ | Access.WRITE]
        return [fault.pgoff, length_pages, Target.ZERO, 0, Access.READ]

    def obey(self, line: bytes) -> None:
        match json.loads(line):
            case ["set", name, value]:
                assert hasattr(self, name)
                setattr(self, name, value)
                report("set")
            case ["write", pages]:
                self.written.update(range(pages))
                report("written")
            case ["send", *frames]:
                self.router.send_multipart([self.pager, *(bytes.fromhex(frame) for frame in frames)])
            case ["answer"]:
                self.answer()
            case ["unmap", request_id, ranges, *even_cows]:
                self.send(messages.Unmap(request_id, even_cows[0] if even_cows else 0, ranges))
            case ["evict", code]:
                self.send(messages.Evict(code))
            case command:
                raise AssertionError(command)


def report(*event: object) -> None:
    print(json.dumps(event), flush=True)


def coordinate(endpoint: str) -> None:
    """Serve until the starter closes our stdin, or ends."""
    commands = os.fdopen(0, "rb", buffering=0)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.router_mandatory = True
        router.bind(endpoint)
        rules = Rules(router)
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(commands, zmq.POLLIN)
        report("ready")
        while True:
            ready = dict(poller.poll())
            if router in ready:
                rules.receive()
            if commands.fileno() in ready or commands in ready:
                line = commands.readline()
                if not line:
                    return
                rules.obey(line)


if __name__ == "__main__":
    coordinate(sys.argv[1])

"""One message to another process and back: pyzmq's DEALER and ROUTER over ipc, both sides nothing but send and receive.

What a request to a process costs at least in Python; what this project's requests are held to.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

MESSAGE = bytes(16)


class PingPong:
    """A socket whose other end sends back what it gets."""

    def __init__(self, dealer: zmq.Socket[bytes]) -> None:
        self._dealer = dealer

    def round_trip_us(self) -> float:
        started_ns = time.perf_counter_ns()
        self._dealer.send(MESSAGE)
        self._dealer.recv()
        return (time.perf_counter_ns() - started_ns) / 1000


@contextmanager
def ping_pong() -> Iterator[PingPong]:
    """With the other process there and warm."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as directory,
        zmq.Context() as zmq_context,
        zmq_context.socket(zmq.DEALER) as dealer,
    ):
        address = f"ipc://{directory}/echo"
        echo = context.Process(target=_echo, args=(address,), daemon=True)
        echo.start()
        try:
            dealer.connect(address)
            both = PingPong(dealer)
            both.round_trip_us()
            yield both
        finally:
            echo.kill()
            echo.join()


def _echo(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        while True:
            router.send_multipart(router.recv_multipart())

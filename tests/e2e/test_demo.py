"""The demo: it ends well by itself, and badly, but always, when anything in it is not as expected."""

import io
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import dax_mp
from dax_mp.clients.demo import PAGE_CACHE_PAGES, SIZE_BYTES, choose_real_file, run_demo
from dax_mp.clients.launch import module_command, module_environment

PAGE = os.sysconf("SC_PAGESIZE")


def start_demo(*options: str) -> "subprocess.Popen[str]":
    command = module_command("dax_mp", "demo", *options)
    return subprocess.Popen(
        command, env=module_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Interrupted(io.StringIO):
    """The demo's output; `interrupt` is called with it, once, when `cue` has been printed."""

    def __init__(self, cue: str, interrupt: Callable[[str], None]) -> None:
        super().__init__()
        self._cue: str | None = cue
        self._interrupt = interrupt

    def write(self, text: str) -> int:
        length = super().write(text)
        if self._cue is not None and self._cue in self.getvalue():
            self._cue = None
            self._interrupt(self.getvalue())
        return length


def run_interrupted(cue: str, interrupt: Callable[[str], None], step_timeout_s: float = 60.0) -> tuple[int, str]:
    output = Interrupted(cue, interrupt)
    console = Console(file=output, width=100, highlight=False)
    code = run_demo(console, size=4 << 20, step_timeout_s=step_timeout_s)
    return code, output.getvalue()


def pid_of(name: str, output: str) -> int:
    """Of the process that the demo has introduced by this name last."""
    return int(re.findall(rf"\b{name} (\d+)", output)[-1])


def test_it_ends_well() -> None:
    with start_demo() as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), output
    assert "All as expected" in output
    assert output.count("Question 1.") == output.count("Question 2.") == 2
    assert output.count('"B was here"') == 4
    assert output.count("BusError: past the end") == 4
    assert max(map(len, output.splitlines())) <= 100


def test_both_regions_fit_into_the_shared_memory_of_a_container() -> None:
    assert SIZE_BYTES + (PAGE_CACHE_PAGES + 2) * PAGE < 60 << 20


def test_what_is_not_as_expected_is_said() -> None:
    def write_to_the_hole(output: str) -> None:
        command = Path(f"/proc/{pid_of('coordinator', output)}/cmdline").read_text().split("\0")
        with (
            dax_mp.connect(command[command.index("--endpoint") + 1]) as session,
            session.open("hole.bin", "r+") as file,
        ):
            file.seek(3 * PAGE)
            file.write(b"uninvited!")

    code, output = run_interrupted("B maps hole.bin", write_to_the_hole)
    assert code == 1
    assert 'A loads from page 3: expected zeros, saw "uninvited!"' in output
    assert re.search(r"\d+ of \d+ checks failed", output)


@pytest.mark.parametrize("name", ["A", "B"])
def test_an_actor_that_dies_ends_it(name: str) -> None:
    def kill(output: str) -> None:
        os.kill(pid_of(name, output), signal.SIGKILL)

    code, output = run_interrupted("B maps short.bin", kill)
    assert code == 1
    assert re.search(rf"The demo cannot go on: actor {name} \(pid \d+\) was killed by SIGKILL", output)


def test_an_actor_that_hangs_ends_it() -> None:
    def stop(output: str) -> None:
        os.kill(pid_of("B", output), signal.SIGSTOP)

    code, output = run_interrupted("B maps hole.bin", stop, step_timeout_s=2.0)
    assert code == 1
    assert re.search(r"The demo cannot go on: actor B \(pid \d+\) has not answered for 2 s", output)


def test_a_coordinator_that_dies_ends_it() -> None:
    def kill(output: str) -> None:
        os.kill(pid_of("coordinator", output), signal.SIGKILL)

    with pytest.raises(ConnectionError, match="has ended"):
        run_interrupted("B maps short.bin", kill)


def test_ctrl_c_leaves_nothing() -> None:
    """What is left would be an error of the whole test run."""
    with start_demo() as process:
        assert process.stdout is not None
        while "A loads" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130


@pytest.mark.parametrize(("size", "what"), [("1EiB", "/dev/shm has"), ("64KiB", "at least 1MiB")])
def test_a_size_that_cannot_be(size: str, what: str) -> None:
    with start_demo("--size", size) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith("dax-mp: ")
    assert what in errors
    assert errors.count("\n") == 1


def test_the_real_file_is_the_largest_that_fits() -> None:
    small, large = choose_real_file(100 << 10), choose_real_file(1 << 30)
    assert 0 < small.stat().st_size <= 100 << 10 < large.stat().st_size

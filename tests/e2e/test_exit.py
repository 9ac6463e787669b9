"""The end of the interpreter with everything still open: no traceback, no warning, exit code 0."""

import pytest

import dax_mp
from script_process import Script

HEAD = """
import sys, threading, time
import dax_mp, numpy as np
session = dax_mp.connect(sys.argv[1])
file = session.open("left", "w+")
file.truncate(1 << 20)
mapping = file.mmap()
array = np.frombuffer(mapping, dtype=np.uint8)
array[5000] = 3
"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "view = memoryview(mapping)[10:]; cycle = [view]; cycle.append(cycle); del view",
        "session.close()",
        "file.close(); del session, file, mapping",
        "sys.exit(0)",
        "def f():\n    return array[0]\nsys.settrace(None); threading.local().x = array",
    ],
)
def test_open_mappings_and_live_arrays(daemon: dax_mp.Daemon, script: Script, text: str) -> None:
    assert script(HEAD + text, daemon.endpoint).end() == (0, "", "")


@pytest.mark.parametrize(
    "work",
    [
        "array[::4096].sum()",
        "array[np.random.randint(1 << 20)] = 1",
        "mapping[5000]",
        "file.pread(10, 0)",
        "file.punch_hole(0, 1 << 20)",
        "session.open('left').mmap()[0]",
    ],
)
def test_daemon_threads(daemon: dax_mp.Daemon, script: Script, work: str) -> None:
    """Threads are in the middle of accesses and requests when it all goes away."""
    process = script(
        HEAD
        + f"""
import warnings
warnings.simplefilter("ignore", ResourceWarning)
threading.excepthook = lambda args: None  # they may see the session closed
started = threading.Barrier(5)

def work():
    started.wait()
    while True:
        {work}

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(0.05)
""",
        daemon.endpoint,
    )
    code, output, errors = process.end()
    assert (code, output) == (0, "")
    assert "Fatal" not in errors
    assert "Traceback" not in errors


@pytest.mark.forks
def test_a_forked_child_with_daemon_threads(daemon: dax_mp.Daemon, script: Script) -> None:
    process = script(
        HEAD
        + """
import os, warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
threading.excepthook = lambda args: None
def work():
    while True:
        array[::4096].sum()
threading.Thread(target=work, daemon=True).start()
pid = os.fork()
if pid == 0:
    threading.Thread(target=work, daemon=True).start()
    array[9000] = 4
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), array[9000])
""",
        daemon.endpoint,
    )
    code, output, errors = process.end()
    assert (code, output) == (0, "0 4\n")
    assert "Fatal" not in errors
    assert "Traceback" not in errors

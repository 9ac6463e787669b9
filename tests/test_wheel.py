"""What is installed: the files of the wheel, built from the sdist, which so has all that a build needs."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parent.parent
BUILD_TIMEOUT_S: Final = 600

BUILD_SDIST: Final = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"

CORE: Final = """
__init__ acquisitions address_space blocks control_messages coordinator copy_range delays device direct_io effects
endpoint errors fallocate fault file_requests file_system frames hole_pages inode limits locks memory messages
pager_messages pins ranges read_write replies requests schema session shift sizes superblock timers transaction truncate
trust unmap validate vma_messages __main__
"""
DAEMONS: Final = """
__init__ connection daemonize descriptors liveness log loop region runtime_directory serve signals sockets start sweep
"""
CLIENTS: Final = """
__init__ arrays attach bus_error channel child cli cli_copy cli_files cli_names cli_options cli_show cli_table
cli_target dax_array demo demo_actor demo_stage direct_io faults file file_ranges fork handle holdings interrupts lane
launch map_file mapping mapping_cursor names new_file open_modes page_table pin session shareable_list shared_memory
shared_memory_manager shared_session signals standard_streams status stress stress_cells stress_ledger stress_progress
stress_worker undo zmtp
"""
METADATA: Final = "METADATA RECORD WHEEL entry_points.txt top_level.txt"

WHEEL_FILES: Final = {
    *(f"dax_mp/{name}.py" for name in CORE.split()),
    *(f"dax_mp/daemons/{name}.py" for name in DAEMONS.split()),
    *(f"dax_mp/clients/{name}.py" for name in CLIENTS.split()),
    "dax_mp/py.typed",
    "dax_mp/mmu/__init__.py",
    "dax_mp/mmu/_mmu.pyi",
    "dax_mp/mmu/_mmu" + sysconfig.get_config_var("EXT_SUFFIX"),
    *(f"dax_mp-0.1.0.dist-info/{name}" for name in METADATA.split()),
}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_files_of_the_wheel(tmp_path: Path) -> None:
    """Built without the network, by the setuptools that is installed."""
    checkout = tmp_path / "checkout"
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info", ".*")
    shutil.copytree(REPOSITORY, checkout, symlinks=True, ignore=leave_out)
    sdist = run(sys.executable, "-P", "-c", BUILD_SDIST, str(tmp_path), cwd=checkout).splitlines()[-1]
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", str(tmp_path), str(tmp_path / sdist), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == WHEEL_FILES

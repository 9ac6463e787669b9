"""What cannot be set up in a virtual environment: says what is missing and how to get it, and exits 1."""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig


def missing():
    """One line for each thing."""
    # An older Python has to get as far as saying that it is too old.
    version = "%d.%d" % sys.version_info[:2]  # noqa: UP031
    if sys.version_info < (3, 11):  # noqa: UP036
        return ["Python 3.11 or newer (this is " + version + "); name one with: make PYTHON=python3.12"]
    lines = []
    if sys.platform != "linux":
        lines.append("Linux (this is " + sys.platform + ")")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        lines.append("Python's venv and ensurepip (Debian, Ubuntu: apt-get install python" + version + "-venv)")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        package = "Debian, Ubuntu: apt-get install python" + version + "-dev; Fedora: dnf install python3-devel"
        lines.append("Python's C headers, Python.h (" + package + ")")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        lines.append("a C compiler, " + compiler + " (Debian, Ubuntu: apt-get install gcc libc6-dev)")
    return lines


if __name__ == "__main__":
    for line in missing():
        sys.stderr.write("dax-mp needs " + line + "\n")
    sys.exit(bool(missing()))

"""Tests that need a /tmp, /run, /dev or /dev/shm of their own: a shell in a mount namespace."""

import os
import subprocess
import sys
from typing import Final

import pytest

from dax_mp.clients.launch import module_environment

TIMEOUT_S: Final = 60
_UNSHARE: Final = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]

has_namespaces: Final = pytest.mark.skipif(
    subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"], check=False, capture_output=True).returncode
    != 0,
    reason="no mount namespace for this user",
)


def in_namespace(script: str) -> "subprocess.CompletedProcess[str]":
    """Run it in a shell with a /tmp and a /run of its own; $PYTHON has dax_mp, $UID_ is who runs it."""
    prologue = "set -eu; mount -t tmpfs tmpfs /run; mount -t tmpfs -o mode=1777 tmpfs /tmp; cd /; UID_=$(id -u)\n"
    environment = {**module_environment(), "PYTHON": sys.executable}
    return subprocess.run(
        [*_UNSHARE, "sh", "-c", prologue + script],
        env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip

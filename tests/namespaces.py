"""Tests that need a /tmp, /run, /dev or /dev/shm of their own: a shell in a mount namespace."""

import os
import subprocess
import sys
from typing import Final

import pytest

from dax_mp.clients.launch import module_environment

TIMEOUT_S: Final = 60
_UNSHARE: Final = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]

UID: Final = 0
"""Who the shell is: root, if only of its own namespace."""

_PROLOGUE: Final = """
set -eu
cd /
UID_=0
mount -t tmpfs tmpfs /run
mkdir /run/keep
mount --bind "$PREFIX" /run/keep  # it may be in /tmp itself
mount -t tmpfs -o mode=1777 tmpfs /tmp
case $PREFIX in /tmp/*) mkdir -p "$PREFIX"; mount --bind /run/keep "$PREFIX";; esac
"""

has_namespaces: Final = pytest.mark.skipif(
    subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"], check=False, capture_output=True).returncode
    != 0,
    reason="no mount namespace for this user",
)


def in_namespace(script: str) -> "subprocess.CompletedProcess[str]":
    """Run it in a shell with a /tmp and a /run of its own; $PYTHON has dax_mp, $UID_ is UID."""
    environment = {**module_environment(), "PYTHON": sys.executable, "PREFIX": sys.prefix}
    return subprocess.run(
        [*_UNSHARE, "sh", "-c", _PROLOGUE + script],
        env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip

"""What pyproject.toml cannot say: the C extension and its compiler flags."""

import os

from setuptools import Extension, setup

SOURCES = [
    "module.c",
    "window_type.c",
    "window_access.c",
    "window_items.c",
    "window_ranges.c",
    "pager_type.c",
    "brackets.c",
    "window.c",
    "window_table.c",
    "closed.c",
    "protection.c",
    "translations.c",
    "scratch.c",
    "private.c",
    "io.c",
    "buffers.c",
    "system_calls.c",
    "sockets.c",
    "stdio.c",
    "memory_calls.c",
    "interpose.c",
    "fault.c",
    "userfaultfd.c",
    "verdict.c",
    "guard.c",
    "bus_error.c",
    "watch.c",
    "bus_errors_type.c",
    "pager.c",
    "fault_queue.c",
    "orders.c",
    "wire.c",
    "zmtp.c",
    "thread.c",
]
HEADERS = [
    "mmu.h",
    "module.h",
    "window.h",
    "window_object.h",
    "pager.h",
    "bus_error.h",
    "userfaultfd.h",
    "system_calls.h",
    "wire.h",
    "zmtp.h",
    "thread.h",
]
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden"]
if os.environ.get("DAX_MP_WERROR"):  # for CI: a newer compiler's new warning must not break a user's build
    FLAGS.append("-Werror")
LINK_FLAGS = ["-pthread"]
if sanitizers := os.environ.get("DAX_MP_SANITIZE"):  # for example "address,undefined"
    FLAGS += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
    LINK_FLAGS += [f"-fsanitize={sanitizers}"]

setup(
    ext_modules=[
        Extension(
            "dax_mp.mmu._mmu",
            sources=[f"dax_mp/mmu/{name}" for name in SOURCES],
            depends=[f"dax_mp/mmu/{name}" for name in HEADERS],
            extra_compile_args=FLAGS,
            extra_link_args=LINK_FLAGS,
        )
    ]
)

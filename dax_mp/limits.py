"""Every limit on a message, a queue or a retry, in one place. Tests go to each of them."""

from typing import Final

NAME_BYTES_MAX: Final = 255
"""A file name, UTF-8 (NAME_MAX of Linux)."""

OFFSET_BYTES_MAX: Final = (1 << 63) - 1
"""A file offset or size (off_t)."""

IO_CHUNK_BYTES_MAX: Final = 1 << 20
"""Data of one Read or Write message: one that is this long or shorter is atomic."""

IO_LEASE_BYTES_MAX: Final = 64 << 20
"""How much of a file one BeginRead or BeginWrite lends at most: longer reads and writes go in turns."""

XATTR_BYTES_MAX: Final = 1 << 16
"""One value of setxattr (XATTR_SIZE_MAX of Linux)."""

XATTRS_PER_FILE_MAX: Final = 64

MESSAGE_BYTES_MAX: Final = IO_CHUNK_BYTES_MAX + 4096
"""One message on either socket; the connection of a peer that sends a longer one is closed."""

SEGMENTS_MAX: Final = 64
"""Segments in one Map, and ranges in one Unmap: the native side's buffers are this large."""

LIST_ENTRIES_MAX: Final = 1024
"""Entries of one reply that lists files, extents or ranges; the next request goes on after the last one."""

MAP_WINDOW_BYTES: Final = 2 << 20
"""How much one fault maps at most of what is there already, aligned to its size, and how far allocation runs ahead."""

VMAS_PER_SESSION_MAX: Final = 65536
HANDLES_PER_SESSION_MAX: Final = 65536
FAULTS_PER_SESSION_MAX: Final = 4096
"""Faults of one session under way at once: a process has that many threads at most in them."""

SESSIONS_MAX: Final = 4096

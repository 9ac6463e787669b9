"""The names of files, as callers give them."""

import errno
import os

from dax_mp.errors import os_error
from dax_mp.limits import NAME_BYTES_MAX


def check_name(name: str | os.PathLike[str]) -> str:
    """The name, as it can be sent. Raises as open() does for such a name; the coordinator judges the rest."""
    text = os.fspath(name)
    if not isinstance(text, str):
        raise TypeError(f"a file's name must be str, not {type(text).__name__}")
    if "\0" in text:
        raise ValueError("embedded null byte")
    if not text:
        raise os_error(errno.ENOENT, filename=text)
    if len(text.encode()) > NAME_BYTES_MAX:  # UnicodeEncodeError, a ValueError, where it is not Unicode
        raise os_error(errno.ENAMETOOLONG, filename=text)
    return text

"""Sizes as people write them: 4096, 4KiB, 1.5GiB, 64M. Units are powers of two."""

import re
from fractions import Fraction
from typing import Final

from dax_mp.limits import OFFSET_BYTES_MAX

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE: Final = re.compile(r"(\d{1,19}(?:\.\d{1,18})?) ?(?:B|([KMGTPE])(?:iB)?)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """The size in bytes. Raises ValueError, with a text that says what is accepted.

    KB and MB are refused: one reader takes them for 1000 and the next for 1024.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text[:40]!r}; write 4096, 4KiB, 1.5GiB or 64M (powers of two)")
    number, letter = match.groups()
    size_bytes = Fraction(number) * (1024 ** " KMGTPE".index(letter.upper()) if letter else 1)
    if size_bytes.denominator != 1:
        raise ValueError(f"not a whole number of bytes: {text!r}")
    if size_bytes > OFFSET_BYTES_MAX:
        raise ValueError(f"larger than any file can be: {text!r}")
    return int(size_bytes)


def format_size(size_bytes: int) -> str:
    """The size in the largest unit that it fills, with at most one decimal place: 512B, 4KiB, 1.5GiB."""
    power = min(max(size_bytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    if power and round(size_bytes / 1024**power, 1) >= 1024 and power + 1 < len(_UNITS):
        power += 1  # 1048575 bytes are 1MiB, not 1024KiB
    return f"{size_bytes / 1024**power:.1f}".removesuffix(".0") + _UNITS[power]

"""A table for people, in columns as wide as what is in them.

On a terminal that is narrower, the widest columns give way, and what does not fit goes on in the next line. Characters
that control a terminal are escaped. Numbers and sizes are aligned at the right, where a column has nothing else.
"""

import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Final

from dax_mp.clients.standard_streams import printable

_GAP: Final = "  "
_COLUMN_CELLS_MIN: Final = 6
"""A column that is wider may give way."""


def print_table(headers: Sequence[str] | None, rows: Iterable[Sequence[object]]) -> None:
    """headers: None where each row begins with what it is about."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    numeric = [
        headers is not None and all(cell[:1].isdigit() for cell in column) for column in zip(*cells, strict=True)
    ]
    if headers is not None:
        numeric = numeric or [False] * len(headers)
        cells.insert(0, [header.upper() for header in headers])
    widths = [max(map(_cells, column)) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():
        _give_way(widths, shutil.get_terminal_size().columns)
    lines: list[str] = []
    for row in cells:
        pieces = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*pieces, fillvalue=""):
            padded = [_pad(*column) for column in zip(line, widths, numeric, strict=True)]
            lines.append(_GAP.join(padded).rstrip() + "\n")
    sys.stdout.write("".join(lines))


def _give_way(widths: list[int], columns: int) -> None:
    """Take from the widest column, one by one, until all fit or none is wide any more."""
    while sum(widths) + len(_GAP) * (len(widths) - 1) > columns and max(widths) > _COLUMN_CELLS_MIN:
        widths[widths.index(max(widths))] -= 1


def _fold(text: str, width: int) -> list[str]:
    if _cells(text) <= width:
        return [text]
    pieces, piece_cells = [""], 0
    for character in text:
        cells = _cells(character)
        if piece_cells + cells > width and pieces[-1]:
            pieces.append("")
            piece_cells = 0
        pieces[-1] += character
        piece_cells += cells
    return pieces


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _cells(text))
    return space + text if right else text + space


def _cells(text: str) -> int:
    """How wide a terminal shows it."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.category(character) in ("Mn", "Me") for character in text)

"""What the file and the mappings must hold: plain bytes.

The file is a byte array. A private mapping shows the file but for the pages that its process has stored to: those are
copies, which a truncate takes away, and nothing else (even_cows in mm/memory.c).
"""

from typing import Final

PAGES_MAX: Final = 24
"""The length of every mapping; the file may be longer than that for a while, and is not compared there."""


class Model:
    """The file's bytes, and for each process the copies of its private mapping, by page."""

    def __init__(self, page_size: int, processes: int) -> None:
        self.page_size = page_size
        self.data = bytearray()
        self.copies: list[dict[int, bytes]] = [{} for _ in range(processes)]

    @property
    def size_pages(self) -> int:
        return -(-len(self.data) // self.page_size)

    def write(self, offset: int, data: bytes) -> None:
        if data:
            self.grow(offset + len(data))
            self.data[offset : offset + len(data)] = data

    def grow(self, size: int) -> None:
        self.data += bytes(max(0, size - len(self.data)))

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.grow(size)
        self.drop_copies_past_eof()

    def drop_copies_past_eof(self) -> None:
        for copies in self.copies:
            for page in [page for page in copies if page >= self.size_pages]:
                del copies[page]

    def zero(self, offset: int, length: int) -> None:
        end = min(offset + length, len(self.data))
        self.data[offset:end] = bytes(max(0, end - offset))

    def private(self, process: int) -> bytes:
        """What the private mapping of this process shows, up to the end of the file."""
        shown = bytearray(self.data[: PAGES_MAX * self.page_size])
        for page, copy in self.copies[process].items():
            start = page * self.page_size
            shown[start : start + self.page_size] = copy[: max(0, len(shown) - start)]
        return bytes(shown)

    def store_private(self, process: int, offset: int, data: bytes) -> None:
        """Precondition: the range is within the file."""
        for page in range(offset // self.page_size, (offset + len(data) - 1) // self.page_size + 1):
            start = page * self.page_size
            copy = bytearray(self.copies[process].get(page) or self.data[start : start + self.page_size])
            copy += bytes(self.page_size - len(copy))
            low, high = max(offset, start), min(offset + len(data), start + self.page_size)
            copy[low - start : high - start] = data[low - offset : high - offset]
            self.copies[process][page] = bytes(copy)

"""What the commands print: JSON, or tables for people."""

import json
import sys
import time
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from dax_mp.clients.cli_table import print_table
from dax_mp.clients.standard_streams import printable
from dax_mp.clients.status import DeviceStat, FileStat, MappedRange, VmaMaps
from dax_mp.messages import Access
from dax_mp.sizes import format_size


def show_files(files: list[FileStat], page_size: int, json_output: bool) -> None:
    if json_output:
        _print_json(files)
        return
    rows = [
        (file.name, format_size(file.size_bytes), format_size(file.blocks * page_size), len(file.mappers))
        for file in files
    ]
    print_table(("name", "size", "allocated", "mapped by"), rows)


def show_names(names: list[str], json_output: bool) -> None:
    if json_output:
        _print_json(names)
        return
    for name in names:
        print(printable(name))


def show_file(file: FileStat, page_size: int, json_output: bool) -> None:
    if json_output:
        _print_json(file)
        return
    mappers = ", ".join(f"pid {mapper.pid} ({_count(mapper.vmas, 'VMA')})" for mapper in file.mappers)
    rows = [
        ("name", file.name),
        ("inode", file.ino),
        ("size", f"{file.size_bytes} ({format_size(file.size_bytes)})"),
        ("blocks", f"{file.blocks} ({format_size(file.blocks * page_size)})"),
        ("mapped by", mappers or "nobody"),
        ("accessed", _time(file.atime_ns)),
        ("modified", _time(file.mtime_ns)),
        ("changed", _time(file.ctime_ns)),
    ]
    print_table(None, rows)


def show_maps(vmas: list[VmaMaps], json_output: bool) -> None:
    if json_output:
        _print_json(vmas)
        return
    rows: list[Sequence[object]] = []
    for vma in vmas:
        pid = f"{vma.pid} (evicted)" if vma.evicted else str(vma.pid)
        access = _access(vma.access) + ("p" if vma.private else "")  # p as in /proc/self/maps
        first = (pid, vma.vma_id, access, _pages(vma.pgoff, vma.length_pages))
        mapped = [_mapped(piece) for piece in vma.mapped] or [("nothing", "", "", "")]
        rows += [(*first, *piece) if index == 0 else ("",) * 4 + piece for index, piece in enumerate(mapped)]
    print_table(("pid", "vma", "access", "pages", "mapped", "to", "frames", "access"), rows)


def show_device(device: DeviceStat, json_output: bool) -> None:
    if json_output:
        _print_json(device)
        return

    def size(pages: int) -> str:
        return format_size(pages * device.page_size)

    used_pages = device.pages - device.pages_free - device.pages_quarantined
    rows = [("pmem", *map(size, (device.pages, used_pages, device.pages_free, device.pages_quarantined)))]
    if device.dram_pages:
        used_pages = device.dram_pages - device.dram_pages_free
        rows.append(("dram", *map(size, (device.dram_pages, used_pages, device.dram_pages_free)), ""))
    print_table(("region", "size", "used", "free", "quarantined"), rows)
    print(
        f"\n{_count(device.files, 'file')}, {_count(device.sessions, 'session')}, {_count(device.vmas, 'VMA')}; "
        f"hole policy {device.hole_policy}, pages of {format_size(device.page_size)}\n"
    )
    print_table(("event", "count"), sorted(device.counters.items()))


def _time(time_ns: int) -> str:
    """As stat(1) has it."""
    seconds, rest_ns = divmod(time_ns, 10**9)
    local = time.localtime(seconds)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', local)}.{rest_ns:09d} {time.strftime('%z', local)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _pages(start: int, length: int) -> str:
    return f"[{start}, {start + length})"


def _access(access: Access) -> str:
    return ("r" if Access.READ in access else "-") + ("w" if Access.WRITE in access else "-")


def _mapped(piece: MappedRange) -> tuple[str, str, str, str]:
    frames = _pages(piece.pfn, piece.length_pages) if piece.pfn else ""
    return _pages(piece.pgoff, piece.length_pages), piece.target.name.lower(), frames, _access(piece.access)


def _print_json(value: Any) -> None:
    ascii_only = not sys.stdout.encoding.lower().startswith("utf")
    print(json.dumps(_plain(value), indent=2, ensure_ascii=ascii_only))


def _plain(value: Any) -> Any:
    """The value in the types that JSON has: records by field, enumerations by name, an access as rw, r- or -w."""
    if isinstance(value, Access):
        return _access(value)
    if isinstance(value, IntEnum):
        return value.name.lower()
    if hasattr(value, "_asdict"):
        return {field: _plain(item) for field, item in value._asdict().items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value

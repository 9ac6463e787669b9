"""Sizes as people write and read them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dax_mp.limits import OFFSET_BYTES_MAX
from dax_mp.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("4KiB", 4096),
        ("4k", 4096),
        ("64M", 64 << 20),
        (" 1 GiB ", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("0.25t", 1 << 38),
        ("1.0", 1),
        (str(OFFSET_BYTES_MAX), OFFSET_BYTES_MAX),
    ],
)
def test_parse_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a size"),
        ("GiB", "not a size"),
        ("-1", "not a size"),
        ("1e3", "not a size"),
        ("1KB", "not a size"),  # 1000 or 1024?
        ("1,5GiB", "not a size"),
        ("0x10", "not a size"),
        ("\N{ARABIC-INDIC DIGIT ONE}", "not a size"),
        ("9" * 100, "not a size"),
        ("1.5", "whole number"),
        ("0.3K", "whole number"),
        ("8EiB", "larger than any file"),
        (str(OFFSET_BYTES_MAX + 1), "larger than any file"),
    ],
)
def test_parse_size_refuses(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (3 << 29, "1.5GiB"),
        (1234567, "1.2MiB"),
        (1048575, "1MiB"),
        (OFFSET_BYTES_MAX, "8EiB"),
    ],
)
def test_format_size(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, OFFSET_BYTES_MAX))
def test_what_is_formatted_is_near(size_bytes: int) -> None:
    match = re.fullmatch(r"([\d.]+)([KMGTPE]?)(i?B)", format_size(size_bytes))
    assert match is not None
    number, letter, _ = match.groups()
    assert 1 <= float(number) < 1024 or size_bytes == 0
    assert float(number) * 1024 ** " KMGTPE".index(letter or " ") == pytest.approx(size_bytes, rel=0.05)

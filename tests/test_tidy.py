"""The rules of the code that a reader relies on, checked on the sources of the checkout."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import dax_mp

REPOSITORY: Final = Path(__file__).parent.parent
LINES_MAX: Final = 400
FUNCTION_LINES_MAX: Final = 70

CORE_MAY_IMPORT: Final = {
    "__future__",
    "bisect",
    "collections",
    "collections.abc",
    "enum",
    "errno",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "msgpack",
    "operator",
    "os",
    "re",
    "sortedcontainers",
    "stat",
    "struct",
    "typing",
}
"""What computes and does nothing else. Of os, only OS_PURE."""
OS_PURE: Final = {"fsencode", "fsdecode", "strerror", "path.join", "path.basename", "path.dirname"}
IO_BUILTINS: Final = {"open", "print", "input", "breakpoint", "exec", "eval", "__import__", "id", "hash"}
"""Besides I/O: what differs from one run to the next."""

PUBLIC_NAMES: Final = {
    "ACCESS_COPY",
    "ACCESS_DEFAULT",
    "ACCESS_READ",
    "ACCESS_WRITE",
    "BusError",
    "Daemon",
    "DaxFile",
    "DeviceStat",
    "Extent",
    "FileStat",
    "MappedRange",
    "Mapper",
    "Mapping",
    "PageTableEntry",
    "SEEK_DATA",
    "SEEK_HOLE",
    "Session",
    "ShareableList",
    "SharedMemory",
    "SharedMemoryManager",
    "VmaMaps",
    "__version__",
    "bus_errors",
    "check",
    "connect",
    "errors",
    "launch",
    "ndarray",
    "shared_session",
}


def python_files(*folders: str) -> list[Path]:
    """The sources below these folders; the links in dax_mp/ are not followed."""
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [path for path in files if not {"daemons", "clients"} & set(path.relative_to(REPOSITORY).parts[1:-1])]


CORE: Final = [
    path for path in python_files("dax_mp") if path.parent.name == "dax_mp" and not path.name.startswith("__")
]
CODE: Final = python_files("dax_mp", "daemons", "clients", "bench")
EVERYTHING: Final = [*CODE, *python_files("tests")]


def by_name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it: `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(), by_name(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{by_name(path)}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_layout_is_as_these_tests_take_it() -> None:
    assert {path.name for path in CORE} >= {"coordinator.py", "messages.py", "endpoint.py"}
    for package in ("daemons", "clients"):
        link = REPOSITORY / "dax_mp" / package
        assert link.is_symlink()
        assert link.readlink() == Path("..", package)
        assert python_files(package)


@pytest.mark.parametrize("path", EVERYTHING, ids=by_name)
def test_no_module_is_imported_under_a_second_name(path: Path) -> None:
    """`import daemons` works in the checkout, and makes a second copy of everything in it."""
    for module in imported_modules(path):
        assert not below(module, "daemons"), f"import dax_mp.{module}"
        assert not below(module, "clients"), f"import dax_mp.{module}"


@pytest.mark.parametrize("path", CORE, ids=by_name)
def test_the_core_does_no_io(path: Path) -> None:
    tree = ast.parse(path.read_text(), by_name(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            assert node.module != "os", "import os, so that what is used of it is seen"
        else:
            continue
        for module in modules:
            allowed = module in CORE_MAY_IMPORT or module == "dax_mp" or is_core(module)
            assert allowed, f"{by_name(path)}:{node.lineno} imports {module}"
    for name, line in used_names(tree):
        assert name not in IO_BUILTINS, f"{by_name(path)}:{line} calls {name}()"
        if name.startswith("os."):
            assert name.removeprefix("os.") in OS_PURE, f"{by_name(path)}:{line} uses {name}"


def is_core(module: str) -> bool:
    return module in {f"dax_mp.{path.stem}" for path in CORE}


def used_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Builtins that are called, and all that is taken from os: os.strerror, os.path.join."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            if name.startswith("os."):
                yield name, node.lineno


@pytest.mark.parametrize("package", ["daemons", "clients"])
def test_daemons_and_clients_import_the_core_and_never_each_other(package: str) -> None:
    other = {"daemons": "clients", "clients": "daemons"}[package]
    for path in python_files(package):
        for module in imported_modules(path):
            assert not below(module, f"dax_mp.{other}"), f"{by_name(path)} imports {module}"


def test_only_the_clients_have_the_native_part() -> None:
    for path in [*CORE, *python_files("daemons")]:
        for module in imported_modules(path):
            assert not below(module, "dax_mp.mmu"), f"{by_name(path)} imports {module}"


@pytest.mark.parametrize("path", CODE, ids=by_name)
def test_modules_are_short(path: Path) -> None:
    """One module, one concept. (A test module is a list of cases, and may be as long as the list.)"""
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", EVERYTHING, ids=by_name)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{by_name(path)}:{node.lineno} {node.name}() has {lines} lines"


@pytest.mark.parametrize("path", python_files("dax_mp", "daemons", "clients"), ids=by_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), by_name(path)


def test_the_public_names() -> None:
    assert set(dax_mp.__all__) == PUBLIC_NAMES
    assert len(dax_mp.__all__) == len(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(dax_mp, name) is not None
        assert name in dir(dax_mp)
    with pytest.raises(AttributeError):
        dax_mp.nothing_of_that_name  # type: ignore[attr-defined]  # noqa: B018

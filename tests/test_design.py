"""The design document has the same names and numbers as the code."""

import re
from pathlib import Path

import dax_mp
from dax_mp import messages

CORE = Path(dax_mp.__file__).parent
REPOSITORY = Path(__file__).parent.parent
DESIGN = (REPOSITORY / "dax_mp" / "README.md").read_text()


def test_the_message_table_is_the_schema() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \| to (coordinator|client) \| (pager|control) \|$", DESIGN, re.MULTILINE)
    documented = {(int(code), name) for code, name, _, _ in rows}
    assert documented == {(code, cls.__name__) for cls, code in messages.CODES.items()}
    for code, name, direction, socket in rows:
        assert direction == ("client" if int(code) in range(16, 32) or 64 <= int(code) < 96 else "coordinator"), name
        assert socket == ("pager" if int(code) < 32 else "control"), name


def test_each_invariant_is_cited_where_the_code_keeps_it() -> None:
    documented = set(re.findall(r"^- \*\*(I\d+)\*\*", DESIGN, re.MULTILINE))
    assert documented == {f"I{number}" for number in range(1, 11)}
    code = "\n".join(path.read_text() for path in CORE.glob("*.py"))
    assert set(re.findall(r"\bI[1-9]\d?\b", code)) == documented - {"I5"}  # I5 has no dirty tracking to be about


def test_each_module_of_the_core_is_in_the_table_of_concepts() -> None:
    documented = set(re.findall(r"`(\w+\.py)`", DESIGN))
    modules = {path.name for path in (REPOSITORY / "dax_mp").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules <= documented, f"not in the design document: {sorted(modules - documented)}"


def test_each_file_that_the_design_names_is_there() -> None:
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|c|md))`", DESIGN):
        places = (REPOSITORY / name, REPOSITORY / "dax_mp" / name)
        assert any(place.exists() for place in places), f"{name} does not exist"

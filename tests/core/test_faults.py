"""The list of faults, the tests that provoke them and the page that says so agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import faults


def test_every_landed_fault_has_a_test() -> None:
    assert faults.problems(faults.marked_tests("fault"), faults.CODES, faults.NOT_LANDED) == []


def test_page_is_up_to_date() -> None:
    assert faults.PAGE.read_text(encoding="utf-8") == faults.page(faults.marked_tests("fault")), (
        "docs/faults.md is stale: python tests/faults.py --write"
    )


def test_codes_are_complete_and_unique() -> None:
    """A1 to A11, S1 to S14 and so on, without a gap: no fault is lost in an edit of the table."""
    assert len(faults.CODES) == sum(len(group) for group in faults.FAULTS.values())
    last = {"A": 11, "S": 14, "L": 8, "T": 7, "R": 7, "M": 6, "J": 9}
    assert set(faults.CODES) == {f"{letter}{n}" for letter in last for n in range(1, last[letter] + 1)}


SOURCE = '''
import pytest
pytestmark = pytest.mark.fault("A1")

@pytest.mark.fault("A2", "A3")
def test_one(): ...

class TestGroup:
    @pytest.mark.fault("A2")
    @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.fault("A4"))])
    def test_two(self, x): ...

@pytest.mark.check("S1")
def test_three():
    """pytest.mark.fault("A5") in a text is no marker."""
'''


def scan(folder: Path, source: str) -> dict[str, list[str]]:
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(source)
    return faults.marked_tests("fault", folder / "tests")


def test_scanner_finds_every_form_of_marker(tmp_path: Path) -> None:
    file = "tests/test_it.py"
    assert scan(tmp_path, SOURCE) == {
        "A1": [file],
        "A2": [f"{file}::test_one", f"{file}::TestGroup::test_two"],
        "A3": [f"{file}::test_one"],
        "A4": [f"{file}::TestGroup::test_two"],
    }
    assert faults.marked_tests("check", tmp_path / "tests") == {"S1": [f"{file}::test_three"]}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("CODE = 'A1'\n@pytest.mark.fault(CODE)\ndef test_a(): ...", "literal strings"),
        ("@pytest.mark.fault()\ndef test_a(): ...", "literal strings"),
        ("@pytest.mark.fault('A1')\ndef helper(): ...", "helper, which is no test"),
    ],
)
def test_scanner_refuses_a_marker_that_marks_nothing(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        scan(tmp_path, source)


def test_problems_are_named() -> None:
    assert faults.problems({"A1": ["t"], "Z9": ["u"]}, ["A1", "A2", "L1"], ["L1"]) == [
        "Z9 is no listed fault, marked by u",
        "A2 has no test",
    ]


def test_page_shows_an_untested_fault() -> None:
    assert "| A2 | truncated file | **none** |" in faults.page({"A1": ["tests/test_it.py::test_one"]})

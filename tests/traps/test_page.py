"""The page of traps and the tests have the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_trap_of_the_page_has_tests_and_each_numbered_test_a_row() -> None:
    page = (ROOT / "docs" / "concepts" / "traps.rst").read_text()
    rows = [int(number) for number in re.findall(r"^   \* - (\d+)$", page, re.MULTILINE)]
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    named = {int(number) for text in tests for number in re.findall(r"def test_trap_(\d+)_", text)}
    assert rows == sorted(named)

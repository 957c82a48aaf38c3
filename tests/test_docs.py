"""What every page of the documentation keeps to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.rst") if "_build" not in path.parts)
CODE = re.compile(r" *\.\. (testcode|testsetup|testcleanup|plot|code-block)::")
WIDTH = 88


def code(text: str) -> Iterator[str]:
    """The lines of code, without the indentation of their block."""
    inside = None
    for line in text.splitlines():
        if CODE.match(line):
            inside = len(line) - len(line.lstrip()) + 3
        elif inside is not None and line.strip() and len(line) - len(line.lstrip()) < inside:
            inside = None
        elif inside is not None:
            yield line[inside:]


def test_code_is_found() -> None:
    assert list(code(".. testcode::\n\n   a = 1\n   b = 2\n\nText.\n")) == ["", "a = 1", "b = 2", ""]


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_the_page(page: str) -> None:
    assert [line for line in code((DOCS / page).read_text()) if len(line) > WIDTH] == []

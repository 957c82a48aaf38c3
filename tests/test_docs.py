"""What every page of the documentation keeps to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SOURCES = sorted((DOCS.parent / "src").rglob("*.py"))
INCLUDED = re.compile(r"literalinclude:: (\S+)\n(?:   :start-after: (.+)\n)?(?:   :end-before: (.+)\n)?")
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


@pytest.mark.parametrize("page", PAGES)
def test_included_code_fits_the_page(page: str) -> None:
    for file, start, end in INCLUDED.findall((DOCS / page).read_text()):
        text = (DOCS / page).parent.joinpath(file).read_text()
        assert start in text
        assert end in text
        part = text.partition(start)[2] if start else text
        part = part.partition(end)[0] if end else part
        assert [line for line in part.splitlines()[1:] if len(line) > WIDTH] == []


def test_examples_in_docstrings_fit_the_page() -> None:
    lines = [line.strip() for path in SOURCES for line in path.read_text().splitlines()]
    examples = [line for line in lines if line.startswith((">>> ", "... "))]
    assert len(examples) > 100
    assert [line for line in examples if len(line) > WIDTH] == []

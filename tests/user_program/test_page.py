"""Each row of the page that promises all this names the test that shows it."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs/concepts/your_program.rst").read_text()
NAMED = re.compile(r"\n\n       \.\. (test_\w+\.py)::(test_\w+)\n")


def test_each_row_of_the_page_names_a_test_that_exists() -> None:
    rows = PAGE.count("\n   * - ")
    headers = PAGE.count(":header-rows: 1")
    named = NAMED.findall(PAGE)
    assert len(named) == rows - headers > 10
    for file, test in named:
        assert f"\ndef {test}(" in (HERE / file).read_text(), f"{file}::{test}"

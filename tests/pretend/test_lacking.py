"""The lists of what does not run on a device name tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

from pretend.lacking import LACKING

FOLDER = Path(__file__).parents[1] / "traps"


def test_the_traps_that_are_left_out_exist() -> None:
    named = {name for path in FOLDER.glob("*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert {name.partition("[")[0] for name in set().union(*LACKING.values())} <= named

"""Each remedy that a message names is tried, and no message names one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from remedies import elsewhere, graphs, programs
from remedies.registry import CASES, messages

TESTS = Path(__file__).parents[1]

# These modules register their cases.
assert programs.__doc__
assert graphs.__doc__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fragment", CASES)
def test_trap_30_what_a_refusal_says_is_done_and_right(fragment: str) -> None:
    CASES[fragment]()


@pytest.mark.parametrize(
    ("place", "text"), list(messages()), ids=lambda value: value.split(":")[0] if ".py:" in value else ""
)
def test_trap_30_each_message_with_a_remedy_is_tried(place: str, text: str) -> None:
    known = [*CASES, *elsewhere.TRIED, *elsewhere.NOT_TRIED]
    assert any(fragment in text for fragment in known), f"{place} names a remedy that no test tries: {text}"


@pytest.mark.parametrize("fragment", [*CASES, *elsewhere.TRIED, *elsewhere.NOT_TRIED])
def test_trap_30_each_case_is_of_a_message_that_there_is(fragment: str) -> None:
    assert any(fragment in text for _, text in messages(all_of_them=True)), f"no message says {fragment!r} any more"


def test_trap_30_no_remedy_is_both_tried_and_not_tried() -> None:
    known = [*CASES, *elsewhere.TRIED, *elsewhere.NOT_TRIED]
    assert len(set(known)) == len(known)


@pytest.mark.parametrize("test", sorted(set(elsewhere.TRIED.values())))
def test_trap_30_each_test_elsewhere_is_there(test: str) -> None:
    path, name = test.split("::")
    assert f"def {name}(" in (TESTS / path).read_text()

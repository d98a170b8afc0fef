"""docs/reliability.md says of every fault what shows it, and is made from the tests themselves."""

import os

import pytest
from faults import FAULTS, marks, page
from repo import REPO


def test_the_page_is_made_from_the_tests():
    """FXC_ACCEPT=1 writes it."""
    path = REPO / "docs" / "reliability.md"
    if os.environ.get("FXC_ACCEPT"):
        path.write_text(page(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_is_shown_by_a_test_that_always_runs(number):
    assert any(not each.slow for each in marks().by_fault[number])


def test_every_mark_names_a_fault():
    assert marks().unknown == [] and list(FAULTS) == list(range(1, 34))

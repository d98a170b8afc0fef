"""Budgets as they are written, and what is optimised within them."""

import pytest

from fxc.errors import UsageError
from fxc.selection.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "size", "latency", "quality", "optimised"),
    [
        ("size=0.4x", 0.4, None, None, "quality"),
        ("quality=1%", None, None, 0.01, "size"),
        ("latency=.6x, size=0.5x", 0.5, 0.6, None, "quality"),
        ("quality=0%,size=0.5x", 0.5, None, 0.0, "latency"),
        ("size=0.4x,latency=0.6x,quality=0.25%", 0.4, 0.6, 0.0025, "quality"),
    ],
)
def test_what_is_said_and_what_is_left_to_optimise(text, size, latency, quality, optimised):
    found = parse_budget(text)
    assert (found.size, found.latency, found.quality, found.optimised) == (size, latency, quality, optimised)
    assert parse_budget(str(found)) == found


def test_a_size_is_a_share_or_bytes():
    assert parse_budget("size=0.5x").most_bytes(1000) == 500
    assert parse_budget("size=4.1MB").most_bytes(1000) == 4.1e6
    assert parse_budget("size=300kB").most_bytes(1) == 3e5
    assert Budget(quality=0.01).most_bytes(10) == float("inf")


@pytest.mark.parametrize(
    "text",
    ["", "size", "size=2%", "latency=5MB", "quality=1x", "speed=2x", "size=0x", "size=0.4x,size=0.5x", "size=-1x", "size=nanx"],
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match=r"budget|twice|zero"):
        parse_budget(text)

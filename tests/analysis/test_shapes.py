"""Which dimensions of a reshape are which."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fxc.analysis.shapes import regroup


def symbol(name: str):
    return SimpleNamespace(node=SimpleNamespace(expr=name))


B, S = symbol("s0"), symbol("s1")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([6], [2, 3], [([0], [0, 1])]),
        ([2, 3, 4], [6, 4], [([0, 1], [0]), ([2], [1])]),
        ([4, 6], [8, 3], [([0, 1], [0, 1])]),
        ([2, 1, 3], [2, 3, 1], [([0], [0]), ([2], [1])]),
        ([1, 1], [1], []),
        ([B, S, 64], [B, S, 4, 16], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ([B, S, 4, 16], [B, S, 64], [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        ([B, S, 64], [symbol("s0*s1"), 64], [([0, 1], [0]), ([2], [1])]),
        ([B, 48, 4, 4], [B, 768], [([0], [0]), ([1, 2, 3], [1])]),
        ([B, 2, 3, 4], [B, 6, 4], [([0], [0]), ([1, 2], [1]), ([3], [2])]),
        ([B, S, 6], [S, B, 2, 3], [([0, 1], [0, 1]), ([2], [2, 3])]),
        ([B, 6, S], [B, 2, symbol("3*s1")], [([0], [0]), ([1, 2], [1, 2])]),
        ([B, 1, S, 8], [B, S, 8], [([0], [0]), ([2], [1]), ([3], [2])]),
        ([12, S], [3, 4, S], [([0], [0, 1]), ([1], [2])]),
    ],
)
def test_regroup(before, after, expected):
    assert regroup(before, after) == expected

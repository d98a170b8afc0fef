"""The network of Deep Compression's kind, from end to end."""

import sys

import pytest
from repo import REPO


@pytest.mark.slow
def test_ninety_percent_sparse_with_32_values_it_takes_a_thirtieth_and_is_as_good(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(REPO / "examples")
    lenet_digits = __import__("lenet_digits")
    monkeypatch.delitem(sys.modules, "lenet_digits")
    made = lenet_digits.compress(tmp_path)
    before, after = made.sizes
    assert before > 4 * (64 * 300 + 300 * 100 + 100 * 10) and after <= before / 30
    assert made.zeros >= 0.899 and made.dense > 0.96
    assert made.loaded >= made.dense - 0.005

"""What training takes, in bytes."""

from __future__ import annotations

import pytest
from formats import captured, directed

from fxc.errors import ResourceError
from fxc.train import needs


def test_it_counts_numbers_five_times_and_values_by_sample():
    program, samples = captured(), directed(6)
    one, four = (needs.needs_of(program, 1000, samples, batch) for batch in (1, 4))
    assert one.numbers == 20_000 and four.values == 4 * one.values and (one.together, four.together) == (1, 4)
    rows = samples[0][0].numel() // 64
    # q, k and v, up, down, odd and head, and what is between them: at least one value of each output channel.
    assert one.values >= 4 * rows * (3 * 32 + 96 + 36 + 32 + 8)
    assert needs.needs_of(program, 1000, samples, 100).together == 6


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(needs, "available", lambda: 10_000)
    with pytest.raises(ResourceError) as refused:
        needs.Needs(20_000, 100, 1).check("recover")
    assert "20.1" not in refused.value.what and "lora=" in refused.value.hint
    with pytest.raises(ResourceError) as refused:
        needs.Needs(100, 20_000, 4).check("recover")
    assert "accumulate=" in refused.value.hint
    needs.Needs(100, 9_000, 4).check("recover")

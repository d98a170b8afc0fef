"""Latency of models, side by side."""

import pytest

from fxc.errors import UsageError
from fxc.measure import bench


def test_bench_times_every_phase_of_every_entry(pair):
    original, packed = pair
    entries = [bench.Entry(n, "here", m, m.program, m.program.nbytes()) for n, m in (("a", original), ("b", packed))]
    rows = bench.race(entries, [1, 2], [4], new=2, rounds=2)
    assert [(r.entry.name, r.batch, r.seq) for r in rows] == [("a", 1, 4), ("b", 1, 4), ("a", 2, 4), ("b", 2, 4)]
    assert all(len(r.milliseconds[p]) == 2 and min(r.milliseconds[p]) > 0 for r in rows for p in ("prefill", "decode"))
    assert rows[0].speedup("decode", rows[0]) == 1
    with pytest.raises(UsageError, match="at most 256"):
        bench.race(entries, [1], [255], new=2)

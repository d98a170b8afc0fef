"""The race: who is compared, who is wrong, skipped or discarded."""

from dataclasses import replace

import pytest
from toy_bench import Fixed, Toy, dense, sweep

from fxc.kernel_bench import report
from fxc.kernel_bench.limits import Peaks, moved_bytes
from fxc.kernel_bench.run import run
from fxc.kernel_bench.shapes import Shape


def poke(out, value):
    """`out` with one wrong number."""
    out = out.clone()
    out[-1, -1] = value(out[-1, -1])
    return out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda out: out * 1.01, "relative error 0.01"),
        (lambda out: poke(out, lambda number: number + 0.1), "at one place"),
        (lambda out: poke(out, lambda number: float("nan")), "relative error inf"),
        (lambda out: out.roll(1, dims=1), "relative error 1."),
        (lambda out: out[:, :-1], r"gives torch.float32\[3, 63\]"),
        (lambda out: out.bfloat16(), "instead of torch.float32"),
        (lambda out: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_named_and_not_timed(change, why):
    platform = Toy([dense(), dense("other", change)])
    result = run(sweep(), platform)
    right, wrong = result.rows
    assert platform.clock.raced == [["dense"]] and right.state == "ok" and right.us == 10.0
    assert wrong.state in ("wrong", "failed") and why.replace("\\", "") in wrong.reason and wrong.us is None
    assert any("other" in line for line in report.remarks(result))
    assert report.shape_cells(result.rows, [3])[1][-1] == wrong.state


def test_who_is_absent_or_cannot_be_built_has_a_reason():
    def broken(weight):
        raise RuntimeError("no such instruction\nand more")

    gone = dense("gone", needs=("no_such_module",))
    old = dense("old", absent="the chip is too old")
    result = run(sweep(), Toy([dense(), gone, old, replace(dense("broken"), build=broken)]))
    assert result.absent == {"gone": "not installed: no_such_module", "old": "the chip is too old"}
    assert [row.contender for row in result.rows] == ["dense"]
    assert [(each.what, each.reason) for each in result.skipped] == [
        ("broken at tiny 64 x 256", "RuntimeError: no such instruction")
    ]


def test_speed_ups_are_over_the_fastest_dense_bfloat16_and_paired_by_round():
    times = {"slow": [40.0, 80.0], "fast": [20.0, 40.0], "ours": [10.0, 10.0], "float": [5.0, 5.0]}
    baselines = [dense(name, baseline=True) for name in ("slow", "fast")]
    given = [dense("float"), *baselines, dense("ours", scheme="int8")]
    peaks = (None, Peaks("measured", bandwidth=1e9, float32=1e9, int8=1e15))
    rows = {row.contender: row for row in run(sweep(), Toy(given, Fixed(times)), peaks=peaks).rows}
    assert [rows[name].speedup for name in ("slow", "fast", "ours")] == [0.5, 1.0, 3.0]
    assert rows["slow"].us == 60.0 and rows["slow"].p20 == pytest.approx(48.0) and rows["slow"].p80 == pytest.approx(72.0)
    ours = rows["ours"]
    assert ours.limit_us["measured"] == pytest.approx(moved_bytes("int8", 64, 256, 3, 4, 4) / 1e9 * 1e6)
    assert ours.fraction["measured"] == pytest.approx(ours.limit_us["measured"] / 10) and ours.fraction["datasheet"] is None
    assert ours.tflops == pytest.approx(2 * 64 * 256 * 3 / 10 / 1e6)
    assert ours.gbps == pytest.approx(moved_bytes("int8", 64, 256, 3, 4, 4) / 10 / 1e3)


def test_what_does_not_fit_the_memory_or_the_time_is_skipped_by_name():
    tight = run(sweep(), Toy([dense()], memory=1000))
    assert tight.rows == [] and "GB of memory" in tight.skipped[0].reason
    late = run(sweep(deadline=0.0), Toy([dense()]))
    assert late.rows == [] and "time" in late.skipped[0].reason
    odd = run(sweep(shapes=(Shape("odd", 64, 100),), schemes=("int4_g128",)), Toy([dense(), dense("int4", scheme="int4_g128")]))
    assert [row.contender for row in odd.rows] == ["dense"] and "multiple of 128" in odd.skipped[0].reason


def test_a_discarded_race_gives_no_times():
    (row,) = run(sweep(), Toy([dense()], Fixed(discarded="the clock drifted"))).rows
    assert (row.state, row.reason, row.us) == ("discarded", "the clock drifted", None)
    assert row.rounds == [10.0, 10.0] and row.speedup is None


def test_results_are_there_after_each_cell_and_a_fault_costs_only_its_own():
    class Flaky(Fixed):
        def race(self, prepared, rounds, watch=True):
            if len(self.raced) == 1:
                self.raced.append([])
                raise RuntimeError("the device is gone")
            return super().race(prepared, rounds, watch)

    seen = []
    result = run(sweep(rows=(1, 2, 3)), Toy([dense()], Flaky()), after=lambda result: seen.append(len(result.rows)))
    assert seen == [1, 1, 2] and [row.m for row in result.rows] == [1, 3]
    assert [(each.what, each.reason) for each in result.skipped] == [("tiny 64 x 256 M=2", "RuntimeError: the device is gone")]

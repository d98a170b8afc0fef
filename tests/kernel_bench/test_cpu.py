"""The CPU: its contenders, the copies of weights, its measured peaks."""

import time

from toy_bench import Toy, sweep

from fxc.kernel_bench import cpu, cpu_platform
from fxc.kernel_bench.clock import CpuClock
from fxc.kernel_bench.run import run
from fxc.kernel_bench.weights import all_schemes


def test_every_layer_of_fxc_is_right_and_says_how_it_runs():
    given = cpu.contenders(tuple(all_schemes()))
    ours = [each for each in given if each.ours]
    result = run(sweep(schemes=tuple(all_schemes()), rows=(1, 5)), Toy(ours, CpuClock(0.0, 0.0)))
    assert {row.scheme for row in result.rows} == set(all_schemes()) and len(result.rows) == 2 * len(ours)
    assert [(row.contender, row.reason) for row in result.rows if row.state != "ok"] == []
    forms = {row.scheme: row.form for row in result.rows}
    assert forms["fp8"] == forms["sparse24"] == "dequantized" and all(forms.values())


def test_copies_of_a_weight_are_more_than_the_caches_hold():
    platform = cpu_platform.CpuPlatform()
    platform.l3 = 32 << 20
    assert platform.copies(10 << 20) == 7 and platform.copies(500 << 20) == 1 and platform.copies(1) == 64
    platform.l3 = 480 << 20
    assert platform.copies(10 << 20) == 1 and "may stay in the L3 of 480 MB" in platform.about()["weights"]


def test_a_product_that_takes_too_long_has_no_peak():
    sides = []

    def make(side):
        sides.append(side)
        return lambda: time.sleep(0.05)

    assert cpu_platform._operations(make, seconds=0.1) is None and sides == [256]
    assert cpu_platform._operations(make, seconds=1.0) > 0


def test_bandwidth_is_measured_on_more_than_a_cache_holds(monkeypatch):
    sizes = []
    rates = iter([200e9, 100e9, 40e9, 39.5e9, 1.0])

    def best(call, calls=5):
        sizes.append(call.__self__.numel() * 4)
        return sizes[-1] / next(rates)

    monkeypatch.setattr(cpu_platform, "_best", best)
    assert cpu_platform._bandwidth(2**20, 2**30, seconds=60.0) == 39.5e9
    assert sizes == [2**26, 2**27, 2**28, 2**29]

"""The CPU: its contenders, the copies of weights, its measured peaks."""

import time

import torch
from toy_bench import Toy, sweep

from fxc.kernel_bench import cpu, cpu_platform, report
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
    """Reading goes on over larger buffers while it gets slower; of two ways to read the faster one counts."""
    sizes, ones = [], torch.ones
    monkeypatch.setattr(cpu_platform, "_SMALLEST_READ", 2**20)
    monkeypatch.setattr(cpu_platform, "_LARGEST_READ", 2**24)
    monkeypatch.setattr(torch, "ones", lambda n: sizes.append(4 * n) or ones(n))
    rates = iter([150e9, 200e9, 100e9, 90e9, 40e9, 20e9, 30e9, 39.5e9, 1.0, 1.0])
    monkeypatch.setattr(cpu_platform, "_best", lambda call, calls=5: sizes[-1] / next(rates))
    assert cpu_platform._bandwidth(2**16, 2**30, seconds=60.0) == 39.5e9
    assert sizes == [2**20, 2**21, 2**22, 2**23]
    rates = iter([10e9] * 10)
    cpu_platform._bandwidth(2**22, 2**30, seconds=60.0)
    assert sizes[4] == 2**22, "what the caches hold is the least"
    cpu_platform._bandwidth(2**30, 2**21, seconds=60.0)
    assert sizes[-1] == 2**21, "and the free memory the most"


def test_peaks_are_those_of_the_threads_that_products_have(monkeypatch):
    asked = []

    def bandwidth(*limits):
        asked.append(torch.get_num_threads())
        return 10e9 * torch.get_num_threads()

    monkeypatch.setattr(cpu_platform, "_bandwidth", bandwidth)
    monkeypatch.setattr(cpu_platform, "_operations", lambda make, seconds: 1e12 * torch.get_num_threads())
    try:
        for threads, least in ((1, [1]), (2, [2, 1])):
            asked.clear()
            torch.set_num_threads(threads)
            peaks = cpu_platform.CpuPlatform().measured_peaks(1.0)
            assert torch.get_num_threads() == threads and asked == least
            assert (peaks.bandwidth, peaks.one_thread, peaks.int8) == (10e9 * threads, 10e9, 1e12 * threads)
    finally:
        torch.set_num_threads(1)
    text = report.peaks_text([None, peaks])
    assert text.startswith("measured in this run, 2 threads: 20 GB/s (10 GB/s by one thread), float32 2 TFLOP/s")

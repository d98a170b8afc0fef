"""`fxc bench kernels`: its limits and summaries by known numbers, its checks by wrong contenders, its clocks by fakes."""

import csv
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from importlib import util

import pytest
import torch
from command import fxc
from repo import REPO

# Appended, so that the repository's folder `kernels` cannot come before Hugging Face's package of that name.
sys.path.append(str(REPO))

from benchmarks import kernels as benchmark
from fxc.cli import bench_kernels
from fxc.errors import ResourceError, UsageError
from fxc.kernel_bench import clock, cpu, cpu_platform, cuda_runner, limits, plots, report, summary, tune, weights
from fxc.kernel_bench.clock import CpuClock, GraphClock, Telemetry
from fxc.kernel_bench.contender import EXACT, HALF, Contender, errors, of_function
from fxc.kernel_bench.limits import Peaks, limit_us, moved_bytes, weight_bytes
from fxc.kernel_bench.run import Plan, Result, Row, run
from fxc.kernel_bench.shapes import MODELS, Shape, parse_shapes, regime
from fxc.kernel_bench.weights import SCHEMES, format_of, make, unfit
from fxc.report.console import Output
from fxc_kernels import fp8_linear, int4_linear, int8_linear, sparse24_linear

TINY = Shape("tiny", 64, 256)
needs_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is for Linux")


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("scheme", "each", "besides"),
    [
        ("float32", 4, 0), ("bf16", 2, 0), ("int8", 1, 4), ("int8_weight_only", 1, 4), ("fp8", 1, 4),
        ("int4_g128", 0.515625, 0), ("int4_g64", 0.53125, 0), ("int4_g32", 0.5625, 0), ("int4_g128_zero", 0.5234375, 0),
        ("sparse24", 1.125, 0), ("int8_sparse24", 0.625, 4),
    ],
)  # fmt: skip
def test_bytes_of_a_weight(scheme, each, besides):
    assert weight_bytes(scheme, 3584, 18944) == each * 3584 * 18944 + besides * 3584


@pytest.mark.parametrize("scheme", ["bf16", *SCHEMES, "int4_g128_zero"])
def test_the_bytes_are_those_that_are_stored(scheme):
    stored = sum(part.nbytes for part in make(format_of(scheme), TINY).parts)
    assert stored / (2 if scheme == "bf16" else 1) == weight_bytes(scheme, TINY.n, TINY.k)


def test_a_limit_is_the_larger_of_bytes_and_operations():
    peaks = Peaks("test", bandwidth=1e12, bf16=1e14, int8=2e14, sparse=True)
    assert moved_bytes("bf16", 1000, 2000, 10) == 2 * (1000 * 2000 + 10 * 2000 + 10 * 1000)
    assert limit_us(peaks, "bf16", 1000, 2000, 10) == pytest.approx(4.06e6 / 1e12 * 1e6)
    compute = 2 * 1000 * 2000 * 5000 / 1e14 * 1e6
    assert limit_us(peaks, "bf16", 1000, 2000, 5000) == pytest.approx(compute)
    assert limit_us(peaks, "int8", 1000, 2000, 5000) == pytest.approx(compute / 2)
    assert limit_us(peaks, "sparse24", 1000, 2000, 5000) == pytest.approx(compute / 2)
    assert limit_us(replace(peaks, sparse=False), "sparse24", 1000, 2000, 5000) == pytest.approx(compute)
    assert limit_us(peaks, "float32", 1000, 2000, 5000) is None, "its speed is not known"
    assert limit_us(peaks, "fp8", 1000, 2000, 5000) == pytest.approx(compute), "without fp8 products they are bf16 ones"


def test_the_speed_ups_that_bytes_allow_are_the_known_ones():
    h200 = limits.datasheet("nvidia-h200")
    schemes = ("bf16", "int8", "int4_g128", "sparse24", "int8_sparse24")
    one = {scheme: limit_us(h200, scheme, 8192, 8192, 1) for scheme in schemes}
    ratios = {scheme: one["bf16"] / us for scheme, us in one.items()}
    assert ratios["int8"] == pytest.approx(2.0, rel=0.01) and ratios["int4_g128"] == pytest.approx(3.88, rel=0.01)
    assert ratios["sparse24"] == pytest.approx(1.78, rel=0.01) and ratios["int8_sparse24"] == pytest.approx(3.2, rel=0.01)
    # The bytes of a bfloat16 weight and of its products are level at 206 rows, but for those of x and y.
    assert limit_us(h200, "bf16", 1 << 20, 1 << 20, 200) == pytest.approx(limit_us(h200, "bf16", 1 << 20, 1 << 20, 1), rel=0.01)
    assert limit_us(h200, "bf16", 1 << 20, 1 << 20, 212) > 1.02 * limit_us(h200, "bf16", 1 << 20, 1 << 20, 1)


def test_datasheets_are_found_by_the_chips_name():
    assert limits.datasheet("nvidia-h100-pcie").bandwidth == 2.0e12
    assert limits.datasheet("nvidia-h100-80gb-hbm3").bandwidth == 3.35e12
    assert limits.datasheet("nvidia-a100-sxm4-80gb").fp8 is None
    assert limits.datasheet("nvidia-geforce-gtx-1080") is None


# ---------------------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_models_layers_and_sizes():
    assert parse_shapes("qwen2.5-7b")[2] == Shape("qwen2.5-7b gate_up", 37888, 3584)
    assert {shape.k for shape in parse_shapes("qwen2.5-72b")} == {8192, 29568}
    assert parse_shapes("llama3-8b:o, 16,32 ,llama3-8b:o") == (Shape("llama3-8b o", 4096, 4096), Shape("weight", 16, 32))
    assert [len(MODELS[name]) for name in MODELS] == [5, 5, 5, 5]


@pytest.mark.parametrize("text", ["gpt2", "4096", "4096,x", "0,16", "llama3-8b:nope", "", "16,32,64"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(UsageError, match="--shapes"):
        parse_shapes(text)


def test_regimes():
    assert [regime(m) for m in (1, 4, 16, 64, 256, 2048)] == ["decode", "decode", "small", "small", "mid", "prefill"]


def test_what_does_not_fit_a_shape_says_why():
    assert "K = 100 is not a multiple of 128" in unfit("int4_g128", Shape("x", 8, 100))
    assert "multiple of 8" in unfit("sparse24", Shape("x", 8, 100))
    assert unfit("int8", Shape("x", 8, 100)) is None and unfit("int4_g32", Shape("x", 8, 96)) is None


# ---------------------------------------------------------------------------------------------------------------- oracle


def test_the_reference_is_that_of_the_operators():
    x = torch.randn(5, TINY.k, generator=torch.Generator().manual_seed(1))
    kinds = ("dense", "int8", "fp8", "int4_g32", "int4_g32_zero", "sparse24", "int8_sparse24")
    made = {kind: make(kind, TINY) for kind in kinds}
    q, scale = made["int8"].parts
    sparse, places = made["sparse24"].parts
    values, meta, row_scale = made["int8_sparse24"].parts
    expected = {
        "dense": x @ made["dense"].parts[0].t(),
        "int8": int8_linear.int8_weight_only_linear_reference(x, q, scale, None),
        "fp8": fp8_linear.fp8_weight_only_linear_reference(x, *made["fp8"].parts, None),
        "int4_g32": int4_linear.int4_weight_only_linear_reference(x, *_float_scale(made["int4_g32"]), None, None, 32),
        "int4_g32_zero": int4_linear.int4_weight_only_linear_reference(x, *_float_scale(made["int4_g32_zero"]), None, 32),
        "sparse24": sparse24_linear.sparse24_linear_reference(x, sparse.float(), places, None),
        "int8_sparse24": x @ (sparse24_linear.unpack(values, meta).float() * row_scale[:, None]).t(),
    }
    for kind, product in expected.items():
        rows, got = made[kind].reference(x)
        assert rows.tolist() == [0, 1, 2, 3, 4]
        torch.testing.assert_close(got, product, rtol=1e-5, atol=1e-5 * product.abs().max().item())


def _float_scale(weight):
    return weight.parts[0], weight.parts[1].float(), *weight.parts[2:]


def test_of_many_rows_some_are_compared_and_the_ends_always(monkeypatch):
    monkeypatch.setattr(weights, "CHECKED_ROWS", 4)
    monkeypatch.setattr(weights, "_CHUNK", 256 * 7)
    weight, x = make("int8", TINY), torch.randn(100, TINY.k)
    rows, got = weight.reference(x)
    assert rows.tolist() == [0, 33, 66, 99]
    torch.testing.assert_close(got, x[rows] @ weight.dense().t(), rtol=1e-4, atol=1e-3)


def test_two_of_four_are_stored_and_places_ascend():
    places = sparse24_linear.unpack_positions(make("sparse24", TINY).parts[1]).reshape(-1, 2)
    assert (places[:, 0] < places[:, 1]).all() and len(places.unique(dim=0)) == 6


# ------------------------------------------------------------------------------------------------------------- the race


class Fixed:
    """A clock on which a call takes as long as it says. raced: what was timed."""

    def __init__(self, us: dict[str, list[float]] | None = None, discarded: str | None = None):
        self.us, self.discarded, self.raced = us or {}, discarded, []

    def prepare(self, calls):
        return calls

    def race(self, prepared, rounds, watch=True):
        self.raced.append(list(prepared))
        return clock.Race({name: self.us.get(name, [10.0] * rounds) for name in prepared}, [], self.discarded)


class Toy:
    """A platform with these contenders."""

    name, device = "toy", torch.device("cpu")

    def __init__(self, contenders, timer=None, memory=1 << 40):
        self.given, self.clock, self.memory = contenders, timer or Fixed(), memory

    def contenders(self, schemes):
        return self.given

    def copies(self, nbytes):
        return 2

    def free_memory(self):
        return self.memory


def dense(name="dense", change=lambda out: out, **options) -> Contender:
    """The right product of a dense weight, or what `change` makes of it."""
    settings = {"scheme": "float32", "kind": "dense", "tolerance": EXACT, "dtype": torch.float32} | options

    def build(weight):
        numbers = weight.dense()
        return of_function(lambda x: change(torch.nn.functional.linear(x.float(), numbers)))

    return Contender(name, build=build, **settings)


def plan(**options) -> Plan:
    return Plan(**{"shapes": (TINY,), "schemes": ("int8",), "rows": (3,), "rounds": 2} | options)


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
    result = run(plan(), platform)
    right, wrong = result.rows
    assert platform.clock.raced == [["dense"]] and right.state == "ok" and right.us == 10.0
    assert wrong.state in ("wrong", "failed") and why.replace("\\", "") in wrong.reason and wrong.us is None
    assert any("other" in line for line in report.remarks(result))
    assert report.shape_cells(result.rows, [3])[1][-1] == wrong.state


def test_rounding_is_not_called_wrong():
    got = torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    rms, largest = errors(got.bfloat16(), torch.arange(1000), got)
    assert rms < HALF / 2 and 4 * rms < largest < 8 * HALF


def test_who_is_absent_or_cannot_be_built_has_a_reason():
    def broken(weight):
        raise RuntimeError("no such instruction\nand more")

    gone = dense("gone", needs=("no_such_module",))
    old = dense("old", absent="the chip is too old")
    result = run(plan(), Toy([dense(), gone, old, replace(dense("broken"), build=broken)]))
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
    rows = {row.contender: row for row in run(plan(), Toy(given, Fixed(times)), peaks=peaks).rows}
    assert [rows[name].speedup for name in ("slow", "fast", "ours")] == [0.5, 1.0, 3.0]
    assert rows["slow"].us == 60.0 and rows["slow"].p20 == pytest.approx(48.0) and rows["slow"].p80 == pytest.approx(72.0)
    ours = rows["ours"]
    assert ours.limit_us["measured"] == pytest.approx(moved_bytes("int8", 64, 256, 3, 4, 4) / 1e9 * 1e6)
    assert ours.fraction["measured"] == pytest.approx(ours.limit_us["measured"] / 10) and ours.fraction["datasheet"] is None
    assert ours.tflops == pytest.approx(2 * 64 * 256 * 3 / 10 / 1e6)
    assert ours.gbps == pytest.approx(moved_bytes("int8", 64, 256, 3, 4, 4) / 10 / 1e3)


def test_what_does_not_fit_the_memory_or_the_time_is_skipped_by_name():
    tight = run(plan(), Toy([dense()], memory=1000))
    assert tight.rows == [] and "GB of memory" in tight.skipped[0].reason
    late = run(plan(deadline=0.0), Toy([dense()]))
    assert late.rows == [] and "time" in late.skipped[0].reason
    odd = run(plan(shapes=(Shape("odd", 64, 100),), schemes=("int4_g128",)), Toy([dense(), dense("int4", scheme="int4_g128")]))
    assert [row.contender for row in odd.rows] == ["dense"] and "multiple of 128" in odd.skipped[0].reason


def test_a_discarded_race_gives_no_times():
    (row,) = run(plan(), Toy([dense()], Fixed(discarded="the clock drifted"))).rows
    assert (row.state, row.reason, row.us) == ("discarded", "the clock drifted", None)
    assert row.rounds == [10.0, 10.0] and row.speedup is None


# -------------------------------------------------------------------------------------------------------------- summary


def line_of(rows, contender, regime="decode"):
    return next(line for line in summary.summarise(rows) if (line.contender, line.regime) == (contender, regime))


def test_a_summary_is_geometric_means_and_worst_cells():
    def row(contender, m, speedup, fraction, ours=True):
        return Row("x", 8, 16 * m, m, regime(m), "int8", contender, ours, False, us=1.0, speedup=speedup,
                   fraction={"datasheet": fraction, "measured": 0.9})  # fmt: skip

    rows = [
        row("fxc int8", 1, 4.0, 0.5), row("fxc int8", 2, 1.0, 0.125), row("fxc int8", 256, 3.0, 0.7),
        row("slow", 1, 1.5, 0.2, ours=False), row("fast", 1, 2.5, 0.4, ours=False),
    ]  # fmt: skip
    rows.append(replace(rows[0], us=None, state="wrong", speedup=None, fraction={}))
    decode = line_of(rows, "fxc int8")
    assert decode.cells == 2 and decode.peaks == "datasheet"
    assert decode.speedup == pytest.approx(2.0) and decode.worst_speedup == 1.0 and decode.worst_cell == "8 x 32, M=2"
    assert decode.fraction == pytest.approx(0.25) and decode.worst_fraction == 0.125
    assert line_of(rows, "fxc int8", "mid").speedup == pytest.approx(3.0)
    shown = summary.headlines(summary.summarise(rows))
    assert [line.contender for line in shown] == ["fxc int8", "fast", "fxc int8"]


def test_without_a_datasheet_fractions_are_of_what_was_measured():
    row = Row("x", 8, 16, 1, "decode", "int8", "a", True, False, us=1.0, fraction={"datasheet": None, "measured": 0.5})
    assert line_of([row], "a").fraction == pytest.approx(0.5) and line_of([row], "a").speedup is None


def test_shares_above_all_that_there_is_are_explained():
    def said(share):
        row = Row("x", 8, 16, 1, "decode", "int8", "a", True, False, us=1.0, fraction={"datasheet": None, "measured": share})
        return report.remarks(Result([row]))

    assert said(0.99) == [] and said(1.31)[0].startswith("shares above 100 %, up to 131%: a weight that stays in a cache")


# --------------------------------------------------------------------------------------------------------------- clocks


def test_a_round_on_the_cpu_is_the_median_after_one_call_that_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.time, "sleep", lambda _: None)
    durations, log = itertools.cycle([0.09, 0.2, 0.4, 0.6]), []

    def call(name, spent=None):
        def run():
            log.append(name)
            now[0] += next(durations) if spent is None else spent

        return run

    timer = CpuClock(seconds=1.0)
    race = timer.race({"a": itertools.cycle([call("a")]), "b": itertools.cycle([call("b0", 3.0), call("b1", 3.0)])}, rounds=2)
    assert race.rounds["a"] == pytest.approx([0.4e6, 0.4e6]), "the first call, which warms the caches, does not count"
    assert race.rounds["b"] == pytest.approx([3e6, 3e6])
    # Copies take turns, every other round is reversed, and a long call is made once.
    assert log == ["a"] * 4 + ["b0", "b1"] + ["a"] * 4
    timer.prepare([call("c", 1.0), call("d", 1.0)])
    assert log[-2:] == ["c", "d"], "every copy has run before it is timed"


class FakeRunner:
    """A GPU on which a call takes `us` microseconds, or as many as it has itself, and a graph those of its calls. clocks: the
    SM clock at each time that it is asked for."""

    def __init__(self, clocks=(), us=10.0):
        self.clocks, self.us, self.captured, self.replays = iter(clocks), us, [], 0

    def capture(self, calls):
        self.captured.append([call() for call in calls])

        def replay():
            self.replays += 1

        replay.us = sum(getattr(call, "us", self.us) for call in calls)
        return replay

    def microseconds(self, replay, repeats):
        for _ in range(repeats):
            replay()
        return repeats * getattr(replay, "us", self.us)

    def telemetry(self, replay, repeats):
        found = next(self.clocks, None)
        return found and Telemetry(found, 400.0, 50.0)


def test_a_graph_goes_through_all_copies_and_has_twenty_calls_at_least():
    runner = FakeRunner()
    timer = GraphClock(runner)
    prepared = timer.prepare([lambda: "a", lambda: "b", lambda: "c"])
    assert runner.captured[0] == ["a", "b", "c"] * 6 + ["a", "b"]
    many = timer.prepare([lambda at=at: at for at in range(33)])

    def long():
        return "long"

    long.us = 2001.0
    timer.prepare([long])
    assert runner.captured.pop() == ["long"] * 2, "of long calls two are enough"
    assert runner.captured[1] == list(range(33))
    race = timer.race({"few": prepared, "many": many}, rounds=3)
    assert race.rounds == {"few": [10.0] * 3, "many": [10.0] * 3} and race.telemetry == [] and race.discarded is None
    # A replay of 200 microseconds is repeated ten times a round, one of 330 six times, and each once before.
    assert runner.replays == 3 * (10 + 6) + 2


@pytest.mark.parametrize(
    ("clocks", "asked", "discarded"),
    [
        ([1980.0, 1950.0], 2, False),
        ([1980.0, 1800.0, 1800.0, 1790.0], 4, False),
        ([1980.0, 1800.0, 1700.0, 1500.0, 1500.0, 1200.0], 6, True),
    ],
)
def test_a_race_in_which_the_clock_drifts_is_run_again_and_in_the_end_thrown_away(clocks, asked, discarded):
    runner = FakeRunner(clocks)
    timer = GraphClock(runner)
    race = timer.race({"a": timer.prepare([lambda: None])}, rounds=1)
    assert bool(race.discarded) == discarded and [each.sm_mhz for each in race.telemetry] == clocks[asked - 2 : asked]
    assert next(runner.clocks, None) is None
    assert timer.race({"a": timer.prepare([lambda: None])}, rounds=1, watch=False).telemetry == []
    if discarded:
        assert race.discarded == "the SM clock went from 1500 to 1200 MHz, 20%"


def test_what_nvidia_smi_says():
    assert cuda_runner.parse_telemetry("1980, 312.40, 45") == Telemetry(1980.0, 312.4, 45.0)
    assert cuda_runner.parse_telemetry("[N/A], 312.40, 45") is None and cuda_runner.parse_telemetry("") is None


def test_percentiles_are_between_the_two_nearest():
    assert [clock.percentile([4.0, 1.0, 2.0, 3.0], share) for share in (0, 0.2, 0.5, 1)] == [1.0, 1.6, 2.5, 4.0]


# ------------------------------------------------------------------------------------------------- the GPU's part, interpreted


@needs_triton
def test_every_kernel_of_a_gpu_is_called_rightly_and_the_table_is_one_that_kernels_read(tmp_path, monkeypatch):
    command = [sys.executable, str(REPO / "tests" / "helpers" / "kernel_bench_interpreted.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = [row for row in found["rows"] if row["ours"]]
    assert {row["scheme"] for row in ours} == set(SCHEMES) - {"int4_g32", "int4_g64"} and len(ours) == 38
    assert [(row["contender"], row["reason"]) for row in ours if row["state"] != "ok"] == []
    assert all(row["us"] == 10.0 and row["speedup"] == 1.0 and row["fraction"]["datasheet"] > 0 for row in ours)
    absent = found["absent"]
    assert "cuSPARSELt" in absent["cuSPARSELt"] and absent["gemlite int4"] == "not installed: gemlite"
    assert len(found["failed"]) == 2 * 7, "of two configurations, one cannot be compiled"

    from fxc_kernels.cuda import dispatch
    from fxc_kernels.cuda.tile import Config

    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    dispatch.table.cache_clear()
    try:
        entry = dispatch.measured("nvidia-h200", "int8", 32, 128)[70]
    finally:
        dispatch.table.cache_clear()
    assert entry == dispatch.Entry(Config(None, 32, 32, 64, 4, 1, split=2), 10.0, 10.0)


@needs_triton
@pytest.mark.parametrize("scheme", SCHEMES)
def test_candidates_are_different_and_survive_the_table(scheme):
    from fxc_kernels.cuda import dispatch
    from fxc_kernels.cuda.tile import Config

    for m in (1, 2, 3, 4, 16, 64, 256, 2048, 8192):
        found = tune.candidates(scheme, m, 90)
        assert len(set(map(str, found))) == len(found) >= 1
        assert all(each is None or Config.parse(str(each)) == each for each in found)
        assert len(found) > 4 or m > 64
        assert not any(dispatch._misfit(scheme, m, each) for each in found if each), "what is written can be read"
        assert m > 4 or all(each.m >= m for each in found), "a GEMV takes no more rows than it is for"


class Inline:
    """A pool of processes that is this one."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, function, *given):
        future = Future()
        future.set_result(function(*given))
        return future


@needs_triton
def test_every_program_is_compiled_once_and_what_there_was_no_time_for_is_missing(monkeypatch):
    ran, ones = [], torch.ones

    def kernel_of(scheme):
        def kernel(x, config):
            ran.append((scheme, x.shape[0], str(config)))
            if config is not None and config.stages == 3:
                raise RuntimeError("out of resource: shared memory")

        return lambda weights: kernel

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(tune.cuda, "kernel_of", kernel_of)
    monkeypatch.setattr(tune.weights, "make", lambda *given: None)
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shapes, rows = (Shape("a", 64, 1024), Shape("b", 64, 1536), Shape("c", 32, 2048)), (1, 16, 2048)
    said: list[str] = []
    found = tune.precompile(("int8", "int4_g128"), shapes, rows, 90, said.append)
    wanted = [(scheme, m, c, k) for scheme in ("int8", "int4_g128") for m in rows for c in tune.candidates(scheme, m, 90)
              for k in (1024, 1536)]  # fmt: skip
    assert set(found) == {tune.compiled_as(*each) for each in wanted} and len(ran) == len(found) < len(wanted)
    assert any(why and "shared memory" in why for why in found.values()) and f"of {len(found)} programs" in said[0]
    assert tune.precompile(("int8",), shapes, rows, 90, said.append, deadline=0.0) == {}
    monkeypatch.setattr(tune, "_device_works", lambda: False)
    assert sum(map(bool, tune.precompile(("int8",), shapes[:1], (2048,), 90, said.append).values())) <= 16


@needs_triton
def test_what_was_not_compiled_in_time_is_not_tried(monkeypatch):
    from fxc_kernels.cuda.tile import Config

    def kernel_of(scheme):
        return lambda given: lambda x, config: torch.nn.functional.linear(x.float(), given.dense()).bfloat16()

    monkeypatch.setattr(tune.cuda, "kernel_of", kernel_of)
    few = [Config(None, 16, 32, 64, 4, stages) for stages in (2, 3, 4)]
    key = [tune.compiled_as("int8", 16, each, TINY.k) for each in few]
    timer = Fixed()
    choices = tune.Choices(Toy([], timer), 90, ("int8",), candidates=lambda *given: few,
                           compiled={key[1]: "out of resource"})  # fmt: skip
    held = {"int8": make("int8", TINY)}
    x = torch.randn(16, TINY.k).bfloat16()
    (best,) = choices.entrants(TINY, 16, x, held)
    assert timer.raced == [[str(few[0])]] and best.contender.name == "fxc int8, tuned"
    assert sorted(choices.failed.values()) == ["out of resource", "was not compiled in time"]

    def broken(scheme):
        raise RuntimeError("no memory")

    monkeypatch.setattr(tune.cuda, "kernel_of", broken)
    assert choices.entrants(TINY, 16, x, held) == [] and "RuntimeError: no memory" in choices.failed.values()


# -------------------------------------------------------------------------------------------------------------- the CPU


def test_every_layer_of_fxc_is_right_and_says_how_it_runs():
    given = cpu.contenders(SCHEMES, threads=1)
    ours = [each for each in given if each.ours]
    result = run(plan(schemes=SCHEMES, rows=(1, 5)), Toy(ours, CpuClock(0.0, 0.0)))
    assert {row.scheme for row in result.rows} == set(SCHEMES) and len(result.rows) == 2 * len(ours)
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


def test_a_bench_ends_within_its_budget():
    request = bench_kernels.KernelsRequest(shapes="256,256", rows=(1,), device="cpu", seconds=1e-3)
    with pytest.raises(ResourceError, match="nothing was measured") as caught:
        bench_kernels.bench_kernels(Output(), request)
    assert caught.value.why == "the time that it may take was spent"


def test_the_command_on_a_cpu_from_end_to_end(tmp_path):
    size = ("--shapes", "64,256", "--m", "1,16", "--rounds", 2, "--device", "cpu")
    done = fxc("bench", "kernels", *size, "--out", tmp_path, "--json")
    found = json.loads(done.stdout)
    assert {row["m"] for row in found["rows"]} == {1, 16} and found["device"]["chip"] == "cpu"
    ok = [row for row in found["rows"] if row["state"] == "ok"]
    assert {"torch float32", "torch bf16", "oneDNN bf16, prepacked", "fxc int8", "fxc int4_g128", "fxc fp8", "fxc sparse24",
            "torch._int_mm + scale"} <= {row["contender"] for row in ok}  # fmt: skip
    for row in ok:
        assert row["us"] > 0 and len(row["rounds"]) == 2 and row["speedup"] > 0 and row["fraction"]["measured"] > 0
        assert row["p20"] <= row["us"] <= row["p80"] and row["error"] < 0.02 and row["fraction"]["datasheet"] is None
    assert found["peaks"]["datasheet"] is None and found["peaks"]["measured"]["bandwidth"] > 1e9
    assert found["device"]["l3_bytes"] >= 0 and found["protocol"]["rounds"] == 2 and found["versions"]["torch"]
    for name, module in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        named = found["absent"] if util.find_spec(module) is None else [row["contender"] for row in ok]
        assert any(each.startswith(name) for each in named)
    stem = f"kernels-{report.slug(found['device']['name'])}"
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == found
    lines = list(csv.DictReader((tmp_path / f"{stem}.csv").read_text().splitlines()))
    assert [line["contender"] for line in lines] == [row["contender"] for row in found["rows"]]
    assert float(next(line for line in lines if line["contender"] == "torch bf16")["us"]) > 0
    text = (tmp_path / f"{stem}.md").read_text()
    assert "## weight 64 x 256" in text and "## Summary" in text and "fxc int8" in text
    assert all(f"- {name}: absent" in text for name in found["absent"])
    assert {line["regime"] for line in found["summary"]} == {"decode", "small"}


def test_the_table_on_a_terminal(tmp_path):
    done = fxc("bench", "kernels", "--shapes", "64,256", "--m", "1", "--rounds", 1, "--scheme", "fp8", "--device", "cpu")
    assert "fxc fp8 (dequantized)" in done.stdout and "summary of fxc" in done.stdout and "GB/s" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_product_of_fxc_is_reported_and_then_an_error(tmp_path, monkeypatch):
    class Machine(Toy):
        def datasheet(self):
            return None

        def measured_peaks(self, seconds):
            return Peaks("measured", bandwidth=1e9, float32=1e9)

        def about(self):
            return {"name": "A Machine", "chip": "toy", "timing": "by a fixed clock", "weights": "weights are one"}

    given = [dense(baseline=True), dense("fxc int8", lambda out: out * 2, scheme="int8", ours=True)]
    given.append(dense("other", lambda out: out * float("nan")))
    monkeypatch.setattr(bench_kernels, "platform_of", lambda kind, device: Machine(given))
    done = fxc("bench", "kernels", "--shapes", "64,256", "--m", 1, "--device", "cpu", "--out", tmp_path, code=5)
    assert "1 products of fxc are wrong" in done.output and "relative error 1" in done.output
    text = (tmp_path / "kernels-a-machine.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rows"][2]["error"] is None
    assert {"kernels-a-machine.json", "kernels-a-machine.csv"} <= {path.name for path in tmp_path.iterdir()}


def test_results_are_there_after_each_cell_and_a_fault_costs_only_its_own():
    class Flaky(Fixed):
        def race(self, prepared, rounds, watch=True):
            if len(self.raced) == 1:
                self.raced.append([])
                raise RuntimeError("the device is gone")
            return super().race(prepared, rounds, watch)

    seen = []
    result = run(plan(rows=(1, 2, 3)), Toy([dense()], Flaky()), after=lambda result: seen.append(len(result.rows)))
    assert seen == [1, 1, 2] and [row.m for row in result.rows] == [1, 3]
    assert [(each.what, each.reason) for each in result.skipped] == [("tiny 64 x 256 M=2", "RuntimeError: the device is gone")]


@pytest.mark.skipif(util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_pictures_are_small_pngs(tmp_path):
    times = {"dense": [20.0], "fxc int8": [10.0], "rival": [12.0]}
    given = [dense(baseline=True), dense("fxc int8", scheme="int8", ours=True), dense("rival", scheme="int8")]
    peaks = (None, Peaks("measured", bandwidth=1e9, float32=1e9, bf16=1e12, int8=2e12))
    result = run(plan(rounds=1, rows=(1, 16)), Toy(given, Fixed(times)), peaks=peaks)
    paths, missing = plots.draw(tmp_path / "x", result, peaks)
    assert [path.name for path in paths] == ["x-roofline.png", "x-speedup.png"] and missing is None
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 200_000 for path in paths)


def test_without_matplotlib_a_note_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.util, "find_spec", lambda name: None)
    result = run(plan(), Toy([dense(ours=True)]))
    about = {"name": "toy", "timing": "none", "weights": "none"}
    written, missing = report.write(tmp_path / "x", report.Report(result, about, {}, (None, None)))
    assert [path.suffix for path in written] == [".json", ".csv", ".md"] and "fxc[bench]" in missing


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "int3"], "there is no scheme 'int3'"),
        (["--scheme", "int3"], "int8_weight_only"),
        (["--shapes", "4096"], "half of a shape"),
        (["--shapes", "bert"], "qwen2.5-7b"),
        (["--shapes", "64,100", "--scheme", "int8,int4"], "K = 100 is not a multiple of 128"),
        (["--shapes", "64,100", "--scheme", "sparse24"], "multiple of 8"),
        (["--m", "1,x"], "'1,x' is not a list of sizes"),
        (["--m", ""], "'' is not a list of sizes"),
        (["--shapes", ""], "there is no shape ''"),
        (["--threads", "100000", "--device", "cpu"], "100000 threads are more than"),
        (["--tune", "--device", "cpu"], "--out"),
        (["--tune", "--device", "cpu", "--out", "x"], "only kernels of a GPU"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, said):
    done = fxc("bench", "kernels", *arguments, code=2)
    assert said in done.output and "error[FXC-E2]" in done.output


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    done = fxc("bench", "kernels", "--device", "cpu", "--out", tmp_path / "file", code=2)
    assert "takes no results" in done.output and "why: File exists" in done.output


def test_a_run_that_measured_nothing_is_an_error():
    done = fxc("bench", "kernels", "--device", "cpu", "--shapes", "1000000,1000000", "--m", 1, "--scheme", "fp8", code=6)
    assert "nothing was measured" in done.output and "GB of memory" in done.output


def test_without_typer_and_rich_the_same_runs(tmp_path, capsys):
    size = ["--shapes", "64,256", "--m", "1", "--rounds", "1", "--scheme", "fp8", "--device", "cpu"]
    assert benchmark.run_plainly([*size, "--out", str(tmp_path), "--json"]) == 0
    assert "fxc fp8" in {row["contender"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".csv", ".md"}
    code = "import sys\nsys.modules |= dict.fromkeys(('typer', 'rich', 'transformers', 'networkx', 'safetensors'))\n" \
           "import importlib.util as u\nfound = u.find_spec\n" \
           "u.find_spec = lambda name, *rest: None if name in ('typer', 'rich') else found(name, *rest)\n" \
           "import fxc.kernel_bench.cuda_platform\n" \
           "from benchmarks.kernels import main\nsys.exit(main(['--scheme', 'int3']))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "error[FXC-E2]: --scheme: there is no scheme 'int3'" in done.stderr, done.stderr


def test_the_benchmark_is_the_command_with_a_place_for_a_full_runs_results():
    results = str(REPO / "benchmarks" / "results")
    assert benchmark.arguments(["--threads", "2"]) == ["bench", "kernels", "--threads", "2", "--out", results]
    assert "--out" not in benchmark.arguments(["--m=1"]) and benchmark.arguments(["--out", "x"])[-1] == "x"

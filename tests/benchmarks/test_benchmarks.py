"""The benchmark's measuring and its tables, on toys. No time is asserted: the clock is the test's own."""

import json
import sys

import pytest
import torch

import fxc
from benchmarks import models, table, text, timing
from benchmarks.peers import DECODERS, ENCODERS, Contender, layers_of
from benchmarks.timing import Call, Timing
from fxc.kernel_bench.files import slug


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a toy adds seconds to it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda _: None)
    return now


def taking(clock: list[float], seconds: float, log: list[str] | None = None, name: str = "") -> Call:
    def run(_):
        clock[0] += seconds
        if log is not None:
            log.append(name)

    return Call(run)


def test_a_round_is_the_median_per_unit_without_preparation(clock):
    durations = iter([9.0, 0.2, 0.4, 0.6])

    def run(prepared):
        assert prepared == "prepared"
        clock[0] += next(durations)

    def prepare():
        clock[0] += 100
        return "prepared"

    # The first call, of nine seconds, warms the caches and does not count.
    assert timing.time_round(Call(run, prepare, units=4), seconds=1.0) == pytest.approx(0.4 / 4 * 1e3)


def test_a_round_goes_on_until_its_seconds_are_spent(clock):
    log = []
    timing.time_round(taking(clock, 0.25, log, "a"), seconds=2.0)
    assert len(log) == 1 + 8


def test_rounds_interleave_and_alternate(clock):
    log = []
    calls = {name: taking(clock, 1.0, log, name) for name in "abc"}
    timings = timing.interleave(calls, rounds=3, seconds=0.0, warmup=1)
    order = [log[at] for at in range(3, len(log), 2)]
    assert log[:3] == ["a", "b", "c"]
    assert order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert [len(each.rounds) for each in timings.values()] == [3, 3, 3]


def test_the_speedup_is_paired_by_round():
    """Noise that slows one whole round down leaves the ratio as it is."""
    slow, fast = Timing([10.0, 80.0, 12.0]), Timing([5.0, 40.0, 4.0])
    assert fast.speedup_over(slow) == 2.0
    assert (slow.median, slow.low, slow.high) == (12.0, 10.0, 80.0)


class Toy:
    """Contenders are functions of a number; `size` is the number."""

    name, title = "encoder", "a toy"

    def __init__(self, contenders: list[Contender], sizes: tuple[str, ...] = ("1", "2")):
        self.contenders, self.sizes = contenders, list(sizes)

    def missing(self):
        return None

    def workbench(self, threads):
        return threads

    def inputs(self, bench, size):
        return torch.tensor([[1.0, float(size[0])]])

    def call(self, model, inputs, size):
        return Call(lambda _: model(inputs))

    def vectors(self, output, inputs):
        return output


def boom(*_):
    raise RuntimeError("it broke\nand more")


TOYS = [
    Contender("base", lambda bench: lambda x: x),
    Contender("same", lambda bench: lambda x: 2 * x, ours=True),
    Contender("gone", boom, needs=("torch", "no_such_module_here")),
    Contender("unbuilt", boom),
    Contender("broken", lambda bench: boom, ours=True),
    Contender("wrong", lambda bench: lambda x: x * torch.tensor([1.0, -1.0])),
    Contender("nan", lambda bench: lambda x: x * torch.nan),
]


@pytest.fixture
def result():
    return models.measure(Toy(TOYS), [], threads=1, rounds=2, seconds=0.0)


def test_only_contenders_that_agree_are_timed(result):
    timed = {name: list(row) for name, row in result["rows"].items()}
    assert timed == {"base": ["1", "2"], "same": ["1", "2"], "broken": [], "wrong": [], "nan": []}
    assert result["rows"]["base"]["1"]["speedup"] == 1.0
    assert result["rows"]["same"]["2"]["cosine"] == 1.0
    assert result["left_out"]["gone"] == "not measured: no_such_module_here not installed"
    assert result["left_out"]["unbuilt"] == "failed: RuntimeError: it broke"
    assert result["left_out"]["broken at 2"] == "failed: RuntimeError: it broke"
    assert result["left_out"]["wrong at 1"] == "wrong: cosine 0.0000"
    assert result["left_out"]["nan at 1"] == "wrong: cosine nan"


def test_only_ours_and_the_baseline_are_faults(result):
    assert models.faults(result, TOYS) == ["broken at 1", "broken at 2"]


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], ["base", "same", "gone", "unbuilt", "broken", "wrong", "nan"]),
        (["sa*"], ["base", "same"]),
        (["encoder", "nan"], ["base", "nan"]),
        (["base"], ["base"]),
        (["decoder"], []),
        (["nothing*"], []),
    ],
)
def test_only_chooses_rows_and_keeps_the_baseline(only, names):
    assert [each.name for each in models.chosen(TOYS, "encoder", only)] == names


def test_tables_show_the_numbers_and_what_is_left_out(result):
    result["rows"]["same"]["1"] = table.record(Timing([4.0, 2.0, 3.0]), Timing([8.0, 8.0, 9.0]), 0.99871)
    line = next(line for line in table.cells(result) if line[0] == "same")
    assert line[1] == "3.00  3.00x\n2.00-4.00" and line[-1] == "0.9987"
    assert table.rich_table(result).row_count == 5
    result["layers"]["same"] = {"dequantized": 3, "int8": 1}
    protocol = {"threads": 1, "rounds": 2, "load_before": 0.0}
    report = {"hardware": table.hardware(), "versions": table.versions(), "protocol": protocol, "workloads": [result]}
    shown = table.markdown(report)
    assert "| same | 3.00  3.00x<br>2.00-4.00 |" in shown
    assert "| wrong | - | - | - |" in shown
    assert "- gone: not measured: no_such_module_here not installed" in shown
    assert "- same runs its layers as: 3 dequantized, 1 int8" in shown
    assert torch.__version__ in shown


def test_how_layers_run_is_counted():
    """A row called int8 whose layers this machine runs dequantized must say so."""
    compiled = fxc.optimize(torch.nn.Linear(64, 64), (torch.ones(2, 64),), passes="int8", budget=1.0)
    compiled(torch.ones(2, 64))
    assert sum(layers_of(torch.nn.Sequential(compiled)).values()) == 1
    assert layers_of(torch.nn.Linear(2, 2)) == layers_of(print) == {}


def test_machine_and_names():
    assert table.hardware()["cores"] >= 1 and table.hardware()["cpu"]
    assert slug("Intel(R) Xeon(R) Processor @ 2.60GHz") == "intel-xeon-processor-2-60ghz"
    for contenders in (ENCODERS, DECODERS):
        names = [each.name for each in contenders]
        assert len(set(names)) == len(names) and names[0] == "eager-float32"


def test_texts_are_sentences_and_calibration_has_none_of_the_measured_ones():
    measured, calibration = text.texts(32), text.calibration_texts(80)
    assert len(measured) == 32 and min(map(len, measured)) >= 50
    assert not set(measured) & set(calibration)
    assert len(measured[0].split()) > 100, "the first row fills 128 tokens"
    with pytest.raises(ValueError, match="too few"):
        text.texts(10_000)


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    monkeypatch.setattr(models, "quiet", lambda: None)
    monkeypatch.setattr(models, "Encoder", lambda sizes: Toy(TOYS, tuple(sizes)))
    monkeypatch.setattr(models, "Decoder", lambda: Toy([]))
    monkeypatch.setattr(models, "interleave", lambda calls, *_: {name: Timing([1.0]) for name in calls})
    return models.main()


def test_the_program_prints_a_table_and_writes_json_and_markdown(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "run.json"
    assert run_main(monkeypatch, "--only", "same", "--sizes", "1x1", "--json", str(out)) == 0
    report = json.loads(out.read_text())
    assert report["workloads"][0]["rows"]["same"]["1x1"]["speedup"] == 1.0
    assert report["protocol"]["rounds"] == 5
    assert out.with_suffix(".md").read_text() == table.markdown(report)
    assert "1.00x" in capsys.readouterr().out


def test_a_fault_of_ours_is_the_exit_status_and_a_partial_run_leaves_the_results_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "RESULTS", tmp_path)
    assert run_main(monkeypatch, "--only", "broken") == 1
    assert run_main(monkeypatch, "--only", "nothing*") == 2
    assert list(tmp_path.iterdir()) == []
    assert run_main(monkeypatch) == 1
    assert len(list(tmp_path.glob("models-*"))) == 2


def test_peers_are_on_also_without_the_word(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "RESULTS", tmp_path)
    for given, are_there in (("--peers", True), ("--no-peers", False)):
        run_main(monkeypatch, given)
        shown = capsys.readouterr().out
        assert ("gone: not measured: no_such_module_here not installed" in shown) == are_there and "same" in shown
    assert len(list(tmp_path.glob("models-*"))) == 2, "a run without them is not a full one"
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--help")
    assert "what it does without the word" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "arguments", [["--sizes", "8by128"], ["--sizes", "0x4"], ["--rounds", "0"], ["--threads", "0"]]
)
def test_bad_options_are_refused(monkeypatch, arguments):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert exit.value.code == 2


@pytest.mark.slow
def test_strategies_on_the_examples(capsys, tmp_path):
    from benchmarks import strategies

    assert strategies.main(["--quick", "--backend", "eager", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    named = ["| strategy", "| `original`", "| `none`", "| `int8`", "| `int8:mode=static`"]
    assert [row[0] for row in rows] == 3 * named
    assert [each in text for each in ("perplexity: over", "cosine with the original: over", "accuracy: over")] == [True] * 3
    shares = [float(row[1].partition("(")[2].rstrip(")")) for row in rows if row[0] == "| `int8:mode=static`"]
    assert max(shares) < 0.7

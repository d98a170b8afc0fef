"""`fxc bench kernels` from the command line: a small run, its files, and what it refuses."""

import csv
import json

import pytest
import torch
from command import fxc
from toy_bench import Toy, dense, quick_cpu

from fxc.cli import bench_kernels
from fxc.errors import ResourceError
from fxc.kernel_bench.files import slug
from fxc.kernel_bench.limits import Peaks
from fxc.report.console import Output


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    quick_cpu(monkeypatch)


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
    assert max(row["copies"] for row in ok) > 1, "weights take turns"
    assert found["peaks"]["datasheet"] is None and found["peaks"]["measured"]["bandwidth"] > 1e9
    assert found["device"]["l3_bytes"] >= 0 and found["protocol"]["rounds"] == 2 and found["versions"]["torch"]
    assert found["absent"] == {} and "onnxruntime" not in found["versions"]
    stem = f"kernels-{slug(found['device']['name'])}"
    assert json.loads((tmp_path / f"{stem}.json").read_text()) == found
    lines = list(csv.DictReader((tmp_path / f"{stem}.csv").read_text().splitlines()))
    assert [line["contender"] for line in lines] == [row["contender"] for row in found["rows"]]
    assert float(next(line for line in lines if line["contender"] == "torch bf16")["us"]) > 0
    text = (tmp_path / f"{stem}.md").read_text()
    assert "## weight 64 x 256" in text and "## Summary" in text and "fxc int8" in text
    assert all(f"- {name}: not measured" in text for name in found["absent"])
    assert {line["regime"] for line in found["summary"]} == {"decode", "small"}


def test_the_table_on_a_terminal(tmp_path):
    done = fxc("bench", "kernels", "--shapes", "64,256", "--m", "1", "--rounds", 1, "--scheme", "fp8", "--device", "cpu")
    assert done.stdout.rstrip().endswith("benchmarks.kernel_peers")
    assert "fxc fp8 (dequantized)" in done.stdout and "summary of fxc" in done.stdout and "GB/s" in done.stdout
    assert list(tmp_path.iterdir()) == []


class Machine(Toy):
    def datasheet(self):
        return None

    def measured_peaks(self, seconds):
        return Peaks("measured", bandwidth=1e9 * torch.get_num_threads(), float32=1e12)

    def about(self):
        about = {"name": "A Machine", "chip": "toy", "timing": "by a fixed clock", "weights": "weights are one"}
        return about | {"threads": torch.get_num_threads()}


def test_one_thread_beside_two_each_with_the_memory_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "platform_of", lambda kind, device: Machine([dense(baseline=True)]))
    size = ("--shapes", "64,256", "--m", 1, "--device", "cpu", "--out", tmp_path)
    found = json.loads(fxc("bench", "kernels", *size, "--threads", "1,2", "--json").stdout)["runs"]
    assert torch.get_num_threads() == 1
    assert [each["device"]["threads"] for each in found] == [1, 2] == [each["protocol"]["threads"] for each in found]
    limits = [each["rows"][0]["limit_us"]["measured"] for each in found]
    assert limits[0] == pytest.approx(2 * limits[1], rel=1e-4)
    stems = [f"kernels-a-machine-{threads}-threads" for threads in (1, 2)]
    assert [json.loads((tmp_path / f"{stem}.json").read_text()) for stem in stems] == found
    assert "threads" in fxc("bench", "kernels", *size, "--threads", "1,x", code=2).stderr


def test_a_wrong_product_of_fxc_is_reported_and_then_an_error(tmp_path, monkeypatch):
    given = [dense(baseline=True), dense("fxc int8", lambda out: out * 2, scheme="int8", ours=True)]
    given.append(dense("other", lambda out: out * float("nan")))
    monkeypatch.setattr(bench_kernels, "platform_of", lambda kind, device: Machine(given))
    done = fxc("bench", "kernels", "--shapes", "64,256", "--m", 1, "--device", "cpu", "--out", tmp_path, code=5)
    assert "1 products of fxc are wrong" in done.output and "relative error 1" in done.output
    text = (tmp_path / "kernels-a-machine.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rows"][1]["error"] is None
    assert {"kernels-a-machine.json", "kernels-a-machine.csv"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "int7"], "there is no scheme 'int7'"),
        (["--scheme", "int7"], "int8_weight_only"),
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
        (["--peers", "no_such_rivals", "--device", "cpu"], "no rivals in no_such_rivals"),
        (["--peers", "json", "--device", "cpu"], "has no attribute 'contenders'"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fxc("bench", "kernels", *arguments, code=2)
    assert said in done.output and "error[FXC-E2]" in done.output


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    done = fxc("bench", "kernels", "--device", "cpu", "--out", tmp_path / "file", code=2)
    assert "takes no results" in done.output and "why: File exists" in done.output


def test_a_run_that_measured_nothing_is_an_error():
    done = fxc("bench", "kernels", "--device", "cpu", "--shapes", "1000000,1000000", "--m", 1, "--scheme", "fp8", code=6)
    assert "nothing was measured" in done.output and "GB of memory" in done.output

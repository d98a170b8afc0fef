"""What runs on a GPU, as far as it runs without one: the checks of kernels in the interpreter, and gpu.sh to its end."""

import contextlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
import torch
from repo import REPO

triton = pytest.importorskip("triton")

from interpreter import needs_interpreter  # noqa: E402

from benchmarks.gpu_checks import __main__ as gpu_checks  # noqa: E402
from benchmarks.gpu_checks import cases as gpu_cases  # noqa: E402
from benchmarks.gpu_checks import chip as gpu_chip  # noqa: E402
from benchmarks.gpu_checks.cases import CASES  # noqa: E402
from benchmarks.gpu_checks.chip import Chip  # noqa: E402
from benchmarks.gpu_checks.fault import FP8, Case, _ordinal, fault, poisoned, quantized, replay_fault  # noqa: E402

CHIP = Chip(torch.device("cpu"), 80, True)


@pytest.mark.slow
@needs_interpreter
def test_all_kernels_pass_in_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--out", tmp_path]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu-checks-interpreter.json").read_text())["rows"]
    found = {row["kernel"] for row in rows}
    absent = ["persistent_int8", "persistent_fp8", "long_int8", "long_fp8", "sparse24_mma", "int8_sparse24_mma"]
    assert found == set(CASES) - set(absent)
    assert f"no case for this chip: {', '.join(absent)}" in done.stdout
    assert len(rows) == done.stdout.count("PASS") >= 60


def test_the_cases_of_a_gpu_can_be_made(monkeypatch):
    """All but the launch: tensors, weights in the kernels' order, references; the real shapes made small."""
    small = {"REAL": ((1, 48, 384), (16, 64, 256)), "CONFIGURED": (48, 384), "GATED": ((3, 9, 40),)}
    small |= {"PERSISTENT": ((33, 16, 48),), "LONG": ((70, 16, 272), (80, 16, 272)), "NORMED_ROWS": 3}
    for name, value in small.items():
        monkeypatch.setattr(gpu_chip if hasattr(gpu_chip, name) else gpu_cases, name, value)
    chip = Chip(torch.device("cpu"), 90, False)
    for kernel, make in CASES.items():
        cases = list(make(chip))
        assert len({case.label for case in cases}) == len(cases) >= 5, kernel
        for case in cases:
            expected = case.expected()
            assert isinstance(expected, tuple) or expected.isfinite().all(), (kernel, case.label)
            assert inspect.signature(case.run).bind() and inspect.signature(case.wrong).bind()


# What the checks see: each of these kernels has one fault.


def _good() -> torch.Tensor:
    out = torch.empty(4, 16, dtype=torch.bfloat16)
    out.copy_(torch.arange(64).view(4, 16))
    return out


def _leaves_a_row() -> torch.Tensor:
    out = torch.empty(4, 16, dtype=torch.bfloat16)
    out[:3] = torch.arange(64).view(4, 16)[:3].bfloat16()
    return out


def _writes_behind() -> torch.Tensor:
    out = _good()
    out.as_strided((4, 17), (16, 1))[3, 16] = 1
    return out


def _differs() -> torch.Tensor:
    _differs.calls += 1
    out = _good()
    out[1, 1] += 0.0625 * _differs.calls
    return out


_differs.calls = 0


def _is_off_by_two_percent() -> torch.Tensor:
    return _good() * 1.02


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (_good, ""),
        (_leaves_a_row, "16 numbers are not finite"),
        (_writes_behind, "writes behind an output"),
        (_differs, "two runs differ"),
        (_is_off_by_two_percent, "differs by"),
    ],
)
def test_the_checks_see_faults(run, says):
    expected = torch.arange(64).view(4, 16).bfloat16()
    found = fault(Case("toy", run, lambda: expected, lambda: expected * 2), CHIP)
    assert found.startswith(says) if says else found == ""
    unseen = fault(Case("toy", _good, lambda: expected, lambda: expected), CHIP)
    assert unseen == "the comparison does not see a changed weight"


def test_quantized_rows_may_be_a_step_off_and_no_more():
    q = torch.arange(1000, dtype=torch.int32).remainder(200).sub(100).to(torch.int8)[None]
    scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    exact = (q, scale[:, None], zero[:, None])
    one_off, two_off, many = q.clone(), q.clone(), q + 1
    one_off[0, 7] += 1
    two_off[0, 7] += 2
    assert quantized((q, scale, zero), exact) == quantized((one_off, scale, zero), exact) == ""
    assert "by up to 2 steps" in quantized((two_off, scale, zero), exact)
    assert quantized((many, scale, zero), exact).startswith("100.00% of the numbers differ")
    assert quantized((q, scale * 1.01, zero), exact).startswith("scales differ")
    assert quantized((many, scale, zero + 1), exact) == "", "what they stand for is the same"
    fp8 = torch.tensor([[1.0, -1.0, 0.0, 448.0]]).to(FP8)
    steps = _ordinal(fp8)
    up = torch.tensor([[1.125, -0.9375, 2**-9, 416.0]]).to(FP8)
    assert (_ordinal(up) - steps).tolist() == [[1, 1, 1, -1]]


def test_new_memory_is_poisoned():
    with poisoned() as guards:
        made = [torch.empty(3, 5), torch.empty((2,), dtype=torch.int32), torch.empty_like(torch.ones(4).half())]
    assert made[0].isnan().all() and (made[1] == -1).all() and made[2].isnan().all() and len(guards) == 3
    assert made[0].shape == (3, 5) and made[2].shape == (4,) and made[0].data_ptr() % 16 == 0
    assert torch.empty(3).shape == (3,) and len(guards) == 3, "afterwards memory is as before"


@pytest.mark.parametrize("late", [False, True])
def test_of_a_process_that_breaks_off_what_it_found_is_kept(late, monkeypatch, capsys):
    def run(command, **options):
        with open(command[-1], "w") as file:
            file.write(json.dumps({"kernel": "int8", "case": "1x1x8", "fault": ""}) + "\n")
        if late:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, -11, "", "CUDA error: misaligned address\n")

    monkeypatch.setattr(gpu_checks.subprocess, "run", run)
    rows = gpu_checks.apart("int8", 10)
    assert [bool(row["fault"]) for row in rows] == [False, True]
    assert ("not over after 10 s" if late else "misaligned address") in rows[1]["fault"]
    said = capsys.readouterr().out
    assert "PASS int8 1x1x8" in said and "FAIL int8: broke off" in said


def test_results_of_kernels_that_are_done_are_there_before_the_others_are(tmp_path):
    row = {"kernel": "rope", "case": "x", "fault": ""}
    gpu_checks.write({"rope": [row]}, ["int8", "rope"], CHIP, tmp_path)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["not_over"] == ["int8"] and found["rows"] == [row]


def test_a_graph_that_is_replayed_must_give_the_same_bits(monkeypatch):
    class Graph:
        def replay(self):
            self.again()

    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    first, captured = torch.arange(4.0), torch.arange(4.0)
    case = Case("toy", lambda: captured, lambda: first)
    monkeypatch.setattr(Graph, "again", lambda self: captured.copy_(first), raising=False)
    assert replay_fault(case, first) == ""
    monkeypatch.setattr(Graph, "again", lambda self: None)
    assert "gives other bits" in replay_fault(case, first)


def test_without_a_gpu_the_checks_say_so(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--out", tmp_path]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "torch finds no CUDA device" in done.stderr


# gpu.sh, with a python that only says what it was asked.

STUB = """#!/usr/bin/env bash
packages=${PYTHONPATH%%:*}
case "$*" in
    "-c import torch, triton"*) printf 'a GPU\\n%s\\n' "${NO_GPU:+no }nvidia-test"; exit ${NO_GPU:-0} ;;
    *importlib.util*) [[ "$*" == *transformers* ]] && echo "$MISSING" ;;
    *) [ -f "$packages/fxc_kernels/int4_linear.py" ] || exit 9
       echo "ran $* tables: $(ls "$packages/fxc_kernels/cuda/tables" 2>/dev/null | tr '\n' ' ')"
       case "$*" in
           *gpu_checks*) echo "FAIL int8 toy: wrong"; [ -z "${SLOW:-}" ] || sleep 20; exit ${CHECKS_STATUS:-0} ;;
           *benchmarks.kernels*) [[ "$*" =~ --out\\ ([^ ]+) ]]; echo '{}' > "${BASH_REMATCH[1]}/nvidia-test.json" ;;
       esac ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(**environment: str) -> subprocess.CompletedProcess:
        given = {**os.environ, "PYTHON": str(stub), "OUT": str(out), "MISSING": "", **environment}
        script = REPO / "benchmarks" / "gpu.sh"
        done = subprocess.run(["bash", script], cwd=tmp_path, env=given, capture_output=True, text=True)
        if out.exists() and (out / "gpu.tar.gz").exists():
            assert {path.name for path in out.iterdir()} == {"gpu.tar.gz", "gpu.log"}, "few files, and all of it in them"
            with tarfile.open(out / "gpu.tar.gz") as archive:
                archive.extractall(run.found, filter="data")
        return done

    run.found = tmp_path / "found"
    return run


def test_the_script_runs_all_parts_and_hands_on_what_was_tuned(call):
    done = call()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done in") == 4
    logs = {path.stem: path.read_text() for path in call.found.glob("gpu-*.log")}
    assert set(logs) == {"gpu-checks", "gpu-kernels", "gpu-decode", "gpu-inductor", "gpu-summary"}
    assert "--tune" in logs["gpu-kernels"] and "tables: \n" in logs["gpu-kernels"]
    assert "--model qwen2.5-7b" in logs["gpu-decode"] and "nvidia-test.json" in logs["gpu-decode"]
    assert (call.found / "nvidia-test.json").exists() and "== summary" in logs["gpu-summary"]


def test_what_the_script_asks_for_is_what_the_bench_takes(call):
    """Shapes, schemes and options are parsed by the real ones, and what is wanted most comes first."""
    from benchmarks import kernels
    from benchmarks.decode import __main__ as decode
    from fxc.cli.bench_kernels import _check, parse_schemes
    from fxc.kernel_bench.shapes import parse_shapes

    call()
    said = (call.found / "gpu-kernels.log").read_text().split(" tables:")[0].split()
    given = dict(itertools.pairwise(said))
    schemes, shapes = parse_schemes(given["--scheme"]), parse_shapes(given["--shapes"])
    _check(schemes, shapes)
    assert (shapes[0].n, shapes[0].k) == (8192, 8192) and schemes[0] == "int4_g128" and len(shapes) == 6
    assert kernels.arguments(said[3:])[:2] == ["bench", "kernels"] and given["--m"] == "1,16,64,2048"
    options = decode.parse((call.found / "gpu-decode.log").read_text().split(" tables:")[0].split()[3:])
    assert options.batch == [1, 16] and options.passes == ["int4", "int8", "fp8"] and options.backend == ["eager"]


def test_the_script_fails_where_a_check_fails_and_still_runs_the_rest(call):
    done = call(CHECKS_STATUS="1")
    assert done.returncode == 1 and "checks: FAILED with status 1" in done.stdout
    assert done.stdout.count(": done in") == 3 and done.stdout.rstrip().endswith("FAIL int8 toy: wrong")


def test_the_script_ends_a_part_that_takes_too_long(call):
    done = call(SLOW="1", CHECKS="3")
    assert done.returncode == 1 and "checks: FAILED, not over after 3 s" in done.stdout
    assert "decode: done in" in done.stdout and "FAIL int8 toy" in (call.found / "gpu-checks.log").read_text()


def test_without_a_folder_of_its_own_results_are_plain_files():
    text = (REPO / "benchmarks" / "gpu.sh").read_text()
    assert "kept=${OUT:-benchmarks/results}" in text and "out=$kept" in text


def test_the_script_names_what_it_leaves_out(call):
    done = call(MISSING="transformers")
    assert done.returncode == 0 and "decode: left out, because python has no transformers" in done.stdout
    assert "checks: done in" in done.stdout and "kernels: done in" in done.stdout


def test_the_script_says_that_there_is_no_gpu(call):
    done = call(NO_GPU="1")
    assert done.returncode == 2 and "nothing was checked or measured: no nvidia-test" in done.stderr and not done.stdout


def test_the_script_is_over_in_eight_minutes(call):
    """What the parts may take, and what ending them takes; each gets what is left."""
    text = (REPO / "benchmarks" / "gpu.sh").read_text()
    total, checks, left = (int(re.search(rf"\$\{{{name}:-(\d+)\}}", text)[1]) for name in ("TOTAL", "CHECKS", "DECODE"))
    assert total + 5 <= 8 * 60 - 10 and total - checks - left >= 200
    done = call(TOTAL="300", CHECKS="50", DECODE="100", INDUCTOR="400")
    limits = [int(n) for n in re.findall(r"\(at most (\d+) s\)", done.stdout)]
    assert limits[0] == 50 and 195 <= limits[1] <= 200 and 290 <= limits[2] <= 300 and len(limits) == 3
    assert "inductor: left out, because" in done.stdout

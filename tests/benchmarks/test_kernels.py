"""benchmarks/kernels.py: the command, also without typer and rich."""

import json
import subprocess
import sys

import pytest
from repo import REPO
from toy_bench import quick_cpu

from benchmarks import kernels as benchmark


@pytest.mark.slow
def test_without_typer_and_rich_the_same_runs(tmp_path, capsys, monkeypatch):
    quick_cpu(monkeypatch)
    size = ["--shapes", "64,256", "--m", "1", "--rounds", "1", "--scheme", "fp8", "--device", "cpu"]
    assert benchmark.run_plainly([*size, "--out", str(tmp_path), "--json"]) == 0
    assert "fxc fp8" in {row["contender"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".csv", ".md"}
    code = "import sys\nsys.modules |= dict.fromkeys(('typer', 'rich', 'transformers', 'networkx', 'safetensors'))\n" \
           "import importlib.util as u\nfound = u.find_spec\n" \
           "u.find_spec = lambda name, *rest: None if name in ('typer', 'rich') else found(name, *rest)\n" \
           "import fxc.kernel_bench.cuda_platform\n" \
           "from benchmarks.kernels import main\nsys.exit(main(['--scheme', 'int7']))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "error[FXC-E2]: --scheme: there is no scheme 'int7'" in done.stderr, done.stderr


def test_the_benchmark_is_the_command_with_a_place_for_a_full_runs_results():
    results = str(REPO / "benchmarks" / "results")
    with_peers = ["bench", "kernels", "--peers", "benchmarks.kernel_peers"]
    assert benchmark.arguments(["--threads", "2"]) == [*with_peers, "--threads", "2", "--out", results]
    assert "--out" not in benchmark.arguments(["--m=1"]) and benchmark.arguments(["--out", "x"])[-1] == "x"

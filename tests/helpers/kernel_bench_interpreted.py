"""The GPU's part of `fxc bench kernels` on CPU tensors, in Triton's interpreter: kernel_bench_interpreted.py FOLDER.

A script, because the interpreter is chosen by TRITON_INTERPRET=1 before Triton is imported, and for the whole process. Time is
a fake: what is checked is that every contender of fxc gets its kernels' arguments right, and that what is not there has a
reason. Prints the rows as JSON and writes the table of configurations to FOLDER.
"""

import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import mma_emulation
import torch

from fxc.kernel_bench import cuda, limits, tune
from fxc.kernel_bench.clock import GraphClock, Telemetry
from fxc.kernel_bench.run import Sweep, run
from fxc.kernel_bench.shapes import Shape
from fxc.kernel_bench.weights import all_schemes
from fxc_kernels.cuda.dispatch import SCHEMES
from fxc_kernels.cuda.tile import Config

# The interpreter cuts float8 off where a chip rounds.
cuda.FP8 = 0.1


class FakeRunner:
    """Each call takes 10 microseconds, and none is made: every result was checked before."""

    def capture(self, calls):
        def replay():
            pass

        replay.calls = len(calls)
        return replay

    def microseconds(self, replay, repeats):
        return 10.0 * getattr(replay, "calls", 1) * repeats

    def telemetry(self, replay, repeats):
        return Telemetry(1980.0, 400.0, 50.0)


class FakePlatform:
    name = "nvidia-h200"
    device = torch.device("cpu")

    def __init__(self):
        self.clock = GraphClock(FakeRunner())

    def contenders(self, schemes):
        return cuda.contenders(schemes, 90)

    def copies(self, nbytes):
        return 2

    def free_memory(self):
        return 1 << 40


def few(scheme: str, m: int, capability: int) -> list[Config]:
    """One that works and one that the kernels refuse."""
    columns = int(scheme.rpartition("_g")[2]) if scheme.startswith("int4") else 64
    return [Config(None, 32, 32, columns, 4, 1, split=2), Config(None, 24, 32, 48, 4, 3)]


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    mma_emulation.install()
    platform = FakePlatform()
    shape, rows = Shape("tiny", 32, 128), (1, 70)
    schemes = tuple(scheme for scheme in all_schemes() if scheme in SCHEMES and scheme not in ("int4_g32", "int4_g64"))
    tuner = tune.Choices(platform, 90, schemes, candidates=few)
    peaks = (limits.datasheet("nvidia-h200"), None)
    result = run(Sweep((shape,), schemes, rows, rounds=2), platform, tuner=tuner, peaks=peaks)
    table = tune.table(result, platform.name, {"triton": "3.6.0"})
    (folder / "nvidia-h200.json").write_text(json.dumps(table))
    print(json.dumps({"rows": [asdict(row) for row in result.rows], "absent": result.absent, "failed": tuner.failed,
                      "telemetry": result.telemetry}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))

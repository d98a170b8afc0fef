"""A platform for `fxc bench kernels` with toy contenders and a clock that shows what it is told, and the CPU in little time."""

from functools import partial

import torch

from fxc.kernel_bench import clock, cpu_platform
from fxc.kernel_bench.contender import EXACT, Contender, of_function
from fxc.kernel_bench.run import Sweep
from fxc.kernel_bench.shapes import Shape

TINY = Shape("tiny", 64, 256)


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


def quick_cpu(patch) -> None:
    """Until `patch`, a pytest.MonkeyPatch, is undone the CPU is a platform with small caches, so that there are few copies of a
    weight (64 of each took a minute to build), short rounds, and peaks from small products."""
    patch.setattr(cpu_platform, "cache_bytes", lambda level: 1 << 15)
    patch.setattr(cpu_platform, "CpuClock", partial(clock.CpuClock, seconds=0.002, settle=0.0))
    patch.setattr(cpu_platform, "PEAK_SECONDS", 1.0)


def dense(name="dense", change=lambda out: out, **options) -> Contender:
    """The right product of a dense weight, or what `change` makes of it."""
    settings = {"scheme": "float32", "kind": "dense", "tolerance": EXACT, "dtype": torch.float32} | options

    def build(weight):
        numbers = weight.dense()
        return of_function(lambda x: change(torch.nn.functional.linear(x.float(), numbers)))

    return Contender(name, build=build, **settings)


def sweep(**options) -> Sweep:
    return Sweep(**{"shapes": (TINY,), "schemes": ("int8",), "rows": (3,), "rounds": 2} | options)

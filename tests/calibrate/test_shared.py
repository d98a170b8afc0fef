"""Two processes that share the samples learn what one learns."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from repo import REPO

SCRIPT = textwrap.dedent("""
    import sys, torch
    torch.set_num_threads(1)
    import fxc
    from fxc import ranks
    from fxc.calibrate.hessian import Hessian, Squares
    from fxc.calibrate.ranges import Range
    ranks.join()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32)).eval()
    samples = [torch.randn(3 + at, 64) * (1 + at) for at in range(7)]
    statistics = {}
    both = lambda width: Hessian(width, cross=True)
    for name, make in {"hessian": Hessian, "both": both, "squares": Squares, "range": Range}.items():
        made = make(64)
        for each in ranks.share(samples):
            made.add(each, each + 1) if name == "both" else made.add(each)
        if ranks.count() > 1:
            made.meet()
        statistics[name] = vars(made)
    passes = ["int4:group=32:algorithm=gptq", "int8:mode=static", "sparse24:criterion=wanda"]
    learned = {}
    for each in passes:
        made = fxc.optimize(net, (samples[0],), passes=each, calib=[(x,) for x in samples], budget=9.0, layer_budget=9.0)
        learned[each] = str(made.program), made.program.constants, made.report["passes"][-1]["notes"]
    torch.save({"processes": ranks.count(), "statistics": statistics, "learned": learned}, f"{sys.argv[1]}-{ranks.number()}.pt")
""")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and what each of two."""
    folder = tmp_path_factory.mktemp("shared")
    script = folder / "learn.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(REPO)])}
    for launcher, name in (([], "one"), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "two")):
        command = [sys.executable, *launcher, str(script), str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{name}.pt") for name in ("one-0", "two-0", "two-1")]


def test_statistics_are_of_all_samples(found):
    one, *two = found
    assert [each["processes"] for each in found] == [1, 2, 2]
    for each in two:
        for name, statistic in one["statistics"].items():
            for field, value in statistic.items():
                torch.testing.assert_close(each["statistics"][name][field], value, rtol=1e-4, atol=1e-5, msg=f"{name}.{field}")


def test_both_learn_the_same_and_what_one_learns(found):
    one, *two = found
    for passes, (text, constants, _) in one["learned"].items():
        mine, theirs = (each["learned"][passes] for each in two)
        assert mine[0] == theirs[0] and all(torch.equal(tensor, theirs[1][name]) for name, tensor in mine[1].items())
        assert mine[1].keys() == constants.keys() and len(mine[0].splitlines()) == len(text.splitlines())
        for name, tensor in constants.items():
            # Sums in another order round some numbers the other way.
            differ = (mine[1][name].float() - tensor.float()).abs() > 1e-4 * tensor.float().abs().max()
            assert differ.float().mean() < 0.05, name

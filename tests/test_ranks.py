"""Two processes give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from repo import REPO

# Trains a network with batches of 6, so that shares are not equal, and with a batch of one sample, of which one has none.
SCRIPT = textwrap.dedent("""
    import sys, torch
    from torch import nn
    from fxc import ranks
    from fxc.train.loop import Pieces, train
    from fxc.train.plan import Plan
    ranks.join()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    unused = nn.Parameter(torch.ones(3, 3))
    x, aim = torch.randn(40, 5), torch.randn(40, 2)
    def loss(row):
        return (net(x[row]) - aim[row]).square().mean()
    def lost(batch):
        rows = list(range(6 * (batch % 5), 6 * (batch % 5) + 6)) if batch % 4 else [batch % 30]
        for row in ranks.share(rows):
            yield loss(row) / len(rows)
    @torch.no_grad()
    def judged():
        return ranks.added(sum(float(loss(row)) for row in ranks.share(range(30, 40)))) / 10
    parameters = dict(net.named_parameters()) | {"unused": unused}
    fit = train(parameters, Pieces(lost, judged), Plan(steps=30, rate=0.01, looks=5))
    if ranks.is_first():
        torch.save({"net": net.state_dict(), "unused": unused.data, "processes": ranks.count(),
                    "curve": [(p.loss, p.held_out) for p in fit.curve]}, sys.argv[1])
""")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one.pt")])
    exec(compile(SCRIPT, str(script), "exec", dont_inherit=True), {"__name__": "__main__"})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(script), str(tmp_path / "two.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert torch.equal(two["unused"], torch.ones(3, 3)) and torch.equal(one["unused"], two["unused"])
    for name, tensor in one["net"].items():
        torch.testing.assert_close(tensor, two["net"][name], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(one["curve"], two["curve"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

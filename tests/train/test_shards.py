"""Processes that hold a part of the weights each train what one process trains that holds them all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from repo import REPO

import fxc
from fxc.errors import UsageError
from fxc.passes.base import parse_passes

# Batches of three, so that one of two processes has more samples than the other, and seven that judge.
SCRIPT = textwrap.dedent("""
    import sys
    import torch
    from families import build
    import fxc
    from fxc import ranks
    from fxc.train import loop, shards
    shards.LEAST = 64
    spec, out = sys.argv[1:]
    held = []
    step = loop._Loop._step
    def watched(self, done):
        step(self, done)
        held.append(sum(each.numel() for each in self.parameters))
    loop._Loop._step = watched
    model, example = build("qwen2")
    ids = torch.randint(0, 99, (40, 12), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)} for row in ids]
    made = fxc.optimize(model, example, passes=spec, calib=data, train=data, verify=False)
    if ranks.is_first():
        torch.save({"constants": made.program.constants, "held": held[0], "steps": len(held)}, out)
""")
STEPS = "method=all:optimizer=adamw:steps=5:batch=3:precision=float32"
PLAIN = f"prune:heads=0.5:ffn=0.5,recover:{STEPS}:rate=0.01"


@pytest.mark.slow
@pytest.mark.parametrize("passes", [PLAIN, f"{PLAIN}:checkpointing=true", f"int4:group=32,recover:{STEPS}:loss=kl+features"])
def test_two_processes_train_what_one_trains(tmp_path, passes):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    paths = [str(REPO), str(REPO / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for launch, spec, name in (([sys.executable], passes, "one"), (launcher, f"{passes}:shard=true", "two")):
        command = [*launch, str(script), spec, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert two["steps"] == one["steps"] == 5 and two["held"] < 0.6 * one["held"]
    for fqn, tensor in one["constants"].items():
        gap = (tensor.float() - two["constants"][fqn].float()).abs().max()
        # Gradients are added up in another order, which may move a number across half a level.
        assert gap <= (1 if tensor.dtype == torch.int8 else 1e-4 * tensor.float().abs().max() + 1e-6), fqn


def test_weights_are_not_divided_where_there_is_one_process():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).eval()
    data = [torch.randn(1, 64) for _ in range(10)]
    with pytest.raises(UsageError, match="there is one"):
        fxc.optimize(model, (data[0],), passes="int8,recover:shard=true:steps=2", calib=data)


@pytest.mark.parametrize("other", ["lora=4", "sparsity=0.5", "layer_drop=0.1", "precision=float16"])
def test_what_needs_the_whole_weight_goes_without(other):
    with pytest.raises(UsageError, match="shard goes without"):
        parse_passes(f"recover:shard=true:{other}")

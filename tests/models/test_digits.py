"""The digits models of examples/ in static int8, convolutions and all."""

from __future__ import annotations

import sys

import pytest
import torch
from repo import REPO

import fxc
from fxc.schemes import int8

sys.path.insert(0, str(REPO))
from examples import digits

CONVOLUTIONS = {"resnet": 10, "vit": 1}


@pytest.mark.parametrize("name", digits.MODELS)
def test_static_int8_loses_half_a_point_at_most(name, tmp_path):
    model, example = getattr(digits, name)()
    before = digits.accuracy(model)
    assert before > 0.97
    compiled = fxc.optimize(model, example, "int8:mode=static", calib=digits.calibration())
    packed = [node for node in compiled.program.graph.nodes if node.target in (int8.STATIC, int8.STATIC_CONV2D)]
    assert sum(node.target is int8.STATIC_CONV2D for node in packed) == CONVOLUTIONS[name]
    assert torch.ops.aten.batch_norm.default not in {node.target for node in compiled.program.graph.nodes}
    # The ten outputs alone are too few.
    refused = [each for each in compiled.report["passes"][-1]["refusals"] if each["bytes"] > 4000]
    assert [each["fqn"] for each in refused] in ([], ["position"])
    compiled.save(tmp_path / "out")
    loaded = fxc.load(tmp_path / "out")
    meant = digits.accuracy(lambda x: loaded.program.module()(x)[0])
    lowered = digits.accuracy(loaded)
    assert min(meant, lowered) >= before - 0.005

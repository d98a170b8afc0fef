"""python -m benchmarks.rotations: which layers it rounds, and what it says of them."""

import pytest
import torch

from benchmarks import rotations
from fxc.calibrate.grid import nearest
from fxc.calibrate.levels import Levels


@pytest.mark.slow
def test_layers_are_rounded_and_the_head_is_not():
    rotated = rotations.prepare("rotate:of=stream", torch.randint(0, 4096, (2, 16)))
    assert len(rotated.layers) == 5 * 7 and not any("head" in name for name in rotated.layers)
    assert all(hessian.rows == 32 for hessian in rotated.hessians.values())
    levels = Levels(2, -1)
    made, error = rotated.rounded(levels, "nearest")
    before, after = rotated.model.program.constants, made.program.constants
    for name in before:
        expected = nearest(before[name], levels).dense() if name in rotated.layers else before[name]
        assert torch.equal(after[name], expected), name
    assert error > rotated.rounded(levels, "gptq")[1] > 0


def test_the_table_has_what_was_measured():
    hardware = {"cpu": "a CPU", "cores": 2}
    seen = {"change": 0.0123, "spread": 0.001, "error": 0.0045, "seconds": 1.0}
    report = {"hardware": hardware, "versions": {"torch": "2"}, "threads": 1, "load_before": 0.1, "windows": 100}
    found = {"as it is": {"4 bits, a row, gptq": seen}, "rotate": {}}
    text = rotations.markdown(report | {"found": found})
    assert "25,600 held-out tokens" in text
    assert "| 4 bits, a row | gptq | +1.23 % ±0.10 (4.5e-03) | - |" in text

"""benchmarks/budgets.py: budgets by seed, and what is found within them against what was made by hand."""

import pytest
import torch
from choosable import Small

from benchmarks.budgets import HIGH, LOW, compared, drawn, markdown
from fxc.captured import capture_source
from fxc.measure.quality import evaluation_of
from fxc.options import Options
from fxc.selection.formats import parse_formats


def test_budgets_are_drawn_by_seed():
    some = drawn(10, 0)
    assert some == drawn(10, 0) == sorted(some) and some != drawn(10, 1)
    assert len(set(some)) > 5 and LOW <= min(some) < max(some) <= HIGH


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(64, (4, 12), generator=generator) for _ in range(4)]
    options = Options("", calib=data, verify=False)
    captured = capture_source(Small().eval(), (data[0],), options)
    formats = parse_formats("int8:mode=weight_only;int4:group=32")
    hand = ["int8:mode=weight_only", "int4:group=32"]
    return compared(captured, options, evaluation_of(captured, data[2:]), formats, hand, [0.35, 0.6], 3)


def test_each_budget_stands_beside_the_best_by_hand_that_fits(found):
    tight, wide = found["budgets"]
    assert tight["by_hand"] is None or tight["by_hand"]["disk_bytes"] <= 0.35 * found["original_bytes"]
    assert wide["found"]["disk_bytes"] <= 0.6 * found["original_bytes"]
    assert wide["by_hand"]["name"] in {each["name"] for each in found["by_hand"]}
    assert wide["is_worse"] == (wide["found"]["loss"] > wide["by_hand"]["loss"])
    assert found["worse"] == [row["budget"] for row in found["budgets"] if row["is_worse"]]
    assert "| size=0.6x |" in markdown(found)

"""Where a pass finds nothing, what would is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import UsageError


@pytest.mark.parametrize(
    ("model", "shape", "passes", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (2, 3, 8, 8), "int8",
         ["prune:channels=0.25 (there are 8 channels that can go)", "--dtype bfloat16"]),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).bfloat16(), (2, 3, 8, 8), "prune:channels=0.5,int8",
         ["try: leave it out; --allow-noop"]),
        (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), (2, 8), "int8", ["prune:ffn=0.25 (there are 12 FFN"]),
        (nn.Linear(8, 4), (2, 8), "int8", ["try: what would find something: --dtype bfloat16"]),
    ],
    ids=["cnn", "pruned_cnn", "classifier", "one_layer"],
)  # fmt: skip
def test_where_a_pass_finds_nothing_others_that_would_are_named(model, shape, passes, said):
    example = torch.randn(shape, dtype=next(model.parameters()).dtype)
    with pytest.raises(UsageError, match="changed nothing") as caught:
        fxc.optimize(model, (example,), passes, budget=9.0, layer_budget=9.0)
    for each in said:
        assert each in str(caught.value)
    if "prune" in str(caught.value.hint):
        spec = caught.value.hint.split(": ", 1)[1].split(" ")[0]
        assert fxc.optimize(model, (example,), spec, budget=9.0, layer_budget=9.0).report["passes"][1]["changed"] > 0

"""Branches that add nothing."""

from __future__ import annotations

import pytest
import torch
from removal import Attention, removed_from
from zeroed import TOKENS, mlp


@pytest.mark.parametrize("bias", ["none", "zero", "some"])
def test_a_branch_that_adds_nothing_is_gone(bias):
    model = Attention(bias=bias != "none")
    with torch.no_grad():
        model.o.weight.zero_()
        if bias == "zero":
            model.o.bias.zero_()
    after, _ = removed_from(model, torch.randn(TOKENS))
    targets = {n.target for n in after.graph.nodes if n.op == "call_function"}
    assert torch.ops.aten.scaled_dot_product_attention.default not in targets
    assert after.numel() == (10 if bias == "some" else 0), "a bias that is left is a constant that is added"


@pytest.mark.fault(17)
def test_a_branch_whose_weights_are_all_zero():
    model = mlp()
    with torch.no_grad():
        model.up.weight.zero_()
    after, _ = removed_from(model, torch.randn(3, 6))
    assert after.numel() == 6 and not after.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)

"""Edits of a graph."""

from __future__ import annotations

import pytest
import torch
from families import Mlp

import fxc
from fxc.ir.edit import call


def test_edits_keep_types():
    program = fxc.capture(Mlp(), (torch.randn(2, 40),))
    node = program.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)[0]
    with pytest.raises(TypeError, match="cannot replace"):
        call(program, torch.ops.aten.sum.dim_IntList, (node.args[0], [1]), replacing=node, by="test")

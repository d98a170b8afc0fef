"""A pass that is no part of fxc: gelu by its tanh approximation. Installed, or imported before, it is one of `--passes`.

    pip install examples/tanh_gelu
    fxc compile examples.digits:vit --passes tanh_gelu,int8
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import fxc
from fxc.ir.edit import call, sweep
from fxc.passes.base import Context, Result

GELU = torch.ops.aten.gelu.default


@dataclass(frozen=True)
class TanhGelu(fxc.Pass):
    """gelu(x) -> gelu(x, approximate="tanh"), the form that some accelerators have."""

    name: ClassVar[str] = "tanh_gelu"
    is_policy: ClassVar[bool] = True
    """It changes what the program computes, within the limits that the gates measure."""
    limits: ClassVar[tuple[float, float]] = (0.01, 0.01)
    shrinks: ClassVar[bool] = False

    def run(self, program: fxc.Program, context: Context) -> Result:
        nodes = [node for node in program.graph.find_nodes(op="call_function", target=GELU) if not node.kwargs]
        for node in nodes:
            call(program, GELU, node.args, kwargs={"approximate": "tanh"}, replacing=node, by=self.name)
        sweep(program)
        return Result(changed=len(nodes))

"""Lowering for CUDA: fxc::int8_linear by fxc's Triton kernels.

Never run on a GPU so far. What is known without one: the kernels' numbers in Triton's interpreter, what they compile to, and
that the rewritten graph computes the same on a CPU, where the operator below is its reference. The other operators of
compressed layers still run by their own definition.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxc.ir.program import Program
from fxc.lower.cpu import LayerChoice
from fxc_kernels.int8_linear import INT32_COLUMNS, int8_linear_reference

_INT8 = torch.ops.fxc.int8_linear.default


@torch.library.custom_op("fxc_cuda::int8_linear", mutates_args=())
def int8_linear(x: Tensor, qweight: Tensor, scale: Tensor, column_sum: Tensor, bias: Tensor | None) -> Tensor:
    """fxc::int8_linear with the sums of qweight's rows, int32 [N], which its kernel would otherwise add up in each call."""
    if not x.is_cuda:
        return int8_linear_reference(x, qweight, scale, bias)
    from fxc_kernels import triton_scaled_mm  # imports Triton, which not every platform has

    return triton_scaled_mm.int8_linear(x, qweight, scale, bias, column_sum=column_sum)


@int8_linear.register_fake
def _(x: Tensor, qweight: Tensor, scale: Tensor, column_sum: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def lower_cuda(program: Program, device: torch.device | str) -> tuple[fx.GraphModule, list[LayerChoice]]:
    """A module (flat tensors in, flat tuple out) that runs `program` on `device`, and what was chosen for each int8 layer."""
    module = program.module(device)
    constants = dict(module.named_buffers()) | dict(module.named_parameters())
    choices = []
    for index, node in enumerate(module.graph.find_nodes(op="call_function", target=_INT8)):
        x, packed, scale, bias = (*node.args, None)[:4]
        if packed.op != "get_attr":
            continue
        qweight = constants[packed.target]
        rows, columns = qweight.shape
        fqn = packed.target.removeprefix("constants.").rpartition(".")[0]
        if not 0 < columns <= INT32_COLUMNS:
            choices.append(LayerChoice(fqn, "unchanged", f"a row of {columns} does not fit the kernel", rows, columns))
            continue
        name = f"column_sums_{index}"
        module.register_buffer(name, qweight.sum(dim=1, dtype=torch.int32))
        with module.graph.inserting_before(node):
            sums = module.graph.get_attr(name)
        node.target = torch.ops.fxc_cuda.int8_linear.default
        node.args = (x, packed, scale, sums, bias)
        choices.append(LayerChoice(fqn, "triton int8", "the kernel of fxc::int8_linear", rows, columns))
    module.recompile()
    return module, choices

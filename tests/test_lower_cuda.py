"""Lowering for CUDA, as far as a machine without a GPU can tell: the rewritten graph, run on a CPU."""

import torch
from torch import fx

from fxc.ir import Input, Program, Signature
from fxc.lower.cuda import lower_cuda
from fxc.schemes.int8 import quantize_weight


def program_with(columns: int) -> Program:
    """Two int8 layers that read one weight, one with a bias, and their sum."""
    qweight, scale = quantize_weight(torch.randn(6, columns))
    constants = {"layer.qweight": qweight, "layer.scale": scale, "layer.bias": torch.randn(6)}
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight, scales, bias = (graph.get_attr(name) for name in constants)
    linear = torch.ops.fxc.int8_linear.default
    both = [graph.call_function(linear, (x, weight, scales, each)) for each in (bias, None)]
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, tuple(both)),))
    return Program(graph, constants, {}, Signature([Input("x")], [], None, None))


def test_int8_layers_become_calls_of_the_kernel():
    program, x = program_with(9), torch.randn(3, 9)
    module, choices = lower_cuda(program, "cpu")
    calls = module.graph.find_nodes(op="call_function", target=torch.ops.fxc_cuda.int8_linear.default)
    assert len(calls) == 2 and not module.graph.find_nodes(op="call_function", target=torch.ops.fxc.int8_linear.default)
    sums = getattr(module, calls[0].args[3].target)
    assert sums.dtype == torch.int32 and torch.equal(sums, program.constants["layer.qweight"].int().sum(1).int())
    torch.testing.assert_close(module(x)[0], program.module()(x)[0])
    assert [(each.fqn, each.op) for each in choices] == [("layer", "triton int8")] * 2


def test_a_row_that_the_kernel_cannot_sum_stays():
    module, choices = lower_cuda(program_with(0), "cpu")
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.fxc.int8_linear.default)) == 2
    assert {each.op for each in choices} == {"unchanged"}
    assert module(torch.randn(3, 0))[0].shape == (3, 6)


def test_opcheck():
    qweight, scale = quantize_weight(torch.randn(6, 9))
    arguments = (torch.randn(2, 3, 9), qweight, scale, qweight.sum(1, dtype=torch.int32), None)
    torch.library.opcheck(torch.ops.fxc_cuda.int8_linear.default, arguments)

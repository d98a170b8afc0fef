"""Programs with int8 layers, made without the compiler, and clocks on which int8 wins."""

import torch
from torch import fx, nn

from fxc.ir import Input, Program, Signature, edit
from fxc.ir.infer import fake_constant, fake_mode_of
from fxc.schemes.int8 import quantize_weight


def program_of(model: nn.Module, x: torch.Tensor, op: str = "int8_linear", skip: tuple[str, ...] = ()) -> Program:
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        exported = torch.export.export(
            model.eval(), (x,), dynamic_shapes=((auto, auto, torch.export.Dim.STATIC),), strict=False
        )
    source = exported.module(check_guards=False)
    graph, constants, env = fx.Graph(), {}, {}
    for node in source.graph.nodes:
        if node.op == "get_attr":
            constants[node.target] = model.get_parameter(node.target).detach()
            env[node] = graph.get_attr(node.target)
        elif node.op == "output":
            graph.output(tuple(env[n] for n in torch.utils._pytree.tree_leaves(node.args[0])))
        elif node.target is torch.ops.aten.linear.default and node.args[1].target.split(".")[0] not in skip:
            name = node.args[1].target.removesuffix(".weight")
            constants[f"{name}.qweight"], constants[f"{name}.scale"] = quantize_weight(constants[f"{name}.weight"])
            attributes = [graph.get_attr(f"{name}.{kind}") for kind in ("qweight", "scale")]
            bias = env[node.args[2]] if len(node.args) > 2 else None
            target = getattr(torch.ops.fxc, op).default
            env[node] = graph.call_function(target, (env[node.args[0]], *attributes, bias))
        elif node.op != "call_module":
            env[node] = graph.node_copy(node, lambda n: env[n])
        if node in env:
            env[node].meta = dict(node.meta)
    for node in graph.find_nodes(op="get_attr"):
        node.meta["val"] = fake_constant(fake_mode_of(graph), constants[node.target])
    outputs = [f"out{i}" for i in range(len(graph.output_node().args[0]))]
    program = Program(graph, constants, {}, Signature([Input("x")], outputs, None, None))
    edit.sweep(program)
    return program


def timing(as_int8, as_float=1.0):
    return lambda *size: {rows: (as_int8, as_float) for rows in (1, 16, 128)}


int8_wins = timing(0.1)

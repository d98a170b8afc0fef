"""Layers whose activations have a scale from data, on a CPU: convolutions as oneDNN runs them, and chains that stay int8.

A layer's result that only such layers read is written as their levels (uint8), through activations, pools and reshapes, which
do the same to levels as to numbers. A residual sum moves into the convolution before it. What the sum adds is read as levels
where there are some, so that a block of a residual network never leaves int8; that rounds it once more than the program says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from fxc.ir import edit
from fxc.ir.call import Call
from fxc.ir.names import layer_of
from fxc.ir.program import Program
from fxc.lower.candidates import SATURATE, within_reach
from fxc.lower.fusion import activation_after
from fxc.lower.siblings import LayerChoice, module_name
from fxc.schemes import int8
from fxc_kernels.cpu import int8_static, ops

aten = torch.ops.aten
Key = tuple[float, int]
"""Scale and zero point of levels."""

STATIC = (ops.STATIC_LINEAR, ops.STATIC_CONV2D)
_DTYPES = (torch.float32, torch.bfloat16)
# What moves numbers and leaves them as they are.
_MOVES = {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.contiguous.default, aten.clone.default,
}  # fmt: skip


def lower_convolutions(program: Program, packed: bool) -> list[LayerChoice]:
    """Static convolutions become oneDNN's, with the activation behind them; where those are not exact, or of a dtype that they
    have not, float ones over the same weights. packed: weights as oneDNN has them, or as they are stored, for Inductor."""
    report = []
    for node in program.graph.find_nodes(op="call_function", target=int8.STATIC_CONV2D):
        call = Call(node)
        qweight, scale = program.constants[call["qweight"].target], program.constants[call["scale"].target]
        layer, dtype = layer_of(node, call["qweight"].target), node.meta["val"].dtype
        name, size = module_name(program, layer), (qweight.shape[0], qweight[0].numel())
        if reason := _why_not(node):
            dense = (qweight.float() * scale[:, None, None, None]).to(dtype)
            weight = edit.constant(program, f"{name}.weight", dense, node)
            bias = call["bias"]
            if bias is not None and bias.meta["val"].dtype != dtype:
                bias = edit.insert(program, aten.to.dtype, (bias, dtype), before=node, by="lower", fqn=layer)
            how = tuple(call[each] for each in ("stride", "padding", "dilation", "groups"))
            x = within_reach(program, call["x"], call["x_scale"], call["x_zero"], node)
            edit.call(program, aten.conv2d.default, (x, weight, bias, *how), replacing=node, by="lower")
            report.append(LayerChoice(layer, "dequantized", f"dequantized: {reason}", *size))
            continue
        how = tuple(list(call[each]) * (2 // len(call[each])) for each in ("stride", "padding", "dilation"))
        given = (call["x_scale"], call["x_zero"])
        made = int8_static.pack_conv2d(qweight, scale, *given, *how, call["groups"]) if packed else qweight
        activation, last = activation_after(node, int8_static.POST_OPS)
        constants = {"weight": made, "scale": scale, "zero_point": torch.zeros(len(scale), dtype=torch.int32)}
        if call["bias"] is not None and call["bias"].op == "get_attr":
            constants["bias"] = program.constants[call["bias"].target].float()
        reads = [edit.constant(program, f"{name}.{part}", tensor, node) for part, tensor in constants.items()]
        if len(reads) == 3:
            reads.append(call["bias"])
        args = (call["x"], *reads, list(qweight.shape[2:]), *how, call["groups"], *given, dtype, activation)
        out = edit.insert(program, ops.STATIC_CONV2D, args, before=node, by="lower", fqn=layer)
        edit.replace(last, out)
        report.append(LayerChoice(layer, "int8", "a scale from data", *size))
    edit.sweep(program)
    return report


def _why_not(node: fx.Node) -> str | None:
    if not int8_static.conv2d_is_exact():
        return SATURATE
    dtype = node.meta["val"].dtype
    return None if dtype in _DTYPES else f"no int8 convolution takes {dtype} to {dtype} on a CPU"


def chain(program: Program, report: list[LayerChoice]) -> list[LayerChoice]:
    """Residual sums move into convolutions, and results that only static layers read are written as their levels. Returns
    `report` with that said."""
    for node in program.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        _sum_in_convolution(program, node)
    edit.sweep(program)
    rounded: dict[tuple[fx.Node, Key], fx.Node] = {}
    kept = {node.meta["fqn"] for node in list(program.graph.nodes) if node.target in STATIC and _stay(program, node, rounded)}
    edit.sweep(program)
    for value in list(program.graph.nodes):
        for key, readers in _readers(value).items():
            if len(readers) > 1 or (value, key) in rounded or _product(program, value):
                levels = _rounded(program, value, key, rounded)
                for reader in readers:
                    Call(reader).set("x", levels)
    edit.sweep(program)
    said = "; its result stays int8"
    return [dataclasses.replace(each, reason=each.reason + said) if each.fqn in kept else each for each in report]


def _sum_in_convolution(program: Program, node: fx.Node) -> None:
    first, second = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return
    kinds = {edit.type_of(each.meta["val"]) for each in (first, second, node)}
    pairs = [(a, b) for a, b in ((first, second), (second, first)) if _takes_sum(a, node) and a is not b]
    if len(kinds) > 1 or not pairs:
        return
    convolution, other = max(pairs, key=lambda pair: bool(_readers(pair[1])))
    name, last = activation_after(node, int8_static.POST_OPS)
    if name.startswith("gelu"):
        name, last = "none", node
    made = _changed(program, convolution, last, activation=name, other=other)
    edit.replace(last, made)


def _takes_sum(node: fx.Node, sum_: fx.Node) -> bool:
    if node.target is not ops.STATIC_CONV2D or list(node.users) != [sum_]:
        return False
    return Call(node)["activation"] == "none" and Call(node)["other"] is None


def _stay(program: Program, node: fx.Node, rounded: dict[tuple[fx.Node, Key], fx.Node]) -> bool:
    """Write the result of a static layer as the levels that all its readers take, if they do."""
    keys = set(_keys(node))
    if len(keys) != 1 or (key := keys.pop()) is None:
        return False
    changes = {"y_scale": key[0], "y_zero": key[1]}
    other = Call(node).get("other")
    if other is not None and other.meta["val"].dtype != torch.uint8:
        found = [each for each in _readers(other) if each is not None]
        known = [each for value, each in rounded if value is other]
        if not (found or known):
            return False
        chosen = (known or found)[0]
        changes |= {"other": _rounded(program, other, chosen, rounded), "other_scale": chosen[0], "other_zero": chosen[1]}
    _pass_on(program, node, _changed(program, node, node, **changes), key)
    return True


def _keys(value: fx.Node) -> Iterator[Key | None]:
    """The levels that the readers of `value` take, moves and the like apart; None for one that takes numbers. A residual sum
    takes any, and says nothing."""
    for user in value.users:
        if user.target in STATIC and user.args[0] is value and Call(user).get("other") is not value:
            yield _key(user)
        elif user.target is ops.STATIC_CONV2D and Call(user)["other"] is value and user.args[0] is not value:
            continue
        elif _works_on_levels(user, value):
            yield from _keys(user)
        else:
            yield None


def _works_on_levels(user: fx.Node, value: fx.Node) -> bool:
    if user.target in (aten.relu.default, aten.max_pool2d.default):
        return True
    if user.target is aten.pad.default:
        return Call(user)["mode"] == "constant" and not Call(user)["value"]
    return user.target in _MOVES and user.args[0] is value


def _pass_on(program: Program, value: fx.Node, levels: fx.Node, key: Key) -> None:
    """Let the readers of `value` read its `levels`."""
    for user in list(value.users):
        if user.target in STATIC:
            call = Call(user)
            if user.args[0] is value:
                call.set("x", levels)
                if call.get("dense") is not None:
                    call.set("dense", None)
                    call.set("limit", 0)
            else:
                for name, argument in (("other", levels), ("other_scale", key[0]), ("other_zero", key[1])):
                    call.set(name, argument)
            continue
        if user.target is aten.relu.default:
            made = _insert(program, aten.clamp_min.default, (levels, key[1]), user) if key[1] else levels
        elif user.target is aten.max_pool2d.default:
            call = Call(user)
            how = [call[each] for each in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")]
            made = _insert(program, ops.MAX_POOL2D, (levels, *how), user)
        elif user.target is aten.pad.default:
            pads = user.args[1]
            made = _insert(program, user.target, (levels, pads, "constant", float(key[1])), user) if any(pads) else levels
        else:
            made = _insert(program, user.target, (levels, *user.args[1:]), user, user.kwargs)
        _pass_on(program, user, made, key)


def _readers(value: fx.Node) -> dict[Key, list[fx.Node]]:
    """The static layers that read the numbers `value` as levels, by which."""
    if value.op == "get_attr" or not isinstance(value.meta.get("val"), torch.Tensor) or value.meta["val"].dtype == torch.uint8:
        return {}
    found: dict[Key, list[fx.Node]] = {}
    for user in value.users:
        if user.target in STATIC and user.args[0] is value and Call(user).get("dense") is None:
            found.setdefault(_key(user), []).append(user)
    return found


def _rounded(program: Program, value: fx.Node, key: Key, rounded: dict[tuple[fx.Node, Key], fx.Node]) -> fx.Node:
    if (value, key) not in rounded:
        after = value.next
        while after.op == "placeholder":
            after = after.next
        rounded[value, key] = _insert(program, ops.TO_LEVELS, (value, *key), after)
        _take_product(program, rounded[value, key])
    return rounded[value, key]


def _take_product(program: Program, levels: fx.Node) -> None:
    """Rounding multiplies by 1 / scale: where what it rounds was multiplied by a vector, it multiplies by both at once."""
    if found := _product(program, levels.args[0]):
        x, vector = found
        scale, zero = levels.args[1:]
        name = f"{module_name(program, levels.meta['fqn'])}.factor"
        factor = edit.constant(program, name, program.constants[vector.target].float() / scale, levels)
        levels.args = (x, scale, zero, factor)


def _product(program: Program, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, vector) of a value that is x times a vector of constants along its last dimension."""
    if value.target is not aten.mul.Tensor or value.meta["val"].dtype not in _DTYPES:
        return None
    for x, vector in (value.args, value.args[::-1]):
        if isinstance(x, fx.Node) and isinstance(vector, fx.Node) and vector.op == "get_attr":
            is_vector = program.constants[vector.target].ndim == 1
            if is_vector and edit.type_of(x.meta["val"]) == edit.type_of(value.meta["val"]):
                return x, vector
    return None


def _key(reader: fx.Node) -> Key:
    return Call(reader)["x_scale"], Call(reader)["x_zero"]


def _changed(program: Program, node: fx.Node, before: fx.Node, **changes: object) -> fx.Node:
    """The call of `node` with other arguments, before the node `before`."""
    arguments = {argument.name: Call(node)[argument.name] for argument in node.target._schema.arguments} | changes
    made = edit.insert(program, node.target, tuple(arguments.values()), before=before, by="lower", fqn=node.meta["fqn"])
    return made


def _insert(program: Program, target: object, args: tuple, before: fx.Node, kwargs: dict | None = None) -> fx.Node:
    return edit.insert(program, target, args, before=before, by="lower", fqn=before.meta.get("fqn", ""), kwargs=kwargs)

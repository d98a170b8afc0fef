"""The one textual form of a program. `parse_program(print_program(p))` gives `p` back, without its constants' values.

    fxc program 1
    metadata {"class": "Net", "kind": "module"}
    call {"args": [0], "kwargs": {}}
    result 0
    symbol s0 = 2
    constant @up.weight: f32[128, 64]
    alias @down.weight = @up.weight
    %0: f32[s0, 64] = input "x"
    %1: f32[s0, 128] = aten.linear(%0, @up.weight)  # up
    return "out" %1

One value a line, numbered in order. A symbol is a size that is known only when the program runs, printed with the
example value at which it was captured; u0, u1, ... are sizes that depend on the values of a tensor and have none. A
comment holds the module that a value came from and, in parentheses, the pass that made it. Parsing infers every type again
and compares it with the one written, so that a changed text is found, and it resolves operators through `fxc.ir.targets`
alone, so that a text cannot make it execute anything.
"""

from __future__ import annotations

import json
import re
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from fxc.errors import UsageError
from fxc.ir.names import layer_at
from fxc.ir.program import Program
from fxc.ir.targets import name_of

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LAYOUTS = {"strided": torch.strided}
FORMATS = {
    "contiguous": torch.contiguous_format, "preserve": torch.preserve_format, "channels_last": torch.channels_last,
}  # fmt: skip
_FORMAT_NAMES = {f: name for name, f in FORMATS.items()}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")
# Of an excerpt: so many lines on either side, none longer.
_AROUND, _LONGEST = 2, 240


def print_program(program: Program) -> str:
    """The text of `program`."""
    return "\n".join(line for _, line in Printer(program).lines()) + "\n"


def excerpt(program: Program, at: fx.Node | str) -> list[str]:
    """The line of a node, a constant or the first call of a layer, marked, with up to two lines before and after, long ones
    cut; [] where there is no such line. A program that has no text, because something is wrong with it, is shown as torch.fx
    prints it."""
    try:
        lines = [(of, line) for of, line in Printer(program).lines() if of is not None]
    except Exception:  # whatever is wrong with it is being told of already
        lines = [(node, str(node.format_node())) for node in program.graph.nodes]
    if isinstance(at, str) and at not in program.constants and at not in program.aliases:
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        at = next((node for node in calls if layer_at(program, node) == at), at)
    place = next((i for i, (of, _) in enumerate(lines) if _named(of) == _named(at)), None)
    if place is None:
        return []
    first = max(0, place - _AROUND)
    near = [line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..." for _, line in lines[first : place + _AROUND + 1]]
    return [f"{'>' if first + i == place else ' '} {line}" for i, line in enumerate(near)]


def _named(of: fx.Node | str) -> fx.Node | str:
    """The name of the constant that a node reads, if it does that."""
    return of.target if isinstance(of, fx.Node) and of.op == "get_attr" else of


class Printer:
    def __init__(self, program: Program):
        self.program = program
        self.names: dict[fx.Node, str] = {}
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}

    def lines(self) -> list[tuple[fx.Node | str | None, str]]:
        """Each line, and the node, or the name of the constant or alias, that it is of, if it is of one."""
        program = self.program
        body = [(node, self.line(node)) for node in self.number()]
        signature = program.signature
        results = ", ".join(
            f"{json.dumps(name)} {self.names[node]}" for name, node in zip(signature.outputs, program.results, strict=True)
        )
        head = [
            "fxc program 1",
            f"metadata {json.dumps(program.metadata, sort_keys=True)}",
            f"call {json.dumps(signature.call)}",
            f"result {json.dumps(signature.result)}",
            *(f"symbol {new} = {self._hint(old)}" for old, new in self.symbols.items() if str(new).startswith("s")),
        ]
        constants = [
            *((fqn, f"constant {_at(fqn)}: {_constant_type(fqn, t)}") for fqn, t in sorted(program.constants.items())),
            *((alias, f"alias {_at(alias)} = {_at(fqn)}") for alias, fqn in sorted(program.aliases.items())),
        ]
        end = program.graph.output_node(), f"return {results}"
        return [*((None, line) for line in head), *constants, *body, end]

    def number(self) -> list[fx.Node]:
        lines = []
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self.names[node] = _at(node.target)
            elif node.op != "output":
                self.names[node] = f"%{len(lines)}"
                lines.append(node)
        # Symbols are numbered in the order of the text, whatever torch called them.
        for node in self.program.placeholders:
            self.type(node.meta["val"])
        return lines

    def line(self, node: fx.Node) -> str:
        left = f"{self.names[node]}: {self.type(node.meta['val'])} = "
        if node.op == "placeholder":
            declared = self.program.signature.inputs[self.program.placeholders.index(node)]
            default = f" default {json.dumps(declared.default)}" if declared.default else ""
            return f"{left}input {json.dumps(declared.name)}{default}"
        arguments = [self.value(a) for a in node.args]
        arguments += [f"{name}={self.value(a)}" for name, a in node.kwargs.items()]
        return f"{left}{name_of(node.target)}({', '.join(arguments)}){_comment(node)}"

    def type(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return tensor_type(value.dtype, [self.size(s) for s in value.shape])
        if isinstance(value, (list, tuple)):
            return f"({', '.join(self.type(v) for v in value)})"
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"number({self.size(value)})"
        raise TypeError(f"a value of type {type(value).__name__} has no place in a program")

    def size(self, value: Any) -> str:
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return repr(value)
        expression = value.node.expr
        free = sorted(expression.free_symbols - self.symbols.keys(), key=lambda s: (len(s.name), s.name))
        for symbol in free:
            # u0, u1, ...: known only from the values of a tensor, as the size of x[mask] is.
            is_counted = symbol_is_type(symbol, SymT.UNBACKED_INT)
            count = sum(str(name).startswith("u") for name in self.symbols.values())
            name = f"u{count}" if is_counted else f"s{len(self.symbols) - count}"
            self.symbols[symbol] = sympy.Symbol(name, integer=True, positive=True)
        return str(expression.xreplace(self.symbols)).replace(" ", "").replace(",", ";")

    def _hint(self, symbol: sympy.Symbol) -> int:
        for node in self.program.placeholders:
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    env = size.node.shape_env
                    return int(env.backed_var_to_val[symbol])
        raise ValueError(f"{symbol} is no size of an input")

    def value(self, argument: Any) -> str:
        match argument:
            case fx.Node():
                return self.names[argument]
            case None | bool():
                return repr(argument)
            case int():
                return repr(argument)
            case float():
                return repr(argument)
            case str():
                return json.dumps(argument)
            case list() | tuple():
                return f"[{', '.join(self.value(a) for a in argument)}]"
            case torch.dtype():
                return _dtype_name(argument)
            case torch.device():
                return f"device({json.dumps(str(argument))})"
            case torch.layout():
                return 'layout("strided")'
            case torch.memory_format():
                return f"format({json.dumps(_FORMAT_NAMES[argument])})"
        raise TypeError(f"an argument of type {type(argument).__name__} has no place in a program")


def tensor_type(dtype: torch.dtype, shape: Any, where: str | None = None) -> str:
    """Raises `UsageError` for a dtype that no text names. where: whose it is."""
    return f"{_dtype_name(dtype, where)}[{', '.join(str(s) for s in shape)}]"


def _dtype_name(dtype: torch.dtype, where: str | None = None) -> str:
    if dtype not in DTYPE_NAMES:
        kind, known = str(dtype).removeprefix("torch."), ", ".join(str(each).removeprefix("torch.") for each in DTYPES.values())
        raise UsageError(f"the text of a program has no {kind}", where=where, hint=f"one of {known}")
    return DTYPE_NAMES[dtype]


def _constant_type(fqn: str, tensor: Tensor) -> str:
    """Of a lowered program, oneDNN may have packed a constant as it likes. No text with such a one is read again."""
    packed = " packed by oneDNN" if tensor.is_mkldnn else ""
    return f"{tensor_type(tensor.dtype, tensor.shape, fqn)}{packed}"


def _at(fqn: str) -> str:
    return f"@{fqn}"


def _comment(node: fx.Node) -> str:
    fqn, by = node.meta.get("fqn", ""), node.meta.get("by", "")
    if not fqn and not by:
        return ""
    return f"  # {fqn if _PLAIN_NAME.match(fqn) or not fqn else json.dumps(fqn)}{f' ({by})' if by else ''}".rstrip()

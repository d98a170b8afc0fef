"""From the text of a program to the program. See `fxc.ir.text` for the form.

The text may come from a stranger. Nothing in it is executed: operators are looked up in `fxc.ir.targets`, sizes are
evaluated by this module, and every type is inferred again and compared with the one written.
"""

from __future__ import annotations

import ast
import json
import keyword
import logging
import math
import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxc.errors import InputRefused, first_line
from fxc.ir.header import check_header
from fxc.ir.infer import fake_constant, infer, new_symbols
from fxc.ir.numbers import check_numbers, integer_of, is_small
from fxc.ir.program import Input, Program, Signature
from fxc.ir.targets import resolve
from fxc.ir.text import DTYPE_NAMES, DTYPES, FORMATS, LAYOUTS, Printer, tensor_type
from fxc.ir.tokens import DEEPEST, STRING, Bad, Tokens, name_of, string_of

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_TARGET = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_INPUT = re.compile(rf" ({STRING})(?: default ({STRING}))?\Z")
_COMMENT = re.compile(rf"(?:  # (?P<fqn>[A-Za-z0-9_.-]*|{STRING}) ?(?:\((?P<by>[A-Za-z0-9_.:=-]+)\))?)?\Z")
_CONSTANTS = {"None": None, "True": True, "False": False, "inf": math.inf, "nan": math.nan}


def parse_program(text: str, constants: dict[str, Tensor] | None = None) -> Program:
    """The program that `text` says. Without `constants` its constants are on meta.

    Raises `InputRefused`, with the line, for a text that is cut, malformed or changed, for an operator that is not
    allowed, for a type that is not the one inferred, and for constants that do not fit.
    """
    parser = _Parser(constants)
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    try:
        with _without_tracebacks():
            for line in lines:
                parser.number += 1
                parser.read(line)
            return parser.finish()
    except Bad as bad:
        raise InputRefused(
            str(bad),
            where=f"program text, line {parser.number}",
            why=lines[parser.number - 1][:160] if lines else "the text is empty",
            hint="the text was damaged or written by another version of fxc: compile the model again",
        ) from None


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """torch logs a traceback for a call whose type it cannot infer, besides raising; here that is a refused line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Parser:
    def __init__(self, constants: dict[str, Tensor] | None):
        self.given = constants
        self.number = 0  # of the line at hand, from 1
        self.header: dict[str, Any] = {}
        self.hints: list[int] = []
        self.constants: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.inputs: list[Input] = []
        self.outputs: list[str] = []
        self.graph = fx.Graph()
        self.values: list[fx.Node] = []
        self.reads: dict[str, fx.Node] = {}
        self.mode = None
        self.symbols: dict[str, torch.SymInt] = {}
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        self.typed: list[tuple[int, str]] = []  # line number and type as written, of each value
        self.done = False

    def read(self, line: str) -> None:
        if self.done:
            raise Bad("there is text after the end of the program")
        word, _, rest = line.partition(" ")
        if word != "fxc" and "version" not in self.header:
            raise Bad("this is not the text of a program: its first line must be 'fxc program 1'")
        if word.startswith("%"):
            self._value(line)
        elif word == "fxc":
            if rest != "program 1":
                raise Bad(f"this version of fxc reads 'fxc program 1', not {line!r}")
            self.header["version"] = 1
        elif word in ("metadata", "call", "result"):
            if word in self.header:
                raise Bad(f"{word} is given twice")
            try:
                self.header[word] = json.loads(rest)
            except (ValueError, RecursionError) as error:
                raise Bad(f"{word} is not JSON ({error})") from None
        elif word == "symbol":
            name, _, hint = rest.partition(" = ")
            if name != f"s{len(self.hints)}" or self.mode or not 1 < integer_of(hint) < 2**31:
                raise Bad("symbols must be s0, s1, ... in order, before any value, each with an example size above 1")
            self.hints.append(int(hint))
        elif word == "constant":
            self._constant(rest)
        elif word == "alias":
            alias, fqn = map(name_of, rest.split(" = ")) if rest.count(" = ") == 1 else ("", "")
            if not alias or alias in self.aliases:
                raise Bad("an alias is written once: alias @name = @constant")
            self.aliases[alias] = fqn
        elif word == "return":
            self._return(rest)
        else:
            raise Bad(f"a line cannot begin with {word!r}")

    def finish(self) -> Program:
        if not self.done:
            raise Bad("the text ends before the program's return line")
        for key in ("metadata", "call", "result"):
            if key not in self.header:
                raise Bad(f"the text has no line {key!r}")
        unread = sorted(self.constants.keys() - self.reads.keys())
        if unread:
            raise Bad(f"the constant {unread[0]} is declared and never read")
        if self.given is not None and (extra := sorted(self.given.keys() - self.constants.keys())):
            raise Bad(f"the tensor {extra[0]} is in the file and the program does not declare it")
        for fqn in self.constants:
            if inside := next((p for p in _prefixes(fqn) if p in self.constants), None):
                raise Bad(f"the constant {fqn} is named as if the constant {inside} were a module")
        for alias, fqn in self.aliases.items():
            if fqn not in self.constants or alias in self.constants:
                raise Bad(f"the alias {alias} does not stand for a declared constant")
        check_header(self.header, self.inputs, self.outputs)
        signature = Signature(self.inputs, self.outputs, self.header["call"], self.header["result"])
        program = Program(self.graph, self.constants, self.aliases, signature, self.header["metadata"])
        self._compare_types(program)
        return program

    def _compare_types(self, program: Program) -> None:
        # Only at the end, because a size may turn out equal to another one on a later line.
        printer = Printer(program)
        printer.symbols = dict(self.names)
        last = self.number
        for node, (number, written) in zip(self.values, self.typed, strict=True):
            self.number = number
            try:
                inferred = printer.type(node.meta["val"])
            except (TypeError, KeyError) as error:
                raise Bad(f"a program cannot hold what this line computes ({error})") from None
            if inferred != written:
                raise Bad(f"it is written as {written} and is {inferred}")
        self.number = last

    def _constant(self, rest: str) -> None:
        at, _, written = rest.rpartition(": ")
        fqn = name_of(at)
        dtype, _, sizes = written.removesuffix("]").partition("[")
        try:
            if not written.endswith("]"):
                raise KeyError(written)
            shape = [integer_of(s) for s in sizes.split(", ")] if sizes else []
            declared = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        except (KeyError, TypeError, RuntimeError, OverflowError):
            raise Bad(f"{written!r} is not the type of a constant") from None
        if fqn in self.constants:
            raise Bad(f"the constant {fqn} is declared twice")
        if self.given is not None:
            tensor = self.given.get(fqn)
            if tensor is None:
                raise Bad(f"the constant {fqn} is declared and the weights do not have it")
            if (tensor.shape, tensor.dtype) != (declared.shape, declared.dtype):
                found = tensor_type(tensor.dtype, tensor.shape) if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
                raise Bad(f"the constant {fqn} is declared as {written} and the weights have {found}")
            declared = tensor
        self.constants[fqn] = declared

    def _begin(self) -> None:
        self.mode, symbols = new_symbols(self.hints)
        self.symbols = {f"s{i}": s for i, s in enumerate(symbols)}
        # A symbol may have been replaced by an equal one when types are compared: print each under its own name.
        self.names = {s.node.expr: sympy.Symbol(name, integer=True, positive=True) for name, s in self.symbols.items()}

    def _value(self, line: str) -> None:
        if self.mode is None:
            self._begin()
        left, _, right = line.partition(" = ")
        number, _, written = left.partition(": ")
        target = _TARGET.match(right)
        if not written or not target:
            raise Bad("this is not a line '%number: type = operator(arguments)'")
        if number != f"%{len(self.values)}":
            raise Bad(f"the value %{len(self.values)} is expected here, not {number}")
        rest = right[target.end() :]
        node = self._input(written, rest) if target[0] == "input" else self._call(target[0], rest)
        self.values.append(node)
        self.typed.append((self.number, written))

    def _input(self, written: str, rest: str) -> fx.Node:
        parsed = _INPUT.match(rest)
        if not parsed:
            raise Bad('an input is written: input "name" or input "name" default "..."')
        self.inputs.append(Input(string_of(parsed[1]), parsed[2] and string_of(parsed[2])))
        node = self.graph.placeholder(f"input_{len(self.inputs) - 1}")
        dtype, _, sizes = written.removesuffix("]").partition("[")
        if dtype not in DTYPES or not written.endswith("]"):
            raise Bad(f"{written[:80]!r} is not the type of an input")
        try:
            shape = [self._size(ast.parse(s, mode="eval").body) for s in sizes.split(", ")] if sizes else []
            with self.mode:
                node.meta["val"] = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
        except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError, SyntaxError, MemoryError):
            raise Bad(f"{written[:80]!r} is not the type of an input") from None
        return node

    def _size(self, expression: ast.expr) -> int | torch.SymInt:
        match expression:
            case ast.Constant(value=int() as value):
                return value
            case ast.Name(id=name):
                return self.symbols[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self._size(left), self._size(right))
        raise ValueError("not a size")

    def _call(self, name: str, rest: str) -> fx.Node:
        try:
            target = resolve(name)
        except KeyError as error:
            raise Bad(error.args[0]) from None
        args, kwargs, rest = self._arguments(rest)
        comment = _COMMENT.match(rest)
        if not comment:
            raise Bad("there is text after the arguments")
        if not isinstance(target, OpOverload):
            check_numbers(name, args, kwargs)
        node = self.graph.call_function(target, args, kwargs)
        try:
            node.meta["val"] = infer(self.mode, target, args, kwargs)
        except Exception as error:  # whatever the operator objects to, the text is at fault
            raise Bad(f"{name} does not take these arguments: {first_line(error)[:200]}") from None
        if not isinstance(target, OpOverload) and not is_small(node.meta["val"]):
            raise Bad("a number does not fit into 64 bits")
        if comment["fqn"]:
            node.meta["fqn"] = string_of(comment["fqn"]) if comment["fqn"].startswith('"') else comment["fqn"]
        if comment["by"]:
            node.meta["by"] = comment["by"]
        return node

    def _arguments(self, text: str) -> tuple[tuple, dict[str, Any], str]:
        """The positional and the named arguments, and the text after them."""
        tokens = Tokens(text)
        tokens.expect("(")
        args, kwargs = [], {}
        while not tokens.take(")"):
            if args or kwargs:
                tokens.expect(",")
            if tokens.kind() == "name" and tokens.peek(1) == "=":
                name = tokens.next()
                tokens.expect("=")
                if name in kwargs or keyword.iskeyword(name):
                    raise Bad(f"the argument {name} is given twice, or its name is a word of Python")
                kwargs[name] = self._argument(tokens)
            elif kwargs:
                raise Bad("an argument without a name follows one with a name")
            else:
                args.append(self._argument(tokens))
        return tuple(args), kwargs, tokens.rest

    def _argument(self, tokens: Tokens, depth: int = 0) -> Any:
        kind, text = tokens.kind(), tokens.next()
        if kind == "value":
            index = integer_of(text[1:])
            if index >= len(self.values):
                raise Bad(f"{text} is used before it is defined")
            return self.values[index]
        if kind == "at":
            return self._read(name_of(text))
        if kind == "string":
            return string_of(text)
        if kind == "number":
            if text.lstrip("-") in _CONSTANTS:
                return float(text)
            return float(text) if any(c in text for c in ".e") else integer_of(text)
        if text == "[" and depth < DEEPEST:
            items = []
            while not tokens.take("]"):
                if items:
                    tokens.expect(",")
                items.append(self._argument(tokens, depth + 1))
            return items
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text in DTYPES:
            return DTYPES[text]
        if text in ("device", "layout", "format"):
            tokens.expect("(")
            name = string_of(tokens.next())
            tokens.expect(")")
            if text == "device" and name == "cpu":
                return torch.device("cpu")
            if text == "layout" and name in LAYOUTS:
                return LAYOUTS[name]
            if text == "format" and name in FORMATS:
                return FORMATS[name]
        raise Bad(f"{text!r} cannot stand here")

    def _read(self, fqn: str) -> fx.Node:
        if fqn not in self.constants:
            raise Bad(f"the constant {fqn} is not declared")
        if fqn not in self.reads:
            node = self.graph.create_node("get_attr", fqn)
            node.meta["val"] = fake_constant(self.mode, self.constants[fqn])
            self.reads[fqn] = node
        return self.reads[fqn]

    def _return(self, rest: str) -> None:
        tokens = Tokens(rest)
        results = []
        while not results or not tokens.at_end():
            if results:
                tokens.expect(",")
            if tokens.kind() != "string":
                raise Bad('what is returned is written: "name" %number, ...')
            self.outputs.append(string_of(tokens.next()))
            if tokens.kind() not in ("value", "at"):
                raise Bad("only values can be returned")
            results.append(self._argument(tokens))
        self.graph.output(tuple(results))
        self.done = True


def _prefixes(fqn: str) -> list[str]:
    """The names of the modules that `fqn` is in: "a.b.c" -> ["a", "a.b"]."""
    parts = fqn.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]

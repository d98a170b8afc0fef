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
from fxc.ir.infer import fake_constant, infer, new_symbols
from fxc.ir.program import Input, Program, Signature, is_name
from fxc.ir.targets import resolve
from fxc.ir.text import DTYPE_NAMES, DTYPES, FORMATS, LAYOUTS, Printer, tensor_type

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
_STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
_TOKEN = re.compile(
    rf"\s*(?:(?P<string>{_STRING})|(?P<value>%[0-9]+)|(?P<at>@[A-Za-z0-9_.-]+)"
    r"|(?P<number>-?(?:inf\b|nan\b|[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?))|(?P<name>[A-Za-z_][A-Za-z0-9_.]*)"
    r"|(?P<mark>[\[\]\(\),=]))"
)
_TARGET = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_INPUT = re.compile(rf" ({_STRING})(?: default ({_STRING}))?\Z")
_COMMENT = re.compile(rf"(?:  # (?P<fqn>[A-Za-z0-9_.-]*|{_STRING}) ?(?:\((?P<by>[A-Za-z0-9_.:=-]+)\))?)?\Z")
_DEFAULT = re.compile(r"(?:ones|zeros):(.+)\Z", re.DOTALL)
_DEEPEST = 32  # nesting of the call and result structures; an argument nests once or twice
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
    except _Bad as bad:
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


class _Bad(Exception):
    """What is wrong with the line at hand."""


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
            raise _Bad("there is text after the end of the program")
        word, _, rest = line.partition(" ")
        if word != "fxc" and "version" not in self.header:
            raise _Bad("this is not the text of a program: its first line must be 'fxc program 1'")
        if word.startswith("%"):
            self._value(line)
        elif word == "fxc":
            if rest != "program 1":
                raise _Bad(f"this version of fxc reads 'fxc program 1', not {line!r}")
            self.header["version"] = 1
        elif word in ("metadata", "call", "result"):
            if word in self.header:
                raise _Bad(f"{word} is given twice")
            try:
                self.header[word] = json.loads(rest)
            except (ValueError, RecursionError) as error:
                raise _Bad(f"{word} is not JSON ({error})") from None
        elif word == "symbol":
            name, _, hint = rest.partition(" = ")
            if name != f"s{len(self.hints)}" or self.mode or not 1 < _integer(hint) < 2**31:
                raise _Bad("symbols must be s0, s1, ... in order, before any value, each with an example size above 1")
            self.hints.append(int(hint))
        elif word == "constant":
            self._constant(rest)
        elif word == "alias":
            alias, fqn = map(_name, rest.split(" = ")) if rest.count(" = ") == 1 else ("", "")
            if not alias or alias in self.aliases:
                raise _Bad("an alias is written once: alias @name = @constant")
            self.aliases[alias] = fqn
        elif word == "return":
            self._return(rest)
        else:
            raise _Bad(f"a line cannot begin with {word!r}")

    def finish(self) -> Program:
        if not self.done:
            raise _Bad("the text ends before the program's return line")
        for key in ("metadata", "call", "result"):
            if key not in self.header:
                raise _Bad(f"the text has no line {key!r}")
        unread = sorted(self.constants.keys() - self.reads.keys())
        if unread:
            raise _Bad(f"the constant {unread[0]} is declared and never read")
        if self.given is not None and (extra := sorted(self.given.keys() - self.constants.keys())):
            raise _Bad(f"the tensor {extra[0]} is in the file and the program does not declare it")
        for fqn in self.constants:
            if inside := next((p for p in _prefixes(fqn) if p in self.constants), None):
                raise _Bad(f"the constant {fqn} is named as if the constant {inside} were a module")
        for alias, fqn in self.aliases.items():
            if fqn not in self.constants or alias in self.constants:
                raise _Bad(f"the alias {alias} does not stand for a declared constant")
        self._check_header()
        signature = Signature(self.inputs, self.outputs, self.header["call"], self.header["result"])
        program = Program(self.graph, self.constants, self.aliases, signature, self.header["metadata"])
        self._compare_types(program)
        return program

    def _check_header(self) -> None:
        metadata, call, result = (self.header[key] for key in ("metadata", "call", "result"))
        name = metadata.get("class", "Program") if isinstance(metadata, dict) else None
        if not isinstance(name, str) or not name.isidentifier():
            raise _Bad("metadata is not an object, or its class is not a name")
        names = [i.name for i in self.inputs]
        if len(set(names)) != len(names):
            raise _Bad("two inputs have one name")
        for declared in self.inputs:
            found = declared.default is None or _DEFAULT.match(declared.default)
            if not found or (declared.default is not None and found[1] not in names):
                raise _Bad(f"{declared.default!r} is not a default: ones: or zeros: and the name of an input")
        if (
            not isinstance(call, dict)
            or call.keys() != {"args", "kwargs"}
            or not isinstance(call["args"], list)
            or not isinstance(call["kwargs"], dict)
            or not all(_is_structure(c, len(names)) for c in (*call["args"], *call["kwargs"].values()))
        ):
            raise _Bad("the call is not a structure over the inputs")
        defaults = metadata.get("defaults", {})
        if not isinstance(defaults, dict) or not all(
            isinstance(meanings, list) and meanings and all(_is_structure(m, 0) for m in meanings)
            for meanings in defaults.values()
        ):
            raise _Bad("the defaults of arguments are not structures without tensors")
        if not _is_structure(result, len(self.outputs)):
            raise _Bad("the result is not a structure over the outputs")

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
                raise _Bad(f"a program cannot hold what this line computes ({error})") from None
            if inferred != written:
                raise _Bad(f"it is written as {written} and is {inferred}")
        self.number = last

    def _constant(self, rest: str) -> None:
        at, _, written = rest.rpartition(": ")
        fqn = _name(at)
        dtype, _, sizes = written.removesuffix("]").partition("[")
        try:
            if not written.endswith("]"):
                raise KeyError(written)
            shape = [_integer(s) for s in sizes.split(", ")] if sizes else []
            declared = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        except (KeyError, TypeError, RuntimeError, OverflowError):
            raise _Bad(f"{written!r} is not the type of a constant") from None
        if fqn in self.constants:
            raise _Bad(f"the constant {fqn} is declared twice")
        if self.given is not None:
            tensor = self.given.get(fqn)
            if tensor is None:
                raise _Bad(f"the constant {fqn} is declared and the weights do not have it")
            if (tensor.shape, tensor.dtype) != (declared.shape, declared.dtype):
                found = tensor_type(tensor.dtype, tensor.shape) if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
                raise _Bad(f"the constant {fqn} is declared as {written} and the weights have {found}")
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
            raise _Bad("this is not a line '%number: type = operator(arguments)'")
        if number != f"%{len(self.values)}":
            raise _Bad(f"the value %{len(self.values)} is expected here, not {number}")
        rest = right[target.end() :]
        node = self._input(written, rest) if target[0] == "input" else self._call(target[0], rest)
        self.values.append(node)
        self.typed.append((self.number, written))

    def _input(self, written: str, rest: str) -> fx.Node:
        parsed = _INPUT.match(rest)
        if not parsed:
            raise _Bad('an input is written: input "name" or input "name" default "..."')
        self.inputs.append(Input(_string(parsed[1]), parsed[2] and _string(parsed[2])))
        node = self.graph.placeholder(f"input_{len(self.inputs) - 1}")
        dtype, _, sizes = written.removesuffix("]").partition("[")
        if dtype not in DTYPES or not written.endswith("]"):
            raise _Bad(f"{written[:80]!r} is not the type of an input")
        try:
            shape = [self._size(ast.parse(s, mode="eval").body) for s in sizes.split(", ")] if sizes else []
            with self.mode:
                node.meta["val"] = torch.empty(shape, dtype=DTYPES[dtype], device="cpu")
        except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError, SyntaxError, MemoryError):
            raise _Bad(f"{written[:80]!r} is not the type of an input") from None
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
            raise _Bad(error.args[0]) from None
        args, kwargs, rest = self._arguments(rest)
        comment = _COMMENT.match(rest)
        if not comment:
            raise _Bad("there is text after the arguments")
        if not isinstance(target, OpOverload):
            _check_numbers(name, args, kwargs)
        node = self.graph.call_function(target, args, kwargs)
        try:
            node.meta["val"] = infer(self.mode, target, args, kwargs)
        except Exception as error:  # whatever the operator objects to, the text is at fault
            raise _Bad(f"{name} does not take these arguments: {first_line(error)[:200]}") from None
        if not isinstance(target, OpOverload) and not _is_small(node.meta["val"]):
            raise _Bad("a number does not fit into 64 bits")
        if comment["fqn"]:
            node.meta["fqn"] = _string(comment["fqn"]) if comment["fqn"].startswith('"') else comment["fqn"]
        if comment["by"]:
            node.meta["by"] = comment["by"]
        return node

    def _arguments(self, text: str) -> tuple[tuple, dict[str, Any], str]:
        """The positional and the named arguments, and the text after them."""
        tokens = _Tokens(text)
        tokens.expect("(")
        args, kwargs = [], {}
        while not tokens.take(")"):
            if args or kwargs:
                tokens.expect(",")
            if tokens.kind() == "name" and tokens.peek(1) == "=":
                name = tokens.next()
                tokens.expect("=")
                if name in kwargs or keyword.iskeyword(name):
                    raise _Bad(f"the argument {name} is given twice, or its name is a word of Python")
                kwargs[name] = self._argument(tokens)
            elif kwargs:
                raise _Bad("an argument without a name follows one with a name")
            else:
                args.append(self._argument(tokens))
        return tuple(args), kwargs, tokens.rest

    def _argument(self, tokens: _Tokens, depth: int = 0) -> Any:
        kind, text = tokens.kind(), tokens.next()
        if kind == "value":
            index = _integer(text[1:])
            if index >= len(self.values):
                raise _Bad(f"{text} is used before it is defined")
            return self.values[index]
        if kind == "at":
            return self._read(_name(text))
        if kind == "string":
            return _string(text)
        if kind == "number":
            if text.lstrip("-") in _CONSTANTS:
                return float(text)
            return float(text) if any(c in text for c in ".e") else _integer(text)
        if text == "[" and depth < _DEEPEST:
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
            name = _string(tokens.next())
            tokens.expect(")")
            if text == "device" and name == "cpu":
                return torch.device("cpu")
            if text == "layout" and name in LAYOUTS:
                return LAYOUTS[name]
            if text == "format" and name in FORMATS:
                return FORMATS[name]
        raise _Bad(f"{text!r} cannot stand here")

    def _read(self, fqn: str) -> fx.Node:
        if fqn not in self.constants:
            raise _Bad(f"the constant {fqn} is not declared")
        if fqn not in self.reads:
            node = self.graph.create_node("get_attr", fqn)
            node.meta["val"] = fake_constant(self.mode, self.constants[fqn])
            self.reads[fqn] = node
        return self.reads[fqn]

    def _return(self, rest: str) -> None:
        tokens = _Tokens(rest)
        results = []
        while not results or not tokens.at_end():
            if results:
                tokens.expect(",")
            if tokens.kind() != "string":
                raise _Bad('what is returned is written: "name" %number, ...')
            self.outputs.append(_string(tokens.next()))
            if tokens.kind() not in ("value", "at"):
                raise _Bad("only values can be returned")
            results.append(self._argument(tokens))
        self.graph.output(tuple(results))
        self.done = True


class _Tokens:
    """The tokens of `text`, up to the parenthesis that closes the first one; `rest` is the text after that."""

    def __init__(self, text: str):
        self.items: list[tuple[str, str]] = []
        self.position = position = depth = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise _Bad(f"{text[position : position + 20]!r} cannot stand here")
            kind = match.lastgroup
            self.items.append((kind, match[kind]))
            position = match.end()
            depth += (match[kind] == "(") - (match[kind] == ")")
            if match[kind] == ")" and depth <= 0:
                break
        self.rest = text[position:]

    def kind(self) -> str:
        return self.items[self.position][0] if not self.at_end() else "end"

    def peek(self, ahead: int) -> str | None:
        index = self.position + ahead
        return self.items[index][1] if index < len(self.items) else None

    def next(self) -> str:
        if self.at_end():
            raise _Bad("the line ends too early")
        self.position += 1
        return self.items[self.position - 1][1]

    def take(self, mark: str) -> bool:
        if not self.at_end() and self.items[self.position] == ("mark", mark):
            self.position += 1
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise _Bad(f"{mark!r} is missing")

    def at_end(self) -> bool:
        return self.position >= len(self.items)


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise _Bad(f"{text} is not a string") from None
    if not isinstance(value, str):
        raise _Bad(f"{text} is not a string")
    return value


def _name(at: str) -> str:
    if not at.startswith("@") or not is_name(at[1:]):
        raise _Bad(f"{at[:80]!r} is not the name of a constant")
    return at[1:]


def _prefixes(fqn: str) -> list[str]:
    """The names of the modules that `fqn` is in: "a.b.c" -> ["a", "a.b"]."""
    parts = fqn.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _integer(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and _is_small(int(text))):
        raise _Bad(f"{text[:40]!r} is not a whole number of 64 bits")
    return int(text)


def _is_small(value: Any) -> bool:
    """False for a whole number of more than 64 bits: arithmetic on such numbers can take any time and memory."""
    if isinstance(value, torch.SymInt):
        value = value.node.hint if value.node.has_hint() else 0
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _check_numbers(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Python's own functions take numbers here and nothing else; their other meanings (repeating a list, say) are not
    part of a program."""
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    if name == "operator.getitem":
        allowed = len(values) == 2 and isinstance(args[0], fx.Node) and isinstance(values[0], (list, tuple))
        values = values[1:]
    else:
        allowed = True
        if name == "torch.sym_sum" and len(args) == 1 and isinstance(args[0], list):
            values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args[0]]
    if name == "operator.pow":
        allowed = len(values) == 2 and type(values[1]) in (int, float) and abs(values[1]) <= 64
    if kwargs or not allowed or not all(isinstance(v, numbers) for v in values):
        raise _Bad(f"{name} is for numbers here")


def _is_structure(value: Any, count: int, depth: int = 0) -> bool:
    """Whether `value` is what `fxc.ir.structure` says, over `count` tensors."""
    if type(value) is int:
        return 0 <= value < count
    if not isinstance(value, dict) or depth > _DEEPEST:
        return False
    kinds = value.keys()
    if kinds == {"value"}:
        return value["value"] is None or isinstance(value["value"], (bool, int, float, str))
    if kinds in ({"list"}, {"tuple"}):
        (inner,) = value.values()
        return isinstance(inner, list) and all(_is_structure(v, count, depth + 1) for v in inner)
    if kinds not in ({"dict"}, {"class", "dict"}) or not isinstance(value.get("class", ""), str):
        return False
    return isinstance(value["dict"], dict) and all(_is_structure(v, count, depth + 1) for v in value["dict"].values())

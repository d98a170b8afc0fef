"""Programs of a few lines, as docstrings of passes and the files in tests/passes show them: before, `---`, after.

    constant @up.weight: f32[16, 32]
    values @up.weight[3] = 0
    %0: f32[s0, 32] = input "x"
    %1: f32[s0, 16] = aten.linear(%0, @up.weight)
    return "out" %1

What such a text leaves out is written for it: the first line, `metadata`, `call`, `result` and `symbol` (all 5, 6, ...).
Constants are random numbers. `values` assigns to a part of one before, and after the `---` says what a part has to be.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxc.ir import parse_program, print_program
from fxc.ir.program import Program
from fxc.ir.text import DTYPES
from fxc.passes.base import Context, Pass, Result, parse_passes
from fxc.verify.compare import relative_error

_CONSTANT = re.compile(r"constant @(\S+): (\w+)\[(.*)\]")
_VALUES = re.compile(r"values @([\w.-]+)\[(.*)\] = (-?[\d.]+)")
_HEAD = ("fxc program", "metadata", "call", "result", "symbol")
RULE = "---"


@dataclass(frozen=True)
class Example:
    """passes: as in --passes, the pass under test last; before and after: texts as above; where: for messages."""

    where: str
    passes: str
    before: str
    after: str

    @property
    def name(self) -> str:
        return self.passes.split(",")[-1].split(":")[0]


def in_docstring(cls: type[Pass]) -> Example | None:
    """The example in the docstring of a pass, or of its module: the paragraph that holds the rule."""
    for text in (cls.__doc__ or "", inspect.getmodule(cls).__doc__ or ""):
        for paragraph in text.split("\n\n"):
            lines = textwrap.dedent(paragraph).splitlines()
            if RULE in lines:
                return _example(f"the docstring of {cls.__name__}", lines, cls.name)
    return None


def in_file(path: Path) -> Example:
    return _example(str(path), path.read_text().splitlines(), path.parent.name)


def _example(where: str, lines: list[str], name: str) -> Example:
    lines = [line.rstrip() for line in lines if line.strip() and not line.startswith("#")]
    passes = lines.pop(0).partition(" ")[2] if lines[0].startswith("passes ") else name
    rule = lines.index(RULE)
    return Example(where, passes, "\n".join(lines[:rule]), "\n".join(lines[rule + 1 :]))


def program_of(text: str) -> Program:
    """The program of a text, its constants as the module says."""
    lines = [line for line in text.splitlines() if not line.startswith("values ")]
    generator = torch.Generator().manual_seed(0)
    constants = {}
    for fqn, dtype, shape in (m.groups() for line in lines if (m := _CONSTANT.match(line))):
        sizes = [int(size) for size in shape.split(",") if size.strip()]
        constants[fqn] = torch.randn(sizes, generator=generator).to(DTYPES[dtype])
    for fqn, index, value in _VALUES.findall(text):
        _part(constants[fqn], index).copy_(torch.tensor(float(value)))
    count = sum(" = input " in line for line in lines)
    results = [int(n) for n in range(len(re.findall(r'"[^"]*" [%@]', lines[-1])))]
    result = results[0] if len(results) == 1 else '{"tuple": [' + ", ".join(map(str, results)) + "]}"
    symbols = sorted(set(re.findall(r"\bs\d+\b", " ".join(line.split("=")[0] for line in lines))), key=lambda s: int(s[1:]))
    head = ["fxc program 1", "metadata {}", f'call {{"args": {list(range(count))}, "kwargs": {{}}}}', f"result {result}"]
    head += [f"symbol {symbol} = {5 + i}" for i, symbol in enumerate(symbols)]
    return parse_program("\n".join([*head, *lines]) + "\n", constants)


def _part(tensor: Tensor, index: str) -> Tensor:
    """A view of tensor[index], of index expressions such as `3`, `2:4`, `:, 5`."""
    parts = [slice(*(int(n) if n else None for n in p.split(":"))) if ":" in p else int(p) for p in index.split(",")]
    return tensor[tuple(parts)]


def short(program: Program) -> str:
    return "\n".join(line for line in print_program(program).splitlines() if not line.startswith(_HEAD))


def run(example: Example) -> tuple[Program, Program, Result]:
    """The programs before and after the last of the example's passes."""
    after = program_of(example.before)
    *first, last = parse_passes(example.passes)
    for each in first:
        each.run(after, Context())
    before, after = after, after.copy()
    return before, after, last.run(after, Context(samples=2 * [_inputs(before)]))


def check(example: Example) -> None:
    """The pass makes of the text before the text after; where it is a mechanism, the program still computes the same.

    Raises AssertionError with both texts."""
    before, after, result = run(example)
    expected = "\n".join(line for line in example.after.splitlines() if not line.startswith("values "))
    assert short(after) == expected, f"{example.where} says\n{expected}\nand the pass makes\n{short(after)}"
    for fqn, index, value in _VALUES.findall(example.after):
        assert bool((_part(after.constants[fqn], index) == float(value)).all()), f"@{fqn}[{index}] is not all {value}"
    if not Pass.registry[example.name].is_policy:
        inputs = _inputs(before)
        with torch.no_grad():
            expected, found = before.module()(*inputs), after.module()(*result.interface.inputs(before, inputs))
        assert relative_error(found, result.interface.outputs(before, expected)) < 1e-5, example.where


def _inputs(program: Program) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = [node.meta["val"] for node in program.placeholders]
    # int(symbol) would fix its size in the program.
    sizes = [[n if isinstance(n, int) else n.node.hint for n in value.shape] for value in values]
    return [torch.randn(size, generator=generator).to(value.dtype) for size, value in zip(sizes, values, strict=True)]


def accept(path: Path, example: Example) -> None:
    """Rewrite the part of a file after the rule as the pass makes it now; its `values` lines stay."""
    text = path.read_text()
    head = text[: text.index(f"\n{RULE}\n") + len(RULE) + 2]
    values = [line for line in example.after.splitlines() if line.startswith("values ")]
    path.write_text("\n".join([head.rstrip(), *values, short(run(example)[1])]) + "\n")

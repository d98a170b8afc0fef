"""The text of programs: what it says, and everything that it must refuse."""

from __future__ import annotations

import pytest
import torch
from families import Mlp

import fxc
from fxc.errors import CaptureFailed, InputRefused, UsageError
from fxc.ir import parse_program, print_program

EXPECTED = """\
fxc program 1
metadata {"class": "Mlp", "kind": "module", "parameters": ["x"]}
call {"args": [0], "kwargs": {}}
result 0
symbol s0 = 3
constant @down.weight: f32[40, 96]
constant @head.bias: f32[10]
constant @head.weight: f32[10, 40]
constant @up.bias: f32[96]
constant @up.weight: f32[96, 40]
%0: f32[s0, 40] = input "x"
%1: f32[s0, 96] = aten.linear(%0, @up.weight, @up.bias)  # up
%2: f32[s0, 96] = aten.gelu(%1)
%3: f32[s0, 40] = aten.linear(%2, @down.weight)  # down
%4: f32[s0, 40] = aten.add.Tensor(%0, %3)
%5: f32[s0, 10] = aten.linear(%4, @head.weight, @head.bias)  # head
return "out" %5
"""


@pytest.fixture(scope="module")
def program():
    return fxc.capture(Mlp(), (torch.randn(3, 40),))


def test_the_text_is_this(program):
    assert print_program(program) == EXPECTED


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fnuz])
def test_a_dtype_that_a_text_does_not_name_is_named(program, dtype):
    other = program.copy()
    other.constants["head.bias"] = torch.zeros(10).to(dtype)
    with pytest.raises(UsageError, match=f"head.bias: the text of a program has no {str(dtype).removeprefix('torch.')}"):
        print_program(other)


def test_parsing_needs_no_weights():
    parsed = parse_program(EXPECTED)
    assert parsed.is_on_meta and print_program(parsed) == EXPECTED


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("aten.gelu(%1)", 'aten.from_file("/etc/passwd", None, 10)', "not on the list of allowed operators"),
        ("aten.gelu(%1)", 'os.system("true")', "not on the list of allowed operators"),
        ("aten.gelu(%1)", 'operator.attrgetter("x")', "not on the list of allowed operators"),
        ("aten.gelu(%1)", "aten.gelu_(%1)", "mutates"),
        ("aten.gelu(%1)", "aten.no_such_thing(%1)", "no operator"),
        ("aten.gelu(%1)", "aten.__class__(%1)", "has no operator"),
        ("aten.gelu(%1)", "aten.gelu(%7)", "used before it is defined"),
        ("aten.gelu(%1)", "aten.gelu(%1", "is missing"),
        ("aten.gelu(%1)", "aten.gelu(lambda: 0)", "cannot stand here"),
        ("aten.gelu(%1)", "aten.gelu(%1, 1, 2, 3)", "does not take these arguments"),
        ("%2: f32[s0, 96]", "%2: f32[s0, 97]", "is f32[s0, 96]"),
        ("%2: f32[s0, 96]", "%2: bf16[s0, 96]", "is f32[s0, 96]"),
        ("%2: f32", "%3: f32", "is expected here"),
        ("@up.weight: f32[96, 40]", "@up.weight: f32[96, 41]", "does not take these arguments"),
        ("constant @head.bias: f32[10]\n", "", "not declared"),
        ("constant @head.bias: f32[10]", "constant @other: f32[10]\nconstant @head.bias: f32[10]", "never read"),
        ("symbol s0 = 3\n", "", "not the type of an input"),
        ("symbol s0 = 3", "symbol s0 = 0", "example size"),
        ('"parameters": ["x"]}', '"parameters": ["x"]', "not JSON"),
        ("fxc program 1", "fxc program 2", "reads 'fxc program 1'"),
        ('return "out" %5\n', "", "ends before"),
        ('return "out" %5\n', 'return "out" %5\nreturn "out" %5\n', "after the end"),
        ("f32[s0, 40] = input", "f32[__import__('os').getpid(), 40] = input", "not the type of an input"),
    ],
)
def test_a_changed_text_is_refused_with_its_line(old, new, says):
    assert old in EXPECTED
    with pytest.raises(InputRefused, match=r"line \d+") as caught:
        parse_program(EXPECTED.replace(old, new, 1))
    assert says in str(caught.value)


@pytest.mark.parametrize("length", range(0, len(EXPECTED) - 1, 37))
def test_a_cut_text_is_refused(length):
    with pytest.raises(InputRefused):
        parse_program(EXPECTED[:length])


def test_weights_must_fit_what_is_declared(program):
    for change, says in (
        ({"up.weight": torch.zeros(96, 41)}, "the weights have f32[96, 41]"),
        ({"up.weight": torch.zeros(96, 40, dtype=torch.float64)}, "the weights have f64[96, 40]"),
        ({"extra": torch.zeros(1)}, "does not declare it"),
    ):
        with pytest.raises(InputRefused) as caught:
            parse_program(EXPECTED, {**program.constants, **change})
        assert says in str(caught.value)
    with pytest.raises(InputRefused, match="the weights do not have it"):
        parse_program(EXPECTED, {k: v for k, v in program.constants.items() if k != "up.bias"})


@pytest.mark.parametrize("name", ['x"]); print(1)#', "x y", "forward", "a..b", "__class__", "x\\u202e"])
def test_names_that_could_become_code_are_refused(name):
    with pytest.raises(InputRefused, match=r"line \d+"):
        parse_program(EXPECTED.replace("up.bias", name))


def test_a_model_with_such_a_name_is_not_captured():
    class Strange(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('a"]', torch.ones(3))

        def forward(self, x):
            return x * getattr(self, 'a"]')

    with pytest.raises(CaptureFailed, match="rename that parameter"):
        fxc.capture(Strange(), (torch.randn(2, 3),))


def test_dashes_and_numbers_survive():
    class Dashes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleDict({"a-b": torch.nn.Linear(3, 4), "0": torch.nn.Linear(4, 5)})

        def forward(self, x):
            return self.blocks["0"](self.blocks["a-b"](x))

    program = fxc.capture(Dashes(), (torch.randn(2, 3),))
    text = print_program(program)
    assert "@blocks.a-b.weight" in text and print_program(parse_program(text, program.constants)) == text

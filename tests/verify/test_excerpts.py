"""An error of a gate shows the lines of the program around the place."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from command import fxc as command
from families import Mlp

import fxc
from fxc.errors import VerificationFailed
from fxc.ir import print_program
from fxc.ir.check import check
from fxc.ir.edit import call, constant, insert, sweep
from fxc.ir.program import Program
from fxc.ir.text import excerpt
from fxc.options import Options
from fxc.passes.base import Context, Fact, Pass, Result, parse_passes
from fxc.passes.facts import CANONICAL
from fxc.passes.int8 import Int8
from fxc.pipeline import run_passes

aten = torch.ops.aten


def captured() -> Program:
    torch.manual_seed(0)
    return fxc.capture(Mlp(), (torch.randn(2, 40),))


def node_of(program: Program, operator) -> torch.fx.Node:
    return program.graph.find_nodes(op="call_function", target=operator)[0]


# ------------------------------------------------------------------------------------------------------------ the lines


def test_a_line_and_its_neighbours():
    program = captured()
    lines = print_program(program).splitlines()
    gelu = next(i for i, line in enumerate(lines) if "aten.gelu" in line)
    shown = excerpt(program, node_of(program, aten.gelu.default))
    assert shown == [f"{'>' if i == gelu else ' '} {lines[i]}" for i in range(gelu - 2, gelu + 3)]
    linears = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert excerpt(program, "down") == excerpt(program, linears[1])
    (marked,) = [line for line in excerpt(program, "up.weight") if line[0] == ">"]
    assert marked == "> constant @up.weight: f32[96, 40]"
    reads = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == "up.weight")
    assert excerpt(program, reads) == excerpt(program, "up.weight")
    assert excerpt(program, "nowhere") == []


def test_at_the_ends_there_are_fewer_lines():
    program = captured()
    assert excerpt(program, program.graph.output_node())[-1].startswith("> return")
    assert len(excerpt(program, program.graph.output_node())) == 3
    first = excerpt(program, min(program.constants))
    assert first[0].startswith("> constant @down.weight") and len(first) == 3, "what the text says before it is of no node"


def test_a_long_line_is_cut():
    program = captured()
    node = node_of(program, aten.gelu.default)
    node.meta["fqn"] = "x" * 1000
    (marked,) = [line for line in excerpt(program, node) if line[0] == ">"]
    assert len(marked) == 245 and marked.endswith("...")


# ------------------------------------------------------------------------------------------------------------ each gate


@dataclass(frozen=True)
class Broken(Pass):
    """Does what it is given, which is wrong."""

    how: Callable[[Program], None] = lambda program: None

    def run(self, program, context):
        self.how(program)
        return Result(1)

    def __str__(self):
        return "broken"


class Policy(Broken):
    is_policy: ClassVar[bool] = True
    shrinks: ClassVar[bool] = False


class Promises(Broken):
    gives: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})


class Keeps(Broken):
    needs: ClassVar[frozenset[Fact]] = frozenset({CANONICAL})


def unknown_operator(program):
    node_of(program, aten.gelu.default).target = print


def no_type(program):
    del node_of(program, aten.gelu.default).meta["val"]


def late(program):
    last = program.graph.output_node().prev
    node = node_of(program, aten.gelu.default)
    node.args = (last,)


def no_constant(program):
    del program.constants["up.bias"]


def orphan(program):
    program.constants["orphan"] = torch.zeros(2)


def other_shape(program):
    program.constants["up.weight"] = torch.zeros(95, 40)


def other_result(program):
    flat = insert(program, aten.flatten.using_ints, (program.results[0],), before=program.graph.output_node(), by="", fqn="")
    program.graph.output_node().args = ((flat,),)


def matmul(program):
    node = node_of(program, aten.linear.default)
    with program.graph.inserting_before(node):
        turned = insert(program, aten.t.default, (node.args[1],), before=node, by="", fqn="")
    call(program, aten.matmul.default, (node.args[0], turned), replacing=node, by="")
    sweep(program)


def not_finite(program):
    program.constants["up.weight"] = program.constants["up.weight"] * float("nan")


def zero(program):
    program.constants["up.weight"] = torch.zeros(96, 40)


def only_this_batch(program):
    node = node_of(program, aten.gelu.default)
    fixed = insert(program, aten.view.default, (node, [2, 96]), before=node.next, by="", fqn="")
    node.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)
    fixed.meta["val"] = node.meta["val"]


def runs_nowhere(program):
    only_this_batch(program)
    node = node_of(program, aten.view.default)
    node.args = (node.args[0], [7, 5])
    program.constants["up.weight"] = program.constants["up.weight"] * 1


@pytest.mark.parametrize(
    ("step", "says", "marked"),
    [
        (Broken(unknown_operator), "print", "gelu"),
        (Broken(no_type), "has no type", "gelu"),
        (Broken(late), "which is not computed before it", "gelu"),
        (Broken(no_constant), "up.bias, which is not in the store", "aten.linear(%0, @up.weight, @up.bias)"),
        (Broken(orphan), "nothing reads it", "constant @orphan: f32[2]"),
        (Broken(other_shape), "the graph says", "constant @up.weight: f32[95, 40]"),
        (Broken(other_result), "'structure'", "aten.flatten.using_ints("),
        (Promises(matmul), "it promises canonical", "aten.matmul("),
        (Keeps(matmul), "it says that it keeps canonical", "aten.matmul("),
        (Broken(not_finite), "'finite'", "constant @up.weight: f32[96, 40]"),
        (Policy(zero), "'layers': alone it differs by", "aten.linear(%0, @up.weight, @up.bias)  # up"),
        (Broken(only_this_batch), "does not run where", "aten.view(%2, [2, 96])"),
        (Policy(runs_nowhere), "does not run where", "aten.view(%2, [7, 5])"),
    ],
)  # fmt: skip
def test_the_error_shows_the_line(step, says, marked):
    with pytest.raises(VerificationFailed) as caught:
        run_passes(captured(), Context(), Options([step], budget=9.0))
    error = caught.value
    assert says in error.what
    (line,) = [line for line in error.excerpt if line[0] == ">"]
    assert marked in line and 3 <= len(error.excerpt) <= 5
    assert str(error).splitlines()[1 : 1 + len(error.excerpt)] == error.excerpt
    assert error.as_json()["excerpt"] == error.excerpt
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.as_json()) == (str(error), error.as_json())


class KeepsFloat(Int8):
    """Leaves a float weight beside the packed one."""

    name: ClassVar[str] = ""

    def run(self, program, context):
        result = super().run(program, context)
        constant(program, "up.weight", torch.ones(96, 40), before=program.results[0])
        return result


def test_a_float_weight_that_is_left_shows():
    with pytest.raises(VerificationFailed, match="'lowered'") as caught:
        run_passes(captured(), Context(), Options([*parse_passes("canonicalize"), KeepsFloat()]))
    assert "> constant @up.weight: f32[96, 40]" in caught.value.excerpt


def test_the_outputs_budget_shows_the_layer_with_most_of_it():
    with pytest.raises(VerificationFailed, match="the outputs differ") as caught:
        run_passes(captured(), Context(), Options("int8", budget=1e-6))
    (line,) = [line for line in caught.value.excerpt if line[0] == ">"]
    assert f"# {caught.value.where} (int8)" in line


def test_what_refuses_the_sizes_of_capture_shows(monkeypatch):
    monkeypatch.setattr("fxc.pipeline.samples", lambda program: [[torch.randn(2, 41)]])
    with pytest.raises(VerificationFailed, match="does not run at the sizes of capture") as caught:
        run_passes(captured(), Context(), Options([Broken()]))
    assert any(line[0] == ">" and "@up.weight" in line for line in caught.value.excerpt)


def test_a_sound_program_has_no_problem():
    check(captured())


def test_the_command_line_shows_it_and_so_does_json(pylm_dir, tmp_path):
    arguments = ["compile", pylm_dir, "-o", tmp_path / "out", "--passes", "int8", "--budget", "1e-6", "--no-measure"]
    done = command(*arguments, "--json", code=5)
    error = json.loads(done.stdout)["error"]
    (line,) = [line for line in error["excerpt"] if line[0] == ">"]
    assert "fxc.int8_linear(" in line and f"# {error['where']} (int8)" in line
    assert "\n".join(error["excerpt"]) in command(*arguments, code=5).stderr


def test_errors_without_a_place_have_no_such_key():
    assert "excerpt" not in VerificationFailed("x").as_json()

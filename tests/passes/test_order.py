"""The order of passes, and what is added."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from families import Mlp

import fxc
from fxc.errors import UsageError
from fxc.passes.base import Fact, Pass, Result, parse_passes
from fxc.passes.facts import FLOAT_WEIGHTS
from fxc.passes.order import order

DEAD = Fact("dead", lambda program: {})


def make(name_: str, **facts):
    """A pass that does nothing and is not registered."""
    made = type(name_, (Pass,), {k: frozenset(v) for k, v in facts.items()} | {"run": lambda s, p, c: Result()})
    made.name = name_.lower()
    return dataclass(frozen=True)(made)()


def named(passes):
    return [type(p).__name__ for p in passes]


def test_givers_before_needers_before_breakers():
    prune = make("Prune", needs={FLOAT_WEIGHTS})
    quantize = make("Quantize", needs={FLOAT_WEIGHTS, DEAD}, breaks={FLOAT_WEIGHTS})
    remove = make("Remove", gives={DEAD})
    assert named(order([quantize, prune, remove]).passes)[-1] == "Quantize"


def test_what_is_missing_is_added_and_said():
    ordered = order(parse_passes("int8"))
    assert [p.name for p in ordered.passes] == ["canonicalize", "int8"]
    assert ordered.reasons == [["added: int8 needs canonical"], ["canonicalize gives canonical, which int8 needs"]]


def test_a_cycle_names_both():
    one = make("One", needs={FLOAT_WEIGHTS}, breaks={FLOAT_WEIGHTS})
    two = make("Two", needs={FLOAT_WEIGHTS}, breaks={FLOAT_WEIGHTS})
    with pytest.raises(UsageError, match="one and two each have to run before the other") as caught:
        order([one, two])
    assert "float_weights" in str(caught.value)


def test_a_pass_that_was_added_and_cannot_run_says_how_to_leave_it_out():
    model, calib = Mlp(), [(torch.randn(2, 40),) for _ in range(8)]
    packed = fxc.optimize(model, calib[0], passes="int4:group=32:only=down")
    with pytest.raises(UsageError, match="the pass smooth needs float_weights") as caught:
        fxc.optimize(packed, passes="int8:mode=static:only=up", calib=calib)
    assert "int8:smooth=false" in str(caught.value)
    made = fxc.optimize(packed, passes="int8:mode=static:only=up:smooth=false", calib=calib)
    assert any("int8_static" in str(node.target) for node in made.program.graph.nodes)


def test_a_fact_that_nobody_gives():
    with pytest.raises(UsageError, match="needs dead, which no pass gives"):
        order([make("Lonely", needs={DEAD})], fxc.capture(Mlp(), (torch.randn(2, 40),)) and None)


def test_loading_a_model_imports_no_graph_library():
    code = "import sys, fxc; fxc.load; fxc.optimize; sys.exit('networkx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

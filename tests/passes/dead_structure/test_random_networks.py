"""What dead_structure makes of random networks with zeroed structures computes the same, and is smaller where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from random_networks import LENGTH, Network, networks
from structures import elements

import fxc
from fxc.analysis.known import known_values
from fxc.ir.check import check
from fxc.ir.observe import run
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context
from fxc.passes.float64 import in_float64
from fxc.pipeline import run_passes
from fxc.verify.compare import relative_error

# torch.nn.utils.prune computes a layer's weight anew in every call, and torch.export says so.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")

SHARDS = {"rows": 5, "tokens": 6, "images": 6}
QUICK = 1  # shard of each family that a plain run of the tests has
PER_SHARD = 10
SIZES = [(3, LENGTH), (1, 2), (5, LENGTH + 2)]  # (batch, length of token sequences)


def canonical(network: Network) -> Program:
    program = fxc.capture(network.build(), tuple(network.inputs(*SIZES[0])), check=False)
    program = run_passes(program, Context(), Options("canonicalize", verify=False))[0]
    # Where a module casts to float32, a constant that the pass computes would be rounded there.
    return in_float64(program, typed=True)


def without_dead_structure(program: Program) -> tuple[Program, int]:
    """The program that is left, and how many places changed."""
    after, steps = run_passes(program, Context(), Options("dead_structure", verify=False))
    return after, next(step.changed for step in steps if step.name == "dead_structure")


def difference(network: Network, a: Program, b: Program) -> float:
    """The largest relative error of the outputs in float64, at three sizes."""
    inputs = [network.inputs(*size) for size in SIZES]
    return max(relative_error(run(b, each), run(a, each)) for each in inputs)


def agrees(network: Network) -> None:
    before = canonical(network)
    after, _ = without_dead_structure(before)
    check(after)
    assert difference(network, before, after) <= 1e-10
    assert without_dead_structure(after)[1] == 0, "a second run found something to remove"
    shrinks_as_it_must(network, before, after)


def shrinks_as_it_must(network: Network, before: Program, after: Program) -> None:
    known = known_values(before)
    if any(r in known and known[r].is_complete for r in before.results):
        return  # a network whose result does not depend on its input: what computes it stays, one unit wide
    sure = list(network.shrinks())
    for cut, fqn, dim, most in sure:
        left = after.constants.get(fqn)
        assert left is None or left.shape[dim] <= most, f"{cut}: {fqn} is {list(left.shape)}, {most} in dimension {dim} is all"
    if sure:
        # Masks of torch.nn.utils.prune are no part of the network's size: they go when they are applied.
        size = sum(t.numel() for fqn, t in before.constants.items() if not fqn.endswith("_mask"))
        assert after.numel() < size, f"{after.numel()} parameters are left of {size}"


def loses_nothing_by_elements(drawn: tuple[Network, list[tuple[str, int]]]) -> None:
    network, choices = drawn
    before = canonical(network)
    masked = before.copy()
    for fqn, element in choices:
        fqn = before.aliases.get(fqn, fqn)
        masked.constants[fqn] = masked.constants[fqn].clone()
        masked.constants[fqn].view(-1)[element] = 0
    (whole, _), (after, _) = without_dead_structure(before), without_dead_structure(masked)
    assert difference(network, masked, after) <= 1e-10
    assert after.numel() == whole.numel()


@st.composite
def with_elements(draw, family: str) -> tuple[Network, list[tuple[str, int]]]:
    """A network with nothing zeroed, and at most one element of each of its weights."""
    network = draw(networks(family, cut=False))
    sizes = elements(network.whole())
    chosen = draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=3, unique=True)) if sizes else []
    return network, [(fqn, draw(st.integers(0, sizes[fqn] - 1))) for fqn in chosen]


def examples(first: int, number: int, strategy: st.SearchStrategy, test: Callable[[Any], None]) -> None:
    """Run `test` on `number` examples from the `first` on, the same in every run. Each is drawn by a run of hypothesis of its
    own, the first after the simplest: of the examples of one run most are small changes of the one before."""
    passed = set()

    def once(example) -> None:
        if repr(example) not in passed:
            test(example)
            passed.add(repr(example))

    quick = settings(max_examples=2, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))
    for i in range(first, first + number):
        seed(i)(quick(given(example=strategy)(lambda example: once(example))))()


@pytest.mark.parametrize(
    ("family", "shard"),
    [
        pytest.param(family, shard, marks=[pytest.mark.slow] * (shard >= QUICK))
        for family, shards in SHARDS.items()
        for shard in range(shards)
    ],
)
def test_masked_and_sliced_agree(family, shard):
    examples(1000 * (shard // 2) + PER_SHARD * (shard % 2), PER_SHARD, networks(family), agrees)


@pytest.mark.parametrize("first", [0, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", SHARDS)
def test_single_zeros_remove_nothing(family, first):
    examples(first, 5, with_elements(family), loses_nothing_by_elements)

"""The integer program against trying everything."""

import itertools
import math
import random

import pytest

from fxc.selection.knapsack import solve, total


def groups(seed: int, count: int) -> list[dict[int, dict[str, float]]]:
    draw = random.Random(seed)
    return [
        {n: {"size": float(draw.randrange(1, 5000)), "loss": draw.random() ** 3, "decode": draw.uniform(-1, 1)}
         for n in draw.sample(range(8), draw.randrange(1, 5))}
        for _ in range(count)
    ]  # fmt: skip


def by_trying(options, minimise, limits, allowed=lambda choice: True):
    fitting = [
        choice for choice in itertools.product(*options)
        if allowed(choice) and all(total(options, choice, name) <= limit for name, limit in limits.items())
    ]  # fmt: skip
    return min((total(options, each, minimise) for each in fitting), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_what_trying_everything_finds(seed):
    options = groups(seed, 6)
    sizes = sorted(total(options, each, "size") for each in itertools.product(*options))
    for minimise, limits in [
        ("loss", {"size": sizes[len(sizes) // 3]}),
        ("loss", {"size": sizes[len(sizes) // 2], "decode": 0.0}),
        ("size", {"loss": total(options, [min(o, key=lambda n: o[n]["loss"]) for o in options], "loss") * 1.5 + 1e-3}),
        ("loss", {"size": math.inf}),
        ("loss", {"size": sizes[0] - 1}),
    ]:
        found, best = solve(options, minimise, limits), by_trying(options, minimise, limits)
        assert (found is None) == (best is None)
        if found is not None:
            assert total(options, found, minimise) == pytest.approx(best, abs=1e-6)
            assert all(total(options, found, name) <= limit for name, limit in limits.items())


def test_a_further_answer_differs_in_as_many_groups_as_asked_for():
    options = groups(3, 6)
    several = sum(len(each) > 1 for each in options)
    assert several >= 3
    limits = {"size": sum(max(c["size"] for c in each.values()) for each in options)}
    first = solve(options, "loss", limits)
    for differing in (1, 2, 3):
        other = solve(options, "loss", limits, [first], differing)
        assert sum(a != b for a, b in zip(first, other, strict=True)) >= differing
        far = by_trying(options, "loss", limits, lambda c, d=differing: sum(a != b for a, b in zip(c, first)) >= d)
        assert total(options, other, "loss") == pytest.approx(far, abs=1e-6)
    assert solve(options, "loss", limits, [first], several + 1) is None


def test_of_no_groups_nothing_is_chosen():
    assert solve([], "loss", {"size": 1.0}) == []

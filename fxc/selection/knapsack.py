"""Which option of each group: a multiple-choice knapsack, solved exactly as an integer program by HiGHS (scipy's `milp`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# HiGHS keeps constraints to within about this share of them. An answer beyond one is looked for again within it, drawn in.
TOLERANCE = 1e-6
Costs = Mapping[str, float]
"""Of one option, by name: "size", "loss", and one for each latency that counts."""


def solve(
    options: Sequence[Mapping[int, Costs]],
    minimise: str,
    limits: Mapping[str, float],
    unlike: Sequence[Sequence[int]] = (),
    differing: int = 1,
) -> list[int] | None:
    """One option of each group, by number, so that the sum of the cost `minimise` is least and no other sum is above its limit;
    None where there is none. unlike: earlier answers, from each of which `differing` groups have to differ."""
    if not options:
        return []
    within = {name: limit for name, limit in limits.items() if limit != float("inf")}
    margin = 0.0
    while True:
        found = _solved(options, minimise, within, unlike, differing, margin)
        if found is None or all(total(options, found, name) <= limit for name, limit in within.items()):
            return found
        margin = max(2 * margin, TOLERANCE / 4)


def _solved(
    options: Sequence[Mapping[int, Costs]],
    minimise: str,
    limits: Mapping[str, float],
    unlike: Sequence[Sequence[int]],
    differing: int,
    margin: float,
) -> list[int] | None:
    """margin: by so much of its largest number each limit is drawn in."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, vstack

    columns = [(group, number) for group, some in enumerate(options) for number in some]
    place = {each: at for at, each in enumerate(columns)}
    count = len(columns)

    def costs(name: str) -> Any:
        return np.array([options[group][number][name] for group, number in columns])

    one_each = coo_array((np.ones(count), ([group for group, _ in columns], range(count))), shape=(len(options), count))
    rows, least, most = [one_each], [1.0] * len(options), [1.0] * len(options)
    for name, limit in limits.items():
        # Of numbers about 1, which is what tolerances are made for.
        scale = max(abs(limit), float(np.abs(costs(name)).max()), 1e-30)
        rows.append(coo_array((costs(name) / scale)[None]))
        least.append(-np.inf)
        most.append(limit / scale - margin)
    for earlier in unlike:
        same = np.zeros(count)
        same[[place[each] for each in enumerate(earlier) if each in place]] = 1
        rows.append(coo_array(same[None]))
        least.append(-np.inf)
        most.append(float(len(options) - differing))
    wanted = costs(minimise)
    found = milp(
        wanted / max(float(np.abs(wanted).max()), 1e-30), integrality=np.ones(count), bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack(rows).tocsr(), np.array(least), np.array(most)), options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        return None
    chosen: list[int] = [0] * len(options)
    for (group, number), taken in zip(columns, found.x, strict=True):
        if taken > 0.5:
            chosen[group] = number
    return chosen


def total(options: Sequence[Mapping[int, Costs]], choice: Sequence[int], name: str) -> float:
    """The sum of the cost `name` over the options chosen."""
    return sum(some[number][name] for some, number in zip(options, choice, strict=True))

"""Which layers may be held in floats, where their memory is bounded.

A form in floats, or a float copy beside another form, takes more memory than the smallest form that the layer can run in.
keep_float is the share of what the smallest forms of all layers save that may be spent on that: 0 for none of it, 1 for all,
which is the original's memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxc.lower.choose import Choice


@dataclass(frozen=True)
class Wish:
    """choices: how a layer may be lowered, the one that it wants first; nbytes: what it holds in each; dense: what it was
    before it was compressed, in bytes, without what stays of it for other readers."""

    choices: Sequence[Choice]
    nbytes: Sequence[int]
    dense: int

    @property
    def least(self) -> int:
        """Which choice holds the least; of two alike the faster one."""
        return min(range(len(self.choices)), key=lambda at: (self.nbytes[at], -self.choices[at].gain))

    def worth(self, at: int) -> float:
        """What a choice gains over the smallest, in logarithms of time for each byte of its share of the layer."""
        more = self.nbytes[at] - self.nbytes[self.least]
        return math.log(self.choices[at].gain / self.choices[self.least].gain) * self.dense / more


def within(wishes: Sequence[Wish], keep_float: float) -> list[Choice]:
    """A choice for each layer: what it wants where all of that fits, else the memory goes to those first that gain most by it.
    The reason of one that does not have what it wants says so."""
    chosen = [wish.least for wish in wishes]
    left = keep_float * sum(max(wish.dense - wish.nbytes[at], 0) for wish, at in zip(wishes, chosen, strict=True))
    if sum(wish.nbytes[0] - wish.nbytes[at] for wish, at in zip(wishes, chosen, strict=True)) <= left:
        return [wish.choices[0] for wish in wishes]
    larger = [(wish, at, n) for n, wish in enumerate(wishes) for at in range(len(wish.choices))]
    larger = [each for each in larger if each[0].nbytes[each[1]] > each[0].nbytes[each[0].least]]
    for wish, at, n in sorted(larger, key=lambda each: -each[0].worth(each[1])):
        more = wish.nbytes[at] - wish.nbytes[chosen[n]]
        if more <= left and wish.choices[at].gain > wish.choices[chosen[n]].gain:
            chosen[n], left = at, left - more
    return [_told(wish, at, keep_float) for wish, at in zip(wishes, chosen, strict=True)]


def _told(wish: Wish, at: int, keep_float: float) -> Choice:
    wanted, choice, more = wish.choices[0], wish.choices[at], wish.nbytes[0] - wish.nbytes[at]
    if more <= 0:
        return choice
    why = f"keep_float={keep_float:g} has no room for {wanted.name}, which is faster and holds {more / 1e6:.2f} MB more"
    return dataclasses.replace(choice, reason=f"{why}; {choice.reason}")

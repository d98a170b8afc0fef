"""The algebra of axes: atoms, products and sums, cut and split."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxc.analysis.axis import (
    DYNAMIC,
    ONE,
    Atom,
    Axis,
    Mismatch,
    Product,
    Sum,
    atoms,
    cut,
    give_role,
    kept,
    pin,
    product_of,
    resolve,
    split,
    sum_of,
    unify,
    units,
)

ANOTHER_WAY = "it meets a dimension that is divided in another way"


def sizes(axis: Axis) -> list[int]:
    return [atom.size for atom in atoms(axis)]


def positions(axis: Axis) -> list[frozenset]:
    """What each position along `axis` is made of, {(atom, index), ...}: the definition of an axis, written out."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [frozenset({(axis, i)}) for i in range(axis.size)]
    if isinstance(axis, Sum):
        return [p for term in axis.terms for p in positions(term)]
    return [frozenset().union(*each) for each in itertools.product(*(positions(f) for f in axis.factors))]


def made_of(*parts: int) -> tuple[Axis, ...]:
    return tuple(Atom(size) for size in parts)


def some_axes() -> list[Axis]:
    a, b, c, d = made_of(2, 3, 4, 3)
    return [
        ONE,
        a,
        product_of(a, b),
        sum_of([a, b, a]),
        sum_of([product_of(a, c), c]),
        product_of(sum_of([a, c]), b),
        product_of(a, sum_of([b, b])),
        sum_of([product_of(b, sum_of([c, c])), product_of(d, c, a)]),
    ]


@pytest.mark.parametrize("number", range(len(some_axes())))
def test_units_and_kept_say_what_positions_are_made_of(number):
    axis = some_axes()[number]
    written = positions(axis)
    assert len(written) == axis.size
    for atom in set(atoms(axis)):
        expected = [next((i for a, i in p if a is atom), -1) for p in written]
        assert units(axis, atom).tolist() == expected
    assert units(axis, Atom(5)).tolist() == [-1] * axis.size
    alive = {atom: torch.arange(atom.size) % 2 == 0 for atom in set(atoms(axis))}
    assert kept(axis, alive).tolist() == [all(i % 2 == 0 for _, i in p) for p in written]
    assert kept(axis, {}).all()


@pytest.mark.parametrize("number", range(1, len(some_axes())))
@pytest.mark.parametrize("length", range(1, 12))
def test_cut_leaves_every_position_what_it_was(number, length):
    axis = some_axes()[number]
    if length >= axis.size:
        return
    before = positions(axis)
    try:
        head, tail = cut(axis, length)
    except Mismatch:
        return
    assert (head.size, tail.size) == (length, axis.size - length)
    assert positions(head) + positions(tail) == positions(axis)
    if all(atom.definition is None for position in before for atom, _ in position):
        assert positions(axis) == before


@pytest.mark.parametrize("number", range(1, len(some_axes())))
@pytest.mark.parametrize("outer", range(2, 7))
def test_split_gives_the_factors_or_says_that_there_are_none(number, outer):
    axis = some_axes()[number]
    if axis.size % outer:
        with pytest.raises(Mismatch):
            split(axis, outer)
        return
    try:
        high, low = split(axis, outer)
    except Mismatch:
        return
    assert (high.size, low.size) == (outer, axis.size // outer)
    assert positions(product_of(high, low)) == positions(axis)


def test_a_dimension_is_defined_as_the_product_that_it_meets():
    hidden, (heads, width) = Atom(12), made_of(4, 3)
    unify(hidden, product_of(heads, width))
    assert resolve(hidden) == Product((heads, width))
    assert units(hidden, heads).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert units(hidden, width).tolist() == [0, 1, 2] * 4
    assert kept(hidden, {heads: torch.tensor([True, False, True, True])}).tolist() == [True] * 3 + [False] * 3 + [True] * 6


def test_two_divisions_that_nest_are_refined():
    a, b = product_of(*made_of(4, 6)), product_of(*made_of(2, 12))
    unify(a, b)
    assert resolve(a) == resolve(b) and sizes(a) == [2, 2, 6]


@pytest.mark.parametrize(("left", "right"), [((4, 6), (3, 8)), ((2, 3), (3, 2))])
def test_two_divisions_that_do_not_nest_pin_both(left, right):
    a, b = product_of(*made_of(*left)), product_of(*made_of(*right))
    unify(a, b)
    assert {atom.pin for axis in (a, b) for atom in atoms(axis)} == {ANOTHER_WAY}


def test_sizes_that_differ_pin_both_and_so_does_a_dynamic_one():
    a, b, c = made_of(4, 5, 6)
    unify(a, b)
    unify(c, DYNAMIC)
    assert {a.pin, b.pin, c.pin} == {ANOTHER_WAY}
    assert DYNAMIC.pin == "its size is known only when the program runs", "nothing else may be said of what all share"


def test_the_first_reason_is_kept_and_goes_with_the_definition():
    atom, (x, y) = Atom(6), made_of(2, 3)
    pin(atom, "first")
    pin(atom, "second")
    give_role(atom, "channel")
    unify(atom, product_of(x, y))
    pin(atom, "third")
    assert (x.pin, y.pin) == ("first", "first") and x.roles == {"channel"}
    assert Atom(2).pin is None


def test_an_atom_is_not_made_of_itself():
    atom = Atom(4)
    high, _ = split(atom, 2)
    unify(high, Atom(2))
    unify(atom, atom)
    assert atom.pin is None and sizes(atom) == [2, 2]
    # A half that would have to be the whole.
    x = Atom(4)
    unify(product_of(x, Atom(2)), product_of(Atom(2), x))
    assert all(len(p) for p in positions(x)), "it resolves to something finite"


def test_fused_queries_keys_and_values_share_their_heads():
    """A projection to 3 * 4 * 2, cut in three, each of which is four heads."""
    fused, heads = Atom(24), Atom(4)
    rest, widths = fused, []
    for _ in range(3):
        part, rest = cut(rest, 8) if rest.size > 8 else (rest, None)
        high, low = split(part, 4)
        unify(high, heads)
        widths.append(low)
    assert units(fused, resolve(heads)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3
    assert len({resolve(w) for w in widths}) == 3, "the widths of the three have nothing to do with each other"
    assert resolve(heads).pin is None
    stays = kept(fused, {resolve(heads): torch.tensor([True, True, False, True])})
    assert stays.tolist() == [True, True, True, True, False, False, True, True] * 3


def test_rotation_makes_the_halves_of_a_width_one_axis():
    """x * cos + cat(-x2, x1) * sin: index i and i + half stay and go together."""
    width = Atom(8)
    first, second = cut(width, 4)
    unify(width, sum_of([second, first]))
    half = resolve(first)
    assert resolve(width) == Sum((half, half))
    assert units(width, half).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert kept(width, {half: torch.tensor([True, False, True, True])}).tolist() == [True, False, True, True] * 2
    heads = Atom(2)
    projection = product_of(heads, width)
    assert units(projection, half).tolist() == [0, 1, 2, 3] * 4
    assert units(projection, heads).tolist() == [0] * 8 + [1] * 8


def test_sums_with_other_boundaries_are_cut_at_both():
    (a, b), (x, y) = made_of(3, 5), made_of(6, 2)
    unify(sum_of([a, b]), sum_of([x, y]))
    assert sizes(sum_of([a, b])) == [3, 3, 2] == sizes(sum_of([x, y]))
    assert resolve(sum_of([a, b])) == resolve(sum_of([x, y]))


def test_a_cut_within_a_head_is_none():
    heads, width = made_of(4, 3)
    with pytest.raises(Mismatch):
        cut(product_of(heads, width), 4)
    head, tail = cut(product_of(heads, width), 6)
    assert sizes(head) == [2, 3] and sizes(tail) == [2, 3] and resolve(heads) == Sum(tuple(list(atoms(heads))))


def test_products_are_flat_and_sums_stand_outside():
    a, b, c = made_of(2, 3, 4)
    assert product_of(product_of(a, b), c) == Product((a, b, c))
    assert product_of(a, ONE) is a and product_of() == ONE
    assert sum_of([sum_of([a, b]), c]) == Sum((a, b, c)) and sum_of([a]) is a
    assert product_of(sum_of([a, b]), c) == Sum((Product((a, c)), Product((b, c))))

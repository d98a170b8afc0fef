"""Constants that are in files: a dict to passes, written in parts, with what a killed process wrote taken up again."""

import threading
from collections import deque

import pytest
import torch

from fxc.ir import store
from fxc.ir.store import Constants, saved


class Files:
    """Writes nothing, and says what it was given. earlier: what a killed process wrote, by name, in order."""

    def __init__(self, **earlier):
        self.written, self.earlier = [], deque(earlier.items())

    def write(self, tensors):
        self.written.append(list(tensors))
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def saved(self, accept):
        found = {}
        while self.earlier and accept(self.earlier[0][0]):
            found.update([self.earlier.popleft()])
        return found

    def forget(self):
        self.earlier.clear()


def constants(**earlier):
    return Constants({"a.weight": torch.ones(2)}, Files(**earlier))


def test_what_is_put_in_waits_and_is_written_together():
    made = constants()
    b, c = torch.zeros(3), torch.zeros(4)
    made["b.weight"], made["c.weight"] = b, c
    assert made["b.weight"] is b and made.spill.written == []
    made.settle()
    assert made.spill.written == [["b.weight", "c.weight"]] and made["b.weight"] is not b
    made.settle()
    assert len(made.spill.written) == 1


def test_more_than_a_part_is_written_between_modules(monkeypatch):
    monkeypatch.setattr(store, "PART_BYTES", 16)
    made = constants()
    for name in ("b.q", "b.scale", "c.q", "c.scale", "d.q"):
        made[name] = torch.zeros(4)
    assert made.spill.written == [["b.q", "b.scale"], ["c.q", "c.scale"]]


class Slow(Files):
    """Writes when it is told to."""

    def __init__(self):
        super().__init__()
        self.may = threading.Event()

    def write(self, tensors):
        assert self.may.wait(60)
        return super().write(tensors)


def test_the_next_ones_are_made_while_a_part_is_written(monkeypatch):
    monkeypatch.setattr(store, "PART_BYTES", 16)
    made = Constants({}, Slow())
    b, c, again = torch.zeros(4), torch.ones(1), torch.full((4,), 2.0)
    made["b.q"], made["c.q"] = b, c
    assert made["b.q"] is b and made.spill.written == [], "it is read from memory as long as it is in no file"
    made["b.q"] = again
    made.spill.may.set()
    made.settle()
    assert made.spill.written == [["b.q"], ["c.q", "b.q"]]
    assert torch.equal(made["b.q"], again) and made["b.q"] is not again and made["c.q"] is not c


@pytest.mark.parametrize("is_renamed", [False, True])
def test_another_name_for_what_is_being_written_writes_nothing(is_renamed, monkeypatch):
    monkeypatch.setattr(store, "PART_BYTES", 16)
    made = constants()
    shared = torch.zeros(4)
    made["b.q"], made["c.q"] = shared, torch.ones(1)
    if is_renamed:
        del made["b.q"]
    made["d.q"] = shared
    assert made["d.q"] is not shared and (is_renamed or made["d.q"] is made["b.q"])
    made.settle()
    assert made.spill.written == [["b.q"], ["c.q"]] and torch.equal(made["d.q"], shared)


def test_what_goes_wrong_in_writing_is_raised(monkeypatch):
    monkeypatch.setattr(store, "PART_BYTES", 16)
    made = constants()
    made.spill.write = lambda tensors: 1 / 0
    made["b.q"] = torch.zeros(4)
    made["c.q"] = torch.zeros(4)
    with pytest.raises(ZeroDivisionError):
        made.settle()


def test_a_copy_is_written_first_and_independent():
    made = constants()
    made["b"] = torch.zeros(3)
    other = made.copy()
    del other["a.weight"]
    assert made.spill.written == [["b"]] and other["b"] is made["b"]
    assert set(made) == {"a.weight", "b"} and set(other) == {"b"}
    assert isinstance(other, Constants)


def test_what_is_taken_out_is_not_written():
    made = constants()
    made["b"] = made["c"] = torch.zeros(3)
    made["d"] = torch.zeros(3)
    del made["b"]
    made.pop("d")
    made.settle()
    assert made.spill.written == [["c"]]


def test_another_name_for_what_is_in_a_file_writes_nothing():
    made = constants()
    made["b"] = made["a.weight"]
    made.settle()
    assert made.spill.written == [] and made["b"] is made["a.weight"]


def test_it_is_read_as_a_dict_is():
    made = constants()
    made.update({"b": torch.zeros(3)})
    assert made.get("c") is None and made.get("b") is made["b"]
    assert [name for name, _ in made.items()] == ["a.weight", "b"]
    assert [each.numel() for each in made.values()] == [2, 3]
    assert made.keys() - {"b"} == {"a.weight"}


def test_what_is_put_in_twice_is_written_twice():
    """What goes on after a kill is given the first one first, and makes the second one of it."""
    some = constants()
    some["b.weight"] = torch.full((2,), 3.0)
    some["c.weight"] = torch.ones(1)
    some["b.weight"] = some["b.weight"] * 2
    some.settle()
    assert some.spill.written == [["b.weight", "c.weight"], ["b.weight"]]
    assert torch.equal(some["b.weight"], torch.full((2,), 6.0))


def test_what_a_killed_process_wrote_takes_the_place_of_what_is_made_again():
    before = torch.full((3,), 7.0)
    made = constants(b=before)
    made["b"] = torch.full((3,), 7.0)
    made.settle()
    assert made["b"] is before and made.spill.written == []


def test_another_shape_than_was_written_makes_the_rest_useless():
    made = constants(b=torch.zeros(9), c=torch.zeros(3))
    made["b"], made["c"] = torch.zeros(3), torch.zeros(3)
    made.settle()
    assert made.spill.written == [["b", "c"]]


def test_parts_are_asked_for_before_they_are_computed():
    made = constants(**{"x.q": torch.zeros(1), "x.scale": torch.zeros(1), "y.q": torch.zeros(1)})
    assert list(saved(made, lambda name: name.startswith("x."))) == ["x.q", "x.scale"]
    assert saved(made, lambda name: name.startswith("x.")) == {}
    assert saved({}, lambda name: True) == {}
    made = constants(**{"x.q": torch.zeros(1)})
    made["x.q"] = saved(made, lambda name: True)["x.q"]
    made.settle()
    assert made.spill.written == []

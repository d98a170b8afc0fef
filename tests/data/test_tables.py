"""Tables that integers of an input index."""

import pytest
import torch
from torch import nn

from fxc.data.tables import bound_of, table_size
from fxc.frontend.capture import capture


class Lookup(nn.Module):
    """Looks its input up in two tables, in the smaller one after `between`."""

    def __init__(self, between):
        super().__init__()
        self.large, self.small = nn.Embedding(50, 4), nn.Embedding(20, 4)
        self.between = between

    def forward(self, x):
        return self.large(x) + self.small(self.between(x))


@pytest.mark.parametrize(
    ("between", "kept", "drawn_below"),
    [
        (lambda x: x, 20, 20),
        (lambda x: x.unsqueeze(-1).expand(-1, -1, 2)[..., 0], 20, 20),
        (lambda x: x + 2, 50, 20),
        (lambda x: (x > 3).long(), 50, 50),
    ],
    ids=["itself", "reshaped", "shifted", "compared"],
)
def test_the_smallest_table_that_the_numbers_themselves_index(between, kept, drawn_below):
    program = capture(Lookup(between), (torch.ones(2, 3, dtype=torch.int64),), check=False)
    (node,) = program.placeholders
    assert table_size(node) == kept, "a number that is changed first may be larger"
    assert bound_of(node) == drawn_below, "what is made up has to fit every table"


def test_numbers_that_index_nothing():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x.float() + y

    program = capture(Sum(), (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), check=False)
    assert [table_size(node) for node in program.placeholders] == [None, None]
    assert [bound_of(node) for node in program.placeholders] == [2, 2]

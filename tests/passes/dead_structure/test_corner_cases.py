"""Corner cases of removing dead structure: what a model may do with an axis besides multiplying it by a weight."""

from __future__ import annotations

import pytest
import torch
from removal import EXACT, canonical, difference, shapes, sliced, with_forward
from torch import Tensor, nn
from torch.nn import functional as F

import fxc
from fxc.analysis.groups import groups
from fxc.analysis.shapes import regroup
from fxc.ir.program import Program

aten = torch.ops.aten


def after(model: nn.Module, *inputs: Tensor) -> Program:
    """What is left of a float64 model, which says the same as before."""
    before = canonical(model, tuple(t.double() if t.is_floating_point() else t for t in inputs))
    found, result = sliced(before)
    assert difference(before, found, result) <= EXACT
    return found


def zero(model: nn.Module, **columns: list[int]) -> nn.Module:
    """With these inputs of the layers ignored."""
    with torch.no_grad():
        for name, indices in columns.items():
            getattr(model, name).weight[:, indices] = 0
    return model


def test_a_position_along_a_product_of_an_axis_with_itself_is_of_two_indices():
    def forward(self, x):
        y = self.a(x)
        return self.o((y[:, :, None] * y[:, None, :]).flatten(1))

    model = zero(with_forward(forward, a=nn.Linear(6, 4), o=nn.Linear(16, 3)), o=[0])
    assert shapes(after(model, torch.randn(3, 6)))["a.weight"] == [4, 6]


def test_a_gram_matrix():
    def forward(self, x):
        y = self.a(x).flatten(2)
        return self.o((y @ y.transpose(1, 2)).flatten(1))

    model = zero(with_forward(forward, a=nn.Conv2d(3, 4, 3), o=nn.Linear(16, 3)), o=[0, 1, 4, 5])
    assert shapes(after(model, torch.randn(2, 3, 6, 6)))["a.weight"] == [4, 3, 3, 3]


@pytest.mark.parametrize("name", ["w", "weight"])
def test_a_constant_is_folded_into_a_weight_that_is_no_layer(name):
    def forward(self, x):
        return F.linear(torch.relu(self.a(x)), getattr(self, name))

    model = with_forward(forward, a=nn.Linear(6, 8), **{name: nn.Parameter(torch.zeros(3, 8))})
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.bias[2] = 1.5
    found = shapes(after(model, torch.randn(3, 6)))
    assert found[name] == [3, 7] and found["bias" if name == "weight" else "w_bias"] == [3]


@pytest.mark.parametrize("how", ["all", "no", "one"])
def test_a_squeeze_leaves_an_axis_of_which_one_index_is_left(how):
    def forward(self, x):
        y = torch.relu(self.a(x))
        y = y[:, None].squeeze() if how == "all" else y.squeeze(-1) if how == "no" else y[:, None].squeeze(1)
        return self.b(y)

    model = zero(with_forward(forward, a=nn.Linear(6, 3), b=nn.Linear(3, 4)), b=[0, 2])
    assert shapes(after(model, torch.randn(3, 6)))["b.weight"] == [4, 1]


def test_a_prelu_has_a_slope_for_each_channel():
    def forward(self, x):
        return self.b(self.p(self.a(x)))

    model = with_forward(forward, a=nn.Conv2d(3, 6, 3), p=nn.PReLU(6), b=nn.Conv2d(6, 4, 3, padding=1))
    zero(model, b=[1, 2])
    with torch.no_grad():
        model.a.weight[4] = 0
        model.a.bias[4] = 0
    found = shapes(after(model, torch.randn(2, 3, 8, 8)))
    assert found["p.weight"] == [3] and found["b.weight"] == [4, 3, 3, 3]


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 6), lambda: nn.BatchNorm1d(6, track_running_stats=False), lambda: nn.InstanceNorm1d(6)]
)
def test_what_is_normalised_over_stays(norm):
    """The length of a row here, which the last layer contracts."""
    model = with_forward(lambda self, x: self.o(self.n(self.a(x))), a=nn.Linear(5, 7), n=norm(), o=nn.Linear(7, 3))
    zero(model, o=[1, 4])
    assert shapes(after(model, torch.randn(2, 6, 5)))["a.weight"] == [7, 5]


def test_channels_of_an_instance_norm_may_go():
    model = with_forward(
        lambda self, x: self.o(self.n(self.a(x))),
        a=nn.Conv2d(3, 6, 3), n=nn.InstanceNorm2d(6, affine=True), o=nn.Conv2d(6, 3, 1),
    )  # fmt: skip
    found = shapes(after(zero(model, o=[1, 4]), torch.randn(2, 3, 8, 8)))
    assert found["a.weight"] == [4, 3, 3, 3] and found["n.weight"] == [4]


def test_a_weight_that_is_a_vector():
    model = with_forward(
        lambda self, x: F.linear(torch.relu(self.a(x)), self.w), a=nn.Linear(6, 8), w=nn.Parameter(torch.zeros(8))
    )
    assert shapes(after(model, torch.randn(3, 6)))["w"] == [8]


@pytest.mark.parametrize("causal", [False, True])
def test_queries_keep_their_places_where_they_see_only_what_is_before(causal):
    def forward(self, x):
        q = self.latents.expand(x.shape[0], -1, -1)
        y = F.scaled_dot_product_attention(q, self.k(x), self.v(x), is_causal=causal)
        return self.mix(y.transpose(1, 2))

    model = with_forward(
        forward, latents=nn.Parameter(torch.zeros(1, 6, 4)), k=nn.Linear(8, 4), v=nn.Linear(8, 4), mix=nn.Linear(6, 3)
    )
    found = shapes(after(zero(model, mix=[0, 3]), torch.randn(2, 5, 8)))
    assert found["latents"] == [1, 6 if causal else 4, 4]


def test_attention_without_a_batch():
    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    model = with_forward(forward, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 4), o=nn.Linear(4, 3))
    assert shapes(after(zero(model, o=[1]), torch.randn(3, 6)))["o.weight"] == [3, 4]


def test_keys_of_one_head_and_values_of_two():
    def forward(self, x):
        q, k, v = (p(x).view(-1, 5, n, 2).transpose(1, 2) for p, n in ((self.q, 4), (self.k, 1), (self.v, 2)))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    model = with_forward(forward, q=nn.Linear(8, 8), k=nn.Linear(8, 2), v=nn.Linear(8, 4), o=nn.Linear(8, 3))
    assert shapes(after(zero(model, o=[0, 1]), torch.randn(2, 5, 8)))["v.weight"] == [4, 8]


def test_an_empty_vector_is_concatenated():
    def forward(self, x):
        return self.o(torch.cat([torch.zeros(0, dtype=x.dtype), torch.relu(self.a(x))], 1))

    model = zero(with_forward(forward, a=nn.Linear(6, 5), o=nn.Linear(5, 3)), o=[1])
    with torch.no_grad():
        model.a.weight[3] = 0
    assert shapes(after(model, torch.randn(3, 6)))["a.weight"] == [3, 6]


def test_an_index_that_is_also_a_number_is_not_numbered_anew():
    model = with_forward(
        lambda self, x: self.o(torch.relu(self.a(x)).index_select(1, self.i) + self.i), a=nn.Linear(6, 5), o=nn.Linear(4, 3)
    )
    model.register_buffer("i", torch.tensor([4, 4, 1, 0]))
    assert shapes(after(zero(model, o=[1, 2]), torch.randn(3, 6)))["i"] == [4]


@pytest.mark.parametrize("gone", [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0], [2, 3], [0, 1, 2, 3, 4, 5]])
def test_an_axis_that_is_copied_to_itself(gone):
    """Each index is read by the next, all the way round."""

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.o(y + y.index_select(1, self.i))

    model = with_forward(forward, a=nn.Linear(6, 6), o=nn.Linear(6, 3))
    model.register_buffer("i", torch.arange(6).roll(1))
    after(zero(model, o=gone), torch.randn(3, 6))


def test_an_index_of_no_dimension():
    model = with_forward(
        lambda self, x: self.o(torch.relu(self.a(x)).index_select(1, self.i)), a=nn.Linear(6, 5), o=nn.Linear(1, 3)
    )
    model.register_buffer("i", torch.tensor(2))
    assert shapes(after(model, torch.randn(3, 6)))["a.weight"] == [5, 6]


def test_a_mean_of_integers():
    model = with_forward(
        lambda self, x: self.o(self.a(x) * self.i.view(5, 2).mean(1, dtype=x.dtype)), a=nn.Linear(6, 5), o=nn.Linear(5, 3)
    )
    model.register_buffer("i", torch.arange(10))
    assert shapes(after(zero(model, o=[1]), torch.randn(3, 6)))["a.weight"] == [4, 6]


@pytest.mark.fault(15)
def test_channels_of_a_transposed_convolution():
    def forward(self, x):
        return self.o(torch.relu(self.t(torch.relu(self.a(x)))))

    model = with_forward(
        forward, a=nn.Conv2d(3, 8, 3), t=nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1), o=nn.Conv2d(5, 3, 1)
    )
    zero(model, o=[1])
    with torch.no_grad():
        model.t.weight[[0, 3]] = 0
        model.t.weight[:, 4] = 0  # which leaves its bias, that is folded
        model.a.weight[5] = 0
        model.a.bias[5] = 0
        model.a.weight[6] = 0  # another constant, which stays
        model.a.bias[6] = 0.7
    found = shapes(after(model, torch.randn(2, 3, 8, 8)))
    assert found["a.weight"] == [5, 3, 3, 3] and found["t.weight"] == [5, 3, 3, 3] and found["o.weight"] == [3, 3, 1, 1]


@pytest.mark.parametrize("how", ["one more", "two at once", "elsewhere"])
def test_copies_of_heads_that_are_no_copies_of_keys(how):
    """An expand and a reshape that do more than to repeat."""

    def forward(self, x):
        y = self.a(x).view(-1, 3, 2)
        if how == "one more":
            z = y[:, :, None].expand(-1, 3, 4, 2).reshape(-1, 12, 1, 2) * self.g[:, None, None]
        elif how == "two at once":
            z = y[:, None, :, None].expand(-1, 5, 3, 4, 2).reshape(-1, 5, 12, 2) * self.g[:, None]
        else:
            z = y.view(-1, 3, 1, 2).unsqueeze(1).expand(-1, 5, 3, 4, 2).reshape(-1, 5, 12, 2) * self.g[:, None]
        return self.b(z.flatten(1))

    copies = 1 if how == "one more" else 5
    model = with_forward(forward, a=nn.Linear(6, 6), g=nn.Parameter(torch.zeros(12)), b=nn.Linear(24 * copies, 3))
    with torch.no_grad():
        model.b.weight.view(3, copies, 12, 2)[:, :, [0, 5, 6, 11]] = 0
    after(model, torch.randn(7, 6))


class Past(nn.Module):
    """Its input and its output are named as a decoder's cache is, and are none."""

    def __init__(self, flat: bool):
        super().__init__()
        self.flat, self.a, self.b = flat, nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, past):
        key = self.a(past["key"])
        joined = key[:, None] if self.flat else torch.cat([past["key"], key], 1)
        return {"y": self.b(past["key"]), "present": {"key": joined}}


@pytest.mark.parametrize("flat", [False, True])
def test_only_a_decoder_has_a_cache(flat):
    model = Past(flat)
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.bias[2] = 0
    x = torch.randn(3, 6) if flat else torch.randn(3, 4, 6)
    before = canonical(model, {"past": {"key": x.double()}})
    found, result = sliced(before)
    assert difference(before, found, result) <= EXACT
    assert shapes(found)["b.weight"] == [3, 6]


def test_a_symbol_is_not_compared_with_a_number():
    """That would fix it."""
    program = fxc.capture(nn.Linear(4, 4), (torch.randn(4, 4),), check=False)
    symbol = program.placeholders[0].meta["val"].shape[0]
    assert not isinstance(symbol, int)
    regroup([8, symbol], [2, symbol * 4])
    regroup([symbol, 4], [4, symbol])
    assert str(program.placeholders[0].meta["val"].shape[0]) == str(symbol) and not symbol.node.expr.is_number


@pytest.mark.parametrize(
    "act",
    [
        lambda y: F.glu(y, 1),
        lambda y: F.glu(y.movedim(1, -1), -1).movedim(-1, 1),
        lambda y: F.glu(y, 1).flatten(2).relu().reshape_as(F.glu(y, 1)),
        lambda y: F.glu(y, 1).swapaxes(1, 2).mT.mT.swapaxes(1, 2),
        lambda y: F.interpolate(F.glu(y, 1), scale_factor=2),
        lambda y: F.interpolate(F.glu(y, 1), size=(9, 9), mode="bilinear"),
        lambda y: F.glu(y, 1) * F.glu(y, 1).mean((2, 3), keepdim=True).expand_as(F.glu(y, 1)),
    ],
)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_more_operators_that_let_channels_go(act, padding):
    def forward(self, x):
        return self.o(act(self.a(x)))

    model = with_forward(forward, a=nn.Conv2d(3, 12, 3, padding=padding), o=nn.Conv2d(6, 3, 3, padding="same"))
    zero(model, o=[1, 4])
    with torch.no_grad():
        for row in (3, 9):  # both halves of a unit, which is constant then
            model.a.weight[row] = 0
        model.a.bias[3] = 0
    found = after(model, torch.randn(2, 3, 8, 8))
    assert shapes(found)["a.weight"] == [6, 3, 3, 3] and shapes(found)["o.weight"] == [3, 3, 3, 3]
    assert {g.kind for g in groups(found) if not g.pinned and g.sites} == {"channel"}


def test_a_single_index_of_a_part_is_broadcast():
    def forward(self, x):
        y = self.a(x)
        one = torch.cat([-x[..., 1:2], x[..., :0]], -1)  # of size 1, in two parts
        return self.b(y * one)

    model = zero(with_forward(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 3)), b=[0, 3])
    assert shapes(after(model, torch.randn(4, 6)))["b.weight"] == [3, 3]


def test_keys_are_broadcast_to_the_queries():
    """As Falcon writes it: query heads are divided into those of each pair of keys and values."""

    def forward(self, x):
        q = self.q(x).view(-1, 5, 2, 3, 4)
        k, v = (torch.broadcast_to(p(x).view(-1, 5, 2, 1, 4), q.shape) for p in (self.k, self.v))
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = with_forward(forward, q=nn.Linear(8, 24), k=nn.Linear(8, 8), v=nn.Linear(8, 8), o=nn.Linear(24, 3))
    zero(model, o=[*range(4), *range(12, 24)])  # the first of three heads, and the second pair
    found = shapes(after(model, torch.randn(2, 5, 8)))
    assert found["q.weight"] == [8, 8] and found["k.weight"] == found["v.weight"] == [4, 8]

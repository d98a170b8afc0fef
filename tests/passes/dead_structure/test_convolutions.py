"""Dead channels of convolutions, and those that are constant."""

from __future__ import annotations

import pytest
import torch
from removal import removed_from, shapes, with_forward
from torch import nn
from zeroed import PICTURES, convolutions


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_whose_norm_is_zero(padding):
    model = convolutions(padding)
    with torch.no_grad():
        model.norm.weight[[1, 4, 6]] = 0
        model.norm.bias[[1, 4, 6]] = 0
    after, result = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [5, 3, 3, 3] and shapes(after)["second.weight"] == [5, 5, 3, 3]
    assert shapes(after)["norm.running_var"] == [5] and not result.refusals
    assert [(r.kind, r.before, r.removed) for r in result.removed] == [("channel", 8, 3)]


@pytest.mark.fault(12)
@pytest.mark.parametrize("second_bias", [False, True])
def test_constant_channels_are_folded_where_nothing_is_padded(second_bias):
    model = convolutions(0, second_bias=second_bias)
    with torch.no_grad():
        model.norm.weight[[1, 4, 6]] = 0
        model.norm.bias[[1, 4]] = torch.tensor([2.0, 0.5]).double()
        model.norm.bias[6] = -1.0  # which relu makes zero
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["second.weight"] == [5, 5, 3, 3] and shapes(after)["second.bias"] == [5]


@pytest.mark.fault(12)
def test_constant_channels_stay_where_the_border_is_padded_and_it_is_said_why():
    model = convolutions(1)
    with torch.no_grad():
        model.norm.weight[[1, 4, 6]] = 0
        model.norm.bias[[1, 4]] = torch.tensor([2.0, 0.5]).double()
        model.norm.bias[6] = -1.0
    after, result = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["second.weight"] == [5, 7, 3, 3], "only what is zero goes"
    assert [(r.fqn, "pads with zeros" in r.reason) for r in result.refusals] == [("second", True)]


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_of_constants_is_constant_where_nothing_is_padded(padding):
    def forward(self, x):
        return self.beside(x) + self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    model = with_forward(
        forward, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 5, 3, padding=padding), third=nn.Conv2d(5, 2, 1),
        beside=nn.Conv2d(3, 2, 3, padding=padding),
    )  # fmt: skip
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.abs_()
        model.second.bias.fill_(20)
    after, _ = removed_from(model, torch.randn(PICTURES))
    convolutions = after.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    assert (len(convolutions) == 1) == (padding == 0)


@pytest.mark.fault(15)
def test_constant_channels_of_a_grouped_convolution_are_folded_group_by_group():
    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    model = with_forward(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 6, 3, groups=2), last=nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        for channel, bias in ((1, 0.7), (5, 1.3), (2, 0.4)):  # 1 and 5 are channel 1 of both groups, 2 stays with 6
            model.first.weight[channel] = 0
            model.first.bias[channel] = bias
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [6, 3, 3, 3] and shapes(after)["second.weight"] == [6, 3, 3, 3]


@pytest.mark.fault(15)
def test_a_whole_group_of_a_convolution_goes():
    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    model = with_forward(forward, first=nn.Conv2d(3, 6, 3), second=nn.Conv2d(6, 9, 3, groups=3), last=nn.Conv2d(9, 2, 1))
    with torch.no_grad():
        model.last.weight[:, 3:6] = 0
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [4, 3, 3, 3] and shapes(after)["second.weight"] == [6, 2, 3, 3]
    assert shapes(after)["last.weight"] == [2, 6, 1, 1]


@pytest.mark.fault(15)
def test_a_channel_of_a_depthwise_convolution_goes_with_its_only_input():
    def forward(self, x):
        return self.last(torch.relu(self.depth(torch.relu(self.first(x)))))

    model = with_forward(
        forward, first=nn.Conv2d(3, 6, 1), depth=nn.Conv2d(6, 6, 3, padding=1, groups=6), last=nn.Conv2d(6, 2, 1)
    )
    with torch.no_grad():
        model.last.weight[:, [0, 3]] = 0
        model.depth.weight[5] = 0
        model.depth.bias[5] = 0
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [3, 3, 1, 1] and shapes(after)["depth.weight"] == [3, 1, 3, 3]


def test_channels_through_concatenation_and_flatten():
    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], dim=1)
        return self.head(torch.relu(self.norm(y)).flatten(1))

    model = with_forward(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 5, 3), norm=nn.BatchNorm2d(9), head=nn.Linear(9 * 49, 7))
    with torch.no_grad():
        model.norm.weight[[1, 6]] = 0
        model.norm.bias[[1, 6]] = torch.tensor([0.0, 1.5]).double()
    after, _ = removed_from(model, torch.randn(PICTURES))
    found = shapes(after)
    assert (found["a.weight"][0], found["b.weight"][0], found["norm.weight"], found["head.weight"]) == (3, 4, [7], [7, 343])

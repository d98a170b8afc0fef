"""Batch norms become a part of layers, exactly, or stay with the reason."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

import fxc
from fxc.options import Options
from fxc.passes.base import Context
from fxc.pipeline import run_passes


def live(model: nn.Module) -> nn.Module:
    """The model with norms that are not the identity, in float64."""
    torch.manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.track_running_stats:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return model.eval().double()


def folded(model: nn.Module, *example):
    """(the program after the pass, how many norms it has left, the reasons)"""
    program = fxc.capture(live(model), example or None)
    after, steps = run_passes(program, Context(), Options("fold_batch_norm"))
    left = [n for n in after.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    if example:
        with torch.no_grad():
            torch.testing.assert_close(after.module()(*example)[0], model(*example), rtol=1e-10, atol=1e-10)
    return after, len(left), "; ".join(refusal.reason for refusal in steps[-1].refusals)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


BEHIND = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv2d_groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "conv2d_same": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 3, bias=False), nn.BatchNorm3d(6, affine=False)), (2, 4, 5, 5, 5)),
    "transposed1d": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 5)),
    "transposed2d_groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5),
    ),
    "transposed3d": (lambda: nn.Sequential(nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6)), (2, 4, 3, 3, 3)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "two_in_a_row": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.BatchNorm1d(6)), (2, 4, 9)),
    "before_conv_groups": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 9, 9)),
    "before_linear": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", BEHIND)
def test_it_is_folded_exactly(case):
    make, shape = BEHIND[case]
    after, left, _ = folded(make(), x(*shape))
    assert left == 0 and not any("running" in name for name in after.constants)


@pytest.mark.parametrize(
    "name", ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenetv2", "regnet"))]
)
def test_nothing_is_left_in_families(name):
    if name == "regnet":
        import transformers

        config = transformers.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8)
        model = transformers.AutoModelForImageClassification.from_config(config)
    else:
        model, _ = build(name)
    _, left, why = folded(model)
    assert left == 0 and not why


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


STAY = {
    "padded": (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 9, 9), "zeros around it"),
    "transposed": (nn.Sequential(nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 3)), (2, 4, 9), "zeros around it"),
    "read_twice": (ReadTwice(), (2, 4, 9), "read by others too"),
    "called_twice": (CalledTwice(), (2, 4, 9), "read by others too"),
    "batch": (nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6, track_running_stats=False)), (2, 4, 9), "the statistics of"),
    "tokens": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)), (2, 5, 4), "are not its second dimension"),
}


@pytest.mark.parametrize("case", STAY)
def test_it_stays_with_the_reason(case):
    model, shape, why = STAY[case]
    _, left, said = folded(model, x(*shape))
    assert left and why in said


def test_a_norm_that_shifts_nothing_goes_into_a_padded_layer():
    model = live(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, groups=2)))
    nn.init.zeros_(model[0].bias)
    model[0].running_mean.zero_()
    program = fxc.capture(model, (x(2, 4, 9, 9),))
    after, _ = run_passes(program, Context(), Options("fold_batch_norm"))
    assert sorted(after.constants) == ["1.bias", "1.weight"]

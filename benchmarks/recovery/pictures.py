"""Gradual sparsity, Network Slimming and distillation, on the networks of examples/digits.py."""

from __future__ import annotations

from statistics import mean, stdev

import torch
from torch import Tensor, nn

import fxc
from benchmarks.output import note
from benchmarks.recovery.row import Row, timed
from examples import digits

BATCH = 64
BAR = "accuracy within 0.5 points"


class Mlp(nn.Module):
    """LeNet-300-100 on images [B, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, digits.CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def batches() -> list[Tensor]:
    """What was trained on, and noise on it once more: batches, in an order of no meaning."""
    x, *_ = digits.images()
    draw = torch.Generator().manual_seed(0)
    x = x[torch.randperm(len(x), generator=draw)]
    noisy = x + digits.NOISE * torch.randn(x.shape, generator=draw)
    return [*x.split(BATCH)[:-1], *noisy.split(BATCH)[:-1]]


def gradual() -> list[Row]:
    """80 % of all weights zero, the zeros coming while it is trained."""
    torch.manual_seed(0)
    return [_gradual("MLP", digits.fitted(Mlp())), _gradual("ResNet", digits.resnet()[0])]


def _gradual(name: str, dense: nn.Module) -> Row:
    note(f"80 % unstructured, {name}")
    example = (torch.zeros(2, 1, 8, 8),)
    at_once = fxc.optimize(dense, example, passes="sparsify:sparsity=0.8")
    spec = "recover:sparsity=0.8:steps=1200:batch=1:rate=0.002"
    made, seconds = timed(lambda: fxc.optimize(dense, example, passes=spec, calib=batches(), calib_samples=100))
    before, without, after = (digits.accuracy(each) for each in (dense, at_once, made))
    return Row(f"80 % unstructured, gradual, digits {name}", BAR, before, without, after, seconds, spec)


def slimming() -> list[Row]:
    """Half of the channels of a CNN with batch norms gone by their scales, which a penalty made small."""
    dense, example = digits.resnet()
    train = "steps=600:batch=1:rate=0.002"
    spec = f"recover:l1=0.001:{train},prune:criterion=bn_scale:channels=0.5,recover:{train}"
    note("Network Slimming")
    at_once = fxc.optimize(dense, example, passes="prune:criterion=bn_scale:channels=0.5")
    made, seconds = timed(lambda: fxc.optimize(dense, example, passes=spec, calib=batches(), calib_samples=100))
    before, without, after = (digits.accuracy(each) for each in (dense, at_once, made))
    name = "Network Slimming, digits ResNet, half of the channels"
    return [Row(name, BAR, before, without, after, seconds, spec)]


SEEDS = (0, 1, 2)


def distillation() -> list[Row]:
    """A ViT of two layers, taught by one of six and by labels, beside the same one trained on labels alone."""
    torch.manual_seed(0)
    teacher = digits.fitted(digits.ViT(depth=6))
    x, y, *_ = digits.images()
    example, data = (torch.zeros(2, 1, 8, 8),), list(zip(x.split(BATCH)[:-1], y.split(BATCH)[:-1], strict=True))
    train = {"steps": 800, "batch": 1, "rate": 0.002, "method": "all", "train_samples": len(data)}
    rows = []
    for loss, bar in (("task", "reference"), ("kl+task", "ahead of labels alone")):
        found, seconds = [], 0.0
        for seed in SEEDS:
            note(f"ViT of two layers, {loss}, seed {seed}")
            torch.manual_seed(seed)
            student = digits.ViT(depth=2).eval()
            made, took = timed(
                lambda student=student, loss=loss, seed=seed: fxc.distill(
                    teacher, student, data, example, loss=loss, temperature=2.0, seed=seed, **train
                )
            )
            found.append(digits.accuracy(made))
            seconds += took
        spread = f"{stdev(found):.4f} between {len(SEEDS)} seeds"
        how = f"fxc.distill(loss={loss}), mean; standard deviation {spread}"
        rows.append(Row(f"digits ViT, 6 layers to 2, {loss}", bar, digits.accuracy(teacher), 0.1, mean(found), seconds, how))
    return rows

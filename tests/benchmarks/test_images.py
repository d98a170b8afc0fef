"""The benchmark of networks of images, on a toy."""

import torch
from torch import nn

from benchmarks import images


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 7, 16)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3)

    def forward(self, pixel_values):
        return self.second(torch.relu(self.norm(self.first(pixel_values))))


def test_norms_are_settled_on_what_they_meet():
    toy, seen = Toy(), torch.randn(4, 3, images.SIDE, images.SIDE) + 2
    images.settled(toy, seen)
    assert not toy.norm.training and torch.allclose(toy.norm.running_mean, toy.first(seen).mean((0, 2, 3)), atol=1e-4)


def test_a_row_has_every_form_and_the_table_every_row(monkeypatch):
    monkeypatch.setattr(images, "interleave", lambda calls, rounds: {name: _Timing(call()) for name, call in calls.items()})
    (row,) = images.timed("Toy", Toy, (2,), rounds=1)
    assert row["ms"].keys() == {"float32", "bfloat16", "int8"} and sum(row["layers"].values()) == 2
    report = {"hardware": {"cpu": "c", "cores": 1, "flags": []}, "versions": {}, "threads": 1, "load_before": 0, "rounds": 1}
    text = images.markdown(report | {"timed": [row], "accuracy": [{"name": "toy", "float32": 1.0, "int8": 0.995}]})
    assert "| Toy | 2 | 3.00 | 3.00 | 3.00 | 1.00x | 1.00x |" in text and "| toy | 100.0% | 99.5% |" in text


class _Timing:
    median = 3.0

    def __init__(self, result: object) -> None:
        self.rounds = [3.0]
        assert (result[0] if isinstance(result, tuple) else result).shape[1] == 16

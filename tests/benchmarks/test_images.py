"""The benchmark of networks of images, on a toy."""

import pytest
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


@pytest.mark.parametrize("has_peer", [False, True])
def test_a_row_has_every_form_and_the_table_every_row(monkeypatch, has_peer):
    monkeypatch.setattr(images, "has_openvino", lambda: has_peer)
    monkeypatch.setattr(images, "openvino_int8", lambda model, seen: images.Logits(model))
    monkeypatch.setattr(images, "interleave", lambda calls, rounds: {name: _Timing(call()) for name, call in calls.items()})
    (row,) = images.timed("Toy", Toy, (2,), rounds=1)
    forms = {"float32", "bfloat16", "int8"} | ({"openvino"} if has_peer else set())
    assert row["ms"].keys() == forms and sum(row["layers"].values()) == 2
    report = {"hardware": {"cpu": "c", "cores": 1, "flags": []}, "versions": {}, "threads": 1, "load_before": 0, "rounds": 1}
    read = {"name": "toy", "float32": 1.0, "int8": 0.995} | ({"openvino": 0.99} if has_peer else {})
    text = images.markdown(report | {"timed": [row], "accuracy": [read]})
    beside = ("3.00", "1.00x", "99.0%") if has_peer else ("-", "-", "-")
    assert f"| Toy | 2 | 3.00 | 3.00 | {beside[0]} | 3.00 | 1.00x | 1.00x | {beside[1]} |" in text
    assert f"| toy | 100.0% | 99.5% | {beside[2]} |" in text


class _Timing:
    median = 3.0

    def __init__(self, result: object) -> None:
        self.rounds = [3.0]
        assert (result[0] if isinstance(result, tuple) else result).shape[1] == 16

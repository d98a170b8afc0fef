"""Times of single layers: every layer has one, and layers that share a product share it."""

import torch
from families import build
from torch import nn

import fxc
from fxc.measure.layers import ROUNDS, measure


def test_every_layer_of_a_decoder_has_a_time():
    model = fxc.optimize(build("qwen2")[0], passes="int8", verify=False)
    said = []

    def track(items, what, count):
        said.append((what, count))
        return items

    made = measure(model, (1e10, 1e11), track)
    names = {f"model.layers.{n}.self_attn.{part}_proj" for n in range(2) for part in "qkvo"}
    assert names <= made.microseconds.keys() and all(value > 0 for value in made.microseconds.values())
    q, k = (made.microseconds[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert abs(q / k - 2) < 1e-6 or q != k, "one product, shared by outputs, or two that were timed apart"
    assert said == [("timing layers", ROUNDS + 1)] and "tokens" in made.how
    assert made.roofline["points"] and all(x > 0 and y > 0 for x, y in made.roofline["points"])


def test_a_model_without_tokens_and_without_peaks():
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    made = measure(fxc.optimize(net, (torch.randn(4, 64),), passes="int8"))
    assert {"0", "2"} <= made.microseconds.keys() and made.roofline is None and made.how.startswith("one sample,")

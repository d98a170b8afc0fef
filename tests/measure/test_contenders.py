"""What a contender costs and how good it is."""

import math
from types import SimpleNamespace

import pytest
import torch
from families import build
from torch import nn

import fxc
from fxc.captured import capture_source
from fxc.errors import UsageError
from fxc.measure import contenders
from fxc.measure.bench import Entry
from fxc.measure.contenders import Contender, held_bytes, measure, sizes_for, sizes_of
from fxc.measure.perplexity import perplexity, relative_change
from fxc.measure.quality import Quality, evaluation_of


@pytest.mark.parametrize("text", ["", "1x", "x8", "0x8", "1x-2", "1x128;8", "1.5", "1x2x3", "9999999999"])
def test_what_is_no_size_is_said(text):
    with pytest.raises(UsageError, match="no list of sizes"):
        sizes_of(text)


def test_sizes_are_of_the_kind_that_a_model_takes(pair):
    program = pair[0].program
    assert sizes_of("1x128, 8x512,1x128") == [(1, 128), (8, 512)] and sizes_of("1,8") == [(1, None), (8, None)]
    assert sizes_for(program) == [(1, 128)] and sizes_for(program, longest=40) == [(1, 8)]
    with pytest.raises(UsageError, match="no size of this model"):
        sizes_for(program, [(4, None)])
    with pytest.raises(UsageError, match="at most 40 tokens, not 41"):
        sizes_for(program, [(1, 33)], longest=40, new=8)
    image = fxc.optimize(nn.Conv2d(3, 4, 3), (torch.zeros(2, 3, 8, 8),), passes="").program
    assert sizes_for(image) == [(1, None), (8, None)]
    with pytest.raises(UsageError, match="batches alone"):
        sizes_for(image, [(1, 128)])


def test_all_numbers_of_all_contenders(pair):
    original, packed = pair
    evaluation = evaluation_of(SimpleNamespace(program=original.program, config=original.config), samples=4)
    both = [Contender(Entry(n, "here", m, m.program, 0), 7) for n, m in (("a", original), ("b", packed))]
    first, second = measure(both, [(1, 4), (2, 4)], evaluation, new=2, rounds=3)
    assert [(x.size, x.phase) for x in first.latencies] == [(s, p) for s in ("1x4", "2x4") for p in ("prefill", "decode")]
    assert all(len(x.rounds) == 3 and x.quartiles[0] <= x.median <= x.quartiles[1] for x in second.latencies)
    assert first.latencies[0].share_of(first.latencies[0]) == 1
    assert first.quality.kind == "kl" and abs(first.quality.value) < second.quality.value / 2
    loss, error = second.quality.loss_against(first.quality)
    assert math.isclose(loss, second.quality.value, rel_tol=0.05) and 0 < error < loss


def test_what_a_loaded_model_holds_is_what_runs(pair):
    _, packed = pair
    assert held_bytes(packed) == sum(t.numel() * t.element_size() for t in packed.lowered.constants.values())
    layer = nn.Linear(4, 8)
    tied = nn.Sequential(layer, nn.Linear(8, 4, bias=False), layer)
    assert held_bytes(tied) == 4 * (4 * 8 + 8 + 4 * 8)


def test_perplexity_is_that_of_fxc_eval(pylm_dir):
    captured = capture_source(str(pylm_dir))
    original = contenders.original_contender(str(pylm_dir), captured)
    # The module has a buffer of frequencies twice.
    assert original.disk_bytes == captured.nbytes and 0 <= original.held_bytes - captured.program.nbytes() < 1000
    made = fxc.optimize(pylm_dir, passes="int4")
    evaluation = evaluation_of(captured, pylm_dir / "heldout.txt", samples=4, window=64)
    before, after = (evaluation.measure(m) for m in (original.entry.model, made))
    tokens = evaluation._tokens
    expected = [perplexity(m, tokens, 64, limit=4) for m in (original.entry.model, made)]
    assert (before.value, after.value) == (expected[0].value, expected[1].value)
    change, error = relative_change(*expected)
    loss, found = after.loss_against(before)
    assert math.isclose(loss, change) and math.isclose(found, error * (1 + change))
    assert before.kind == "perplexity" and before.count == 4 * 63 and 0 < before.error < before.value
    rows = evaluation_of(captured, ["import os\nimport sys\n", "def f(x):\n    return x\n"])
    assert rows.kind == "perplexity" and rows.measure(made).count == rows.measure(original.entry.model).count > 8


def test_accuracy_where_there_are_labels_and_else_cosine():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    captured = capture_source(net, (torch.zeros(2, 6),))
    x = torch.randn(40, 6)
    right = net(x).argmax(-1)
    labels = right.clone()
    labels[:10] = (labels[:10] + 1) % 3
    evaluation = evaluation_of(captured, list(zip(x.split(4), labels.split(4))))
    found = evaluation.measure(net)
    assert (found.kind, found.value, found.count) == ("accuracy", 0.75, 40) and found.error > 0
    assert evaluation.measure(fxc.optimize(net, (torch.zeros(2, 6),), passes="")).loss_against(found) == (0.0, 0.0)
    plain = evaluation_of(captured, list(x.split(4)))
    assert plain.kind == "cosine" and plain.measure(net).value == pytest.approx(1)
    assert plain.measure(nn.Sequential(net, nn.Linear(3, 3))).value < 0.99
    with pytest.raises(UsageError, match="has the label 7"):
        evaluation_of(captured, [(x[:2], torch.tensor([0, 7]))]).measure(net)


def test_labels_of_some_samples_or_that_are_no_labels_are_said():
    net = nn.Linear(6, 3)
    captured = capture_source(net, (torch.zeros(2, 6),))
    with pytest.raises(UsageError, match="have no label"):
        evaluation_of(captured, [{"input": torch.zeros(1, 6), "label": 1}, {"input": torch.zeros(1, 6)}])
    with pytest.raises(UsageError, match="no class of this model"):
        evaluation_of(captured, [{"input": torch.zeros(1, 6), "label": "cat"}])


def test_an_encoder_as_it_comes_gives_its_first_output(tmp_path):
    model, inputs = build("bert")
    captured = capture_source(model, inputs)
    evaluation = evaluation_of(captured, samples=3)
    assert evaluation.kind == "cosine" and evaluation.measure(model).value == pytest.approx(1)


def test_the_error_of_a_mean_is_that_of_its_units():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    found = Quality("accuracy", "labels", values, [1] * 8)
    assert found.error == pytest.approx(torch.tensor(values).std().item() / math.sqrt(8))
    assert Quality("accuracy", "labels", [3.0], [4]).error is None

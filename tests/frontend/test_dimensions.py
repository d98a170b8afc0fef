"""Which sizes of the inputs vary: found by trying, or said by the caller; and inputs whose values may not be made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxc
from fxc.data.samples import samples
from fxc.errors import CaptureFailed, UsageError


class Call(nn.Module):
    """A linear layer of `width` and a function of it and the inputs."""

    def __init__(self, function, width=64):
        super().__init__()
        self.function = function
        self.l = nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(16, width))

    def forward(self, *args):
        return self.function(self, *args)


def agree(compiled, model, *inputs):
    with torch.no_grad():
        found, expected = compiled(*inputs), model(*inputs)
    for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def encoder(batch_first):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.l = kind(16, 32, batch_first=True, bidirectional=True), nn.Linear(64, 4)

    def forward(self, x):
        return self.l(self.rnn(x)[0])


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("model", "shape", "others"),
    [
        (encoder(batch_first=True), (4, 7, 64), [(4, 9, 64), (1, 30, 64)]),
        (encoder(batch_first=False), (7, 4, 64), [(9, 4, 64), (3, 2, 64)]),
        (nn.Sequential(nn.Conv1d(16, 32, 3), nn.ReLU(), nn.Conv1d(32, 8, 3)), (2, 16, 20), [(1, 16, 33), (3, 16, 9)]),
        (Recurrent(nn.GRU), (2, 7, 16), [(2, 11, 16), (1, 3, 16)]),
        (Recurrent(nn.LSTM), (2, 7, 16), [(2, 11, 16), (1, 3, 16)]),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
            (2, 3, 32, 32),
            [(2, 3, 64, 48), (1, 3, 96, 96)],
        ),
    ],
    ids=["batch first", "time first", "conv1d", "gru", "lstm", "cnn"],
)  # fmt: skip
def test_what_the_model_takes_at_other_sizes_is_free(model, shape, others):
    model.eval()
    compiled = fxc.optimize(model, (torch.randn(shape),), "canonicalize")
    for other in (shape, *others):
        agree(compiled, model, torch.randn(other))


def test_a_mask_grows_with_its_sequence():
    model = Call(lambda self, x, mask: self.l(x) * mask[..., None])
    compiled = fxc.optimize(model, (torch.randn(4, 7, 64), torch.ones(4, 7, dtype=torch.bool)), "")
    agree(compiled, model, torch.randn(2, 11, 64), torch.ones(2, 11, dtype=torch.bool))


@pytest.mark.fault(19)
def test_a_size_that_cannot_vary_is_fixed_for_the_caller():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 8 * 8, 4)).eval()
    compiled = fxc.optimize(model, (torch.randn(2, 3, 16, 16),), "")
    agree(compiled, model, torch.randn(5, 3, 16, 16))
    with pytest.raises(UsageError, match="size 32 in dimension 2"):
        compiled(torch.randn(2, 3, 32, 32))


def test_a_branch_on_a_free_size_makes_it_a_fixed_one():
    model = Call(lambda self, x: self.l(x) * (2 if x.shape[1] > 8 else 1))
    compiled = fxc.optimize(model, (torch.randn(2, 7, 64),), "")
    agree(compiled, model, torch.randn(5, 7, 64))
    with pytest.raises(UsageError, match="captured for 7"):
        compiled(torch.randn(2, 9, 64))


def test_a_batch_of_one_that_the_model_insists_on():
    model = Call(lambda self, x: self.l(self.l(x).view(64)))
    compiled = fxc.optimize(model, (torch.randn(1, 64),), "")
    agree(compiled, model, torch.randn(1, 64))
    with pytest.raises(UsageError, match="size 2 in dimension 0; the program was captured for 1"):
        compiled(torch.randn(2, 64))


@pytest.mark.parametrize(
    "said",
    [{"x": (0, 1)}, {"x": {0: Dim("batch"), 1: Dim.AUTO}}, {"x": [Dim.DYNAMIC, Dim.AUTO, None]}, ({0: Dim("b"), 1: Dim("t")},)],
)
def test_the_caller_says_which_vary(said):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(64, 64)

        def forward(self, x):
            return self.l(x)

    model = Named()
    program = fxc.capture(model, (torch.randn(1, 7, 64),), dynamic_shapes=said)
    assert [isinstance(s, int) for s in program.placeholders[0].meta["val"].shape] == [False, False, True]
    program = fxc.capture(model, (torch.randn(4, 7, 64),), dynamic_shapes={"x": 0})
    assert [isinstance(s, int) for s in program.placeholders[0].meta["val"].shape] == [False, True, True]
    with pytest.raises(CaptureFailed, match="dimension 2 of x cannot vary"):
        fxc.capture(model, (torch.randn(4, 7, 64),), dynamic_shapes={"x": (2,)})
    with pytest.raises(UsageError, match="no input 'y'"):
        fxc.capture(model, (torch.randn(4, 7, 64),), dynamic_shapes={"y": (0,)})
    with pytest.raises(UsageError, match="no dimension 3"):
        fxc.capture(model, (torch.randn(4, 7, 64),), dynamic_shapes={"x": (3,)})


# -------------------------------------------------------------------------------------- values that may not be made up


def bags(self, ids, offsets):
    return self.l(nn.functional.embedding_bag(ids, self.table, offsets))


def log_of_probabilities(self, x):
    return self.l(x.log())


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (bags, (torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([0, 3, 5]))),
        (log_of_probabilities, (torch.rand(4, 64) + 0.1,)),
    ],
)
def test_gates_use_the_examples_where_random_values_break_the_model(function, inputs):
    model = Call(function).eval()
    compiled = fxc.optimize(model, inputs, "int8")
    assert "ok: outputs differ" in compiled.report["passes"][-1]["gates"]["meaning"]
    assert torch.equal(samples(compiled.program)[0][-1], inputs[-1])


def test_an_end_token_that_a_head_looks_for():
    import transformers

    config = transformers.BartConfig(
        d_model=64, vocab_size=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, num_labels=3,
    )  # fmt: skip
    compiled = fxc.optimize(transformers.BartForSequenceClassification(config).eval(), passes="int8")
    assert (samples(compiled.program)[0][0] == 2).any()

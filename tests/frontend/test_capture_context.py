"""Capture in whatever state the process has put torch, and of models whose weights are computed at every call."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxc
from fxc.errors import CaptureFailed


def mlp(wrap=lambda layer: layer) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 64)).eval()


@contextlib.contextmanager
def setting(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "default device cpu": lambda: setting(torch.set_default_device, "cpu", None),
    "with a device": lambda: torch.device("meta"),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
}


def state():
    return (
        torch.is_autocast_enabled("cpu"), torch.get_default_device(), torch.get_default_dtype(),
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(),
    )  # fmt: skip


class Factories(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = mlp()

    def forward(self, x):
        return self.l(x) * torch.full((64,), 0.5) + torch.ones(64)


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_the_process_changes_nothing_and_stays(name):
    model, x = Factories().eval(), torch.randn(4, 64)
    expected = fxc.optimize(model, (x,), "int8")(x)
    with STATES[name]():
        before = state()
        compiled = fxc.optimize(model, (x,), "int8")
        assert state() == before
        found = compiled(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled(x), expected)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, x = mlp(), torch.randn(4, 64)
        model[2].weight = model[0].weight
    compiled = fxc.optimize(model, (x,), "")
    torch.testing.assert_close(compiled(x), model(x))
    assert "0.weight" in compiled.program.constants and compiled.program.aliases == {"2.weight": "0.weight"}
    assert model[0].weight.is_inference()


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


def symmetric(layer):
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, symmetric,
        nn.utils.weight_norm, nn.utils.spectral_norm,
    ],
)  # fmt: skip
def test_a_parametrized_weight_is_captured_as_its_value(wrap):
    model, x = mlp(wrap), torch.randn(4, 64)
    if wrap is nn.utils.spectral_norm:
        model.train()(x)  # the older hook has no weight before the first call
        model.eval()
    names, expected = list(model.state_dict()), model(x)
    compiled = fxc.optimize(model, (x,), "")
    assert set(compiled.program.constants) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(compiled(x), expected)
    assert len(fxc.optimize(model, (x,), "int8").report["passes"][-1]["layer_errors"]) == 2
    assert list(model.state_dict()) == names
    model.train()(x).sum().backward()  # it can be trained on
    assert all(p.grad is not None for p in model.parameters())


def test_a_padding_mask_of_torchs_own_encoder():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x, padding = torch.randn(4, 7, 64), torch.zeros(4, 7, dtype=torch.bool)
    padding[0, 5:] = True
    compiled = fxc.optimize(model, {"src": x, "src_key_padding_mask": padding}, "")
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)  # by its fast path
    torch.testing.assert_close(compiled(src=x, src_key_padding_mask=padding)[~padding], expected[~padding])


@pytest.mark.parametrize("boolean", [False, True])
def test_an_attention_mask_of_torchs_own_encoder_and_decoder(boolean):
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    mask = mask.isinf() if boolean else mask
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1).eval()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), 1).eval()
    x = torch.randn(4, 7, 64)
    compiled = fxc.optimize(encoder, {"src": x, "mask": mask}, "canonicalize")
    torch.testing.assert_close(compiled(src=x, mask=mask), encoder(x, mask=mask))
    compiled = fxc.optimize(decoder, {"tgt": x, "memory": x.flip(0), "tgt_mask": mask}, "canonicalize")
    expected = decoder(x, x.flip(0), tgt_mask=mask)
    torch.testing.assert_close(compiled(tgt=x, memory=x.flip(0), tgt_mask=mask), expected)


def test_padded_keys_of_an_attention():
    model, x = nn.MultiheadAttention(64, 4, batch_first=True).eval(), torch.randn(4, 7, 64)
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[0, 5:] = True
    given = {"query": x, "key": x, "value": x, "key_padding_mask": padding}
    compiled = fxc.optimize(model, given, "canonicalize")
    for found, expected in zip(compiled(**given), model(**given), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_decomposition_leaves_is_made_public():
    aten = torch.ops.aten

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(64, 64)

        def forward(self, x):
            y = aten._unsafe_view(self.l(aten.alias(x)), [-1, 8, 8])
            first, second = aten.unsafe_split(aten.lift_fresh_copy(y.detach()), 4, 1)
            filled = first.new_empty(first.shape).copy_(first)
            return filled.clone(memory_format=torch.contiguous_format) + aten._unsafe_index(second, [None, torch.arange(4)])

    model, x = Left().eval(), torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(fxc.optimize(model, (x,), "canonicalize")(x), model(x))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("dropout", lambda x: nn.functional.dropout(x, 0.5)),
        ("randn_like", lambda x: x + torch.randn_like(x)),
        ("bernoulli", lambda x: x * torch.bernoulli(torch.full_like(x, 0.5))),
    ],
)
def test_a_random_model_is_called_random(name, function):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x):
            return function(self.l(x))

    with pytest.raises(CaptureFailed, match="random: two runs on the same inputs differ") as caught:
        fxc.capture(Random(), (torch.randn(4, 8),))
    assert name in str(caught.value)


def test_what_cannot_be_traced_is_said_once(capfd):
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.max() > 0.5 else x

    with pytest.raises(CaptureFailed, match="data-dependent"):
        fxc.capture(Branches(), (torch.randn(4, 8),))
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""

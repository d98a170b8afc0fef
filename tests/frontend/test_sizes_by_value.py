"""Programs in which a size depends on the values of a tensor: they work whole, or are refused with the reason."""

import copy
import pickle
import shutil

import pytest
import torch
import transformers
from torch import nn

import fxc
from fxc.errors import CaptureFailed, FxcError, UsageError
from fxc.ir.parse import parse_program
from fxc.ir.text import print_program


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 48)


class ByMask(Body):
    def forward(self, x):
        return self.second(self.first(x[x[:, 0] > 0]).relu())


class ByNonzero(Body):
    def forward(self, x):
        rows = torch.nonzero(x[:, 0] > 0).squeeze(1)
        return self.second(self.first(x.index_select(0, rows)))


class ByWhere(Body):
    def forward(self, x):
        (rows,) = torch.where(x[:, 0] > 0)
        return self.second(self.first(x)[rows])


class BySelect(Body):
    def forward(self, x):
        return torch.masked_select(self.second(self.first(x)), x[:, :1] > 0)


class AfterLinear(Body):
    def forward(self, x):
        y = self.first(x)
        return self.second(y[x[:, 0] > 0]).softmax(-1), y.sum()


class TwoMasks(Body):
    def forward(self, x):
        return torch.cat([self.first(x[x[:, 0] > 0]), self.first(x[x[:, 0] <= 0])])


class ByBothDimensions(Body):
    def forward(self, x):
        return self.first(x)[x > 0] * 2


class Scattered(Body):
    def forward(self, x):
        mask = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[mask] = self.first(x[mask])
        return self.second(out)


class ByUnique(Body):
    def forward(self, x):
        return self.second(self.first(torch.unique(x.round(), dim=0)))


class ByRepeat(Body):
    def forward(self, x):
        return self.second(torch.repeat_interleave(self.first(x), (x[:, 0] > 0).to(torch.int64) + 1, dim=0))


class ByItem(Body):
    def forward(self, x):
        return self.second(self.first(x))[: int((x[:, 0] > 0).sum())]


MODELS = [ByMask, ByNonzero, ByWhere, BySelect, AfterLinear, TwoMasks, ByBothDimensions, Scattered, ByUnique, ByRepeat, ByItem]


def near(found, expected, tolerance):
    found, expected = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6


def examples():
    generator = torch.Generator().manual_seed(0)
    yield from (torch.randn(rows, 64, generator=generator) for rows in (4, 1, 9, 33))
    yield torch.randn(5, 64, generator=generator).abs()  # all rows are taken
    yield -torch.randn(5, 64, generator=generator).abs()  # none is


@pytest.mark.fault(18)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("passes", ["", "int8"])
def test_it_works_whole_or_is_refused(kind, passes, tmp_path):
    torch.manual_seed(0)
    model, tolerance = kind().eval(), 0.1 if passes else 1e-5
    try:
        compiled = fxc.optimize(model, (next(examples()),), passes)
    except (CaptureFailed, UsageError) as error:
        assert error.hint
        assert kind in (ByItem, ByRepeat, ByUnique), error  # nobody else's
        return
    text = print_program(compiled.program)
    assert print_program(parse_program(text, compiled.program.constants)) == text
    compiled.save(tmp_path / "a")
    loaded = fxc.load(tmp_path / "a")
    assert print_program(loaded.program) == text
    for other in (compiled, loaded, copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        for x in examples():
            with torch.no_grad():
                near(other(x), model(x), tolerance)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [ByMask], ids=lambda kind: kind.__name__)
def test_inductor_gives_numbers_or_refuses(kind):
    torch.manual_seed(0)
    model = kind().eval()
    compiled = fxc.optimize(model, (next(examples()),), "int8", backend="inductor")
    for x in examples():
        try:
            found = compiled(x)
        except UsageError as error:
            assert "eager" in error.hint
        else:
            near(found, model(x), 0.1)


@pytest.fixture(scope="module")
def bart():
    """BartForSequenceClassification, which reads its sentence where the token for the end stands, and the same compiled."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=64, vocab_size=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, num_labels=3,
    )  # fmt: skip
    model = transformers.BartForSequenceClassification(config).eval()
    return model, fxc.optimize(model, passes="int8")


def test_bart_pools_where_the_text_ends(bart, tmp_path):
    model, compiled = bart
    compiled.save(tmp_path / "a")
    for other in (compiled, fxc.load(tmp_path / "a"), copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        for batch, length in ((2, 9), (1, 5), (3, 20)):
            ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(length))
            ids[:, -1] = 2
            near(other(input_ids=ids).logits, model(input_ids=ids).logits.detach(), 0.1)


def test_bart_with_example_inputs(bart):
    model, ids = bart[0], torch.tensor([[5, 6, 7, 8, 2], [9, 8, 7, 6, 2]])
    compiled = fxc.optimize(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "")
    near(compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, model(input_ids=ids).logits.detach(), 1e-4)


def test_texts_with_different_numbers_of_ends_fail_as_in_the_original(bart):
    model, compiled = bart
    ids = torch.tensor([[5, 6, 7, 2], [9, 8, 7, 6]])
    with pytest.raises((ValueError, RuntimeError)):
        model(input_ids=ids)
    with pytest.raises((FxcError, RuntimeError)):
        compiled(input_ids=ids)

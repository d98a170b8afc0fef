"""Perplexity, against what can be computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from fxc.errors import UsageError, VerificationFailed
from fxc.measure.perplexity import Perplexity, perplexity, relative_change


class Bigrams(torch.nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(vocab_size=len(table), max_position_embeddings=64)
        self.rows: list[int] = []

    def forward(self, input_ids, use_cache=None):
        self.rows.append(len(input_ids))
        return SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_is_that_of_every_token_but_a_windows_first():
    torch.manual_seed(0)
    model, tokens = Bigrams(torch.randn(11, 11)), torch.randint(0, 11, (53,))
    losses = []
    for start in range(0, 53, 8):
        for at in range(start + 1, min(start + 8, 53)):
            losses.append(-model.table[tokens[at - 1]].log_softmax(-1)[tokens[at]].item())
    found = perplexity(model, tokens, 8)
    assert found.tokens == len(losses) == sum(found.counts)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert max(model.rows) > 1, "full windows go through the model together"


def test_perplexity_refuses_what_it_cannot_measure():
    model = Bigrams(torch.zeros(11, 11))
    for tokens, window in ((torch.tensor([1]), 8), (torch.tensor([1, 11]), 8), (torch.ones(9).long(), 65)):
        with pytest.raises(UsageError):
            perplexity(model, tokens, window)
    with pytest.raises(VerificationFailed, match="nan"):
        perplexity(Bigrams(torch.full((11, 11), torch.nan)), torch.ones(9).long(), 8)


def test_change_is_paired():
    before = Perplexity(0, 20, 11, [10.0, 30.0], [10, 10])
    same_shift = Perplexity(0, 20, 11, [11.0, 31.0], [10, 10])
    relative, error = relative_change(before, same_shift)
    assert relative == pytest.approx(math.exp(0.1) - 1)
    assert error == pytest.approx(0, abs=1e-9)
    _, error = relative_change(before, Perplexity(0, 20, 11, [11.0, 30.0], [10, 10]))
    assert error == pytest.approx(0.05)
    one = Perplexity(0, 10, 11, [10.0], [10])
    assert relative_change(one, one) == (0.0, None)

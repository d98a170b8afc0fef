"""An encoder and its decoder, cut in two: `tests/compiled/test_seq2seq.py` generates with it."""

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import UsageError
from fxc.ir.observe import run
from fxc.runtime.encoder_once import halves


class Pair(nn.Module):
    """Frames are halved, so that the decoder sees a length that no input has. `by`: what it adds for each frame, which has no
    batch: numbers made of the length alone, or rows of a table."""

    def __init__(self, by):
        super().__init__()
        self.by, self.encoder, self.decoder = by, nn.Linear(4, 6), nn.Linear(4, 6)
        self.table = nn.Embedding(40, 1)

    def forward(self, frames, decoder_frames):
        made = self.encoder(frames)[:, ::2]
        places = torch.arange(made.shape[1])
        added = self.table(places)[:, 0] if self.by == "table" else places / 10
        scores = self.decoder(decoder_frames) @ made.transpose(1, 2) + added
        return scores.view(frames.shape[0], -1, made.shape[1]) * decoder_frames.shape[1], made


def captured(by):
    torch.manual_seed(0)
    return fxc.capture(Pair(by), {"frames": torch.randn(2, 10, 4), "decoder_frames": torch.randn(2, 3, 4)})


@pytest.mark.parametrize(("batch", "length", "new"), [(2, 10, 3), (3, 7, 1)])
def test_both_parts_give_what_the_whole_gives(batch, length, new):
    whole = captured("length")
    parts = halves(whole)
    inputs = {"frames": torch.randn(batch, length, 4), "decoder_frames": torch.randn(batch, new, 4)}
    found = dict(inputs)
    for part in (parts.encoder, parts.decoder):
        given = [found[declared.name] for declared in part.signature.inputs]
        found |= zip(part.signature.outputs, run(part, given), strict=True)
    for name, expected in zip(whole.signature.outputs, run(whole, list(inputs.values())), strict=True):
        torch.testing.assert_close(found[name], expected)
    assert set(parts.encoder.constants) == {"encoder.weight", "encoder.bias"}
    assert set(parts.decoder.constants) == {"decoder.weight", "decoder.bias"}
    assert [declared.name for declared in parts.encoder.signature.inputs] == ["frames"]


def test_a_weight_that_every_step_would_read_is_refused():
    with pytest.raises(UsageError, match=r"in every step[\s\S]*reads table.weight"):
        halves(captured("table"))

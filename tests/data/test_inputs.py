"""The inputs of a call: what a decoder is given besides its tokens, and what a program cannot take."""

import torch
from calibrated import refused, runs
from families import build

from fxc.data.calibration import calibration_samples


def test_a_decoders_mask_positions_and_cache_are_filled_in(programs):
    program = programs("qwen2")
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), "token_type_ids": ids * 0}
    for data in (ids, [ids], [(ids,)], [{"input_ids": ids}], [padded], [ids.tolist()]):
        (sample,) = calibration_samples(program, data)
        assert torch.equal(sample[0], ids) and sample[2].tolist() == [[0, 1, 2, 3]] * 2
        assert torch.equal(sample[1], padded["attention_mask"] if data == [padded] else torch.ones_like(ids))
        assert sample[3].shape == (2, 2, 0, 16)
    runs(program, calibration_samples(program, [padded]))
    (whole,) = calibration_samples(program, [dict(zip((i.name for i in program.signature.inputs), sample))])
    assert len(whole) == len(sample)


def test_what_a_program_cannot_take(programs, folder):
    bert, qwen2, mlp = map(programs, ("bert", "qwen2", "mlp"))
    refused(programs("t5"), ["a text"], "decoder_input_ids too", folder=folder)
    assert "sample 2" in refused(mlp, [torch.zeros(1, 40), torch.zeros(1, 41)], "captured for 40")
    refused(mlp, [torch.zeros(40)], "dimensions")
    refused(mlp, [torch.full((1, 40), float("nan"))], "NaN")
    refused(mlp, [(torch.zeros(1, 40), torch.zeros(1))], "2 positional arguments")
    refused(mlp, [None], "cannot be of the type NoneType")
    refused(mlp, [], "empty")
    refused(mlp, [torch.zeros(1, 40)], "at least one sample", limit=0)
    ids = torch.ones(1, 200, dtype=torch.int64)
    refused(bert, [ids], "at most 128", config=build("bert")[0].config)
    refused(qwen2, [{"input_ids": ids, "attention_mask": ids[:, :5]}], "attention_mask is [1, 5]")
    refused(qwen2, [{"attention_mask": ids}], "missing")
    refused(qwen2, [ids[0]], "input_ids has 1 dimensions")
    refused(qwen2, [{"input_ids": ids, "past.0.key": torch.zeros(1, 2, 3, 16)}], "missing")

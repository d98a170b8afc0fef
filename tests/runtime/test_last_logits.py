"""A prompt of which only the last logits are asked for does not compute the others."""

import copy

import pytest
import torch
from families import build

from fxc import optimize
from fxc.runtime.last_logits import last_logits
from fxc_kernels.cpu import ops

IDS = torch.arange(14).view(2, 7)


def compiled(family, passes):
    model, inputs = build(family)
    return optimize(model, inputs, passes=passes, verify=False)


@pytest.mark.parametrize(
    ("family", "passes", "backend"),
    [
        ("qwen2", "", "eager"), ("qwen2", "int8", "eager"), ("gemma2", "int4:group=32", "eager"), ("gpt2", "", "eager"),
        pytest.param("qwen2", "int8", "inductor", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_they_are_those_of_the_whole(family, passes, backend):
    model = compiled(family, passes)
    model.backend = backend
    model.keep_compressed = True  # or 2 rows may run in another form than 14
    whole = model(IDS)
    last = model(IDS, logits_to_keep=1)
    assert last.logits.shape == (2, 1, whole.logits.shape[-1])
    torch.testing.assert_close(last.logits, whole.logits[:, -1:], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(last.past_key_values.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
    assert model._prompt is not None and model._prompt is not model._lowered


def test_the_head_reads_one_position():
    model = compiled("qwen2", "")
    program = last_logits(model.lowered)
    shape = program.results[program.signature.outputs.index("logits")].meta["val"].shape
    assert shape[1] == 1
    assert {name: id(tensor) for name, tensor in program.constants.items()} == {
        name: id(tensor) for name, tensor in model.lowered.constants.items()
    }


def test_where_the_logits_are_no_product_all_of_them_are_computed(monkeypatch):
    model = compiled("qwen2", "")
    monkeypatch.setattr("fxc.runtime.last_logits._HEADS", {ops.GELU})
    assert last_logits(model.lowered) is None
    assert model(IDS, logits_to_keep=1).logits.shape[1] == 1 and model._prompt is model._lowered


def test_copies_share_it_and_generation_uses_it():
    model = compiled("qwen2", "")
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model._prompt is not None
    assert copy.deepcopy(model)._prompt is model._prompt

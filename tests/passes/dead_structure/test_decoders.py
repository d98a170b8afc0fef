"""What is gone from a decoder is gone from its cache."""

from __future__ import annotations

import pytest
import torch
from families import build
from removal import EXACT, canonical, difference, sliced
from zeroed import generated

from fxc.compiled.model import compiled_model
from fxc.passes.float64 import in_float64


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_dead_layer_of_a_decoder_goes_with_its_cache(name):
    model, example = build(name)
    with torch.no_grad():
        if name == "gpt2":
            layer = model.transformer.h[0]
            last = layer.attn.c_proj, layer.mlp.c_proj
        else:
            layer = model.model.layers[0]
            last = layer.self_attn.o_proj, layer.mlp.down_proj
        for projection in last:
            projection.weight.zero_()
            if projection.bias is not None:
                projection.bias.zero_()
    before = canonical(model, example)
    after, result = sliced(before)
    assert difference(before, after, result) <= EXACT
    assert sorted(result.interface.dropped) == ["past.0.key", "past.0.value"]
    names = [i.name for i in after.signature.inputs], after.signature.outputs
    assert not any("past.0" in n or "present.0" in n for its in names for n in its)
    inside = "transformer.h.0." if name == "gpt2" else "model.layers.0."
    assert not [fqn for fqn in after.constants if fqn.startswith(inside)]
    # The model itself, which knows nothing of any of this, says the same, alone and padded on the left.
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(5))
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.double().generate(ids, attention_mask=attention, **options)
    compiled = compiled_model(in_float64(after, typed=True), {}, config=model.config)
    assert torch.equal(compiled.generate(ids, attention_mask=attention, **options), expected)


@pytest.mark.fault(14)
def test_heads_that_are_gone_are_gone_from_the_cache():
    model, example = build("gpt2")
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[16:48] = 0  # heads 1 and 2; the weight is stored transposed
    program = canonical(model, example)
    after, result = sliced(program)
    assert difference(program, after, result) <= EXACT
    heads = {i.name: n.meta["val"].shape[1] for i, n in zip(after.signature.inputs, after.placeholders) if "past." in i.name}
    assert heads == {"past.0.key": 4, "past.0.value": 4, "past.1.key": 2, "past.1.value": 2}
    assert result.interface.kept["past.1.key"][1].tolist() == [0, 3]
    ids = torch.randint(3, 300, (1, 6), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(generated(after, model, ids), model.double().generate(ids, **options))

"""rotate within heads: however values are split, shared and multiplied, and what becomes of a decoder's cache."""

from types import SimpleNamespace

import families
import pytest
import torch
from rotated import differs, family_of, rotated
from torch import nn

from fxc.data.decoder import next_inputs
from fxc.data.samples import samples
from fxc.passes.interface import Interface
from fxc.passes.rotate.hadamard import rotation
from fxc.verify.compare import relative_error

WIDTH = 8


class Attention(nn.Module):
    """Four heads of eight; kind: how queries, keys and values come apart and are multiplied."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(32, 64 if kind == "shared" else 96)
        self.o = nn.Linear(16 if kind == "cut" else 32, 32)

    def forward(self, x):
        batch, length, _ = x.shape
        y = self.qkv(x)
        if self.kind == "unbind":
            q, k, v = y.reshape(batch, length, 3, 4, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = y.split([32, 16, 16], -1) if self.kind == "shared" else y.chunk(3, -1)
            q, k, v = (each.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for each in parts)
        if self.kind == "gated":
            v = torch.nn.functional.silu(v)
        if self.kind == "cut":
            v = v[..., :4]
        if self.kind == "matmul":
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.kind == "shared")
        out = self.o(y.transpose(1, 2).flatten(2))
        return (out, v) if self.kind == "returned" else out


@pytest.mark.parametrize("kind", ["chunk", "shared", "matmul", "unbind"])
def test_values_turn_head_by_head(kind):
    torch.manual_seed(0)
    program = family_of(Attention(kind), torch.randn(2, 5, 32))
    after, result = rotated(program)
    assert result.changed == 2 and not result.refusals and differs(program, after, result) < 1e-13
    h = rotation(WIDTH)
    expected = torch.cat([head @ h for head in program.constants["o.weight"].split(WIDTH, 1)], 1)
    torch.testing.assert_close(after.constants["o.weight"], expected)
    first = 32 if kind == "shared" else 64
    for name in ("qkv.weight", "qkv.bias"):
        before, now = program.constants[name], after.constants[name]
        # Where one reshape divides all three, queries and keys turn with the values.
        kept = 0 if kind == "unbind" else first + 16 * (kind == "shared")
        assert torch.equal(now[:kept], before[:kept])
        torch.testing.assert_close(now[kept:], torch.cat([h.t() @ head for head in before[kept:].split(WIDTH)]))


@pytest.mark.parametrize("kind, why", [
    ("gated", "aten.silu"), ("returned", "the model returns it"), ("cut", "its channels are divided"),
])  # fmt: skip
def test_it_declines_with_the_reason(kind, why):
    program = family_of(Attention(kind), torch.randn(2, 5, 32))
    _, result = rotated(program)
    assert result.changed == 0 and [why in each.reason for each in result.refusals] == [True]


def test_a_decoder_goes_on_with_its_own_cache():
    model, _ = families.build("qwen2")
    program = family_of(model)
    after, result = rotated(program, of="heads")
    inputs = [t.double() if t.is_floating_point() else t for t in samples(program)[0]]
    found, expected = after.module()(*result.interface.inputs(program, inputs)), program.module()(*inputs)
    _, mask, positions, *_ = inputs
    for _ in range(3):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
        ids = torch.full_like(positions, 7)
        found, expected = (
            p.module()(*next_inputs(p, outputs, ids, mask, positions)) for p, outputs in ((after, found), (program, expected))
        )
        assert relative_error(found[:1], expected[:1]) < 1e-13
    assert relative_error(found[2:3], expected[2:3]) > 0.1, "values in the cache are rotated"


def test_what_is_cut_after_it_was_turned_comes_back_turned():
    matrix = rotation(8)
    first, second, third = Interface(), Interface(), Interface()
    first.turn({"past.0.value": {3: matrix}})
    second.cut({"past.0.value": {1: torch.tensor([1, 2]), 3: torch.arange(6)}})
    third.turn({"past.0.value": {3: rotation(6)}})
    both = first.then(second).then(third)
    value = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    names = ["input_ids", "attention_mask", "position_ids", "past.0.key", "past.0.value"]
    program = SimpleNamespace(signature=SimpleNamespace(inputs=[SimpleNamespace(name=name) for name in names]))
    given = [torch.zeros(1)] * 3 + [value, value]
    apart = third.inputs(program, second.inputs(program, first.inputs(program, given)))
    found = both.inputs(program, given)
    assert found[4].shape == (2, 2, 5, 6) and torch.equal(found[3], value)
    torch.testing.assert_close(found[4], apart[4])
    torch.testing.assert_close(found[4], (value[:, 1:] @ matrix)[..., :6] @ rotation(6))
    assert torch.equal(first.turned["past.0.value"][3], matrix), "the first is not changed"


def test_a_turned_cache_comes_back():
    program = family_of(families.build("llama")[0])
    _, result = rotated(program)
    for inputs in samples(program):
        inputs = [t.double() if t.is_floating_point() else t for t in inputs]
        again = result.interface.restored(program, result.interface.inputs(program, inputs))
        for found, expected in zip(again, inputs, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)

"""Capture: what it takes, what it must not get wrong, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxc
from fxc.errors import CaptureFailed, UsageError
from fxc.ir import parse_program, print_program


class Function(nn.Module):
    """A function with a linear layer `l` and a buffer `b` at hand."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.l = nn.Linear(32, 32)
        self.register_buffer("b", torch.randn(32))

    def forward(self, *args):
        return self.function(self, *args)


def agree(function, *example, others=(), dtype=None):
    model = Function(function).eval()
    if dtype:
        model.l.to(dtype)
    program = fxc.capture(model, example)
    text = print_program(program)
    assert print_program(parse_program(text, program.constants)) == text, "the types in the graph are not the real ones"
    compiled = fxc.optimize(model, example, passes="canonicalize")
    for inputs in (example, *others):
        with torch.no_grad():
            found, expected = compiled(*inputs), model(*inputs)
        for a, b in zip(
            found if isinstance(found, tuple) else (found,), expected if isinstance(expected, tuple) else (expected,)
        ):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_writing_through_a_view_of_several():
    def function(self, x):
        y = self.l(x)
        first, _ = y.chunk(2, -1)
        first.mul_(3)
        return y

    agree(function, torch.randn(4, 32))
    agree(function, torch.randn(32))


def test_a_view_that_is_returned_sees_the_write():
    def function(self, x):
        y = self.l(x)
        view = y.view(-1)
        y.add_(1)
        return view

    agree(function, torch.randn(4, 32))


def test_writing_to_a_slice():
    def function(self, x):
        y = self.l(x)
        y[:, 0] = 0
        y[:, 1:3] = x[:, :2]
        return y

    agree(function, torch.randn(4, 32))


def test_what_is_written_keeps_the_type_of_where():
    def function(self, x):
        y = self.l(x)
        y += self.b
        return y

    agree(function, torch.randn(4, 32, dtype=torch.bfloat16), dtype=torch.bfloat16)


def test_a_branch_on_a_size_is_found_when_both_sides_are_tried():
    model = Function(lambda self, ids: self.l(self.b[ids % 32, None] * torch.ones(32)) * (2 if ids.shape[1] > 16 else 1))
    with pytest.raises(CaptureFailed, match="differs from the model"):
        fxc.capture(model, (torch.zeros(3, 9, dtype=torch.int64),))


@pytest.mark.fault(19)
def test_a_size_that_export_fixed_is_fixed_for_the_caller():
    def function(self, ids):
        return self.b[ids % 32] + torch.ones(9)

    compiled = fxc.optimize(Function(function), (torch.zeros(3, 9, dtype=torch.int64),), passes="")
    assert compiled(torch.zeros(5, 9, dtype=torch.int64)).shape == (5, 9)
    with pytest.raises(UsageError, match="captured for 9"):
        compiled(torch.zeros(3, 10, dtype=torch.int64))


def test_inputs_of_different_first_sizes():
    agree(lambda self, x, t: self.l(x) * t, torch.randn(4, 32), torch.randn(1), others=[(torch.randn(7, 32), torch.randn(1))])
    agree(lambda self, x: self.l(x), torch.randn(1, 32), others=[(torch.randn(5, 32),)])


def test_a_decoder_with_example_inputs_is_captured_without_its_cache():
    from families import build

    model, _ = build("qwen2")
    ids = torch.randint(3, 300, (2, 9))
    compiled = fxc.optimize(model, {"input_ids": ids}, passes="")
    torch.testing.assert_close(compiled(input_ids=ids[:1, :4]).logits, model(input_ids=ids[:1, :4]).logits)


@pytest.mark.parametrize(("family", "positions"), [("opt", "mask"), ("qwen2", "arange")])
def test_positions_default_as_in_the_model(family, positions):
    import transformers
    from families import build

    if family == "opt":
        config = transformers.OPTConfig(
            vocab_size=320, hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=64,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(config).eval()
    else:
        model, _ = build(family)
    program = fxc.capture(model)
    assert program.metadata["positions"] == positions


def test_a_model_whose_inputs_are_unknown_says_so():
    import transformers

    class Feeling(transformers.BertModel):
        main_input_name = "smell"

        def forward(self, smell, return_dict=True):
            return super().forward(inputs_embeds=smell)

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 16}
    with pytest.raises(CaptureFailed, match="example of the input smell"):
        fxc.capture(Feeling(transformers.BertConfig(**sizes)))


def test_a_failure_of_torchs_own_decomposition_leaves_the_reason_why_it_was_tried(monkeypatch):
    def function(self, x):
        y = self.l(x)
        view = y.view(-1)
        y.add_(1)
        return view

    def fails(*_):
        raise AttributeError("'NoneType' object has no attribute 'size'")

    monkeypatch.setattr("fxc.frontend.capture.functionalized", fails)
    with pytest.raises(CaptureFailed, match="read later through another view"):
        fxc.capture(Function(function), (torch.randn(4, 32),))

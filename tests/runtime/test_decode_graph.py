"""The step of a decoder over buffers of a fixed size, and which decoders have none."""

from __future__ import annotations

import pytest
import torch
from decoders import compiled

from fxc.errors import UsageError, VerificationFailed
from fxc.ir import check, print_program
from fxc.runtime.decode_graph import decode_program
from fxc_kernels.cpu import native_attention, ops


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt2"])
def test_keys_are_not_repeated_and_masks_are_made_once(name):
    program = compiled(name).program
    step = decode_program(program)
    aten = torch.ops.aten
    attentions = step.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert len(attentions) == 2
    for node in attentions:
        assert [each.target for each in node.args[1:3]] == [aten.index_copy_.default] * 2
    assert len({node.args[3] for node in attentions}) == 1 and attentions[0].args[3].target is aten.to.dtype
    assert step.constants.keys() == program.constants.keys()
    assert all(tensor is program.constants[name] for name, tensor in step.constants.items()), "weights are shared"


def test_attention_in_cpp_reads_the_buffers_as_they_are():
    lowered = compiled("qwen2").lowered
    calls = decode_program(lowered).graph.find_nodes(op="call_function", target=ops.ATTENTION)
    if native_attention.why_not() or torch.cpu._is_amx_tile_supported():
        assert not calls
    else:
        assert [each.target for each in calls[0].args[1:3]] == [torch.ops.aten.index_copy_.default] * 2 and len(calls) == 2


def test_a_step_is_a_program():
    step = decode_program(compiled("qwen2").program)
    check(step, lowered=True)
    with pytest.raises(VerificationFailed, match="mutates its arguments"):
        check(step)
    inputs = [line.partition(" = ")[0].partition(": ")[2] for line in print_program(step).splitlines() if " = input " in line]
    assert inputs[:4] == ["i64[s0, 1]", "i64[s0, s1]", "i64[s0, 1]", "i64[1]"]
    assert set(inputs[4:]) == {"f32[s0, 2, s1, 16]"}
    assert step.results[0].meta["val"].shape[1:] == (1, 320)


# What is not understood is refused.
def test_a_model_that_measures_distance_from_the_end_is_refused():
    with pytest.raises(UsageError, match="uses the number of cached tokens in a way that is not known"):
        compiled("mpt").use_static_cache()


def _changed(name, edit):
    """decode_program of the family's program after `edit` of its graph."""
    program = compiled(name).program.copy()
    edit(program.graph)
    return decode_program(program)


def _window_of_the_last(graph):
    append = next(n for n in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default) if n.args[1] == -2)
    with graph.inserting_after(append):
        last = graph.call_function(torch.ops.aten.slice.Tensor, (append, 2, -4, 2**63 - 1))
    last.meta = dict(append.meta)
    append.replace_all_uses_with(last, delete_user_cb=lambda user: user not in (last, graph.output_node()))


def _reads_the_cache(graph):
    past = graph.find_nodes(op="placeholder")[3]
    with graph.inserting_before(graph.output_node()):
        total = graph.call_function(torch.ops.aten.neg.default, (past,))
    (logits, *present) = graph.output_node().args[0]
    graph.output_node().args = ((logits, total, *present[1:]),)


def _returns_something_else(graph):
    (logits, first, second, *rest) = graph.output_node().args[0]
    graph.output_node().args = ((logits, second, first, *rest),)


def _counts_cached_tokens(graph):
    size = next(n for n in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int) if n.args[1] == 2)
    hidden = graph.output_node().args[0][0]
    with graph.inserting_before(graph.output_node()):
        scaled = graph.call_function(torch.ops.aten.div.Tensor, (hidden, size))
    graph.output_node().args = ((scaled, *graph.output_node().args[0][1:]),)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_window_of_the_last, "takes a part of what it has cached"),
        (_reads_the_cache, "does more with its cache than append"),
        (_returns_something_else, "present.0.key is not its cache"),
        (_counts_cached_tokens, "in a way that is not known"),
    ],
)
def test_other_uses_of_the_cache_are_refused(edit, says):
    with pytest.raises(UsageError, match=says):
        _changed("qwen2", edit)

import pytest
import torch
from families import build
from torch import nn

from fxc.calibrate.blocks import blocks
from fxc.frontend.capture import capture
from fxc.ir.names import layer_name, weight_of
from fxc.passes.base import Context
from fxc.passes.canonicalize import Canonicalize


def captured(model, example=None):
    program = capture(model, example, check=False)
    Canonicalize().run(program, Context())
    return program


def layers_of(program, found):
    return [[[layer_name(weight_of(program, node)) for node in group] for group in block.groups] for block in found]


def check(program, found):
    """The blocks are the program in order, and what a block reads from outside is told."""
    order = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [node for block in found for node in block.nodes] == order
    assert found[0].enters is None and found[-1].leaves is None
    assert [block.enters for block in found[1:]] == [block.leaves for block in found[:-1]]
    for block in found:
        assert block.groups
        inside = set(block.nodes)
        outside = {each for node in block.nodes for each in node.all_input_nodes} - inside
        assert set(block.reads) == {each for each in outside if each.op != "get_attr"}


@pytest.mark.parametrize(("family", "stem"), [("qwen2", "model.layers"), ("gemma2", "model.layers")])
def test_a_decoder_is_cut_after_each_attention_and_each_feed_forward_part(family, stem):
    program = captured(*build(family))
    found = blocks(program)
    check(program, found)
    parts = layers_of(program, found)[1:-1]
    assert parts == [
        part
        for at in range(2)
        for part in (
            [[f"{stem}.{at}.self_attn.{each}_proj" for each in "qkv"], [f"{stem}.{at}.self_attn.o_proj"]],
            [[f"{stem}.{at}.mlp.gate_proj", f"{stem}.{at}.mlp.up_proj"], [f"{stem}.{at}.mlp.down_proj"]],
        )
    ]


def test_the_norm_after_an_encoders_block_belongs_to_it():
    program = captured(*build("bert"))
    found = blocks(program)
    check(program, found)
    layer = "bert.encoder.layer.1"
    assert [[f"{layer}.intermediate.dense"], [f"{layer}.output.dense"]] in layers_of(program, found)
    attention = next(block for block in found if f"{layer}.attention.output.dense" in str(layers_of(program, [block])))
    assert "layer_norm" in str(attention.leaves.target) and "layer_norm" in str(attention.enters.target)


def test_experts_run_after_their_router_and_one_after_the_other():
    program = captured(*build("qwen3_moe"))
    found = blocks(program)
    check(program, found)
    mlp = "model.layers.0.mlp"
    assert [[f"{mlp}.gate"], [f"{mlp}.experts.gate_up_proj"], [f"{mlp}.experts.down_proj"]] in layers_of(program, found)


def test_two_towers_are_cut_though_the_first_ones_result_waits():
    program = captured(*build("clip"))
    found = blocks(program)
    check(program, found)
    assert max(sum(map(len, block.groups)) for block in found) == 4


def test_a_residual_networks_blocks():
    program = captured(*build("resnet"))
    found = blocks(program)
    check(program, found)
    stage = "resnet.encoder.stages.1.layers.0"
    assert [
        [f"{stage}.layer.0.convolution", f"{stage}.shortcut.convolution"], [f"{stage}.layer.1.convolution"]
    ] in layers_of(program, found)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mlp", [[["up"]], [["down"]], [["head"]]]),
        ("cnn", [[["stem"]], [["grouped", "depthwise"]], [["head.1"]], [["head.4"]]]),
    ],
)
def test_plain_modules_are_cut_after_each_layer(family, expected):
    program = captured(*build(family))
    found = blocks(program)
    check(program, found)
    assert layers_of(program, found) == expected
    assert "relu" in str(found[0].leaves.target) or "gelu" in str(found[0].leaves.target)


class CrossAttention(nn.Module):
    """Three blocks that all read what an encoder gave."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.embed = nn.Linear(8, 16)
        self.keys = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.outs = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, y):
        memory = torch.relu(self.encoder(x))
        y = self.embed(y)
        for key, out in zip(self.keys, self.outs):
            y = y + out(torch.sigmoid(y @ key(memory).transpose(1, 2)) @ memory)
        return y


def test_what_an_encoder_gave_is_shared_by_all_blocks():
    program = captured(CrossAttention().eval(), (torch.randn(2, 5, 16), torch.randn(2, 3, 8)))
    found = blocks(program)
    check(program, found)
    assert layers_of(program, found)[-3:] == [[[f"keys.{at}"], [f"outs.{at}"]] for at in range(3)]
    memory = found[-1].reads
    assert sum("relu" in str(node.target) for node in memory) == 1


def test_a_program_without_layers_has_no_blocks():
    class Sum(nn.Module):
        def forward(self, x):
            return x + 1

    assert blocks(captured(Sum(), (torch.randn(2, 3),))) == []

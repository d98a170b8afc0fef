"""What moves together, and that bytes are known exactly before anything is packed."""

import random

import pytest
import torch
from families import build

from fxc.captured import capture_source
from fxc.compiler import compile_captured
from fxc.options import Options
from fxc.selection.formats import FLOAT, parse_format, parse_formats, recipe_of
from fxc.selection.groups import canonical, groups_of, space_of


def test_layers_that_read_the_same_and_those_that_share_a_weight_are_groups(space):
    found = {group.layers: group for group in space.groups}
    assert set(found) == {("table",), ("left", "right"), ("down",), ("odd",), ("back",)}
    assert found["table",].tables == {"table"} and not found["down",].tables
    assert set(space.left) == {"few"} and "2 outputs" in space.left["few"]


def test_a_format_is_offered_where_it_takes_all_of_a_group(space):
    offered = {group.layers[0]: {str(space.formats[n]) for n in sizes} for group, sizes in zip(space.groups, space.sizes)}
    assert "int4:group=32" not in offered["back"] and "int8:mode=weight_only" in offered["back"]
    assert "int4:group=64:algorithm=gptq" in offered["left"] and "float" in offered["left"]


def passes_of(space, choice):
    layers = [[n for at, g in enumerate(space.groups) if choice[at] == f for n in g.layers] for f in range(len(space.formats))]
    tables = frozenset().union(*(group.tables for group in space.groups))
    return recipe_of(space.formats[1:], layers[1:], tables, layers[0], list(space.left))


@pytest.mark.parametrize("seed", range(4))
def test_bytes_are_those_of_what_is_compiled(captured, space, data, seed):
    draw = random.Random(seed)
    choice = [draw.choice(list(sizes)) for sizes in space.sizes]
    if not any(choice):
        choice[0] = max(space.sizes[0])
    passes = passes_of(space, choice)
    made = compile_captured(captured, Options(passes, calib=data, verify=False))
    assert made.program.nbytes() == space.nbytes(choice)
    done = {name for step in made.record.passes for name in step.layer_errors}
    assert not done  # nothing was judged, and so that the layers are right is asked of the program
    packed = {node.meta["fqn"] for node in made.program.graph.nodes if node.meta.get("by") in ("int4", "int8")}
    wanted = {name for at, group in enumerate(space.groups) if choice[at] for name in group.layers}
    assert {name.replace("head", "table") for name in packed} == wanted


def test_one_format_for_all_layers_needs_no_names():
    both = parse_format("int8:mode=weight_only"), parse_format("sparse24,int4:group=32")
    made = recipe_of(both, [["a", "b"], []], frozenset({"a"}), left=["c"])
    assert [str(each) for each in made] == ["int8:mode=weight_only:embeddings=int8"]
    made = recipe_of(both, [["a"], ["b.a", "c"]], frozenset({"a"}), ["a.d"])
    assert [str(each) for each in made] == [
        "int8:mode=weight_only:only=re:^a$:embeddings=int8", "sparse24:only=b.a;c", "int4:group=32:only=b.a;c",
    ]  # fmt: skip


def test_queries_keys_and_values_are_one_group_and_experts_have_formats():
    captured = capture_source(build("mixtral")[0], options=Options("", verify=False))
    together = [group.layers for group in groups_of(canonical(captured.program)) if len(group.layers) > 1]
    assert any([layer.rpartition(".")[2] for layer in some] == ["q_proj", "k_proj", "v_proj"] for some in together)
    space = space_of(captured.program, parse_formats("int8"))
    assert any("experts" in layer for group in space.groups for layer in group.layers)
    assert all("gate" not in layer for group in space.groups for layer in group.layers if "experts" not in layer)


def test_what_is_skipped_stays_float(captured):
    space = space_of(captured.program, parse_formats("int4:group=32"), skip=["left", "table"])
    assert {layer for group in space.groups for layer in group.layers} == {"right", "down", "odd"}
    assert space.formats[0] == FLOAT and torch.is_tensor(captured.program.constants["left.weight"])

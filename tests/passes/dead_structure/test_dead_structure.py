"""What is masked and removed: the same outputs, fewer parameters by as many as the axes say, nothing left to remove."""

from __future__ import annotations

import functools
from collections import Counter
from unittest import mock

import pytest
import torch
from families import FAMILIES, build
from removal import EXACT, Attention, canonical, difference, removed_from, shapes, sliced, with_forward
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import fxc.passes
from fxc.analysis.groups import Group, groups
from fxc.data.samples import samples
from fxc.errors import VerificationFailed
from fxc.ir.program import Program
from fxc.passes.base import Context, Result, parse_passes
from fxc.passes.dead_structure import dead_structure
from fxc.passes.dead_structure.dead_structure import DeadStructure
from fxc.passes.prune.mask import mask
from fxc.pipeline import run_passes
from fxc.runtime.model import compiled_model
from fxc.verify.compare import in_float64

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------------------ families

PRUNABLE = {  # how many groups of each kind may lose units
    "qwen2": {"head": 2, "kv_head": 2, "ffn": 2},
    "qwen3": {"head": 2, "kv_head": 2, "ffn": 2},
    "llama": {"head": 2, "kv_head": 2, "ffn": 2},
    "mistral": {"head": 2, "kv_head": 2, "ffn": 2},
    "gemma": {"head": 2, "kv_head": 2, "ffn": 2},
    "gemma2": {"head": 2, "kv_head": 2, "ffn": 2},
    "gpt2": {"head": 2, "ffn": 2},
    "bert": {"head": 2, "ffn": 3},
    "distilbert": {"head": 2, "ffn": 2},
    "vit": {"head": 2, "ffn": 2},
    "resnet": {"channel": 5},
    "mobilenetv2": {"channel": 25},
    "t5": {"head": 3, "ffn": 4},
    "whisper_encoder": {"head": 2, "ffn": 2, "channel": 1},
    "clip": {"head": 4, "ffn": 4},
    "mixtral": {"head": 2, "kv_head": 2, "ffn": 2},
    "qwen3_moe": {"head": 2, "kv_head": 2, "ffn": 2},
    "mlp": {"ffn": 1},
    "cnn": {"ffn": 1, "channel": 2, "conv_group": 1},
}
ONE = "one of each layer"
CRITERIA = ("l2", "wanda", "taylor", "mask_gradient", "l1")


def spec_of(number: int, ratio: float | str, kinds: set[str]) -> str:
    """How much goes, by a criterion and with or without uniformity, that change from case to case."""
    shares = {"heads": "head", "ffn": "ffn", "channels": "channel"}
    share = {name: 0.99 if ratio == ONE and name == "heads" else 0.25 if ratio == ONE else ratio for name in shares}
    given = [f"{name}={share[name]}" for name, kind in shares.items() if kind in kinds]
    case = number + (0.1, 0.25, 0.5, ONE).index(ratio)
    criterion = CRITERIA[case % len(CRITERIA)]
    if "channel" in kinds and "head" not in kinds and case % 3 == 0:
        criterion = "bn_scale"
    # Layers are uniform where they are numbered.
    extra = [[], ["uniform=true"] if kinds != {"ffn"} else [], ["scope=global"]][case % 3]
    return ":".join(["prune", *given, f"criterion={criterion}", *extra])


def dropped(before: list[Group], masked: Program) -> dict[Group, Tensor]:
    """Of each group, which units no weight reads any more; KV heads go with the last query head that reads them."""
    gone: dict[Group, Tensor] = {}
    for group in before:
        if group.sites and not group.pinned and group.kind != "head_dim":
            alive = torch.zeros(group.size, dtype=torch.bool)
            for site in group.sites:
                weight = masked.constants[site.weight.fqn].movedim(site.weight.dim, -1).reshape(-1, len(site.weight.units))
                alive[site.weight.units[weight.any(0) & (site.weight.units >= 0)]] = True
            gone[group] = ~alive
    for group in before:
        if group.source is not None and group in gone:
            source, index = group.source
            read = torch.zeros(source.size, dtype=torch.bool)
            read[index[~gone[group]]] = True
            gone[source] = gone.get(source, ~read) & ~read
    return gone


def predicted(program: Program, masked: Program) -> dict[str, list[int]]:
    """The shape that is left of each constant, by the units of the groups that run along it."""
    left = {fqn: [torch.ones(size, dtype=torch.bool) for size in shape] for fqn, shape in shapes(program).items()}
    found = groups(program)
    for group, gone in dropped(found, masked).items():
        for member in group.members:
            its = member.units
            left[member.fqn][member.dim] &= ~((its >= 0) & gone[its.clamp(min=0)])
    return {fqn: [int(dim.sum()) for dim in dims] for fqn, dims in left.items()}


@functools.cache
def family(name: str) -> tuple[nn.Module, Program]:
    model, example = build(name)
    return model, canonical(model, example)


def generated(program: Program, model: nn.Module, ids: Tensor) -> Tensor:
    # In float64, so that no tie is broken by rounding.
    compiled = compiled_model(in_float64(program), {}, config=model.config)
    return compiled.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_and_sliced_agree_for_every_family(name, tmp_path):
    model, program = family(name)
    there = groups(program)
    free = Counter(g.kind for g in there if not g.pinned and g.kind not in ("head_dim", "width", "other"))
    assert free == PRUNABLE[name], "all heads, channels and FFN channels, and nothing else, may go"
    calibration = samples(program)
    for ratio in (0.1, 0.25, 0.5, ONE):
        spec = spec_of(list(FAMILIES).index(name), ratio, set(free))
        if ratio == ONE and "head" not in free:
            continue
        masked = program.copy()
        policy = parse_passes(spec)[0].run(masked, Context(samples=calibration))
        after, result = sliced(masked)
        assert difference(masked, after, result) <= EXACT, spec
        expected = predicted(program, masked)
        found = shapes(after)
        extra = found.keys() - expected.keys()
        assert {fqn: found[fqn] for fqn in expected if fqn in found} == {f: s for f, s in expected.items() if f in found}, spec
        assert all(after.constants[fqn].dtype == torch.int64 for fqn in extra), "an index of keys and values is all that is new"
        total = sum(torch.Size(shape).numel() for shape in expected.values())
        assert after.numel() - sum(after.constants[f].numel() for f in extra) == total < program.numel(), spec
        asked = {(r.scope, r.kind): (r.before, r.removed) for r in policy.removed}
        removed = {(r.scope, r.kind): (r.before, r.removed) for r in result.removed}
        assert asked and asked.items() <= removed.items(), spec
        assert all(kind == "kv_head" for _, kind in removed.keys() - asked.keys()), spec
        if ratio == ONE:
            heads = [g for g in groups(after) if g.kind == "head"]
            assert not heads, f"a head that is alone is no axis: {heads}"
        if program.metadata.get("kind") == "causal_lm" and ratio in (0.5, ONE):
            ids = torch.randint(3, 300, (1, 6), generator=torch.Generator().manual_seed(1))
            assert torch.equal(generated(masked, model, ids), generated(after, model, ids)), spec
        if ratio == 0.25:
            small, _ = run_passes(after, parse_passes("int8"), Context(), verify=False, allow_noop=True)
            config = getattr(model, "config", None)
            files = {"config.json": config.to_json_string().encode()} if config is not None else {}
            compiled = compiled_model(small, {}, config=config, files=files)
            compiled.save(tmp_path / "out")
            inputs = result.interface.inputs(program, samples(program)[0])
            loaded = fxc.load(tmp_path / "out")
            assert small.nbytes() < after.nbytes() < masked.nbytes()
            for a, b in zip(compiled.run(inputs), loaded.run(inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("pylm_dir", "prune:heads=0.25:ffn=0.3"),
        ("pylm_dir", "prune:heads=0.5:ffn=0.1:uniform=true"),
        ("minilm_dir", "prune:heads=0.25:ffn=0.5:criterion=l1:scope=global"),
    ],
)
def test_masked_and_sliced_agree_for_real_models(request, source, passes):
    from fxc.captured import capture_source

    folder = request.getfixturevalue(source)
    captured = capture_source(str(folder), dtype="float32", check=False)
    program = run_passes(captured.program, parse_passes("canonicalize"), Context(), verify=False)[0]
    masked = program.copy()
    parse_passes(passes)[0].run(masked, Context())
    after, result = sliced(masked)
    assert difference(masked, after, result) <= EXACT
    expected = predicted(program, masked)
    assert {f: s for f, s in shapes(after).items() if f in expected} == expected
    assert after.numel() < 0.9 * program.numel()


# ---------------------------------------------------------------------------------------------------- masks by others


def mlp(bias: bool = True, act=torch.nn.functional.gelu) -> nn.Module:
    def forward(self, x):
        return x + self.down(act(self.up(x)))

    return with_forward(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6, bias=bias))


@pytest.mark.parametrize("left_on", [False, True])
def test_columns_that_torch_has_pruned(left_on):
    model = mlp()
    torch_prune.ln_structured(model.down, "weight", amount=5, n=2, dim=1)
    if not left_on:
        torch_prune.remove(model.down, "weight")
    after, result = removed_from(model, torch.randn(3, 6))
    assert shapes(after)["up.weight"] == [7, 6] and shapes(after)["up.bias"] == [7]
    assert [(r.before, r.removed) for r in result.removed] == [(12, 5)]


@pytest.mark.parametrize("left_on", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_torch_has_pruned_leave_a_constant_that_is_folded(left_on, bias):
    model = mlp(bias)
    torch_prune.ln_structured(model.up, "weight", amount=5, n=2, dim=0)
    if not left_on:
        torch_prune.remove(model.up, "weight")
    after, result = removed_from(model, torch.randn(3, 6))
    found = shapes(after)
    assert found["down.weight"] == [6, 7] and found["down.bias"] == [6], "a bias is added if there is none"
    assert found["up.bias"] == [7]
    assert sum(r.removed for r in result.removed) == 5


def test_global_unstructured_pruning_removes_what_it_happens_to_kill_and_no_more():
    model = mlp()
    torch_prune.global_unstructured([(model.down, "weight")], torch_prune.L1Unstructured, amount=0.5)
    after, _ = removed_from(model, torch.randn(3, 6))
    dead = int((~(model.down.weight != 0).any(0)).sum())
    assert shapes(after)["up.weight"] == [12 - dead, 6]


def convolutions(padding: int, act=torch.relu, norm: bool = True, second_bias: bool = True) -> nn.Module:
    def forward(self, x):
        y = self.first(x)
        return self.second(act(self.norm(y) if norm else y))

    return with_forward(
        forward, first=nn.Conv2d(3, 8, 3, padding=1), norm=nn.BatchNorm2d(8),
        second=nn.Conv2d(8, 5, 3, padding=padding, bias=second_bias),
    )  # fmt: skip


PICTURES = (2, 3, 9, 9)


@pytest.mark.parametrize("padding", [0, 1])
def test_channels_whose_norm_is_zero(padding):
    model = convolutions(padding)
    with torch.no_grad():
        model.norm.weight[[1, 4, 6]] = 0
        model.norm.bias[[1, 4, 6]] = 0
    after, result = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [5, 3, 3, 3] and shapes(after)["second.weight"] == [5, 5, 3, 3]
    assert shapes(after)["norm.running_var"] == [5] and not result.refusals
    assert [(r.kind, r.before, r.removed) for r in result.removed] == [("channel", 8, 3)]


@pytest.mark.parametrize("second_bias", [False, True])
def test_constant_channels_are_folded_where_nothing_is_padded(second_bias):
    model = convolutions(0, second_bias=second_bias)
    with torch.no_grad():
        model.norm.weight[[1, 4, 6]] = 0
        model.norm.bias[[1, 4]] = torch.tensor([2.0, 0.5]).double()
        model.norm.bias[6] = -1.0  # which relu makes zero
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["second.weight"] == [5, 5, 3, 3] and shapes(after)["second.bias"] == [5]


def test_constant_channels_stay_where_the_border_is_padded_and_it_is_said_why():
    model = convolutions(1)
    with torch.no_grad():
        model.norm.weight[[1, 4, 6]] = 0
        model.norm.bias[[1, 4]] = torch.tensor([2.0, 0.5]).double()
        model.norm.bias[6] = -1.0
    after, result = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["second.weight"] == [5, 7, 3, 3], "only what is zero goes"
    assert [(r.fqn, "pads with zeros" in r.reason) for r in result.refusals] == [("second", True)]


@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_of_constants_is_constant_where_nothing_is_padded(padding):
    def forward(self, x):
        return self.beside(x) + self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    model = with_forward(
        forward, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 5, 3, padding=padding), third=nn.Conv2d(5, 2, 1),
        beside=nn.Conv2d(3, 2, 3, padding=padding),
    )  # fmt: skip
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.abs_()
        model.second.bias.fill_(20)
    after, _ = removed_from(model, torch.randn(PICTURES))
    convolutions = after.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert (len(convolutions) == 1) == (padding == 0)


def test_constant_channels_of_a_grouped_convolution_are_folded_group_by_group():
    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    model = with_forward(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 6, 3, groups=2), last=nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        for channel, bias in ((1, 0.7), (5, 1.3), (2, 0.4)):  # 1 and 5 are channel 1 of both groups, 2 stays with 6
            model.first.weight[channel] = 0
            model.first.bias[channel] = bias
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [6, 3, 3, 3] and shapes(after)["second.weight"] == [6, 3, 3, 3]


def test_a_whole_group_of_a_convolution_goes():
    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    model = with_forward(forward, first=nn.Conv2d(3, 6, 3), second=nn.Conv2d(6, 9, 3, groups=3), last=nn.Conv2d(9, 2, 1))
    with torch.no_grad():
        model.last.weight[:, 3:6] = 0
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [4, 3, 3, 3] and shapes(after)["second.weight"] == [6, 2, 3, 3]
    assert shapes(after)["last.weight"] == [2, 6, 1, 1]


def test_a_channel_of_a_depthwise_convolution_goes_with_its_only_input():
    def forward(self, x):
        return self.last(torch.relu(self.depth(torch.relu(self.first(x)))))

    model = with_forward(
        forward, first=nn.Conv2d(3, 6, 1), depth=nn.Conv2d(6, 6, 3, padding=1, groups=6), last=nn.Conv2d(6, 2, 1)
    )
    with torch.no_grad():
        model.last.weight[:, [0, 3]] = 0
        model.depth.weight[5] = 0
        model.depth.bias[5] = 0
    after, _ = removed_from(model, torch.randn(PICTURES))
    assert shapes(after)["first.weight"] == [3, 3, 1, 1] and shapes(after)["depth.weight"] == [3, 1, 3, 3]


def test_channels_through_concatenation_and_flatten():
    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], dim=1)
        return self.head(torch.relu(self.norm(y)).flatten(1))

    model = with_forward(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 5, 3), norm=nn.BatchNorm2d(9), head=nn.Linear(9 * 49, 7))
    with torch.no_grad():
        model.norm.weight[[1, 6]] = 0
        model.norm.bias[[1, 6]] = torch.tensor([0.0, 1.5]).double()
    after, _ = removed_from(model, torch.randn(PICTURES))
    found = shapes(after)
    assert (found["a.weight"][0], found["b.weight"][0], found["norm.weight"], found["head.weight"]) == (3, 4, [7], [7, 343])


# ----------------------------------------------------------------------------------------------------------- attention


TOKENS = (2, 5, 10)


def rows(*heads: int) -> list[int]:
    return [4 * h + i for h in heads for i in range(4)]


def zero_heads(model: Attention, where: str, *heads: int) -> None:
    with torch.no_grad():
        if where == "o columns":
            model.o.weight[:, rows(*heads)] = 0
        else:
            for layer in (model.v,) if where == "v rows" else (model.q, model.k, model.v):
                layer.weight[rows(*heads)] = 0
                if where != "v weight rows":
                    layer.bias[rows(*heads)] = 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["o columns", "v rows", "q, k and v rows"])
def test_heads_that_were_zeroed_by_hand(where, masked):
    model = Attention(masked=masked)
    zero_heads(model, where, 0, 2)
    after, result = removed_from(model, torch.randn(TOKENS))
    found = shapes(after)
    assert found["q.weight"] == found["k.weight"] == found["v.weight"] == [8, 10] and found["o.weight"] == [10, 8]
    assert [(r.kind, r.before, r.removed) for r in result.removed] == [("head", 4, 2)]


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_with_constant_values_is_folded(bias):
    """The weights of attention sum to one, so that a value that is the same everywhere comes out as it is."""
    model = Attention(bias=bias)
    with torch.no_grad():
        model.v.weight[rows(1)] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["q.weight"] == [12, 10] and shapes(after)["o.bias"] == [10]


@pytest.mark.parametrize("part", ["q", "k"])
def test_heads_without_queries_or_keys_are_not_dead(part):
    """Their weights are even, and they average the values."""
    model = Attention()
    with torch.no_grad():
        getattr(model, part).weight[rows(1)] = 0
        getattr(model, part).bias[rows(1)] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [16, 10]


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 7, 8])
def test_every_ratio_of_query_to_kv_heads(ratio, how):
    model = Attention(2 * ratio, 2, how)
    # The first query head of the first KV head, and all but one of the second.
    zero_heads(model, "o columns", 0, *range(ratio + 1, 2 * ratio))
    after, _ = removed_from(model, torch.randn(TOKENS))
    queries = 2 * ratio - 1 - (ratio - 1)
    heads = shapes(after)["q.weight"][0] // 4
    assert heads == queries
    assert shapes(after)["k.weight"] == shapes(after)["v.weight"] == [4 if ratio == 1 else 8, 10]
    uneven = queries - 1 != 1 and ratio > 1
    assert any(n.target is aten.index_select.default for n in after.graph.nodes) == uneven, "no copy that is not needed"


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ((0, 1, 2), (3, 1)),  # a whole KV head with its queries
        ((0, 3), (4, 2)),  # one of each: still even
        ((1, 2), (4, 2)),  # uneven
        ((0, 1, 2, 4, 5), (1, 1)),  # one head left
        ((2, 4, 5), (3, 2)),
    ],
)
def test_shared_keys_and_values_stay_as_long_as_a_query_reads_them(how, gone, left):
    model = Attention(6, 2, how)
    zero_heads(model, "o columns", *gone)
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert (shapes(after)["q.weight"][0] // 4, shapes(after)["k.weight"][0] // 4) == left


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
def test_one_kv_head_for_all_stays(how):
    model = Attention(4, 1, how)
    zero_heads(model, "o columns", 0, 1, 3)
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["q.weight"] == shapes(after)["k.weight"] == [4, 10] and shapes(after)["o.weight"] == [10, 4]


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
def test_a_kv_head_that_is_read_elsewhere_stays_without_queries(how):
    class ReadTwice(Attention):
        def __init__(self):
            super().__init__(6, 2, how)
            self.side = nn.Linear(8, 10).double()

        def forward(self, x):
            b, s, _ = x.shape
            values = self.v(x).view(b, s, 2, 4)
            return super().forward(x) + self.side(values.transpose(1, 2).transpose(1, 2).reshape(b, s, 8))

    model = ReadTwice()
    zero_heads(model, "o columns", 0, 1, 2)
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [8, 10]
    with torch.no_grad():
        model.side.weight[:, :4] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [4, 10] and shapes(after)["side.weight"] == [10, 4]


@pytest.mark.parametrize("how", ["expand", "interleave", "enable_gqa"])
def test_values_of_a_kv_head_that_are_zero_take_all_its_queries(how):
    model = Attention(6, 2, how)
    with torch.no_grad():
        model.v.weight[rows(1)] = 0
        model.v.bias[rows(1)] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["q.weight"] == [12, 10] and shapes(after)["v.weight"] == [4, 10]


def test_the_width_of_values_and_of_scores_may_shrink_and_the_scale_stays():
    model = Attention()
    with torch.no_grad():
        model.o.weight.view(10, 4, 4)[:, :, 1] = 0
        for part in (model.q, model.k):
            part.weight.view(4, 4, 10)[:, 2] = 0
            part.bias.view(4, 4)[:, 2] = 0
    after, _ = removed_from(model, torch.randn(TOKENS))
    assert shapes(after)["v.weight"] == [12, 10] and shapes(after)["q.weight"] == shapes(after)["k.weight"] == [12, 10]


# ------------------------------------------------------------------------------------------------- branches and layers


@pytest.mark.parametrize("bias", ["none", "zero", "some"])
def test_a_branch_that_adds_nothing_is_gone(bias):
    model = Attention(bias=bias != "none")
    with torch.no_grad():
        model.o.weight.zero_()
        if bias == "zero":
            model.o.bias.zero_()
    after, _ = removed_from(model, torch.randn(TOKENS))
    targets = {n.target for n in after.graph.nodes if n.op == "call_function"}
    assert aten.scaled_dot_product_attention.default not in targets
    assert after.numel() == (10 if bias == "some" else 0), "a bias that is left is a constant that is added"


def test_a_branch_whose_weights_are_all_zero():
    model = mlp()
    with torch.no_grad():
        model.up.weight.zero_()
    after, _ = removed_from(model, torch.randn(3, 6))
    assert after.numel() == 6 and not after.graph.find_nodes(op="call_function", target=aten.linear.default)


def test_a_module_that_is_called_twice_is_cut_once():
    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(x)))
        return x

    model = with_forward(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6))
    with torch.no_grad():
        model.down.weight[:, [2, 7]] = 0
        model.up.weight[5] = 0
    after, result = removed_from(model, torch.randn(3, 6))
    assert shapes(after)["up.weight"] == [9, 6] and shapes(after)["down.weight"] == [6, 9]
    assert [r.removed for r in result.removed] == [3]


def test_tied_weights_stay_tied():
    def forward(self, ids):
        y = self.table(ids)
        y = y + self.down(torch.relu(self.up(y)))
        return torch.nn.functional.linear(y, self.table.weight)

    model = with_forward(forward, table=nn.Embedding(30, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8))
    with torch.no_grad():
        model.down.weight[:, 3] = 0
        model.table.weight[:, 6] = 0  # read by the last product as zero, and zero itself
        model.down.weight[6] = 0
        model.down.bias[6] = 0
    after, _ = removed_from(model, torch.randint(0, 30, (2, 5)))
    assert shapes(after) == {
        "table.weight": [30, 7], "up.weight": [11, 7], "up.bias": [11], "down.weight": [7, 11], "down.bias": [7],
    }  # fmt: skip


def test_a_weight_that_another_layer_shares_keeps_what_the_other_reads():
    """Two products with one matrix, between different activations: a unit goes when both do without it."""

    def forward(self, x):
        return self.down(torch.relu(self.up(x))), self.other(torch.tanh(self.up(x)))

    model = with_forward(forward, up=nn.Linear(6, 12), down=nn.Linear(12, 6), other=nn.Linear(12, 5))
    with torch.no_grad():
        model.down.weight[:, [1, 2, 3]] = 0
        model.other.weight[:, [2, 3, 4]] = 0
    before = canonical(model, (torch.randn(3, 6).double(),))
    after, result = sliced(before)
    assert difference(before, after, result) <= EXACT
    assert shapes(after)["up.weight"] == [10, 6]


def test_a_bias_that_two_layers_share_is_not_folded_into():
    def forward(self, x):
        y = torch.relu(self.up(x))
        return torch.nn.functional.linear(y, self.a, self.bias) * torch.nn.functional.linear(x, self.b, self.bias)

    model = with_forward(
        forward, up=nn.Linear(6, 12), a=nn.Parameter(torch.zeros(4, 12)), b=nn.Parameter(torch.zeros(4, 6)),
        bias=nn.Parameter(torch.zeros(4)),
    )  # fmt: skip
    with torch.no_grad():
        model.up.weight[[1, 5]] = 0
        model.up.bias[[1, 5]] = torch.tensor([1.0, 2.0]).double()
    after, _ = removed_from(model, torch.randn(3, 6))
    assert shapes(after)["a"] == [4, 10] and len(shapes(after)) == 6, "the other keeps the bias that it had"


def test_nothing_is_removed_from_a_model_where_all_matters():
    for model, x in (
        (mlp(), torch.randn(3, 6)),
        (Attention(6, 2), torch.randn(TOKENS)),
        (convolutions(1), torch.randn(PICTURES)),
    ):
        before = canonical(model, (x.double(),))
        after, result = sliced(before)
        assert result.changed == 0 and str(after) == str(before) and result.removed == []


def test_single_zeros_are_no_structure():
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, :] = 0  # an output that is its bias
        model.down.weight[1:, 4] = torch.where(torch.arange(5) == 2, 1.0, 0.0)
        model.up.weight[3, :5] = 0
    after, result = sliced(canonical(model, (torch.randn(3, 6).double(),)))
    assert result.changed == 0 and shapes(after)["up.weight"] == [12, 6]


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
    compiled = compiled_model(in_float64(after), {}, config=model.config)
    assert torch.equal(compiled.generate(ids, attention_mask=attention, **options), expected)


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


# ----------------------------------------------------------------------------------------------------------- mutations


def other_units(axes, alive, folds):
    return SHRINK(axes, {atom: its.roll(1) for atom, its in alive.items()}, folds)


def no_folds(axes, alive, folds):
    return SHRINK(axes, alive, {})


def folds_of_the_wrong_sign(axes, alive, folds):
    return SHRINK(axes, alive, {node: -values for node, values in folds.items()})


def copies_of_the_wrong_head(axes, alive, folds):
    for link in axes.links:
        link.index.copy_(link.index.flip(0))
    return SHRINK(axes, alive, folds)


def another_cut_of_the_cache(axes, alive, folds):
    inputs = SHRINK(axes, alive, folds)
    return {name: {dim: torch.arange(len(i)) for dim, i in dims.items()} for name, dims in inputs.items()}


SHRINK = dead_structure.shrink


class Broken(DeadStructure):
    """`DeadStructure` that shrinks in a wrong way."""

    name = ""  # not registered
    how = None

    def run(self, program, context):
        with mock.patch.object(dead_structure, "shrink", type(self).how):
            return super().run(program, context)


class Idle(DeadStructure):
    """`DeadStructure` that removes nothing."""

    name = ""

    def run(self, program, context):
        return Result()


def broken(how):
    return type("Broken", (Broken,), {"how": staticmethod(how)})()


def masked_mlp() -> Program:
    program = canonical(mlp(), (torch.randn(3, 6).double(),))
    mask(program, next(g for g in groups(program) if g.kind == "ffn"), torch.tensor([2, 3, 9]))
    return program


def constant_mlp() -> Program:
    model = mlp()
    with torch.no_grad():
        model.up.weight[[2, 3, 9]] = 0
        model.up.bias[[2, 3, 9]] = 1
    return canonical(model, (torch.randn(3, 6).double(),))


def uneven_attention() -> Program:
    model = Attention(6, 2)
    zero_heads(model, "o columns", 1, 2)
    return canonical(model, (torch.randn(TOKENS).double(),))


def decoder_without_a_head() -> Program:
    program = family("gpt2")[1].copy()
    mask(program, next(g for g in groups(program) if g.kind == "head"), torch.tensor([1]))
    return program


@pytest.mark.parametrize(
    ("program", "how"),
    [
        (masked_mlp, other_units),
        (constant_mlp, no_folds),
        (constant_mlp, folds_of_the_wrong_sign),
        (uneven_attention, copies_of_the_wrong_head),
        (decoder_without_a_head, another_cut_of_the_cache),
    ],
    ids=lambda each: each.__name__,
)
def test_what_is_removed_wrongly_does_not_get_through_the_gates(program, how):
    program = program()
    step = broken(how)
    with pytest.raises(VerificationFailed, match="may not change what the program computes"):
        run_passes(program, [step], Context())
    run_passes(program, [DeadStructure()], Context())


def test_what_is_left_behind_does_not_get_through_the_gates():
    with pytest.raises(VerificationFailed, match=r"promises no_dead_structure, and .* has a dead ffn"):
        run_passes(masked_mlp(), [Idle()], Context())

"""Every family and real models, pruned: the same outputs, fewer parameters by as many as the axes say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import FAMILIES
from removal import EXACT, difference, shapes, sliced
from torch import Tensor
from zeroed import family, generated

import fxc.passes
from fxc.analysis.groups import Group, groups
from fxc.compiled.model import compiled_model
from fxc.data.samples import samples
from fxc.ir.program import Program
from fxc.options import Options
from fxc.passes.base import Context, parse_passes
from fxc.pipeline import run_passes

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
    case = number + RATIOS.index(ratio)
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


RATIOS = (0.1, 0.25, 0.5, ONE)
# Of each family two ratios, others in the next, one of families that differ in numbers only; all but one unit only of heads. A
# plain run takes the first of the two.
REPEATED = ("qwen3", "llama", "mistral", "gemma")
CASES = [
    pytest.param(name, ratio, id=f"{name}-{ratio}", marks=[pytest.mark.slow] * (name in REPEATED or more))
    for number, name in enumerate(FAMILIES)
    for more in range(1 if name in REPEATED else 2)
    for ratio in [RATIOS[(number + 2 * more) % (4 if "head" in PRUNABLE[name] else 3)]]
]


@pytest.mark.parametrize(("name", "ratio"), CASES)
def test_masked_and_sliced_agree_for_every_family(name, ratio, tmp_path):
    model, program = family(name)
    there = groups(program)
    free = Counter(g.kind for g in there if not g.pinned and g.kind not in ("head_dim", "width", "other"))
    assert free == PRUNABLE[name], "all heads, channels and FFN channels, and nothing else, may go"
    calibration = samples(program)
    spec = spec_of(list(FAMILIES).index(name), ratio, set(free))
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
        small, _ = run_passes(after, Context(), Options("int8", verify=False, allow_noop=True))
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
        pytest.param("pylm_dir", "prune:heads=0.5:ffn=0.1:uniform=true", marks=pytest.mark.slow),
        pytest.param("minilm_dir", "prune:heads=0.25:ffn=0.5:criterion=l1:scope=global", marks=pytest.mark.slow),
    ],
)
def test_masked_and_sliced_agree_for_real_models(request, source, passes):
    from fxc.captured import capture_source

    folder = request.getfixturevalue(source)
    captured = capture_source(str(folder), options=Options(dtype="float32", verify=False))
    program = run_passes(captured.program, Context(), Options("canonicalize", verify=False))[0]
    masked = program.copy()
    parse_passes(passes)[0].run(masked, Context())
    after, result = sliced(masked)
    assert difference(masked, after, result) <= EXACT
    expected = predicted(program, masked)
    assert {f: s for f, s in shapes(after).items() if f in expected} == expected
    assert after.numel() < 0.9 * program.numel()

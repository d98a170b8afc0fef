"""A program that is divided among processes gives what it gives in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from families import build
from repo import REPO
from tiny import save
from together import together

import fxc
from fxc.data.samples import samples
from fxc.errors import UsageError
from fxc.ir.cache import cache_types, is_causal_lm, is_past, is_present
from fxc.ir.parse import parse_program
from fxc.parallel import divide


def program_of(name, passes="", **options):
    model, example = build(name)
    return fxc.optimize(model, example, passes=passes, allow_noop=True, **options).program


def divided(program, count):
    made = [divide(program, number, count) for number in range(count)]
    return [each for each, _ in made], made[0][1]


def largest_error(program, count):
    """Of outputs without a cache, relative to the largest number of each, over the processes and several inputs."""
    parts, division = divided(program, count)
    names = program.signature.outputs
    worst = 0.0
    for inputs in samples(program):
        given = [_own(part, inputs) for part in parts]
        with torch.no_grad():
            expected = program.module()(*(_own(program, inputs)))
        for outputs in together(parts, given):
            for name, ours, theirs in zip(names, outputs, expected, strict=True):
                if not is_present(name) and theirs.is_floating_point():
                    worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst, division


def _own(program, inputs):
    """The inputs with an empty cache of the program's own heads: what is in a cache was computed before."""
    made = []
    length = 0
    for node, declared, tensor in zip(program.placeholders, program.signature.inputs, inputs, strict=True):
        if is_past(declared.name):
            length = tensor.shape[2]
            shape = tensor.shape[0], node.meta["val"].shape[1], 0, tensor.shape[3]
            tensor = torch.empty(shape, dtype=tensor.dtype)
        made.append(tensor)
    return [t[:, length:] if declared.name == "attention_mask" and length and is_causal_lm(program) else t
            for t, declared in zip(made, program.signature.inputs)]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gpt2", "mixtral", "bert", "vit", "t5", "clip", "mlp"])
def test_two_give_what_one_gives(name):
    error, division = largest_error(program_of(name), 2)
    assert error < 2e-5 and division.parts


FORMATS = ["int8", "int8:mode=weight_only", "int4:group=32", "int4:group=32:bits=3", "fp8", "sparse24"]


@pytest.mark.parametrize("passes", FORMATS)
@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_packed_weights_are_cut_with_their_scales(name, passes):
    program = program_of(name, passes, budget=9.0, layer_budget=9.0)
    error, division = largest_error(program, 2)
    assert error < 2e-5 and len(division.parts) >= 4 and division.whole == {}
    assert divide(program, 1, 2)[0].nbytes() < 0.95 * program.nbytes()


def test_experts_are_cut_by_their_channels():
    program = program_of("mixtral", "int8", budget=9.0, layer_budget=9.0)
    error, division = largest_error(program, 2)
    assert error < 2e-5 and [80, 80] in division.parts.values()


def test_more_processes_than_heads_of_keys_hold_the_same_ones():
    program = program_of("qwen2", "int4:group=32", budget=9.0, layer_budget=9.0)
    error, division = largest_error(program, 4)
    assert error < 2e-5
    # Of 16 numbers each, where 32 share a scale.
    assert "cannot be divided among 4" in division.whole["the heads of model.layers.0.self_attn"]
    program = program_of("qwen2")
    error, division = largest_error(program, 4)
    assert error < 2e-5 and division.whole == {}
    parts, _ = divided(program, 4)
    assert [part.constants["model.layers.0.self_attn.k_proj.weight"].shape[0] for part in parts] == [16] * 4
    assert {cache.shape[1] for cache in cache_types(parts[0])} == {1}


@pytest.mark.parametrize("count", [2, 3])
def test_uneven_layers_of_a_pruned_model(count):
    program = program_of("qwen2", "prune:drop='model.layers.0.self_attn:heads=1;model.layers.1.mlp:ffn=0,3,5,90'")
    error, division = largest_error(program, count)
    assert error < 2e-5
    assert sum(division.parts["the FFN channels of model.layers.1.mlp"]) == 156
    assert sum(division.parts["the heads of model.layers.0.self_attn"]) == 3


def test_what_stays_whole_says_why():
    _, division = divide(program_of("qwen2"), 0, 5)
    assert "there are 4, and 5 processes" in str(division)
    alone = fxc.optimize(torch.nn.Linear(32, 8).eval(), (torch.randn(2, 32),), passes="", allow_noop=True).program
    with pytest.raises(UsageError, match="nothing of this model can be divided among 2"):
        divide(alone, 0, 2)


def test_of_two_layers_in_a_row_one_is_divided():
    net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()) for _ in range(4)])
    program = fxc.optimize(net.eval(), (torch.randn(2, 32),), passes="", allow_noop=True).program
    error, division = largest_error(program, 2)
    assert error < 2e-5 and len(division.parts) == 2
    assert all("is divided along its other dimension" in why for why in division.whole.values()) and division.whole


def test_biases_are_added_once():
    parts, _ = divided(program_of("bert"), 2)
    of = [[name for name in part.constants if name.endswith("output.dense.bias")] for part in parts]
    assert len(of[0]) == 4 and of[1] == []


def test_there_is_no_text_of_it_that_could_be_loaded():
    part = divide(program_of("mlp"), 0, 2)[0]
    with pytest.raises(fxc.FxcError, match="not on the list"):
        parse_program(str(part), part.constants)


# Loads each artifact as one of several processes, generates or runs it, and keeps what came out.
SCRIPT = textwrap.dedent("""
    import json, sys, torch, fxc
    torch.set_num_threads(1)
    from fxc import ranks
    found = {}
    for folder in sys.argv[2:]:
        model = fxc.load(folder, keep_compressed=True, tensor_parallel=True)
        ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
        if hasattr(model, "generate"):
            made = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0).tolist()
        else:
            made = model(input_ids=ids).logits.tolist()
        try:
            model.save(sys.argv[1] + "-saved")
        except fxc.FxcError as error:
            refused = str(error)
        found[folder] = [made, len(model.division.parts), refused]
    with open(f"{sys.argv[1]}-{ranks.number()}.json", "w") as file:
        json.dump(found, file)
""")
CASES = {("qwen2", ""): 4, ("mixtral", "int8"): 4, ("qwen2", "int4:group=32"): 4, ("bert", "int8"): 5}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """(family, passes) -> its artifact."""
    folder, made = tmp_path_factory.mktemp("artifacts"), {}
    for name, passes in CASES:
        path = folder / f"{name}-{passes.partition(':')[0]}"
        fxc.optimize(save(name, folder / name, False), passes=passes, allow_noop=True, budget=9.0, layer_budget=9.0).save(path)
        made[name, passes] = path
    return made


def test_two_processes_give_the_tokens_of_one(artifacts, tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(REPO)])}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, str(script), str(tmp_path / "found"), *map(str, artifacts.values())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found-{number}.json").read_text()) for number in (0, 1)]
    assert found[0] == {k: [*v[:2], v[2].replace("2 of 2", "1 of 2")] for k, v in found[1].items()}
    for case, folder in artifacts.items():
        model = fxc.load(folder, keep_compressed=True)
        ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
        made, count, refused = found[0][str(folder)]
        assert count == CASES[case] and "a part of a model" in refused
        if case[0] == "bert":
            expected = model(input_ids=ids).logits
            assert torch.allclose(torch.tensor(made), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
        else:
            options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            assert made == model.generate(ids, **options).tolist()


def test_a_single_process_says_so(artifacts):
    with pytest.raises(UsageError, match="single process") as refused:
        fxc.load(artifacts["qwen2", ""], tensor_parallel=True)
    assert "torchrun" in refused.value.hint
    with pytest.raises(UsageError, match="fixed size"):
        fxc.load(artifacts["qwen2", ""], tensor_parallel=True, static_cache=True)

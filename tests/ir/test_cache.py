"""The cache of a decoder: names, types and positions, and that nothing else in the code knows how its inputs are called."""

import ast
import re

import pytest
import torch
from families import build
from repo import REPO

from fxc.frontend.capture import capture
from fxc.ir import cache

HOME = REPO / "fxc" / "ir" / "cache.py"
SOURCES = sorted(path for room in ("fxc", "benchmarks", "kernels") for path in (REPO / room).rglob("*.py"))
NAMES = re.compile(r"\bcausal_lm\b|\b(past|present)\\?\.(?![ ,;:])")
FROM_THE_FOURTH = re.compile(r"(placeholder|inputs).*\[3:\]$")


def names_the_cache(source: str) -> list[str]:
    """The strings in the code, without docstrings, that say what inputs or outputs of a cache or the kind of their program are
    called, and the places that count on the cache to begin at the fourth input."""
    tree = ast.parse(source)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            found += [node.value] if NAMES.search(node.value) else []
        elif isinstance(node, ast.Subscript) and FROM_THE_FOURTH.search(text := ast.unparse(node)):
            found.append(text)
    return found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('if program.metadata["kind"] == "causal_lm": pass', 1),
        ('name.startswith("past.")', 1),
        ('f"present.{layer}.key"', 1),
        ('re.match(r"present\\.", name)', 1),
        ("types = program.placeholders[3:]", 1),
        ('graph.find_nodes(op="placeholder")[3:]', 1),
        ("tensors[4:], shape[3:]", 0),
        ('"""past.0.key is an input"""\nstate.past.get(1)\nsay("tokens of the past, then more in the past. Then")', 0),
    ],
)
def test_the_check_sees_names_of_the_cache(source, count):
    assert len(names_the_cache(source)) == count


def test_only_one_file_names_the_cache():
    found = {path: names for path in SOURCES if (names := names_the_cache(path.read_text(encoding="utf-8")))}
    assert list(found) == [HOME], found


@pytest.fixture(scope="module")
def decoder():
    return capture(build("qwen2")[0], check=False)


@pytest.fixture(scope="module")
def encoder():
    return capture(build("bert")[0], check=False)


def test_a_captured_decoder_has_these_inputs_and_outputs(decoder):
    layers = len(cache.cache_types(decoder)) // 2
    assert [declared.name for declared in decoder.signature.inputs] == cache.input_names(layers)
    assert decoder.signature.outputs == cache.output_names(layers) and layers == 2
    assert cache.input_names(1) == ["input_ids", "attention_mask", "position_ids", "past.0.key", "past.0.value"]
    assert cache.is_causal_lm(decoder)


def test_inputs_and_outputs_are_paired_by_name(decoder):
    pairs = cache.cache_pairs(decoder)
    assert pairs == {"past.0.key": (3, 1), "past.0.value": (4, 2), "past.1.key": (5, 3), "past.1.value": (6, 4)}
    fewer = decoder.copy()
    del fewer.signature.outputs[1]
    assert cache.cache_pairs(fewer) == {"past.0.value": (4, 1), "past.1.key": (5, 2), "past.1.value": (6, 3)}


def test_what_is_no_decoder_has_no_cache(encoder):
    assert not cache.is_causal_lm(encoder) and cache.cache_types(encoder) == []
    named_alike = encoder.copy()
    named_alike.signature.outputs[0] = "present.0.key"
    assert cache.cache_pairs(named_alike) == {}


def test_names_of_what_comes_out_and_goes_in_again():
    assert cache.as_past("present.3.value") == "past.3.value" and cache.as_present("past.3.value") == "present.3.value"
    for name in ("logits", "past.0.key", "presents", "x.present.0"):
        assert cache.as_past(name) == name and not cache.is_present(name)
    for name in ("input_ids", "present.0.key", "pasts", "x.past.0"):
        assert cache.as_present(name) == name and not cache.is_past(name)


def test_an_empty_cache_is_one_that_the_program_takes(decoder):
    past = cache.empty_cache(decoder, 3)
    assert [tuple(t.shape) for t in past] == [(3, 2, 0, 16)] * 4
    ids = torch.ones(3, 5, dtype=torch.int64)
    outputs = decoder.module()(ids, ids, cache.positions_of(ids, 5), *past)
    assert [tuple(t.shape) for t in outputs[1:]] == [(3, 2, 5, 16)] * 4


def test_positions_are_counted_from_each_rows_first_token(decoder):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert cache.positions_of(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert cache.positions_of(mask, 2).tolist() == [[1, 2], [3, 4]]
    assert cache.positions_of(mask, 0).shape == (2, 0)
    as_told = decoder.copy()
    for how, expected in (("mask", [[1, 2], [3, 4]]), ("arange", [[3, 4], [3, 4]])):
        as_told.metadata["positions"] = how
        assert cache.default_positions(as_told, mask, 2).tolist() == expected

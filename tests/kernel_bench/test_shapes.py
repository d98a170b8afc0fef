"""The shapes of layers: models, sizes, regimes."""

import pytest

from fxc.errors import UsageError
from fxc.kernel_bench.shapes import MODELS, Shape, parse_shapes, regime


def test_shapes_are_models_layers_and_sizes():
    assert parse_shapes("qwen2.5-7b")[2] == Shape("qwen2.5-7b gate_up", 37888, 3584)
    assert {shape.k for shape in parse_shapes("qwen2.5-72b")} == {8192, 29568}
    assert parse_shapes("llama3-8b:o, 16,32 ,llama3-8b:o") == (Shape("llama3-8b o", 4096, 4096), Shape("weight", 16, 32))
    assert [len(MODELS[name]) for name in MODELS] == [5, 5, 5, 5]


@pytest.mark.parametrize("text", ["gpt2", "4096", "4096,x", "0,16", "llama3-8b:nope", "", "16,32,64"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(UsageError, match="--shapes"):
        parse_shapes(text)


def test_regimes():
    assert [regime(m) for m in (1, 4, 16, 64, 256, 2048)] == ["decode", "decode", "small", "small", "mid", "prefill"]

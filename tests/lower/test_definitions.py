"""Packed products as functions of plain torch: what the operators compute."""

import families
import pytest

import fxc
from fxc.errors import UsageError
from fxc.export.runs import runs
from fxc.lower.definitions import by_definition
from fxc.schemes.scheme import product_of
from fxc.verify.compare import relative_error


def compiled(name: str, passes: str):
    return fxc.optimize(*families.build(name), passes=passes, verify=False).program


# Passes -> how far what is traced may be from the operators: rounding, or another integer now and then.
DEFINED = {
    ("qwen2", "int8:embeddings=int8"): 1e-5,
    ("qwen2", "int8:mode=weight_only"): 1e-5,
    ("qwen2", "int4:group=32:symmetric=false:embeddings=int4"): 1e-5,
    ("qwen2", "int4:group=32:bits=3"): 1e-5,
    ("qwen2", "fp8"): 1e-5,
    ("qwen2", "sparse24,int8"): 1e-5,
    ("cnn", "canonicalize"): 1e-6,
}


@pytest.mark.parametrize(("name", "passes"), DEFINED)
def test_products_are_written_by_their_definitions(name, passes):
    program = compiled(name, passes)
    written = by_definition(program)
    assert not any(product_of(node.target) for node in written.graph.nodes)
    assert set(written.constants) == set(program.constants)
    for inputs, expected in runs(program):
        assert relative_error(written.module()(*inputs), expected) <= DEFINED[name, passes]


def test_experts_have_none():
    with pytest.raises(UsageError, match="no compiled code multiplies int8 experts"):
        by_definition(compiled("mixtral", "int8:only=re:experts"))

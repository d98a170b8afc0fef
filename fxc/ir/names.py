"""What a user calls a layer, from the name of a constant that it reads."""

from __future__ import annotations

import re

# The last part of the names of weights and of what stands for them when they are packed.
_PARTS = frozenset({"weight", "qweight", "values", "meta", "scale", "zero"})
# What a packed part is called where the module has something of its name already (`fxc.passes.linears`).
_PACKED = re.compile(r"\.(?:int8|int4|fp8|sparse24)(?:_\d+)?\Z")


def layer_name(fqn: str) -> str:
    """mlp.up.weight, mlp.up.qweight, mlp.up.int8_2.values -> mlp.up; the whole name of a bare parameter."""
    layer, _, part = fqn.rpartition(".")
    return _PACKED.sub("", layer) if layer and part in _PARTS else fqn

"""A small artifact to damage, and what is said of it then."""

import json
from pathlib import Path

import pytest
import torch

import fxc  # noqa: F401 - registers the operators
from fxc.artifact import manifest, store
from fxc.errors import InputRefused
from fxc.ir import Program, parse_program

SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
NET = """\
fxc program 1
metadata {"class": "Net", "kind": "module"}
call {"args": [0], "kwargs": {}}
result 0
symbol s0 = 2
constant @down.weight: f32[4, 6]
constant @mask: f32[4]
constant @up.qweight: i8[6, 4]
constant @up.scale: f32[6]
alias @head.weight = @down.weight
%0: f32[s0, 4] = input "x"
%1: f32[s0, 6] = fxc.int8_linear(%0, @up.qweight, @up.scale, None)  # up (int8)
%2: f32[s0, 4] = aten.linear(%1, @down.weight)  # down
%3: f32[s0, 4] = aten.maximum(%2, @mask)
return "out" %3
"""


def constants() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "up.qweight": torch.randint(-127, 128, (6, 4), generator=generator, dtype=torch.int8),
        "up.scale": torch.rand(6, generator=generator) + 0.1,
        "down.weight": torch.randn(4, 6, generator=generator),
        "mask": torch.tensor([0.0, -torch.inf, 1.0, -torch.inf]),
    }


def net() -> Program:
    return parse_program(NET, constants())


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rehash(folder: Path) -> None:
    """What somebody who changes an artifact on purpose does: hashes that fit what he made of it."""
    path = folder / "fxc.json"
    content = json.loads(path.read_bytes())
    path.unlink()
    content["files"] = manifest.describe(folder)
    path.write_bytes(manifest.encode(content))


def refusal(path: Path, *words: str) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        store.read(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def first(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change

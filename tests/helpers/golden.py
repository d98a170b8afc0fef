"""Artifacts of every format, made once by the version that could write it, and never again: later versions have to load them.

`tests/records/golden/<name>/` is an artifact; `outputs.json` beside them says what each gave for `inputs()`. `python
tests/helpers/golden.py` adds what is missing, and leaves alone what is there.
"""

from __future__ import annotations

import json
import sys

import torch
from repo import REPO
from torch import nn

import fxc

FOLDER = REPO / "tests" / "records" / "golden"
FORMATS = {
    "captured": "", "int8": "int8", "int8-weight-only": "int8:mode=weight_only", "int8-embeddings": "int8:embeddings=int8",
    "int8-static": "int8:mode=static:observer=minmax", "int4": "int4:group=32",
    "int4-asymmetric": "int4:group=32:symmetric=false",
    "int4-embeddings": "int4:group=32:embeddings=int4", "int3": "int4:bits=3:group=32", "int2": "int4:bits=2:group=32",
    "int4-gptq": "int4:group=32:algorithm=gptq", "fp8": "fp8", "fp8-weight-only": "fp8:mode=weight_only",
    "fp8-static": "fp8:mode=static",
    "sparse24": "sparse24", "sparse24-int8": "sparse24,int8", "sparse24-int4": "sparse24,int4:group=32", "bf16": "bf16",
    "fp16": "fp16",
    "pack": "sparsify:sparsity=0.5,pack:codebook=16", "pack-int8": "int8,pack", "pruned": "prune:ffn=0.5",
    "mixed": "int4:group=32:only=up,int8", "images-int8-static": "int8:mode=static:observer=minmax", "images-captured": "",
}  # fmt: skip


class Net(nn.Module):
    """A table, a tied head, two layers with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(24, 32)
        self.up, self.down, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return x @ self.table.weight.t()


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def _of_images(name: str) -> bool:
    return name.startswith("images")


def inputs(name: str) -> tuple[torch.Tensor]:
    """What the artifact `name` is given."""
    if _of_images(name):
        return (torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6).sin(),)
    return (torch.arange(10).reshape(2, 5),)


def make(name: str) -> fxc.CompiledModel:
    learns = "static" in name or "gptq" in name
    rows = [(torch.arange(n, n + 6).reshape(1, 6) % 24,) for n in range(8)]
    images = [(torch.linspace(-1, n, 3 * 6 * 6).reshape(1, 3, 6, 6).sin(),) for n in range(1, 9)]
    calib = (images if _of_images(name) else rows) if learns else None
    model = Images().eval() if _of_images(name) else Net()
    return fxc.optimize(model, inputs(name), FORMATS[name], calib=calib, budget=9.0, layer_budget=9.0)


def outputs(name: str, program: fxc.Program) -> list[float]:
    """By the operators' definitions, so that no machine's kernels are in it."""
    return [round(value, 5) for value in program.module()(*inputs(name))[0].flatten().tolist()]


def main() -> None:
    path = FOLDER / "outputs.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    for name in FORMATS:
        if not (FOLDER / name).exists():
            model = make(name)
            model.save(FOLDER / name)
            # The page is no part of what is loaded, and larger than all of it.
            (FOLDER / name / "report.html").unlink()
            said[name] = outputs(name, model.program)
    path.write_text(json.dumps(said) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Where the bytes of a program are: by kind of weight, by layer, on disk."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from fxc.ir.names import layer_of, parts_of
from fxc.ir.program import Program
from fxc.ir.targets import name_of
from fxc.schemes.parameters import parameters_by_constant, shape_of
from fxc.schemes.scheme import product_of, scheme_of

# Operator -> what its weight is called here. What packed weights are called their formats say.
_KINDS = {
    "aten.embedding": "embedding",
    "aten.linear": "linear", "aten.addmm": "linear", "aten.mm": "linear", "aten.matmul": "linear",
    "fxc.grouped_linear": "experts", "fxc.grouped_mm": "experts", "aten._grouped_mm": "experts",
    "aten.layer_norm": "norm", "aten.batch_norm": "norm", "aten.group_norm": "norm",
    "aten._native_batch_norm_legit_no_training": "norm", "aten.rms_norm": "norm",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The constants of one module. kind, shape: of the largest of them, a packed one's as the weight that it stands for;
    dtypes: all of theirs."""

    name: str
    kind: str
    dtypes: str
    parameters: int
    nbytes: int
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Without the name."""
        told = {"kind": self.kind, "dtypes": self.dtypes, "shape": list(self.shape)}
        return told | {"parameters": self.parameters, "bytes": self.nbytes}


def kinds_of(program: Program) -> dict[str, str]:
    """FQN of each constant -> its kind: embedding, linear, int8 linear, scale, norm, bias, convolution, ..."""
    readers: defaultdict[str, set[str]] = defaultdict(set)
    packed: defaultdict[str, set[str]] = defaultdict(set)
    for node in program.graph.nodes:
        for argument in node.all_input_nodes if node.op == "call_function" else ():
            if argument.op == "get_attr":
                readers[argument.target].add(_kind_of_operator(node))
        for part, fqn in parts_of(node).items():
            packed[fqn].add(scheme_of(node.target).parts[part] or product_of(node.target).kind)
    return {f: _packed(packed[f]) if f in packed else _kind(program, f, readers[f]) for f in program.constants}


def _packed(kinds: set[str]) -> str:
    lookup = next((kind for kind in kinds if kind.endswith("embedding")), None)
    return f"{lookup}, tied to a linear" if lookup and len(kinds) > 1 else min(kinds)


def _kind_of_operator(node: fx.Node) -> str:
    name = ".".join(name_of(node.target).split(".")[:2])
    return "convolution" if "conv" in name else _KINDS.get(name, "other")


def _kind(program: Program, fqn: str, readers: set[str]) -> str:
    if {"embedding", "linear"} <= readers:
        return "embedding, tied to a linear"
    if program.constants[fqn].ndim < 2:
        return "norm" if "norm" in readers or "norm" in fqn.lower() else "bias and other vectors"
    return min(readers, default="other", key=lambda kind: (kind == "other", kind))


def bytes_by_kind(program: Program) -> dict[str, int]:
    """Kind -> bytes, the largest first; a tied weight counts once."""
    total: Counter[str] = Counter()
    for fqn, kind in kinds_of(program).items():
        total[kind] += _nbytes(program, fqn)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def layers(program: Program) -> list[Layer]:
    """The modules that have constants, the largest first."""
    kinds = kinds_of(program)
    packed = {fqn: layer_of(node, fqn) for node in program.graph.nodes for fqn in parts_of(node).values()}
    members: defaultdict[str, list[str]] = defaultdict(list)
    for fqn in program.constants:
        members[packed.get(fqn) or fqn.rpartition(".")[0] or fqn].append(fqn)
    found, counted, dense = [], parameters_by_constant(program), _packed_shapes(program)
    for name, fqns in members.items():
        largest = max(fqns, key=lambda fqn: _nbytes(program, fqn))
        dtypes = sorted({str(program.constants[f].dtype).removeprefix("torch.") for f in fqns})
        numbers = sum(counted[f] for f in fqns)
        shape = dense.get(largest) or tuple(program.constants[largest].shape)
        found.append(Layer(name, kinds[largest], ", ".join(dtypes), numbers, sum(_nbytes(program, f) for f in fqns), shape))
    return sorted(found, key=lambda layer: (-layer.nbytes, layer.name))


def _packed_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Of each part of a packed weight, by FQN, the shape of the weight."""
    found = {}
    for node in program.graph.nodes:
        if parts := parts_of(node):
            shape = shape_of(scheme_of(node.target), {part: program.constants[fqn] for part, fqn in parts.items()})
            found |= dict.fromkeys(parts.values(), shape)
    return found


def operators(program: Program) -> dict[str, int]:
    """Operator -> how often it is called, the most frequent first."""
    counts = Counter(name_of(n.target) for n in program.graph.nodes if n.op == "call_function")
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def on_disk(folder: Path) -> int:
    """Bytes of what makes the model run: weights, program, manifest, configuration. Tokenizers are the same before and
    after, and are left out."""
    names = (
        "*.safetensors",
        "*.safetensors.index.json",
        "program.fxc",
        "fxc.json",
        "config.json",
        "pytorch_model*.bin",
    )
    return sum(path.stat().st_size for name in names for path in folder.glob(name))


def _nbytes(program: Program, fqn: str) -> int:
    tensor = program.constants[fqn]
    return tensor.numel() * tensor.element_size()

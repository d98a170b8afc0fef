"""What a pass made of a program's inputs and outputs: a cache with fewer heads, of fewer layers, or of turned values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxc.ir.cache import as_past
from fxc.ir.program import Program


@dataclass
class Interface:
    """kept: name of an input -> dimension -> which of the indices that it had before are left; dropped: inputs that are gone;
    turned: name of an input -> dimension -> by which matrix, float64 [before, after] with orthonormal columns, it is multiplied
    there, after what is cut. The output that a cache input comes from is cut, dropped and turned with it."""

    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    turned: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def cut(self, inputs: dict[str, dict[int, Tensor]]) -> None:
        """Of what is left, only these indices stay."""
        for name, dims in inputs.items():
            mine, turned = self.kept.setdefault(name, {}), self.turned.get(name, {})
            for dim, indices in dims.items():
                if dim in turned:
                    turned[dim] = turned[dim][:, indices]
                else:
                    mine[dim] = mine[dim][indices] if dim in mine else indices

    def turn(self, inputs: dict[str, dict[int, Tensor]]) -> None:
        """What is left is multiplied by these matrices."""
        for name, dims in inputs.items():
            mine = self.turned.setdefault(name, {})
            for dim, matrix in dims.items():
                mine[dim] = mine[dim] @ matrix if dim in mine else matrix

    def drop(self, inputs: Sequence[str]) -> None:
        self.dropped += inputs

    def then(self, later: Interface) -> Interface:
        """Of two passes, one after the other."""
        kept, turned = ({name: dict(dims) for name, dims in its.items()} for its in (self.kept, self.turned))
        both = Interface(kept, list(self.dropped), turned)
        both.cut(later.kept)
        both.turn(later.turned)
        both.drop(later.dropped)
        return both

    def inputs(self, before: Program, tensors: Sequence[Any]) -> list[Any]:
        """Inputs of the program before, as the one after takes them; what is not a tensor is passed on as it is."""
        return self._cut([i.name for i in before.signature.inputs], tensors)

    def outputs(self, before: Program, tensors: Sequence[Any]) -> list[Any]:
        """Outputs of the program before, as the one after should give them."""
        return self._cut([as_past(name) for name in before.signature.outputs], tensors)

    def restored(self, before: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of the program after, as the one before takes them: what is gone of the cache is zero, which nobody can tell
        while the cache is empty, as it is in calibration samples."""
        left = iter(tensors)
        taken = [None if declared.name in self.dropped else next(left) for declared in before.signature.inputs]
        types = [node.meta["val"] for node in before.placeholders]
        sizes: dict[str, int] = {}
        for like, tensor in zip(types, taken, strict=True):
            if tensor is not None:
                sizes |= {str(s): n for s, n in zip(like.shape, tensor.shape, strict=True) if not isinstance(s, int)}
        device = tensors[0].device
        result = []
        for declared, like, tensor in zip(before.signature.inputs, types, taken, strict=True):
            if tensor is None:
                shape = [s if isinstance(s, int) else sizes[str(s)] for s in like.shape]
                tensor = torch.zeros(shape, dtype=like.dtype, device=device)
            elif declared.name in self.turned:
                tensor = _turned(tensor, {dim: matrix.t() for dim, matrix in self.turned[declared.name].items()})
            for dim, indices in self.kept.get(declared.name, {}).items() if declared.name not in self.dropped else ():
                shape = [*tensor.shape[:dim], like.shape[dim], *tensor.shape[dim + 1 :]]
                tensor = tensor.new_zeros(shape).index_copy(dim, indices.to(device), tensor)
            result.append(tensor)
        return result

    def _cut(self, names: list[str], tensors: Sequence[Any]) -> list[Any]:
        result = []
        for name, tensor in zip(names, tensors, strict=True):
            if name in self.dropped:
                continue
            if isinstance(tensor, Tensor):
                for dim, indices in self.kept.get(name, {}).items():
                    tensor = tensor.index_select(dim, indices)
                tensor = _turned(tensor, self.turned.get(name, {}))
            result.append(tensor)
        return result


def _turned(tensor: Tensor, matrices: dict[int, Tensor]) -> Tensor:
    for dim, matrix in matrices.items():
        wide = tensor.double().movedim(dim, -1) @ matrix.to(tensor.device)
        tensor = wide.movedim(-1, dim).to(tensor.dtype).contiguous()
    return tensor

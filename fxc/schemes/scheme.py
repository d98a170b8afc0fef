"""What a weight format is: one record, which whoever packs, reads, runs, counts or names packed weights asks.

A format is a file of this package that registers its `Scheme`: how a weight is packed and unpacked, and the operators that
multiply by it (`Product`), whose arguments are called as the parts of the weight are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxc.ir import names
from fxc.mapped import LARGE, passed

LINEAR = torch.ops.aten.linear.default
EMBEDDING = torch.ops.aten.embedding.default
CONV2D = torch.ops.aten.conv2d.default


def runs_anywhere(capability: int) -> None:
    """Of a product that every CUDA device has."""


def any_number(**options: Any) -> tuple[int, str]:
    """Of a format for rows of any length."""
    return 1, "a number"


@dataclass(frozen=True)
class Product:
    """One operator that multiplies by the weights of a format: `x`, the parts of the weight by their names, `bias` if any; or
    that looks rows of them up: `indices`, the parts, and the `dtype` of what it returns.

    name: as measurements of kernels are kept by, its arguments in braces: "int8_weight_only", "int4_g{group}"; kind: what size
    tables call its weights; layer: the operator over float weights that it stands for; activations: what it rounds each row
    of x to as it runs, None where x stays as it is; why_not: compute capability (89 is 8.9) -> why a CUDA device of that
    cannot run it, None where it can; instead: what to compile with for one that cannot; learned: its arguments that come from
    calibration data, and what they are for numbers of a standard normal distribution; rounded: x [..., K] and the learned
    arguments by name -> the numbers that it multiplies by in the place of x, float32, None where x stays as it is.
    """

    operator: OpOverload
    name: str
    kind: str
    layer: OpOverload = LINEAR
    activations: torch.dtype | None = None
    why_not: Callable[[int], str | None] = runs_anywhere
    instead: str | None = None
    learned: Mapping[str, Any] = field(default_factory=dict)
    rounded: Callable[..., Tensor] | None = None

    def arguments(self, args: Sequence[Any]) -> dict[str, Any]:
        """The positional arguments of a call by their names."""
        return dict(zip((argument.name for argument in self.operator._schema.arguments), args))


AT_ONCE = 1 << 22
"""So many numbers of a weight are packed at once, whole rows, which know nothing of each other: what that takes is many times
theirs in float32."""


@dataclass(frozen=True, eq=False)
class Scheme:
    """A weight format.

    name: of the pass that makes it, and what stands in the names of constants between a layer and a part where the layer has
    something of the part's name; label: what people read; parts: what stands for a weight [N, K], each with N as its first
    dimension, and what size tables call it; the first are its numbers, a matrix, and are called as the product says;
    products: the operators; quantize: a float matrix and `options` -> the parts in that order, None for one that it has not,
    InputRefused where the format cannot hold it; dequantize: the parts in that order -> the numbers that they stand for;
    options: the choices for each; multiple: options -> what K has to be a multiple of, and what so many numbers are;
    is_quantized: whether those are other numbers than the model's, and no longer of its dtype; is_sparse: whether some of a
    weight's numbers are left out; has_signed_scales: whether a scale may be negative, which it is nowhere else; levels: the
    part that holds the numbers -> each of them as stored, and the lowest and the highest that there may be, None where
    numbers stay as they are; stored: levels [N, K] as float, as `levels` counts them, and the parts -> the part that holds the
    numbers, None where `levels` is.
    """

    name: str
    label: str
    parts: Mapping[str, str | None]
    products: tuple[Product, ...]
    quantize: Callable[..., Sequence[Tensor | None]]
    dequantize: Callable[..., Tensor]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    multiple: Callable[..., tuple[int, str]] = any_number
    is_quantized: bool = True
    is_sparse: bool = False
    has_signed_scales: bool = False
    levels: Callable[[Tensor], tuple[Tensor, float, float]] | None = None
    stored: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None

    @property
    def numbers(self) -> str:
        """The part that holds the numbers."""
        return next(iter(self.parts))

    def pack(self, weight: Tensor, **options: Any) -> dict[str, Tensor]:
        """weight [..., N, K] of any float dtype -> its parts, on meta where it is. Raises InputRefused as `quantize` does."""
        if weight.is_meta:
            return self.planned(weight, **options)
        matrix = weight.reshape(-1, weight.shape[-1])
        rows = max(AT_ONCE // max(weight.shape[-1], 1), 1)
        whole = first = self._quantized(matrix[:rows], options)
        if len(matrix) > rows:
            whole = {part: tensor.new_empty(len(matrix), *tensor.shape[1:]) for part, tensor in first.items()}
            for start in range(0, len(matrix), rows):
                some = self._quantized(matrix[start : start + rows], options) if start else first
                for part, tensor in some.items():
                    whole[part][start : start + rows] = tensor
                if matrix.nbytes > LARGE:
                    passed(matrix[start : start + rows])
        return {part: tensor.unflatten(0, weight.shape[:-1]) for part, tensor in whole.items()}

    def planned(self, weight: Tensor, **options: Any) -> dict[str, Tensor]:
        """The parts of `weight` [..., N, K] on meta, from those of a single row of zeros."""
        row = self._quantized(torch.zeros(1, weight.shape[-1], dtype=weight.dtype), options)
        lead = weight.shape[:-1]
        return {part: torch.empty(*lead, *t.shape[1:], dtype=t.dtype, device="meta") for part, t in row.items()}

    def dense(self, parts: Mapping[str, Tensor | None]) -> Tensor:
        """The weight [..., N, K] that `parts` stand for, float32, or as the model has them where it is not quantized."""
        lead = parts[self.numbers].shape[:-1]
        flat = [None if (t := parts.get(part)) is None else t.flatten(0, len(lead) - 1) for part in self.parts]
        return self.dequantize(*flat).unflatten(0, lead)

    def saturation(self, numbers: Tensor) -> float | None:
        """The share of the stored numbers, of the part `numbers`, that are at an end of the range; None without a range or
        without numbers."""
        if self.levels is None or numbers.numel() == 0:
            return None
        values, low, high = self.levels(numbers)
        return int(((values <= low) | (values >= high)).sum()) / values.numel()

    def fake(self, weight: Tensor, **options: Any) -> Tensor:
        """What is left of `weight` [..., N, K] when it is packed, in its dtype and without a gradient."""
        return self.dense(self.pack(weight, **options)).to(weight.dtype)

    def _quantized(self, matrix: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        packed = zip(self.parts, self.quantize(matrix, **options), strict=True)
        return {part: tensor for part, tensor in packed if tensor is not None}


SCHEMES: dict[str, Scheme] = {}
_BY_OPERATOR: dict[object, tuple[Scheme, Product]] = {}


def register(scheme: Scheme) -> Scheme:
    """Let everything know this format, which its file does. Raises ValueError for a name or an operator that is taken."""
    operators = [product.operator for product in scheme.products]
    if scheme.name in SCHEMES or _BY_OPERATOR.keys() & set(operators):
        raise ValueError(f"a format {scheme.name!r}, or one of its operators, is registered already")
    SCHEMES[scheme.name] = scheme
    _BY_OPERATOR.update({product.operator: (scheme, product) for product in scheme.products})
    names.register_format(scheme.name, operators, tuple(scheme.parts))
    return scheme


def unregister(scheme: Scheme) -> None:
    """Forget a registered format."""
    del SCHEMES[scheme.name]
    for product in scheme.products:
        del _BY_OPERATOR[product.operator]
    names.unregister_format(scheme.name)


def scheme_of(operator: object) -> Scheme | None:
    """The format whose weights `operator` multiplies by; None where it is none of a format's operators."""
    return _BY_OPERATOR.get(operator, (None, None))[0]


def product_of(operator: object) -> Product | None:
    """What is known of an operator that multiplies by packed weights; None for any other."""
    return _BY_OPERATOR.get(operator, (None, None))[1]


def products_for(layer: OpOverload) -> list[OpOverload]:
    """The operators of all formats that stand for `layer`, as aten.linear."""
    return [product.operator for _, product in _BY_OPERATOR.values() if product.layer is layer]

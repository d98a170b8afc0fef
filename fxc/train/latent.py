"""What is trained of one weight, what the program computes with meanwhile, and what is stored of it in the end.

A latent is a module without inputs: called, it gives the weight that a step computes with, in float32 and with a gradient;
`stored` gives the constants that stand for it. What was zero in the weight stays zero. Both are the same weight
(`tests/train`): there is no difference between what was trained and what is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fxc.schemes.scheme import Scheme

# A scale may fall to so much of itself, and no further: it never changes its sign.
LEAST_FACTOR = 0.1
FEW_LEVELS = 16
# A share of zeros below this is none that somebody wanted.
LEAST_PRUNED = 1e-3
# With so many levels, those of 3 bits, most of a weight is gone.
LEAST_LEVELS = 8


class Latent(nn.Module):
    """Base of the latents. rounds: whether what it gives is rounded as what is stored, where that is. kind: "weight", "vector"
    (biases, gains of norms) or "scale" of each of its parameters, by name."""

    kind: Mapping[str, str]
    rounds = True

    def forward(self) -> Tensor:
        """The weight to compute with, float32."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """What stands for it in the program: part -> tensor; of a constant that is not packed the part is ""."""
        raise NotImplementedError

    @property
    def is_reduced(self) -> bool:
        """Whether much of the weight is gone: numbers, or all but a few levels."""
        return False

    def settle(self) -> None:
        """Before other parameters are trained than until now: what is rounded stays at the level where it is."""


def zeros_of(weight: Tensor) -> Tensor | None:
    """Where a float weight of two dimensions or more is not zero, bool. None where nothing but zeros is in it, as some layers
    begin; and where too few are for anybody to have pruned it: a mask of a table of words costs half of a step."""
    keep = weight != 0
    zeros = keep.numel() - int(keep.count_nonzero())
    return keep if weight.ndim > 1 and LEAST_PRUNED * keep.numel() <= zeros < keep.numel() and zeros else None


class Float(Latent):
    """A float constant, trained as it is: a master copy of at least float32, rounded to the constant's dtype only in the
    end."""

    def __init__(self, constant: Tensor, keep: Tensor | None = None) -> None:
        super().__init__()
        self.dtype = constant.dtype
        self.weight = nn.Parameter(constant.detach().to(torch.promote_types(constant.dtype, torch.float32)).clone())
        self.register_buffer("keep", zeros_of(constant) if keep is None else keep)
        self.kind = {"weight": "weight" if constant.ndim > 1 and constant.numel() > max(constant.shape) else "vector"}

    def forward(self) -> Tensor:
        return self.weight if self.keep is None else self.weight * self.keep

    @property
    def is_reduced(self) -> bool:
        return self.keep is not None

    def stored(self) -> dict[str, Tensor]:
        return {"": self().detach().to(self.dtype)}


class Thin(Latent):
    """A weight of which a format stores some numbers as they are (2:4): these are trained, at their places."""

    is_reduced = True

    def __init__(self, scheme: Scheme, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.scheme, self.numbers = scheme, Float(parts[scheme.numbers])
        self.others = {part: tensor for part, tensor in parts.items() if part != scheme.numbers}
        self.kind = {f"numbers.{name}": kind for name, kind in self.numbers.kind.items()}

    def forward(self) -> Tensor:
        return self.dense(self.numbers())

    def dense(self, numbers: Tensor) -> Tensor:
        """The weight with these stored numbers."""
        return dense_of(self.scheme, {**self.others, self.scheme.numbers: numbers})

    def stored(self) -> dict[str, Tensor]:
        return {self.scheme.numbers: self.numbers.stored()[""]}


class Rounded(Latent):
    """A weight in levels with scales, trained before it is rounded, and its scales with it (Esser et al., "Learned Step Size
    Quantization", ICLR 2020): codes = clamp(round(v / f) + zero), weight = f s (codes - zero). Gradients go through the
    rounding as if it were none. Of few levels v is counted in levels, so that a rate says how much of one a step may go: each
    number that changes its level is a step of that size for what the layer gives. Of many, as of int8, it is the weight as it
    is. f is a factor around 1 for each group, because steps of a size are no size for scales.

    Where the weight is not trained, levels stay, whatever becomes of scales. It begins at exactly the weight that is packed.
    original: the weight before it was packed, towards which v lies a quarter of a level at most, so that a number between two
    levels changes to the other more easily; without it, is_thinned: whether what is zero was so before.
    """

    def __init__(
        self, scheme: Scheme, parts: Mapping[str, Tensor], original: Tensor | None = None, is_thinned: bool = False
    ) -> None:
        super().__init__()
        self.scheme, self.parts = scheme, dict(parts)
        numbers, scale = parts[scheme.numbers], parts["scale"]
        _, self.least, self.largest = scheme.levels(numbers[:1])
        dense = dense_of(scheme, parts)
        self.shape = dense.shape
        flat = dense.flatten(1) if numbers.ndim == 4 else dense.reshape(-1, dense.shape[-1])
        self.groups = scale.numel() // len(flat)
        self.register_buffer("scale", scale.detach().float().reshape(len(flat), self.groups, 1))
        middle = torch.full_like(self.scale, -(-(self.least + self.largest) // 2))
        zero = parts.get("zero")
        self.register_buffer("zero", middle if zero is None else zero.float().reshape(self.scale.shape))
        levels = (flat.view(len(flat), self.groups, -1) / self.scale).round()
        codes = levels + self.zero
        self.register_buffer("start", codes)
        self.register_buffer("keep", self._kept(original, codes, is_thinned))
        if original is not None and original.shape == dense.shape:
            gap = original.detach().float().reshape(levels.shape) / self.scale - levels
            # Halfway, at most a quarter of a level: what was compensated for lies far off, and would change at the first step.
            levels = levels + gap.clamp(-0.5, 0.5) / 2
        self.register_buffer("unit", self.scale if self.largest - self.least < FEW_LEVELS else torch.ones_like(self.scale))
        self.weight = nn.Parameter(levels * (self.scale / self.unit))
        self.factor = nn.Parameter(torch.ones_like(self.scale))
        self.kind = {"weight": "weight", "factor": "scale"}

    @property
    def is_reduced(self) -> bool:
        return self.keep is not None or self.largest - self.least < LEAST_LEVELS

    def _kept(self, original: Tensor | None, codes: Tensor, is_thinned: bool) -> Tensor | None:
        """What is not zero because it was pruned: of 2:4 weights what is stored, else what was not zero before it was
        packed, or is not now."""
        if self.scheme.is_sparse:
            # Where a number can be anything but zero.
            ends = (torch.full_like(codes.flatten(1), level) for level in (self.least, self.largest))
            stored = [{**self.parts, self.scheme.numbers: self.scheme.stored(each, self.parts)} for each in ends]
            return torch.stack([dense_of(self.scheme, each) != 0 for each in stored]).any(0).view(codes.shape)
        if original is None or original.shape != self.shape:
            return codes != self.zero if is_thinned else None
        keep = zeros_of(original)
        return None if keep is None else keep.reshape(codes.shape)

    def forward(self) -> Tensor:
        if not self.rounds:
            levels = self.weight if self.keep is None else self.weight * self.keep
            return (levels * self.unit).reshape(self.shape)
        scale = self._scale()
        return ((self._codes(scale) - self.zero) * scale).reshape(self.shape)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        scale = self._scale()
        codes, numbers, kept = self._codes(scale).flatten(1), self.parts[self.scheme.numbers], self.parts["scale"]
        stored = self.scheme.stored(codes, self.parts).view(numbers.shape)
        return {self.scheme.numbers: stored, "scale": scale.reshape(kept.shape).to(kept.dtype)}

    @torch.no_grad()
    def settle(self) -> None:
        self.start = self._codes(self._scale())

    def _scale(self) -> Tensor:
        scale = self.scale * self.factor.clamp(min=LEAST_FACTOR)
        return through(scale, lambda s: s.to(self.parts["scale"].dtype).float())

    def _codes(self, scale: Tensor) -> Tensor:
        if not any(each.requires_grad for each in self.parameters() if each is not self.factor):
            return self.start
        codes = through(self.weight * (self.unit / scale), torch.round) + self.zero
        codes = codes.clamp(self.least, self.largest)
        return codes if self.keep is None else torch.where(self.keep, codes, self.zero)


class Cast(Latent):
    """A weight in a format whose numbers are no levels (fp8): trained as float, packed anew for every step, with the gradient
    of one that is not."""

    def __init__(
        self, scheme: Scheme, parts: Mapping[str, Tensor], original: Tensor | None = None, is_thinned: bool = False
    ) -> None:
        super().__init__()
        self.scheme = scheme
        dense = dense_of(scheme, parts)
        keep = dense != 0 if is_thinned else None
        if original is not None and original.shape == dense.shape:
            keep = zeros_of(original)
        self.master = Float(dense, keep)
        self.kind = {f"master.{name}": kind for name, kind in self.master.kind.items()}

    @property
    def is_reduced(self) -> bool:
        return self.master.is_reduced

    def forward(self) -> Tensor:
        return through(self.master(), self.scheme.fake) if self.rounds else self.master()

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        return self.scheme.pack(self.master())


def packed(
    scheme: Scheme, parts: Mapping[str, Tensor], original: Tensor | None = None, is_thinned: bool = False
) -> Latent:
    """The latent of a packed weight. original: the float weight that it was packed from, where it is known; is_thinned: where
    it is not, whether zeros were part of it."""
    if not scheme.is_quantized:
        return Thin(scheme, parts)
    kind = Cast if scheme.stored is None else Rounded
    return kind(scheme, parts, original, is_thinned)


def dense_of(scheme: Scheme, parts: Mapping[str, Tensor]) -> Tensor:
    """`Scheme.dense`, of convolutions too, whose numbers have four dimensions."""
    numbers = parts[scheme.numbers]
    if numbers.ndim < 4:
        return scheme.dense(parts)
    return scheme.dense({**parts, scheme.numbers: numbers.flatten(1)}).view(numbers.shape)


def through(value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(value), with the gradient of value: a straight-through estimator (Bengio et al., arXiv 1308.3432)."""
    return value + (function(value.detach()) - value).detach()

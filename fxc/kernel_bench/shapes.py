"""The weights that are measured: those of well-known language models, or any N,K."""

from __future__ import annotations

from dataclasses import dataclass

from fxc.errors import UsageError

# N, K of each weight: q, k and v are one product, and so are gate and up.
MODELS = {
    "qwen2.5-7b": {
        "qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944), "head": (152064, 3584),
    },
    "qwen2.5-72b": {
        "qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (59136, 8192), "down": (8192, 29568), "head": (152064, 8192),
    },
    "llama3-8b": {
        "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
    },
    "llama3-70b": {
        "qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672), "head": (128256, 8192),
    },
}  # fmt: skip
# Up to so many rows (tokens) a product counts as one of this kind.
REGIMES = {"decode": 4, "small": 128, "mid": 1024, "prefill": None}


@dataclass(frozen=True)
class Shape:
    """One weight [n, k]."""

    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.name} {self.n} x {self.k}"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """ "qwen2.5-7b", "llama3-8b:o" or "4096,4096", and several of them with commas between. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    found: list[Shape] = []
    while parts:
        part = parts.pop(0)
        if part.isdecimal():
            other = parts.pop(0) if parts else ""
            if not other.isdecimal() or not int(part) or not int(other):
                raise UsageError(f"{part} is half of a shape", where="--shapes", hint="write N,K, as in 4096,4096")
            found.append(Shape("weight", int(part), int(other)))
            continue
        model, _, layer = part.partition(":")
        if model not in MODELS or (layer and layer not in MODELS[model]):
            layers = ", ".join(next(iter(MODELS.values())))
            raise UsageError(
                f"there is no shape {part!r}",
                where="--shapes",
                hint=f"N,K or one of {', '.join(MODELS)}, or one layer of it ({layers}), as in llama3-8b:o",
            )
        chosen = {layer: MODELS[model][layer]} if layer else MODELS[model]
        found += [Shape(f"{model} {name}", *size) for name, size in chosen.items()]
    return tuple(dict.fromkeys(found))


def regime(m: int) -> str:
    """Of a product of m rows: decode up to 4, small up to 128, mid up to 1024, prefill above."""
    return next(name for name, limit in REGIMES.items() if limit is None or m <= limit)

"""Random small networks, and random structures to zero in them: layers that have been masked as a pruner masks them.

A `Network` is what hypothesis draws and shrinks, and its repr is the Python that builds it again: a recipe, a seed for the
weights, and cuts. Every module says which structures it has (`structures`). A cut of one that is `sure` must make the
parameters that it names smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

VOCABULARY = 7
LENGTH = 5
ACTIVATIONS = {
    "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda x: x,
}  # fmt: skip


class Make:
    """A module to be built; prints as what makes it."""

    def __init__(self, cls: type[nn.Module], *args, **options):
        self.cls, self.args, self.options = cls, args, options

    def __repr__(self) -> str:
        given = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"Make({', '.join([self.cls.__name__, *given])})"

    def __call__(self) -> nn.Module:
        return self.cls(*map(_made, self.args), **{k: _made(v) for k, v in self.options.items()})


def _made(option):
    if isinstance(option, list):
        return [_made(o) for o in option]
    return option() if isinstance(option, Make) else option


# ---------------------------------------------------------------------------------------------------------- structures


@dataclass(frozen=True)
class Structure:
    """Indices that can be zeroed, 0 to size - 1, and what is zero for each: (parameter, index into it). shrinks: the
    parameters that have to become smaller for each index, the dimension, and by how much; empty where zeroing is no proof
    that anything may go; stays: how many units stay where all are zeroed, since no axis becomes empty."""

    size: int
    zeros: Callable[[int], list[tuple[str, tuple]]]
    shrinks: list[tuple[str, int, int]] = field(default_factory=list)
    stays: int = 1


def structures(model: nn.Module) -> dict[str, Structure]:
    """What can be zeroed in `model`, by "module:structure"."""
    return {f"{name}:{kind}": s for name, module in model.named_modules() for kind, s in _structures(name, module)}


def _structures(name: str, module: nn.Module) -> Iterator[tuple[str, Structure]]:
    prefix = f"{name}." if name else ""
    bias = f"{prefix}bias"
    weight = f"{prefix}weight"
    match module:
        case nn.Linear() | nn.Conv2d():
            shape = module.weight.shape
            yield "rows", Structure(shape[0], lambda i: [(weight, (i,))])
            if module.bias is not None:
                yield "rows_and_bias", Structure(shape[0], lambda i: [(weight, (i,)), (bias, (i,))])
            yield "columns", Structure(shape[1], lambda i: [(weight, (slice(None), i))])
        case nn.BatchNorm2d() | nn.GroupNorm() | nn.LayerNorm() | RmsNorm() if module.weight is not None:
            yield "scales", Structure(len(module.weight), lambda i: [(weight, (i,))])
            if getattr(module, "bias", None) is not None:
                yield "scales_and_bias", Structure(len(module.weight), lambda i: [(weight, (i,)), (bias, (i,))])
    for kind, structure in getattr(module, "structures", lambda: {})().items():
        yield (
            kind,
            Structure(
                structure.size,
                lambda i, zeros=structure.zeros: [(prefix + fqn, index) for fqn, index in zeros(i)],
                [(prefix + fqn, dim, by) for fqn, dim, by in structure.shrinks],
                structure.stays,
            ),
        )


def elements(model: nn.Module) -> dict[str, int]:
    """The weights of which one element is neither a row nor a column -> how many elements."""
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {f"{n}.weight": w.numel() for n, w in layers.items() if len(w) > 1 and w[0].numel() > 1}


def _units(parts: list[tuple[str, int]], width: int = 1, first: int = 0) -> Callable[[int], list[tuple[str, tuple]]]:
    """Index i -> a run of `width` positions from first + i * width on, of each (parameter, dimension)."""
    return lambda i: [
        (fqn, (*[slice(None)] * dim, slice(first + i * width, first + (i + 1) * width))) for fqn, dim in parts
    ]  # fmt: skip


def _parts(model: nn.Module, layer: str, dim: int = 0) -> list[tuple[str, int]]:
    """The weight of `layer`, and for rows its bias, if it has one."""
    found = getattr(model, layer)
    return [(f"{layer}.weight", dim)] + ([(f"{layer}.bias", 0)] if dim == 0 and found.bias is not None else [])


def _shrinks(parts: list[tuple[str, int]], by: int = 1) -> list[tuple[str, int, int]]:
    return [(fqn, dim, by) for fqn, dim in parts]


# -------------------------------------------------------------------------------------------------------------- tokens


class RmsNorm(nn.Module):
    def __init__(self, width: int, cast: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.cast = cast

    def forward(self, x):
        wide = x.to(torch.float32) if self.cast else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def norm_of(kind: str | None, width: int) -> nn.Module:
    match kind:
        case "layer":
            return nn.LayerNorm(width)
        case "plain":
            return nn.LayerNorm(width, elementwise_affine=False)
        case "rms" | "rms_cast":
            return RmsNorm(width, cast=kind == "rms_cast")
    return nn.Identity()


class Mlp(nn.Module):
    """Linear layers with activations between them."""

    def __init__(self, sizes: list[int], act: str, bias: bool = True, down_bias: bool = True):
        super().__init__()
        self.act = ACTIVATIONS[act]
        last = len(sizes) - 2
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=down_bias if i == last else bias) for i, (a, b) in enumerate(pairwise(sizes))
        )

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)

    def structures(self):
        found = {}
        for i in range(len(self.layers) - 1):
            rows = [(f"layers.{i}.{n}", 0) for n, p in self.layers[i].named_parameters() if p is not None]
            columns = [(f"layers.{i + 1}.weight", 1)]
            size = self.layers[i].out_features
            for kind, zeroed in (("in", rows), ("in_weight", rows[:1]), ("out", columns)):
                found[f"hidden{i}_{kind}"] = Structure(size, _units(zeroed), _shrinks(rows + columns))
        return found


class GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: str, fused: str | None = None, bias: bool = False, swapped: bool = False):
        super().__init__()
        self.hidden, self.fused, self.swapped, self.name = hidden, fused, swapped, act
        if fused:
            self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        else:
            self.gate, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        match self.fused:
            case "chunk":
                gate, up = self.gate_up(x).chunk(2, dim=-1)
            case "split":
                gate, up = self.gate_up(x).split([self.hidden, self.hidden], dim=-1)
            case "slice":
                both = self.gate_up(x)
                gate, up = both[..., : self.hidden], both[..., self.hidden :]
            case _:
                gate, up = self.gate(x), self.up(x)
        gate = ACTIVATIONS[self.name](gate)
        return self.down(up * gate if self.swapped else gate * up)

    def structures(self):
        down = [("down.weight", 1)]
        if self.fused:
            rows = _parts(self, "gate_up")
            gate, up = _units(rows), _units(rows, first=self.hidden)
            all_of = _shrinks(rows, 2) + _shrinks(down)
        else:
            gate, up = _units(_parts(self, "gate")), _units(_parts(self, "up"))
            all_of = _shrinks(_parts(self, "gate") + _parts(self, "up") + down)
        from_zero = [] if self.name == "sigmoid" else all_of
        return {
            "gate": Structure(self.hidden, gate, from_zero),
            "up": Structure(self.hidden, up, all_of),
            "down": Structure(self.hidden, _units(down), all_of),
        }


class Attention(nn.Module):
    """fused: how one product becomes q, k and v, or None; widen: how keys are shared by several heads; length: that of the
    inputs, for a bias that is a table."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, fused: str | None = None, widen: str = "expand",
        eager: bool = False, bias: bool = True, norm: str | None = None, rotary: bool = False, mask: str | None = None,
        counted: bool = True, length: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.counted = heads, kv_heads, head_dim, counted
        self.fused, self.widen, self.eager, self.mask, self.rotary = fused, widen, eager, mask, rotary
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if fused:
            self.qkv = nn.Linear(width, sum(self.sizes), bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, size, bias=bias) for size in self.sizes)
        self.o = nn.Linear(heads * head_dim, width, bias=bias)
        self.has_norm = norm is not None
        self.q_norm, self.k_norm = norm_of(norm, head_dim), norm_of(norm, head_dim)
        if mask == "slopes":
            self.slopes = nn.Parameter(torch.ones(heads, 1, 1))
        elif mask == "table":
            self.table = nn.Parameter(torch.ones(heads, length, length))
        if rotary:
            self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        groups = self.heads // self.kv_heads
        if groups > 1 and self.widen != "native":
            k, v = self.widened(k, groups), self.widened(v, groups)
        y = self.attend(q, k, v, self.additive(x)).transpose(1, 2)
        return self.o(y.reshape(b, t, self.heads * self.head_dim if self.counted else -1))

    def project(self, x):
        b, t, _ = x.shape
        if self.fused == "unbind":
            return self.qkv(x).reshape(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused == "interleaved":
            return self.qkv(x).view(b, t, self.heads, 3 * self.head_dim).transpose(1, 2).chunk(3, dim=-1)
        if self.fused == "chunk":
            qkv = self.qkv(x).chunk(3, dim=-1)
        elif self.fused == "split":
            qkv = self.qkv(x).split(self.sizes, dim=-1)
        else:
            qkv = self.q(x), self.k(x), self.v(x)
        heads = (self.heads, self.kv_heads, self.kv_heads) if self.counted else (-1, -1, -1)
        return [y.view(b, t, n, self.head_dim).transpose(1, 2) for y, n in zip(qkv, heads)]

    def rotate(self, x):
        angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), self.frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angles.cos() + turned * angles.sin()

    def widened(self, x, groups: int):
        if self.widen == "repeat":
            return x.repeat_interleave(groups, dim=1)
        b, n, t, d = x.shape
        return x[:, :, None].expand(b, n, groups, t, d).reshape(b, n * groups, t, d)

    def additive(self, x):
        t = x.shape[1]
        if self.mask == "table":
            return self.table
        if self.mask == "slopes":
            places = torch.arange(t, dtype=x.dtype)
            return self.slopes * (places[None, :] - places[:, None])
        return None

    def attend(self, q, k, v, additive):
        causal = self.mask == "causal"
        if not self.eager:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=additive, is_causal=causal, enable_gqa=self.widen == "native"
            )  # fmt: skip
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if additive is not None:
            scores = scores + additive
        if causal:
            t = q.shape[2]
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(dim=-1) @ v

    def structures(self):
        d, groups = self.head_dim, self.heads // self.kv_heads
        o = [("o.weight", 1)]
        found = {"head_dims": Structure(d, lambda i: [("o.weight", (slice(None), slice(i, None, d)))])}
        if self.fused in ("unbind", "interleaved"):
            qkv = _parts(self, "qkv")
            found["heads"] = Structure(self.heads, _units(o, d), _shrinks(o, d) + _shrinks(qkv, 3 * d))
            if self.fused == "unbind":
                v = _units(qkv, d, 2 * self.heads * d)
                found["values"] = Structure(self.heads, v, _shrinks(o, d) + _shrinks(qkv, 3 * d))
            return found
        if self.fused:
            q, kv, v = _shrinks(_parts(self, "qkv"), d), 2 * d, _units(_parts(self, "qkv"), d, sum(self.sizes[:2]))
            whole = _shrinks(_parts(self, "qkv"), groups * d + kv)
        else:
            q, v = _shrinks(_parts(self, "q"), d), _units(_parts(self, "v"), d)
            whole = _shrinks(_parts(self, "q"), groups * d) + _shrinks(_parts(self, "k") + _parts(self, "v"), d)
        found["heads"] = Structure(self.heads, _units(o, d), _shrinks(o, d) + q)
        found["groups"] = Structure(self.kv_heads, _units(o, groups * d), _shrinks(o, groups * d) + whole)
        found["values"] = Structure(self.kv_heads, v, _shrinks(o, groups * d) + whole)
        return found


class Residual(nn.Module):
    """order: where the norm is; scale: a learned factor of the branch, one number, one for each channel, or none."""

    def __init__(self, width: int, branch: nn.Module, norm: str | None = None, order: str = "pre", scale: str | None = None):
        super().__init__()
        self.branch, self.norm, self.order = branch, norm_of(norm, width), order
        self.scale = nn.Parameter(torch.ones(width if scale == "channels" else 1)) if scale else None

    def forward(self, x):
        y = self.branch(self.norm(x) if self.order == "pre" else x)
        if self.scale is not None:
            y = self.scale * y
        return self.norm(x + y) if self.order == "post" else x + y

    def structures(self):
        """Scale or last layer of the branch: where they are zero nothing of it is left."""
        gone = [(f"branch.{n}", 0, len(p)) for n, p in self.branch.named_parameters()]
        normed = getattr(self.branch, "last_norm", False)
        weighted = (nn.BatchNorm2d, nn.GroupNorm) if normed else (nn.Linear, nn.Conv2d)
        layer = [n for n, m in self.branch.named_modules() if isinstance(m, weighted)][-1]
        last = [n for n, _ in self.named_parameters() if n.startswith(f"branch.{layer}.")]
        found = {"last": Structure(1, lambda i: [(n, (slice(None),)) for n in last], gone, 0)}
        if self.scale is not None:
            gone.append(("scale", 0, len(self.scale)))
            found["branch"] = Structure(1, lambda i: [("scale", (slice(None),))], gone, 0)
        return found


class Concat(nn.Module):
    """Branches beside one another and a layer over all of them."""

    def __init__(self, branches: list[nn.Module], width: int, total: int, keep: bool = False):
        super().__init__()
        self.branches, self.keep = nn.ModuleList(branches), keep
        self.mix = nn.Linear(total, width)

    def forward(self, x):
        return self.mix(torch.cat([*([x] if self.keep else []), *(branch(x) for branch in self.branches)], dim=-1))


class Sliced(nn.Module):
    """Parts of a layer's channels treated differently, put together in another order."""

    def __init__(self, width: int, hidden: int, at: int, act: str):
        super().__init__()
        self.up, self.down, self.at, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width), at, ACTIVATIONS[act]

    def forward(self, x):
        y = self.up(x)
        return self.down(torch.cat([y[..., self.at :], self.act(y[..., : self.at])], dim=-1))

    def structures(self):
        return {"channels": Structure(self.up.out_features, _units(_parts(self, "up")))}


class Twice(nn.Module):
    """One layer, used two times."""

    def __init__(self, width: int, act: str):
        super().__init__()
        self.layer, self.act = nn.Linear(width, width), ACTIVATIONS[act]

    def forward(self, x):
        return self.layer(self.act(self.layer(x)))


class Embed(nn.Module):
    def __init__(self, width: int, positions: bool):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(16, width) if positions else None

    def forward(self, ids):
        x = self.tokens(ids)
        return x if self.positions is None else x + self.positions(torch.arange(ids.shape[1]))

    def structures(self):
        return {"columns": Structure(self.tokens.embedding_dim, _units([("tokens.weight", 1)]))}


class Pooled(nn.Module):
    """Tokens -> rows."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, x):
        match self.how:
            case "mean":
                return x.mean(dim=1)
            case "first":
                return x[:, 0]
            case "flatten":
                return x.flatten(1)
        return x


# -------------------------------------------------------------------------------------------------------------- images


class Convs(nn.Module):
    """Convolutions with norms and activations after each but the last, which may have a norm.

    layers: (in, out, kernel, padding, groups).
    """

    def __init__(self, layers: list[tuple], norm: str | None, act: str, bias: bool, last_norm: bool = False):
        super().__init__()
        self.name, self.act, self.last_norm = act, ACTIVATIONS[act], last_norm
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=padding, groups=groups, bias=bias) for a, b, kernel, padding, groups in layers
        )
        normed = [layer[1] for layer in (layers if last_norm else layers[:-1]) if norm]
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) if norm == "batch" else nn.GroupNorm(2, n) for n in normed)

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = self.norms[i](x) if i < len(self.norms) else x
            x = self.act(x) if i + 1 < len(self.convs) else x
        return x

    def structures(self):
        """Between two plain convolutions a channel can go, with all that stands between them one by one."""
        plain = [i for i, conv in enumerate(self.convs) if conv.groups == 1]
        found = {}
        for i, j in pairwise(plain):
            between = range(i, j)
            depthwise = all(self.convs[k].groups == self.convs[k].in_channels for k in between[1:])
            batch = not self.norms or isinstance(self.norms[0], nn.BatchNorm2d)
            parts = [(f"convs.{k}.{n}", 0) for k in between for n, _ in self.convs[k].named_parameters()]
            parts += [
                (f"norms.{k}.{n}", 0) for k in between if k < len(self.norms) for n, _ in self.norms[k].named_parameters()
            ]
            columns = [(f"convs.{j}.weight", 1)]
            size = self.convs[i].out_channels
            gone = _shrinks(parts + columns) if depthwise and batch else []
            found[f"channels{i}_out"] = Structure(size, _units(columns), gone)
            if self.norms and i < len(self.norms):
                zeroed = [(f"norms.{i}.{n}", 0) for n in ("weight", "bias")]
            else:
                zeroed = [(f"convs.{i}.{n}", 0) for n, _ in self.convs[i].named_parameters()]
            # A depthwise convolution makes a zero its bias, which is a constant that padding breaks off at the border.
            through = len(between) == 1 and self.name != "sigmoid"
            inside = self.convs[j].padding == (0, 0) and all(c.padding == (0, 0) for c in self.convs[i + 1 : j])
            found[f"channels{i}_in"] = Structure(size, _units(zeroed), gone if through or inside else [])
            found[f"channels{i}_in_weight"] = Structure(size, _units(zeroed[:1]), gone if inside else [])
        return found


class ImageResidual(nn.Module):
    def __init__(self, branch: nn.Module, width: int, act: str, scale: bool = False):
        super().__init__()
        self.branch, self.act = branch, ACTIVATIONS[act]
        self.scale = nn.Parameter(torch.ones(width, 1, 1)) if scale else None

    def forward(self, x):
        y = self.branch(x)
        return self.act(x + (y if self.scale is None else y * self.scale))

    structures = Residual.structures


class ImageConcat(nn.Module):
    def __init__(self, branches: list[nn.Module], keep: bool):
        super().__init__()
        self.branches, self.keep = nn.ModuleList(branches), keep

    def forward(self, x):
        return torch.cat([*([x] if self.keep else []), *(branch(x) for branch in self.branches)], dim=1)


class Shuffle(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Halves(nn.Module):
    """A convolution of some of the channels; the others go past it."""

    def __init__(self, branch: nn.Module, at: int, how: str):
        super().__init__()
        self.branch, self.at, self.how = branch, at, how

    def forward(self, x):
        if self.how == "chunk":
            a, b = x.chunk(2, dim=1)
        elif self.how == "split":
            a, b = x.split([self.at, x.shape[1] - self.at], dim=1)
        else:
            a, b = x[:, : self.at], x[:, self.at :]
        return torch.cat([b, self.branch(a)], dim=1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, hidden: int, convs: bool):
        super().__init__()
        self.convs = convs
        make = (lambda a, b: nn.Conv2d(a, b, 1)) if convs else nn.Linear
        self.down, self.up = make(width, hidden), make(hidden, width)

    def forward(self, x):
        if self.convs:
            return x * torch.sigmoid(self.up(torch.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean(dim=(2, 3))))))[:, :, None, None]

    def structures(self):
        rows, columns = _parts(self, "down"), [("up.weight", 1)]
        gone = _shrinks(rows + columns)
        size = self.down.weight.shape[0]
        return {"hidden_in": Structure(size, _units(rows), gone), "hidden_out": Structure(size, _units(columns), gone)}


class GlobalMean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


class Patches(nn.Module):
    """An image as tokens, with a learned one before them where `first` says so."""

    def __init__(self, channels: int, width: int, side: int, first: bool):
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 2, stride=2)
        count = (side // 2) ** 2 + first
        self.first = nn.Parameter(torch.ones(1, 1, width)) if first else None
        self.places = nn.Parameter(torch.ones(1, count, width))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.first is not None:
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.places


# ------------------------------------------------------------------------------------------------------------- networks


class Net(nn.Module):
    """Blocks one after the other. tail: heads over the last value, one output each; shown: a block whose value is an output
    too; tied: whether the first block's embedding is a head."""

    def __init__(self, blocks: list[nn.Module], tails: list[nn.Module], shown: int | None = None, tied: bool = False):
        super().__init__()
        self.blocks, self.tails, self.shown = nn.ModuleList(blocks), nn.ModuleList(tails), shown
        if tied:
            embedding = blocks[0].tokens
            head = nn.Linear(embedding.embedding_dim, VOCABULARY, bias=False)
            head.weight = embedding.weight
            self.tails.append(head)

    def forward(self, x):
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.shown:
                outputs.append(x)
        outputs += [tail(x) for tail in self.tails]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


@dataclass(frozen=True)
class Network:
    """recipe: the blocks and how they are used; shape: of one input without its batch, () for tokens; cuts: (structure,
    its indices that are zeroed); attached: whether weights are zeroed by masks of torch.nn.utils.prune that are left where
    they are; pruned: (layer, function of torch.nn.utils.prune, amount, dimension), left there too."""

    recipe: Make
    shape: tuple[int, ...]
    seed: int = 0
    cuts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    attached: bool = False
    pruned: tuple[tuple[str, str, float, int | None], ...] = ()

    def whole(self) -> nn.Module:
        """The network with nothing zeroed, in float64 and with random weights, biases, scales and statistics."""
        model = self.recipe().double().eval()
        generator = torch.Generator().manual_seed(self.seed)

        def near_one(tensor: Tensor) -> None:
            tensor.uniform_(0.5, 1.5, generator=generator)

        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.ndim > 1 and name.endswith("weight"):
                    tensor.normal_(generator=generator).div_(tensor[0].numel() ** 0.5)
                elif name.endswith(("weight", "scale", "slopes")):
                    near_one(tensor)
                else:
                    tensor.normal_(generator=generator).div_(2)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(generator=generator)
                    near_one(module.running_var)
        return model

    def build(self) -> nn.Module:
        """The network as a pruner leaves it."""
        model = self.whole()
        masks: dict[str, Tensor] = {}
        for name, indices in self.cuts:
            structure = structures(model)[name]
            for fqn, where in (zero for i in indices for zero in structure.zeros(i)):
                mask = masks.setdefault(fqn, torch.ones_like(model.get_parameter(fqn)))
                mask[where] = 0
        for fqn, mask in masks.items():
            layer = model.get_submodule(fqn.rpartition(".")[0])
            if self.attached and isinstance(layer, (nn.Linear, nn.Conv2d)):
                prune.custom_from_mask(layer, fqn.rpartition(".")[2], mask)
            else:
                model.get_parameter(fqn).data.mul_(mask)
        for name, how, amount, dim in self.pruned:
            torch.manual_seed(self.seed)
            options = {} if dim is None else {"n": 2, "dim": dim} if how == "ln_structured" else {"dim": dim}
            getattr(prune, how)(model.get_submodule(name), "weight", amount=amount, **options)
        return model

    def shrinks(self) -> Iterator[tuple[str, str, int, int]]:
        """(cut, parameter, dimension, the size that it may have at most) of all that has to become smaller."""
        model = self.whole()
        for name, indices in self.cuts:
            structure = structures(model)[name]
            for fqn, dim, by in structure.shrinks:
                left = max(structure.size - len(indices), structure.stays)
                yield name, fqn, dim, model.get_parameter(fqn).shape[dim] - by * (structure.size - left)

    def inputs(self, batch: int, length: int = LENGTH) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + batch)
        if not self.shape:
            return [torch.randint(0, VOCABULARY, (batch, length), generator=generator)]
        return [torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64)]


# ------------------------------------------------------------------------------------------------------------ strategies

_acts = st.sampled_from(["relu", "gelu", "silu", "tanh", "sigmoid"])
_token_norms = st.sampled_from([None, "layer", "rms", "plain", "rms_cast"])
_small = st.integers(2, 5)


@st.composite
def _mlps(draw, width: int, out: int | None = None) -> Make:
    hidden = draw(st.lists(st.integers(2, 6), min_size=1, max_size=2))
    return Make(Mlp, [width, *hidden, out or width], draw(_acts), bias=draw(st.booleans()), down_bias=draw(st.booleans()))


@st.composite
def _gated_mlps(draw, width: int) -> Make:
    fused = draw(st.sampled_from([None, "chunk", "split", "slice"]))
    return Make(GatedMlp, width, draw(_small), draw(_acts), fused=fused, bias=draw(st.booleans()), swapped=draw(st.booleans()))


@st.composite
def _attentions(draw, width: int, length: int | None) -> Make:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2, 3]))
    fused = draw(st.sampled_from([None, "split", "chunk", "unbind", "interleaved"] if heads == kv_heads else [None, "split"]))
    eager = draw(st.booleans())
    return Make(
        Attention,
        width,
        heads,
        kv_heads,
        draw(st.sampled_from([2, 4])),
        fused=fused,
        widen=draw(st.sampled_from(["expand", "repeat"] if eager or heads == kv_heads else ["expand", "repeat", "native"])),
        eager=eager,
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from([None, None, "rms", "layer"])),
        rotary=draw(st.booleans()),
        mask=draw(st.sampled_from([None, "causal", "slopes", "table"] if length else [None, "causal", "slopes"])),
        counted=draw(st.booleans()),
        length=length,
    )


@st.composite
def _row_blocks(draw, width: int, attention: st.SearchStrategy | None = None) -> Make:
    """A block of `width` channels in and out, over rows or, with `attention`, over tokens."""
    inner = st.one_of(_mlps(width), _gated_mlps(width))
    if attention is not None and draw(st.integers(0, 2)):
        inner = attention
    kind = draw(st.sampled_from(["residual"] * 4 + ["plain", "concat", "sliced", "twice"]))
    match kind:
        case "residual":
            return Make(
                Residual,
                width,
                draw(inner),
                norm=draw(_token_norms),
                order=draw(st.sampled_from(["pre", "post"])),
                scale=draw(st.sampled_from([None, None, "one", "channels"])),
            )
        case "concat":
            sizes = draw(st.lists(_small, min_size=1, max_size=2))
            branches = [draw(_mlps(width, size)) for size in sizes]
            keep = draw(st.booleans())
            return Make(Concat, branches, width, sum(sizes) + keep * width, keep=keep)
        case "sliced":
            hidden = draw(st.integers(3, 6))
            return Make(Sliced, width, hidden, draw(st.integers(1, hidden - 1)), draw(_acts))
        case "twice":
            return Make(Twice, width, draw(_acts))
    return draw(inner)


@st.composite
def _row_networks(draw) -> tuple[Make, tuple[int, ...]]:
    width = draw(_small)
    blocks = [draw(_row_blocks(width)) for _ in range(draw(st.integers(1, 3)))]
    tails = [draw(_heads(width)) for _ in range(draw(st.integers(1, 2)))]
    return Make(Net, blocks, tails, shown=draw(_shown(blocks))), (width,)


def _heads(width: int) -> st.SearchStrategy[Make]:
    return st.one_of(st.just(Make(nn.Linear, width, 3)), st.just(Make(nn.Linear, width, 2, bias=False)), _mlps(width, 3))


def _shown(blocks: list[Make]) -> st.SearchStrategy[int | None]:
    return st.sampled_from([None] * 3 + list(range(len(blocks))))


@st.composite
def _token_networks(draw) -> tuple[Make, tuple[int, ...]]:
    front = draw(st.sampled_from(["values", "embedding", "patches"]))
    width = draw(st.sampled_from([4, 6]))
    shape: tuple[int, ...] = ()
    length = None
    if front == "values":
        blocks, shape, length = [], (LENGTH, width), LENGTH
    elif front == "embedding":
        blocks = [Make(Embed, width, draw(st.booleans()))]
    else:
        first = draw(st.booleans())
        blocks, shape, length = [Make(Patches, 3, width, 4, first)], (3, 4, 4), 4 + first
    attention = _attentions(width, length)
    blocks += [draw(_row_blocks(width, attention)) for _ in range(draw(st.integers(1, 2)))]
    if draw(st.booleans()):
        blocks.append(Make(draw(st.sampled_from([nn.LayerNorm, RmsNorm])), width))
    tied = front == "embedding" and draw(st.booleans())
    how = draw(st.sampled_from(["all", "mean", "first", "flatten"] if length and not tied else ["all", "mean", "first"]))
    if tied:
        return Make(Net, blocks, [], shown=draw(_shown(blocks)), tied=True), shape
    shown = draw(_shown(blocks))
    blocks.append(Make(Pooled, how))
    tails = [draw(_heads(width * length if how == "flatten" else width)) for _ in range(draw(st.integers(1, 2)))]
    return Make(Net, blocks, tails, shown=shown), shape


@st.composite
def _convs(draw, width: int, out: int, padded: bool = True) -> Make:
    """Convolutions from `width` to `out` channels that keep the image's size where `padded`, else make it 2 smaller."""
    act, norm, bias = draw(_acts), draw(st.sampled_from([None, "batch", "batch", "group"])), draw(st.booleans())
    hidden = draw(st.sampled_from([4, 6]))
    one, three = (1, 0, 1), (3, 1 if padded else 0, 1)
    match draw(st.sampled_from(["one", "two", "two", "three", "depthwise", "grouped"])):
        case "one":
            layers = [(width, out, *(draw(st.sampled_from([one, three])) if padded else three))]
        case "two":
            first, second = draw(st.sampled_from([(one, three), (three, one)]))
            layers = [(width, hidden, *first), (hidden, out, *second)]
        case "three":
            layers = [(width, hidden, *one), (hidden, 4, *three), (4, out, *one)]
        case "depthwise":
            layers = [(width, hidden, *one), (hidden, hidden, *three[:2], hidden), (hidden, out, *one)]
        case _:
            layers = [(width, hidden, *one), (hidden, 4, *three[:2], 2), (4, out, *one)]
    last = norm is not None and out % 2 == 0 and draw(st.booleans())
    return Make(Convs, layers, norm, act, bias, last_norm=last)


@st.composite
def _image_networks(draw) -> tuple[Make, tuple[int, ...]]:
    channels, side = draw(st.integers(1, 4)), 6
    shape = (channels, side, side)
    width = channels
    blocks: list[Make] = []
    kinds = ["convs", "residual", "residual", "concat", "shuffle", "halves", "excite", "norm", "max", "average", "act"]
    for i in range(draw(st.integers(1, 4))):
        kind = "convs" if i == 0 else draw(st.sampled_from(kinds))
        if kind in ("shuffle", "halves") and (width < 4 or width % 2):
            kind = "convs"
        match kind:
            case "convs":
                padded = side < 5 or draw(st.booleans())
                out = draw(st.sampled_from([4, 6, 8]))
                blocks.append(draw(_convs(width, out, padded)))
                width, side = out, side if padded else side - 2
            case "residual":
                act = draw(st.sampled_from(["none", "relu", "silu"]))
                blocks.append(Make(ImageResidual, draw(_convs(width, width)), width, act, scale=draw(st.booleans())))
            case "concat":
                sizes = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2))
                keep = draw(st.booleans())
                blocks.append(Make(ImageConcat, [draw(_convs(width, size)) for size in sizes], keep))
                width = sum(sizes) + keep * width
            case "shuffle":
                blocks.append(Make(Shuffle, 2))
            case "halves":
                at = width // 2
                how = draw(st.sampled_from(["chunk", "split", "slice"]))
                blocks.append(Make(Halves, draw(_convs(at, at)), at, how))
            case "excite":
                blocks.append(Make(SqueezeExcite, width, 3, draw(st.booleans())))
            case "norm":
                blocks.append(Make(nn.BatchNorm2d, width))
            case "max" | "average" if side >= 4:
                blocks.append(Make(nn.MaxPool2d if kind == "max" else nn.AvgPool2d, 2))
                side //= 2
            case _:
                blocks.append(Make(draw(st.sampled_from([nn.ReLU, nn.SiLU, nn.Sigmoid]))))
    shown = draw(_shown(blocks))
    match draw(st.sampled_from(["mean", "pool", "pool2", "flatten", "none"])):
        case "mean":
            blocks.append(Make(GlobalMean))
        case "pool":
            blocks += [Make(draw(st.sampled_from([nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])), 1), Make(nn.Flatten)]
        case "pool2":
            blocks += [Make(nn.AdaptiveAvgPool2d, 2), Make(nn.Flatten)]
            width *= 4
        case "flatten":
            blocks.append(Make(nn.Flatten))
            width *= side * side
        case _:
            return Make(Net, blocks, [Make(nn.Conv2d, width, 2, 1)], shown=shown), shape
    return Make(Net, blocks, [draw(_heads(width)) for _ in range(draw(st.integers(1, 2)))], shown=shown), shape


FAMILIES = {"rows": _row_networks, "tokens": _token_networks, "images": _image_networks}


@st.composite
def networks(draw, family: str, cut: bool = True) -> Network:
    """Networks of a family: rows, tokens or images. cut: zero something in them."""
    recipe, shape = draw(FAMILIES[family]())
    whole = Network(recipe, shape, draw(st.integers(0, 999)))
    if not cut:
        return whole
    model = whole.whole()
    found = structures(model)
    sure = [name for name, s in found.items() if s.shrinks]
    cuts = {}
    for _ in range(draw(st.integers(1, 4))):
        names = sure if sure and draw(st.booleans()) else list(found)
        kind = draw(st.sampled_from(sorted({name.partition(":")[2] for name in names})))
        name = draw(st.sampled_from([name for name in names if name.endswith(f":{kind}")]))
        last = found[name].size - 1
        # All of them now and then, but mostly a few.
        few = st.sets(st.integers(0, last), min_size=1, max_size=3)
        cuts[name] = tuple(range(last + 1)) if draw(st.integers(0, 7)) == 7 else tuple(sorted(draw(few)))
    attached, pruned = draw(st.integers(0, 4)) == 4, []
    if attached:
        masked = {fqn for name, indices in cuts.items() for i in indices for fqn, _ in found[name].zeros(i)}
        shared = {id(p) for n, p in model.named_parameters() if "tokens" in n}
        layers = [
            n for n, m in model.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d)) and f"{n}.weight" not in masked and id(m.weight) not in shared
        ]  # fmt: skip
        for name in draw(st.lists(st.sampled_from(layers), max_size=2, unique=True)) if layers else []:
            how = draw(st.sampled_from([("ln_structured", 1, 0), ("ln_structured", 1, 1), ("random_unstructured", 0.3, None)]))
            pruned.append((name, *how))
    return Network(recipe, shape, whole.seed, tuple(sorted(cuts.items())), attached, tuple(pruned))

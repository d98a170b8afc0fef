"""Layers over tokens and rows, written in many ways."""

from __future__ import annotations

from itertools import pairwise

import torch
from structures import Structure, norm_of, parts_of, shrink_of, units
from torch import nn
from torch.nn import functional as F

VOCABULARY = 7
ACTIVATIONS = {
    "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda x: x,
}  # fmt: skip


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
                found[f"hidden{i}_{kind}"] = Structure(size, units(zeroed), shrink_of(rows + columns))
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
            rows = parts_of(self, "gate_up")
            gate, up = units(rows), units(rows, first=self.hidden)
            all_of = shrink_of(rows, 2) + shrink_of(down)
        else:
            gate, up = units(parts_of(self, "gate")), units(parts_of(self, "up"))
            all_of = shrink_of(parts_of(self, "gate") + parts_of(self, "up") + down)
        from_zero = [] if self.name == "sigmoid" else all_of
        return {
            "gate": Structure(self.hidden, gate, from_zero),
            "up": Structure(self.hidden, up, all_of),
            "down": Structure(self.hidden, units(down), all_of),
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
            qkv = parts_of(self, "qkv")
            found["heads"] = Structure(self.heads, units(o, d), shrink_of(o, d) + shrink_of(qkv, 3 * d))
            if self.fused == "unbind":
                v = units(qkv, d, 2 * self.heads * d)
                found["values"] = Structure(self.heads, v, shrink_of(o, d) + shrink_of(qkv, 3 * d))
            return found
        if self.fused:
            q, kv, v = shrink_of(parts_of(self, "qkv"), d), 2 * d, units(parts_of(self, "qkv"), d, sum(self.sizes[:2]))
            whole = shrink_of(parts_of(self, "qkv"), groups * d + kv)
        else:
            q, v = shrink_of(parts_of(self, "q"), d), units(parts_of(self, "v"), d)
            whole = shrink_of(parts_of(self, "q"), groups * d) + shrink_of(parts_of(self, "k") + parts_of(self, "v"), d)
        found["heads"] = Structure(self.heads, units(o, d), shrink_of(o, d) + q)
        found["groups"] = Structure(self.kv_heads, units(o, groups * d), shrink_of(o, groups * d) + whole)
        found["values"] = Structure(self.kv_heads, v, shrink_of(o, groups * d) + whole)
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
        return {"channels": Structure(self.up.out_features, units(parts_of(self, "up")))}


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
        return {"columns": Structure(self.tokens.embedding_dim, units([("tokens.weight", 1)]))}


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

"""Layers over images, written in many ways."""

from __future__ import annotations

from itertools import pairwise

import torch
from structures import Structure, parts_of, shrink_of, units
from token_layers import ACTIVATIONS, Residual
from torch import nn
from torch.nn import functional as F


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
            gone = shrink_of(parts + columns) if depthwise and batch else []
            found[f"channels{i}_out"] = Structure(size, units(columns), gone)
            if self.norms and i < len(self.norms):
                zeroed = [(f"norms.{i}.{n}", 0) for n in ("weight", "bias")]
            else:
                zeroed = [(f"convs.{i}.{n}", 0) for n, _ in self.convs[i].named_parameters()]
            # A depthwise convolution makes a zero its bias, which is a constant that padding breaks off at the border.
            through = len(between) == 1 and self.name != "sigmoid"
            inside = self.convs[j].padding == (0, 0) and all(c.padding == (0, 0) for c in self.convs[i + 1 : j])
            found[f"channels{i}_in"] = Structure(size, units(zeroed), gone if through or inside else [])
            found[f"channels{i}_in_weight"] = Structure(size, units(zeroed[:1]), gone if inside else [])
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
        rows, columns = parts_of(self, "down"), [("up.weight", 1)]
        gone = shrink_of(rows + columns)
        size = self.down.weight.shape[0]
        return {"hidden_in": Structure(size, units(rows), gone), "hidden_out": Structure(size, units(columns), gone)}


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

"""Random small networks, and random structures to zero in them: layers that have been masked as a pruner masks them.

A `Network` is what hypothesis draws and shrinks, and its repr is the Python that builds it again: a recipe, a seed for the
weights, and cuts. A cut of a structure that is `sure` must make the parameters that it names smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from image_layers import Convs, GlobalMean, Halves, ImageConcat, ImageResidual, Patches, Shuffle, SqueezeExcite
from structures import RmsNorm, structures
from token_layers import VOCABULARY, Attention, Concat, Embed, GatedMlp, Mlp, Pooled, Residual, Sliced, Twice
from torch import Tensor, nn
from torch.nn.utils import prune

LENGTH = 5


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

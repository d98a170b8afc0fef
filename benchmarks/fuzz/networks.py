"""Random networks, wide enough to be packed, through a pass or two: the gates hold, what is lowered computes what the program
says, and what is saved comes back."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cache
from itertools import permutations
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import fxc
from fxc.artifact import store
from fxc.compiled.model import CompiledModel
from fxc.errors import UsageError
from fxc.ir.observe import run
from fxc.options import Options
from fxc.page import plots
from fxc.passes.order import order
from fxc.verify.compare import relative_error

# The tests' layers: heads of every ratio, gates, fused projections, slices, tied embeddings, convolutions in groups.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

import image_layers as images
import token_layers as tokens
from structures import RmsNorm

PASSES = [
    "canonicalize", "dead_structure", "fold_batch_norm", "int8", "int8:mode=weight_only", "int8:embeddings=int8",
    "int8:mode=static",
    "int8:mode=static:observer=minmax:smooth=false", "int8:algorithm=gptq", "int4:group=32", "int4:group=auto",
    "int4:group=32:symmetric=false", "int4:bits=3:group=32", "int4:bits=2:group=32:algorithm=grid",
    "int4:group=32:embeddings=int4", "int4:group=32:algorithm=qronos", "fp8", "fp8:mode=weight_only", "fp8:mode=static",
    "sparse24",
    "sparse24:criterion=wanda", "sparsify:sparsity=0.4", "sparsify:sparsity=0.5:scope=global", "sparsify:criterion=sparsegpt",
    "prune:ffn=0.3", "prune:heads=0.4", "prune:channels=0.3", "prune:heads=0.3:ffn=0.3:channels=0.3:round_to=4", "rotate",
    "rotate:of=heads", "smooth", "awq", "bf16", "fp16", "pack", "pack:codebook=16",
]  # fmt: skip
# One of so many has the plots in its page, and is read by `save` before it is read here: both take time, and are not what this
# is about.
WHOLE = 20
# The largest error of what runs over what the program says: forms in C++ round rows to eight bits, or activations again.
LOWERED = 0.05
ACTS = ["relu", "gelu", "silu", "tanh", "sigmoid"]


class Net(nn.Module):
    """Blocks one after the other, and a head; tied: whose weight is the table of the first block."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module | None, tied: bool = False) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), head
        if tied:
            self.head = nn.Linear(blocks[0].tokens.embedding_dim, tokens.VOCABULARY, bias=False)
            self.head.weight = blocks[0].tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(draw: random.Random) -> tuple[nn.Module, tuple[Tensor, ...], list[Tensor], dict[str, tuple[int, ...]] | None]:
    """A network, an example of its inputs, calibration data, and which of its sizes vary: all that can, rows, or none."""
    torch.manual_seed(draw.randrange(2**31))
    kind = draw.choice(["rows", "tokens", "values", "images"])
    model, shape = _image_net(draw) if kind == "images" else _row_net(draw, kind)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    varying = draw.choice([None, {"x": (0,)}, {"x": ()}, {"x": ()}])
    batch = 2 if varying == {"x": ()} else 1
    given = [_input(kind, shape, each) for each in (2, *[batch] * 5)]
    return model.float().eval(), (given[0],), given[1:], varying


def _input(kind: str, shape: tuple[int, ...], batch: int) -> Tensor:
    if kind == "tokens":
        return torch.randint(0, tokens.VOCABULARY, (batch, 6))
    return torch.randn(batch, *shape)


def _row_net(draw: random.Random, kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    width = draw.choice([32, 40, 64, 96])
    blocks: list[nn.Module] = [tokens.Embed(width, draw.random() < 0.5)] if kind == "tokens" else []
    for _ in range(draw.choice([1, 1, 1, 2])):
        blocks.append(_block(draw, width, attends=kind != "rows"))
    if draw.random() < 0.5:
        blocks.append(draw.choice([nn.LayerNorm, RmsNorm])(width))
    tied = kind == "tokens" and draw.random() < 0.4
    head = None if tied else nn.Linear(width, draw.choice([3, 16, 48]), bias=draw.random() < 0.5)
    return Net(blocks, head, tied), (width,) if kind == "rows" else (6, width)


def _block(draw: random.Random, width: int, attends: bool) -> nn.Module:
    act = draw.choice(ACTS)
    kinds = ["mlp", "gated", "sliced", "twice", "concat", *["attention"] * 3 * attends]
    match draw.choice(kinds):
        case "mlp":
            inner: nn.Module = tokens.Mlp([width, draw.choice([32, 48, 100, 128]), width], act, bias=draw.random() < 0.7)
        case "gated":
            fused = draw.choice([None, "chunk", "split", "slice"])
            inner = tokens.GatedMlp(width, draw.choice([32, 64, 72]), act, fused=fused, bias=draw.random() < 0.3)
        case "sliced":
            return tokens.Sliced(width, 64, draw.randint(16, 48), act)
        case "twice":
            return tokens.Twice(width, act)
        case "concat":
            return tokens.Concat([tokens.Mlp([width, 32, 24], act), tokens.Mlp([width, 16], act)], width, 40, keep=False)
        case _:
            kv_heads = draw.randint(1, 3)
            heads = kv_heads * draw.choice([1, 2, 3])
            fused = draw.choice([None, "split", "chunk"] if heads == kv_heads else [None, "split"])
            inner = tokens.Attention(width, heads, kv_heads, draw.choice([8, 16]), fused=fused, eager=draw.random() < 0.5,
                                     bias=draw.random() < 0.5, rotary=draw.random() < 0.5,
                                     mask=draw.choice([None, "causal"]))  # fmt: skip
    if draw.random() < 0.8:
        norm = draw.choice([None, "layer", "rms"])
        return tokens.Residual(width, inner, norm=norm, order=draw.choice(["pre", "post"]))
    return inner


def _image_net(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    width, act = draw.choice([16, 24, 32]), draw.choice(ACTS)
    norm = draw.choice([None, "batch", "batch"])
    blocks: list[nn.Module] = [images.Convs([(3, width, 3, 1, 1)], norm, act, True, last_norm=norm is not None)]
    for _ in range(draw.choice([1, 1, 1, 2])):
        groups = draw.choice([1, 1, 2, width])
        layers = [(width, width, 3, 1, groups)] if groups > 1 else [(width, 32, 1, 0, 1), (32, width, 3, 1, 1)]
        inner = images.Convs(layers, norm, act, draw.random() < 0.5)
        blocks.append(images.ImageResidual(inner, width, act) if draw.random() < 0.5 else inner)
    if draw.random() < 0.5:
        blocks.append(images.Shuffle(2))
    blocks += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Net(blocks, nn.Linear(width, draw.choice([5, 20]))), (3, 8, 8)


@cache
def pairs() -> list[list[str]]:
    """Every two of `PASSES` that can both run, in each order of asking for them."""
    found = [list(pair) for pair in permutations(PASSES, 2) if _can_run(pair)]
    random.Random(0).shuffle(found)
    return found


def _can_run(names: Iterable[str]) -> bool:
    try:
        order(Options(",".join(names)).passes)
    except UsageError:
        return False
    return True


def spec_of(number: int) -> list[str]:
    """A pass, or two in the order in which they are asked for: all of `PASSES`, then all `pairs`, then these again."""
    return [PASSES[number]] if number < len(PASSES) else pairs()[(number - len(PASSES)) % len(pairs())]


def coverage(compiled: Iterable[int], declined: Iterable[int]) -> dict[str, str]:
    """How many of the passes, and of the pairs in each order, these numbers met."""
    made, refused = ({tuple(spec_of(number)) for number in numbers} for numbers in (compiled, declined))
    found = {}
    for what, length, total in (("passes", 1, len(PASSES)), ("pairs of passes, in each order", 2, len(pairs()))):
        yes, no = ({spec for spec in specs if len(spec) == length} for specs in (made, refused))
        found[what] = f"{len(yes)} of {total} compiled, {len(no - yes)} declined each time"
    impossible = len(PASSES) * (len(PASSES) - 1) - len(pairs())
    return found | {"pairs that cannot both run, refused before there is a network": str(impossible)}


def check(seed: int, number: int, folder: Path | None = None) -> str:
    """Compile, lower, save and load one network. Returns "compiled", or why fxc declined it; raises what should not be."""
    names = spec_of(number)
    model, example, data, varying = network(random.Random(f"{seed}-{number}"))
    calib = [(each,) for each in data] if _learns(names) else None
    options = {"budget": float("inf"), "layer_budget": float("inf"), "allow_noop": True, "dynamic_shapes": varying}
    try:
        made = fxc.optimize(model, example, ",".join(names), calib=calib, seed=number, **options)
    except UsageError as error:
        return f"declined: {error.what[:80]}"
    inputs = [list(example), [data[0]]]
    compares_lowered(made, inputs)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        with ExitStack() as stack:
            if number % WHOLE:
                stack.enter_context(mock.patch.object(plots, "is_there", lambda: False))
                stack.enter_context(mock.patch.object(store, "_check_written"))
            made.save(Path(place) / "out")
        again = fxc.load(Path(place) / "out")
        assert str(again.program) == str(made.program), "the text that was read is not the one that was written"
        for name, tensor in made.program.constants.items():
            other = again.program.constants[name]
            assert tensor.dtype == other.dtype and torch.equal(_bits(tensor), _bits(other)), name
    return "compiled"


def compares_lowered(made: CompiledModel, inputs: list[list[Tensor]]) -> None:
    """What a CPU runs computes what the program says."""
    for tensors in inputs:
        expected, found = run(made.program, tensors), made.run(tensors)
        error = relative_error(list(found), list(expected))
        assert error <= LOWERED, f"what runs differs from the program by {error:.3g}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def _learns(names: list[str]) -> bool:
    return any(each.uses_data() for each in Options(",".join(names)).passes)

"""What each layer of a compiled model takes on this machine, one operator at a time."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxc.compiled.model import CompiledModel
from fxc.data.decoder import decoder_inputs
from fxc.data.samples import has_length, sample_of_size
from fxc.ir.cache import is_causal_lm
from fxc.lower.remembered import cpu_name
from fxc.lower.runnable import runnable
from fxc.progress import Track, untracked

LENGTH, ROUNDS = 128, 7


@dataclass(frozen=True)
class Measured:
    """microseconds: of each layer by name, the median; how: on what and of what, in words; roofline: None without peaks, else
    "points": (operations for each byte, operations a second) of each product, and "bandwidth" and "operations" a second."""

    microseconds: dict[str, float]
    how: str
    roofline: dict[str, Any] | None


def measure(model: CompiledModel, peaks: tuple[float, float] | None = None, track: Track = untracked) -> Measured:
    """Run the model on the CPU in eager mode for one sample of 128 tokens (or one image), operator by operator. What the call
    of an operator costs is in it; layers that share a product share its time by their outputs. peaks: bytes and operations a
    second that the machine is able to."""
    program = model.lowered
    inputs = _inputs(model)
    timer = _Timer(runnable(program, "cpu", "eager"))
    with torch.inference_mode():
        for _ in track(range(ROUNDS + 1), "timing layers", ROUNDS + 1):
            timer.run(*inputs)
    microseconds: dict[str, float] = {}
    points = []
    for name, spent in timer.seconds.items():
        node = timer.nodes[name]
        seconds = statistics.median(spent[1:])
        shares = _shares(node)
        for layer, share in shares.items():
            microseconds[layer] = microseconds.get(layer, 0.0) + 1e6 * seconds * share
        if shares and timer.moved[name] and (operations := timer.operations.get(name)):
            points.append((operations / timer.moved[name], operations / seconds))
    length = _length(model)
    how = "one sample" if length is None else f"one sample of {length} tokens"
    described = f"{how}, eager, {torch.get_num_threads()} threads, {cpu_name()}, median of {ROUNDS}, operator by operator"
    roofline = None if peaks is None else {"points": points, "bandwidth": peaks[0], "operations": peaks[1]}
    return Measured(microseconds, described, roofline)


def _length(model: CompiledModel) -> int | None:
    if not any(has_length(node.meta["val"]) for node in model.program.placeholders):
        return None
    return min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)


def _inputs(model: CompiledModel) -> list[Tensor]:
    made = sample_of_size(model.program, 1, _length(model))
    return decoder_inputs(model.program, made[0]) if is_causal_lm(model.program) else made


def _shares(node: fx.Node) -> dict[str, float]:
    """Of a call that reads a weight, the layers that it stands for, and the share of each in its outputs."""
    parts = [user for user in node.users if user.op == "call_function" and user.target is torch.ops.aten.narrow.default]
    if parts and len(parts) == len(node.users) and all(part.meta.get("fqn") for part in parts):
        total = sum(part.args[3] for part in parts)
        return {part.meta["fqn"]: part.args[3] / total for part in parts}
    return {node.meta["fqn"]: 1.0} if node.meta.get("fqn") else {}


class _Timer(fx.Interpreter):
    """Times the calls that read a constant. seconds: by node, of each run; moved: bytes of what it reads and gives; operations:
    of products, two for each weight and row."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.moved: dict[str, int] = {}
        self.operations: dict[str, int] = {}
        self.nodes = {
            node.name: node
            for node in module.graph.nodes
            if node.op == "call_function" and any(each.op == "get_attr" for each in node.all_input_nodes)
        }

    def run_node(self, node: fx.Node) -> Any:
        if node.name not in self.nodes:
            return super().run_node(node)
        began = time.perf_counter()
        value = super().run_node(node)
        self.seconds[node.name].append(time.perf_counter() - began)
        if node.name not in self.moved:
            read = [self.env[each] for each in node.all_input_nodes if isinstance(self.env.get(each), Tensor)]
            given = [each for each in (value if isinstance(value, tuple | list) else (value,)) if isinstance(each, Tensor)]
            self.moved[node.name] = sum(each.nbytes for each in [*read, *given])
            first = node.args[0] if node.args else None
            x = self.env.get(first) if isinstance(first, fx.Node) else None
            if "linear" in str(node.target) and isinstance(x, Tensor) and given:
                self.operations[node.name] = 2 * x.numel() * given[0].shape[-1]
        return value

"""How near one model is to another: at the output, and layer by layer."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from fxc.compiled.model import CompiledModel
from fxc.data.comparison import for_both
from fxc.errors import UsageError
from fxc.ir.cache import is_causal_lm, is_past
from fxc.ir.names import layer_of, weight_of
from fxc.ir.observe import observe, values_at
from fxc.ir.program import Program
from fxc.passes.base import Context
from fxc.passes.canonicalize import Canonicalize
from fxc.progress import Track, untracked
from fxc.verify.compare import relative_error


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one layer's output. own: given the inputs that the original's layer has; accumulated: given
    those that reach it through the layers before it. Infinite where the shapes differ. place: its number among the original's
    layers in the order in which they run, from 0; identical: whether dtype, shape and all bits are the same, given what reaches
    it."""

    name: str
    own: float
    accumulated: float
    place: int
    identical: bool


@dataclass(frozen=True)
class Parting:
    """Where two programs part, in the order in which the original runs: the first layer whose output is not the same bit for
    bit (`bits`), and the first that is off by more than `tolerance`, a relative error (`beyond`), with what reaches them; None
    where none is. gone, new: the layers that only the original has, and only the other."""

    tolerance: float
    bits: LayerError | None
    beyond: LayerError | None
    gone: list[str]
    new: list[str]


def agreement(
    model: CompiledModel, original: CompiledModel, inputs: Sequence[list[Tensor]], *, track: Track = untracked
) -> dict[str, float]:
    """How near `model` is to `original` in the first floating-point output, over sets of flat inputs.

    Always relative_error, |found - expected| / |expected| over everything. For a causal language model next_token, the
    share of positions with the same most likely token, and kl, the mean divergence in nats of the model's distribution
    from the original's; otherwise cosine_mean and cosine_min over the samples, a sequence taken as the mean of its
    positions, and, where the output is logits over classes, same_label.
    """
    a, b = ([i.name for i in m.program.signature.inputs if not is_past(i.name)] for m in (model, original))
    if a != b:
        raise UsageError("the two were not made from the same model", why=f"the inputs are {a} and {b}")
    program = original.program
    index = next((i for i, n in enumerate(program.results) if n.meta["val"].dtype.is_floating_point), None)
    if index is None:
        raise UsageError("the model has no floating-point output to compare")
    causal = is_causal_lm(program)
    difference = magnitude = 0.0
    values: defaultdict[str, list[Tensor]] = defaultdict(list)
    for tensors in track(inputs, "comparing outputs", len(inputs)):
        given = for_both(tensors, model.program, program)
        found, expected = (m.run(its)[index].float().cpu() for m, its in zip((model, original), given, strict=True))
        if found.shape != expected.shape:
            raise UsageError(f"the outputs are {list(found.shape)} and {list(expected.shape)}")
        difference += (found - expected).double().square().sum().item()
        magnitude += expected.double().square().sum().item()
        if causal:
            values["next_token"].append((found.argmax(-1) == expected.argmax(-1)).float().flatten())
            logs = found.log_softmax(-1), expected.log_softmax(-1)
            values["kl"].append((logs[1].exp() * (logs[1] - logs[0])).sum(-1).flatten())
        else:
            pooled = [t.mean(1) if t.ndim == 3 else t.reshape(len(t), -1) for t in (found, expected)]
            values["cosine"].append(torch.nn.functional.cosine_similarity(*pooled, dim=-1))
            if program.signature.outputs[index] == "logits" and expected.ndim == 2:
                values["same_label"].append((found.argmax(-1) == expected.argmax(-1)).float())
    outputs = {"relative_error": math.sqrt(difference / magnitude) if magnitude else math.sqrt(difference)}
    for name, parts in values.items():
        together = torch.cat(parts)
        if name == "cosine":
            outputs |= {"cosine_mean": together.mean().item(), "cosine_min": together.min().item()}
        else:
            outputs[name] = together.mean().item()
    return outputs


def accuracies(
    model: CompiledModel, original: CompiledModel, inputs: Sequence[list[Tensor]], labels: Sequence[Tensor],
    track: Track = untracked,
) -> tuple[float, float] | None:
    """The share of samples whose likeliest class is their label, of both; None where the output is no logits over classes.
    labels: of each set of inputs, int64 [B]."""
    program = original.program
    index = next((i for i, name in enumerate(program.signature.outputs) if name == "logits"), None)
    if index is None or program.results[index].meta["val"].ndim != 2:
        return None
    right, count = [0, 0], 0
    for tensors, truth in zip(track(inputs, "accuracy", len(inputs)), labels):
        for at, (each, given) in enumerate(zip((model, original), for_both(tensors, model.program, program), strict=True)):
            right[at] += int((each.run(given)[index].argmax(-1).cpu() == truth).sum())
        count += len(truth)
    return right[0] / count, right[1] / count


def layer_agreement(program: Program, original: Program, inputs: Sequence[list[Tensor]]) -> list[LayerError]:
    """The errors of every layer that both programs have, by the operators' own definitions, the mean over `inputs`, the largest
    of their own first.

    Layers are paired by the name of the weight that they read, packed or not, and by how often it was read before.
    """
    return compare_layers(program, original, inputs)[0]


def compare_layers(
    program: Program, original: Program, inputs: Sequence[list[Tensor]], tolerance: float = 0.01, track: Track = untracked
) -> tuple[list[LayerError], Parting]:
    """`layer_agreement`, and where the two first part."""
    programs = [p.copy() for p in (program, original)]
    for each in programs:
        Canonicalize().run(each, Context())
    found, expected = map(_layers, programs)
    pairs = {found[key].name: expected[key].name for key in found.keys() & expected.keys()}
    names = {node.name: key[0] for key, node in found.items()}
    theirs, ours = (list(dict.fromkeys(name for name, _ in each)) for each in (expected, found))
    places = {name: place for place, name in enumerate(theirs)}
    identical = dict.fromkeys(places, True)
    own: defaultdict[str, list[float]] = defaultdict(list)
    accumulated: defaultdict[str, list[float]] = defaultdict(list)
    modules = [p.module() for p in programs]
    for tensors in track(inputs, "comparing layers", len(inputs)):
        with torch.no_grad():
            given = for_both(tensors, *programs)
            truth = values_at(modules[1], given[1], set(pairs.values()))
            for errors, put_back in ((own, True), (accumulated, False)):

                def watch(value: Tensor, name: str, errors=errors, put_back=put_back, truth=truth) -> Tensor | None:
                    expected = truth[pairs[name]]
                    errors[names[name]].append(relative_error([value], [expected]))
                    if not put_back:
                        identical[names[name]] &= _same_bits(value, expected)
                    return expected if put_back and value.shape == expected.shape else None

                observe(modules[0], given[0], {name: partial(watch, name=name) for name in pairs})
    layers = [
        LayerError(n, sum(own[n]) / len(own[n]), sum(accumulated[n]) / len(accumulated[n]), places[n], identical[n])
        for n in sorted(own, key=places.__getitem__)
    ]
    bits = next((each for each in layers if not each.identical), None)
    beyond = next((each for each in layers if not each.accumulated <= tolerance), None)
    gone, new = [n for n in theirs if n not in own], [n for n in ours if n not in own]
    return sorted(layers, key=lambda layer: (-layer.own, layer.name)), Parting(tolerance, bits, beyond, gone, new)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree; a NaN is the same as itself, and 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def _layers(program: Program) -> dict[tuple[str, int], fx.Node]:
    """(layer, how often its weight was read before) -> the node that reads it, for weights of at least two dimensions."""
    seen: Counter[str] = Counter()
    layers = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        weight = weight_of(program, node)
        if weight is not None and node.meta["val"].dtype.is_floating_point:
            name = layer_of(node, weight)
            layers[name, seen[name]] = node
            seen[name] += 1
    return layers

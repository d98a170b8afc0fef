"""What each layer alone costs: the model as it was, with one layer as the passes would leave it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, fx, nn

from fxc.captured import Captured, capture_source
from fxc.compilation import Step, decibels
from fxc.compiler import compile_captured, samples_of
from fxc.errors import UsageError
from fxc.ir.cache import is_causal_lm, is_present
from fxc.ir.names import layer_at
from fxc.ir.next_token import counted, next_token_loss
from fxc.ir.observe import Watch, observe
from fxc.ir.program import Program
from fxc.neutral import one_at_a_time
from fxc.options import Keywords, Options
from fxc.passes.base import Pass
from fxc.progress import Track, untracked
from fxc.verify.compare import rewritten


@dataclass(frozen=True)
class Effect:
    """Of one layer alone. error: |found - expected| / |expected| of the model's floating-point outputs, its cache aside, over
    all samples; decibels: the same as a ratio of signal to noise, 20 log10(1 / error), infinite where nothing changed; loss: by
    how many nats a token the loss of the next token rises, None of a model that has none; bytes_before, bytes_after: of what
    the layer reads."""

    layer: str
    error: float
    decibels: float
    loss: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Sensitivity:
    """layers: the worst first; together: of all of them at once; before: the model's own loss in nats a token, or None."""

    passes: str
    samples: int
    layers: list[Effect] = field(default_factory=list)
    together: Effect | None = None
    before: float | None = None


@one_at_a_time
def sensitivity(
    model: nn.Module | str | Path, example_inputs: Any = None, passes: str = "int8", **options: Unpack[Keywords]
) -> Sensitivity:
    """Compile as `fxc.optimize` with these arguments, and measure on `calib` what each layer that the passes rewrite costs
    alone: the others compute with the weights that they had before the first policy.

    Programs run by their operators' definitions. Raises what `fxc.optimize` raises, and `UsageError` without `calib` or where
    the passes take layers out or give the model other inputs.
    """
    chosen = Options(passes, **options)
    return sensitivity_of(capture_source(model, example_inputs, _checked(chosen)), chosen)


def _checked(options: Options) -> Options:
    if options.calib is None:
        raise UsageError("the effect of a layer is measured on data", where="calib", hint="--calib FILE, in Python calib=...")
    options.check()
    return options


def sensitivity_of(captured: Captured, options: Options, track: Track = untracked) -> Sensitivity:
    """`sensitivity` of what is captured already."""
    _checked(options)
    if not isinstance(options.calib, (str, Path, Tensor, Mapping)):
        options = replace(options, calib=list(options.calib))
    samples = samples_of(captured, options, track)
    chain = _Chain(captured.program, options.passes)
    made = compile_captured(captured, options, on_step=chain.follow, track=track)
    gone = [step.name for step in made.record.passes if step.removed]
    if gone or (chain.base is not None and len(chain.base.placeholders) != len(captured.program.placeholders)):
        raise UsageError(
            "of what is pruned no layer has an effect alone: others change with it",
            where=", ".join(gone) or None,
            hint="leave pruning out, or prune first and measure the artifact",
        )
    if not chain.pairs:
        raise UsageError("these passes rewrite no layer", where=", ".join(map(str, options.passes)))
    return _Measured(chain.base, made.program, chain.pairs, samples).all(", ".join(map(str, options.passes)), track)


class _Chain:
    """The program before the first policy, and which of its nodes the nodes of the last program stand for."""

    def __init__(self, program: Program, passes: Iterable[Pass]) -> None:
        self._policies = {str(each): each.name for each in passes if each.is_policy}
        self._before = program
        self.base: Program | None = None
        self.pairs: dict[str, str] = {}

    def follow(self, step: Step, after: Program) -> None:
        name = self._policies.get(step.name)
        if name is not None:
            self.base = self._before if self.base is None else self.base
            found = rewritten(self._before, after, name)
            self.pairs |= {new: self.pairs.get(old, old) for new, old in found.items()}
        self._before = after


class _Measured:
    """base, after: the two programs; pairs: nodes of `after` -> those of `base` that they stand for."""

    def __init__(self, base: Program, after: Program, pairs: dict[str, str], samples: Sequence[Sequence[Tensor]]) -> None:
        self.base, self.after, self.samples = base, after, samples
        self.pairs = pairs
        self.module = base.module()
        names = {node.name: node for node in base.graph.nodes}
        self.layers: dict[str, dict[fx.Node, fx.Node]] = {}
        for node in after.graph.nodes:
            old = names.get(pairs.get(node.name, ""))
            if old is not None and all(self._in_base(each) in names for each in _read(node)):
                self.layers.setdefault(layer_at(base, old), {})[old] = node
        causal = is_causal_lm(base)
        kinds = zip(base.results, base.signature.outputs, strict=True)
        self.outputs = [i for i, (n, o) in enumerate(kinds) if n.meta["val"].dtype.is_floating_point and not is_present(o)]
        inputs = [each.name for each in base.signature.inputs]
        self.ids, self.mask = (inputs.index(n) if causal and n in inputs else None for n in ("input_ids", "attention_mask"))

    def _in_base(self, node: fx.Node) -> str:
        return self.pairs.get(node.name, node.name)

    def all(self, passes: str, track: Track) -> Sensitivity:
        with torch.no_grad():
            expected = [self.module(*sample) for sample in self.samples]
            before = self._loss(expected)
            effects = [
                self._effect(name, layer, expected, before)
                for name, layer in track(list(self.layers.items()), "measuring layers one by one", len(self.layers))
            ]
            everything = {old: new for layer in self.layers.values() for old, new in layer.items()}
            together = self._effect("all", everything, expected, before)
        effects.sort(key=lambda each: (-(each.loss if each.loss is not None else each.error), -each.error))
        return Sensitivity(passes, len(self.samples), effects, together, before)

    def _effect(self, name: str, layer: dict[fx.Node, fx.Node], expected: list[Any], before: float | None) -> Effect:
        found = [self._with(layer, sample) for sample in self.samples]
        noise = signal = 0.0
        for ours, theirs in zip(found, expected, strict=True):
            for i in self.outputs:
                noise += (ours[i].double() - theirs[i].double()).square().sum().item()
                signal += theirs[i].double().square().sum().item()
        error = math.sqrt(noise / signal) if signal else math.inf if noise else 0.0
        loss = None if before is None else self._loss(found) - before
        return Effect(name, error, decibels(error), loss, _bytes(self.base, layer), _bytes(self.after, layer.values()))

    def _with(self, layer: dict[fx.Node, fx.Node], sample: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of the base whose nodes compute what their counterparts in `layer` do."""
        values: dict[str, Any] = {}

        def instead(new: fx.Node) -> Watch:
            def value(_: Any) -> Any:
                given = {n: self.after.constants[n.target] for n in new.all_input_nodes if n.op == "get_attr"}
                given |= {n: values[self._in_base(n)] for n in _read(new)}
                args, kwargs = fx.node.map_arg((new.args, new.kwargs), given.__getitem__)
                return new.target(*args, **kwargs)

            return value

        watches: dict[str, Watch] = {}
        for name in {self._in_base(n) for new in layer.values() for n in _read(new)}:
            watches[name] = lambda value, name=name: values.update({name: value})
        for old, new in layer.items():
            kept, other = watches.get(old.name), instead(new)
            watches[old.name] = other if kept is None else _both(other, kept)
        return observe(self.module, sample, watches)

    def _loss(self, outputs: list[Any]) -> float | None:
        """Nats a token."""
        if self.ids is None:
            return None
        total, count = 0.0, 0
        for sample, found in zip(self.samples, outputs, strict=True):
            ids, mask = sample[self.ids], None if self.mask is None else sample[self.mask]
            total += next_token_loss(found[self.outputs[0]], ids, mask).item()
            count += ids[:, 1:].numel() if mask is None else int(counted(ids, mask).sum())
        return total / count if count else None


def _both(other: Watch, kept: Watch) -> Watch:
    """What one layer computes instead is what the next one reads."""

    def value(given: Any) -> Any:
        made = other(given)
        kept(made)
        return made

    return value


def _read(node: fx.Node) -> list[fx.Node]:
    return [each for each in node.all_input_nodes if each.op != "get_attr"]


def _bytes(program: Program, nodes: Iterable[fx.Node]) -> int:
    """Of the constants that these nodes read."""
    names = {each.target for node in nodes for each in node.all_input_nodes if each.op == "get_attr"}
    return sum(program.constants[name].nbytes for name in names)

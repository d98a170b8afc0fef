"""What a compilation did, as a record. Its JSON is the report that users read and that an artifact keeps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fxc.passes.base import Refusal, Removal
from fxc.train.fit import Fit


@dataclass
class Step:
    """What one pass did. bytes and parameters are of all constants, a tied weight counted once, a packed
    weight as the numbers that it stands for; covered_bytes are those of the weights that it rewrote, as they were before it;
    layer_errors are relative, of the output of a layer that is given the inputs that it had before, by FQN; judged_on: what
    these inputs are; saturation: the share of the numbers of a packed weight that are at the ends of the format's range, by
    FQN; cut_off: the share of what a layer read of the samples that lies beyond the range learned for it, by FQN; repeat: the
    pass that makes the same decisions again, of one that chose by itself; training: what it trained, with its curve; plugin:
    where the pass comes from, of one that is not fxc's own (`fxc.plugins.origin_of`)."""

    name: str
    changed: int
    seconds: float
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    covered_bytes: int
    refusals: list[Refusal] = field(default_factory=list)
    removed: list[Removal] = field(default_factory=list)
    gates: dict[str, str] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    repeat: str | None = None
    saturation: dict[str, float] = field(default_factory=dict)
    cut_off: dict[str, float] = field(default_factory=dict)
    judged_on: str | None = None
    training: Fit | None = None
    plugin: dict[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """Of layers that were measured also signal_to_noise in dB, None where it is infinite; what was not measured is left
        out."""
        content = asdict(self)
        if self.layer_errors:
            ratios = {name: decibels(error) for name, error in self.layer_errors.items()}
            content["signal_to_noise"] = {name: ratio if math.isfinite(ratio) else None for name, ratio in ratios.items()}
        unmeasured = {name for name in ("saturation", "cut_off", "judged_on", "training", "plugin") if not content[name]}
        return {name: value for name, value in content.items() if name not in unmeasured}


@dataclass(frozen=True)
class Worst:
    """A layer that lost much in the pass `by`: its relative error, its saturation where its weight was packed, and what was cut
    off of its activations where their range was learned."""

    layer: str
    by: str
    error: float
    saturation: float | None
    cut_off: float | None


def decibels(error: float) -> float:
    """A relative error as a ratio of signal to noise: 20 log10(1 / error), infinite where there is none."""
    if error == 0:
        return math.inf
    return -20 * math.log10(error) if error < math.inf else -math.inf


@dataclass
class Stage:
    """What the program was worth after a pass. bytes, parameters: of its constants; milliseconds: of one call, by phase, the
    median, where it was timed; tokens: the length that it was timed at, of a program that takes tokens."""

    name: str
    bytes: int
    parameters: int
    milliseconds: dict[str, float] | None = None
    tokens: int | None = None
    perplexity: float | None = None

    def as_json(self) -> dict[str, Any]:
        untimed = {"milliseconds", "tokens"} if self.milliseconds is None else set()
        unscored = {"perplexity"} if self.perplexity is None else set()
        return {name: value for name, value in asdict(self).items() if name not in untimed | unscored}


@dataclass
class PerplexityChange:
    """The perplexity of a language model before and after, over the same `tokens` tokens in windows of `window`. change is
    relative, and so is its standard_error, where there are windows enough to know it."""

    before: float
    after: float
    change: float
    standard_error: float | None
    tokens: int
    window: int


@dataclass
class Configuration:
    """What removal makes of a Hugging Face configuration. changes: dotted field -> (before, after); not_exportable: why no
    configuration says what is left."""

    changes: dict[str, tuple[Any, Any]]
    not_exportable: str | None


@dataclass
class Calibration:
    """What passes learned from or trained on: so many samples, and how many more they were judged on; at most `most` were asked
    for, of texts each `length` tokens long or shorter; sha256: of all their tensors, the same for the same data."""

    samples: int
    held_out: int
    most: int
    length: int
    sha256: str


@dataclass
class Compilation:
    """What one compilation did.

    source: what was compiled, as JSON. dtype, skip: as given; skipped: what each pattern of skip was applied to. bytes_before:
    of the weights as they came; bytes_after, parameters: of the program's constants. coverage: of the bytes that were there
    when the first pass came that rewrites weights, the share that was rewritten. earlier: the passes that an artifact went
    through before, as its report says; passes: those of this compilation; teacher: the source that taught it, if one was given.
    limit: after how many rewrites it was told to end.
    perplexity, stages: where they were measured; stages are of one machine, and no artifact keeps more of them than their
    perplexity. layers: of each layer of the program as it came, by name, its kind, dtypes, shape, parameters and bytes.
    """

    source: dict[str, Any]
    dtype: str
    skip: list[str]
    skipped: dict[str, list[str]]
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    coverage: float
    earlier: list[dict[str, Any]]
    passes: list[Step]
    teacher: dict[str, Any] | None = None
    limit: int | None = None
    configuration: Configuration | None = None
    calibration: Calibration | None = None
    training: Calibration | None = None
    perplexity: PerplexityChange | None = None
    stages: list[Stage] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def worst(self, count: int = 5) -> list[Worst]:
        """The layers with the largest errors in any pass, the worst first."""
        layers = [
            Worst(layer, p.name, error, p.saturation.get(layer), p.cut_off.get(layer))
            for p in self.passes
            for layer, error in p.layer_errors.items()
        ]
        return sorted(layers, key=lambda each: (-each.error, each.layer))[:count]

    def as_json(self) -> dict[str, Any]:
        """The report: `passes` are all that the model went through; what was not measured or did not change is left out."""
        content = asdict(self)
        del content["stages"]
        if not content["layers"]:
            del content["layers"]
        if scored := [{"name": s.name, "perplexity": s.perplexity} for s in self.stages if s.perplexity is not None]:
            content["quality"] = scored
        content["passes"] = content.pop("earlier") + [each.as_json() for each in self.passes]
        if worst := self.worst():
            content["worst"] = [asdict(each) for each in worst]
        return {name: value for name, value in content.items() if value is not None}


def lasting(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the times that passes took: equal inputs have to give equal files."""
    if "passes" not in report:
        return report
    return report | {"passes": [_timeless(each) for each in report["passes"]]}


def _timeless(value: Any) -> Any:
    """Without what is named seconds, at any depth."""
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name != "seconds"}
    return [_timeless(each) for each in value] if isinstance(value, list | tuple) else value

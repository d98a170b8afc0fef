"""What a pass is: a frozen dataclass whose fields are its options, with one method that rewrites a program.

A policy pass decides, and may change what the program computes, within limits that are measured. A mechanism pass may not,
and is checked to have not. A pass tells the truth about what it changed, and where it declines it says why.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, fx

from fxc.calibrate.journal import Saves
from fxc.errors import UsageError
from fxc.ir.program import Program
from fxc.passes.interface import Interface
from fxc.passes.patterns import check_patterns, matches
from fxc.passes.rewrites import Rewrites
from fxc.plugins import FAILED
from fxc.progress import Say, Track, unsaid, untracked
from fxc.train.fit import Fit


@dataclass(frozen=True)
class Fact:
    """Something that is true of a program or not. broken: where it is not, each with the counterexample in words: by the layer
    of a fact that holds layer by layer (`by_layer`), by the name of a node or constant of another."""

    name: str
    broken: Callable[[Program], dict[str, str]] = field(compare=False)
    by_layer: bool = False

    def check(self, program: Program) -> str | None:
        """None where it holds, else a counterexample."""
        return next(iter(self.broken(program).values()), None)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Refusal:
    """A layer that a pass left as it was. bytes: of its weight, which is named once; 0 where that is not one weight."""

    fqn: str
    reason: str
    bytes: int = 0


@dataclass(frozen=True)
class Removal:
    """Of the `before` units of a kind ("head", "ffn", "channel", ...) in the module `scope`, how many went."""

    scope: str
    kind: str
    before: int
    removed: int


@dataclass
class Result:
    """What a pass did: how many places it changed, where it declined, the bytes of weights that it rewrote, which units it
    removed or masked, and what became of the program's inputs and outputs. notes: what else a user should know; repeat: the
    pass that makes the same decisions without looking, for one that looked; cut_off: of layers, by FQN, the share of what they
    read of the samples that lies beyond the range learned for it; training: what training did, where it trained."""

    changed: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    covered_bytes: int = 0
    removed: list[Removal] = field(default_factory=list)
    interface: Interface = field(default_factory=Interface)
    notes: list[str] = field(default_factory=list)
    repeat: Pass | None = None
    cut_off: dict[str, float] = field(default_factory=dict)
    training: Fit | None = None


@dataclass(frozen=True)
class Original:
    """The program before the first pass: what a student is taught by, and the stream that no pass has disturbed yet.

    interface: what the passes since then made of its inputs and outputs; samples: `Context.samples`, one by one, as it takes
    them; is_other: whether it is another model, whose layers have nothing to do with those of the present program.
    """

    program: Program
    samples: list[list[Tensor]] = field(default_factory=list)
    interface: Interface = field(default_factory=Interface)
    is_other: bool = False

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of the present program as this one takes them (`Interface.restored`)."""
        return self.interface.restored(self.program, tensors)

    def outputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of this program as the present one gives them."""
        return self.interface.outputs(self.program, tensors)


class Judge(Protocol):
    """What judges a layer as soon as it is packed: see `fxc.verify.layer_gate`."""

    def __call__(self, program: Program, layer: fx.Node, weight: Tensor, made: fx.Node) -> float: ...

    def note(self, program: Program, made: fx.Node, error: float) -> None: ...


@dataclass
class Context:
    """What passes are given besides the program.

    skip: patterns of FQNs to leave alone, globs or "re:..." regular expressions; one that matches a module means all that
    is in it, and a plain string is one pattern; skipped: what passes left alone for each pattern; samples: sets of input
    tensors for the program, realistic where calibration data was given, which data-driven policies use; held_out: others of
    that data, on which gates judge policies; training, judging: others again, of training data, for passes that train, and to
    judge these by; all four with labels where they have some (`fxc.data.labels.Samples`); limit, tried: the gate's
    relative error of the outputs, where the user set one, and its inputs; track: shows how far a pass has come with its
    samples; say: tells what it is going to take; saves: where it saves what it has done, to go on from; original: the program
    before the first pass; teacher: another one to be taught by, in its place, and is_other as of Original; floats: weights that
    passes have packed, as they were just before, by name; seed: of all that passes draw at random; on_layer: of a program
    that is larger than memory, what judges a layer as soon as it is packed: it is given the program, the layer as it was, its
    float weight, and what stands in its place; rewrites: numbers what passes change, and says which of it is too much;
    is_short: whether memory is, so that gates take little.
    """

    skip: tuple[str, ...] = ()
    samples: list[list[Tensor]] = field(default_factory=list)
    held_out: list[list[Tensor]] = field(default_factory=list)
    training: list[list[Tensor]] = field(default_factory=list)
    judging: list[list[Tensor]] = field(default_factory=list)
    limit: float | None = None
    tried: list[list[Tensor]] = field(default_factory=list)
    track: Track = untracked
    say: Say = unsaid
    saves: Saves | None = None
    original: Original | None = None
    teacher: Program | None = None
    is_other: bool = False
    floats: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    later: tuple[Pass, ...] = ()
    on_layer: Judge | None = None
    is_short: bool = False
    rewrites: Rewrites = field(default_factory=Rewrites)

    skipped: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        if wrong := [p for p in self.skip if not isinstance(p, str)]:
            raise UsageError(f"{wrong[0]!r} is not a pattern", where="skip", hint="give strings: globs or 're:...'")
        for pattern in self.skip:
            self.skipped.setdefault(pattern, [])

    def skips(self, fqn: str) -> str | None:
        """The pattern that says to leave the module `fqn` alone, if one does."""
        matching = [p for p in self.skip if matches(p, fqn)]
        for pattern in matching:
            if fqn not in self.skipped[pattern]:
                self.skipped[pattern].append(fqn)
        return matching[0] if matching else None

    def check_skip(self, program: Program) -> None:
        """Raises `UsageError` for a pattern that matches no module and no weight of `program`."""
        check_patterns(self.skip, program, "skip")


@dataclass(frozen=True)
class Pass:
    """Base of all passes. A subclass that sets `name` can be used in `--passes` from then on."""

    name: ClassVar[str] = ""
    is_policy: ClassVar[bool] = False
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    owes: ClassVar[frozenset[Fact]] = frozenset()
    """Facts that another pass has to make true after this one: what is masked is to be removed."""
    limits: ClassVar[tuple[float, float]] = (0.2, 0.5)
    """Of a policy: the largest relative error that it may cause in the outputs, and in one layer alone."""
    shrinks: ClassVar[bool] = True
    """Of a policy: whether it makes the weights smaller by itself."""
    repeats: ClassVar[bool] = False
    """Whether it may be given more than once, with other passes in between."""
    rounds: ClassVar[bool] = False
    """Of a mechanism: whether it computes new constants, which are rounded to the dtype of the weights."""
    registry: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls) -> None:
        """Raises `UsageError` for a name of fxc's own passes in a class from elsewhere."""
        own = Pass.registry.get(cls.name)
        if own is not None and own.__module__.startswith("fxc.") and not cls.__module__.startswith("fxc."):
            what = f"the pass {cls.name} is fxc's own"
            raise UsageError(what, where=f"{cls.__module__}.{cls.__qualname__}", hint="give yours another name")
        if cls.name:
            Pass.registry[cls.name] = cls

    def run(self, program: Program, context: Context) -> Result:
        """Rewrite `program` in place."""
        raise NotImplementedError

    def limited_to(self) -> tuple[str, ...]:
        """Patterns of the layers that the pass is for; () where it is for all."""
        return ()

    def covers(self, layer: str) -> bool:
        """Whether the pass is for this layer, among others. Facts that hold layer by layer are needed and broken there only."""
        patterns = self.limited_to()
        return not patterns or any(matches(pattern, layer) for pattern in patterns)

    def uses_data(self) -> bool:
        """Whether the pass, with its options, learns from `Context.samples`."""
        return False

    def needs_data(self) -> str | None:
        """What the pass, with its options, cannot do without `Context.samples`, in words."""
        return None

    def uses_training(self) -> bool:
        """Whether the pass learns from `Context.training` where that is given, and from `samples` where not."""
        return False

    def fits_data(self) -> bool:
        """Whether what the pass makes is right only for inputs like `Context.samples`, so that it is judged on those."""
        return False

    def may_change_nothing(self) -> bool:
        """Whether that nothing could be changed is an answer, and no fault of what was asked."""
        return False

    def __str__(self) -> str:
        """The pass as it is written in `--passes`, with the options that are not at their defaults."""
        options = [
            f":{f.name}={_print_option(getattr(self, f.name))}"
            for f in options_of(type(self))
            if getattr(self, f.name) != f.default
        ]
        return self.name + "".join(options)


def options_of(cls: type[Pass]) -> list[dataclasses.Field]:
    """The options of a pass, those that it shares with others last."""
    return sorted(dataclasses.fields(cls), key=lambda f: f.kw_only)


# A value, or one of several patterns in it, may stand in quotes, and a quote in it twice.
_QUOTED = re.compile(r"""(?<=[=;])(?:'(?:[^']|'')*'|"(?:[^"]|"")*")(?=[:;,]|\Z)""")
# Between two options, and not within a regular expression, where a colon is one unless an option's name follows it.
_OPTION = re.compile(r":((?:[^:]|(?<=[=;]re):(?:[^:]|:(?!\w+=))*)*)")


def parse_passes(spec: str | Iterable[str | Pass]) -> list[Pass]:
    """The passes in "int8:mode=weight_only,prune:heads=0.25". A value that has a comma in it stands in quotes, as in
    int4:only='re:mlp,up'. Raises `UsageError` for a name, an option or a value that does not exist, with what there is."""
    items = [s for s in _split(spec) if s.strip()] if isinstance(spec, str) else list(spec)
    return [item if isinstance(item, Pass) else _parse_pass(item.strip()) for item in items]


# What people ask for by a name that no pass has.
_OTHERWISE = {
    "qat": "int4:group=32,recover:steps=400 is quantization-aware training: recover trains what is packed as it is rounded",
    "distill": "fxc distill --teacher A --student B; recover:loss=kl distils the model into what is left of it",
    "lora": "recover:lora=16",
}


def quoted_masked(text: str) -> str:
    """`text` with another character in the place of each one in quotes."""
    return _QUOTED.sub(lambda quoted: "x" * len(quoted[0]), text)


def _split(spec: str) -> list[str]:
    """What stands between commas that are not in quotes."""
    ends = [i for i, each in enumerate(quoted_masked(spec)) if each == ","]
    return [spec[i:j] for i, j in zip([0, *(end + 1 for end in ends)], [*ends, len(spec)], strict=True)]


def check_data_is_given(passes: Iterable[Pass], is_given: bool, can_train: bool = False) -> None:
    """Raises `UsageError` for the first pass that cannot do without calibration data. can_train: whether there is training
    data, which does for passes that train."""
    for each in passes:
        if not is_given and not (can_train and each.uses_training()) and (what := each.needs_data()):
            hint = "--calib FILE, in Python calib=..."
            hint = f"{hint}; or --train FILE, train=..." if each.uses_training() else hint
            raise UsageError(f"{what} measured on calibration data, and there is none", where=each.name, hint=hint)


def _parse_pass(text: str) -> Pass:
    masked = quoted_masked(text)
    name = masked.partition(":")[0]
    options = [text[slice(*found.span(1))] for found in _OPTION.finditer(masked, len(name))]
    cls = Pass.registry.get(name)
    if cls is None:
        hint = f"{_did_you_mean(name, Pass.registry)}'fxc passes' lists them; --plugin MODULE adds others, in Python its import"
        failed = "; ".join(f"the plugin {module} could not be imported: {why}" for module, why in FAILED.items())
        raise UsageError(f"there is no pass {name!r}", why=failed or None, hint=_OTHERWISE.get(name) or hint)
    fields = {f.name: f for f in options_of(cls)}
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in fields or not equals:
            known = ", ".join(fields) or "none"
            raise UsageError(f"the pass {name} has no option {option!r}", hint=f"its options: {known}")
        values[key] = _parse_option(f"{name}:{key}", types[key], _unquoted(value))
    return cls(**values)


def _parse_option(where: str, kind: Any, value: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
        values = ", ".join(filter(None, typing.get_args(kind)))
        raise UsageError(f"{value!r} is not a value of it", where=where, hint=f"one of {values}")
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if typing.get_origin(kind) is typing.Union:
        # A number, or one of some words.
        kind, words = typing.get_args(kind)
        if value in typing.get_args(words):
            return value
        others = "".join(f", nor {word}" for word in typing.get_args(words))
    else:
        others = ""
    if kind in (int, float, str):
        try:
            return kind(value)
        except ValueError:
            pass
    raise UsageError(f"{value!r} is not a {kind.__name__}{others}", where=where)


def _print_option(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    is_plain = not re.search("[,'\"]", text) and _OPTION.fullmatch(f":={text}")
    return text if is_plain else "'" + text.replace("'", "''") + "'"


def _unquoted(value: str) -> str:
    def inside(quoted: re.Match) -> str:
        mark = quoted[0][0]
        return quoted[0][1:-1].replace(mark * 2, mark)

    return _QUOTED.sub(inside, f"={value}")[1:]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""

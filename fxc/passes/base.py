"""What a pass is: a frozen dataclass whose fields are its options, with one method that rewrites a program.

A policy pass decides, and may change what the program computes, within limits that are measured. A mechanism pass may not,
and is checked to have not. A pass tells the truth about what it changed, and where it declines it says why.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fxc.errors import UsageError
from fxc.ir.names import layer_name
from fxc.ir.program import Program
from fxc.passes.interface import Interface
from fxc.progress import Track, untracked


@dataclass(frozen=True)
class Fact:
    """Something that is true of a program or not. `check` returns None where it holds, else a counterexample in words."""

    name: str
    check: Callable[[Program], str | None] = field(compare=False)

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
    pass that makes the same decisions without looking, for one that looked."""

    changed: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    covered_bytes: int = 0
    removed: list[Removal] = field(default_factory=list)
    interface: Interface = field(default_factory=Interface)
    notes: list[str] = field(default_factory=list)
    repeat: Pass | None = None


@dataclass
class Context:
    """What passes are given besides the program.

    skip: patterns of FQNs to leave alone, globs or "re:..." regular expressions; one that matches a module means all that
    is in it, and a plain string is one pattern; skipped: what passes left alone for each pattern; samples: sets of input
    tensors for the program, realistic where calibration data was given, which gates and data-driven policies use; draw: makes
    such inputs for a program from nothing; limit, tried: the gate's relative error of the outputs, where the user set one, and
    its inputs; track: shows how far a pass has come with its samples.
    """

    skip: tuple[str, ...] = ()
    samples: list[list[Tensor]] = field(default_factory=list)
    draw: Callable[[Program], list[list[Tensor]]] | None = None
    limit: float | None = None
    tried: list[list[Tensor]] = field(default_factory=list)
    track: Track = untracked

    skipped: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        if wrong := [p for p in self.skip if not isinstance(p, str)]:
            raise UsageError(f"{wrong[0]!r} is not a pattern", where="skip", hint="give strings: globs or 're:...'")
        for pattern in self.skip:
            self.skipped.setdefault(pattern, [])

    def skips(self, fqn: str) -> str | None:
        """The pattern that says to leave the module `fqn` alone, if one does."""
        matching = [p for p in self.skip if _matches(p, fqn)]
        for pattern in matching:
            if fqn not in self.skipped[pattern]:
                self.skipped[pattern].append(fqn)
        return matching[0] if matching else None

    def check_skip(self, program: Program) -> None:
        """Raises `UsageError` for a pattern that matches no module and no weight of `program`."""
        names = {n: None for fqn in [*program.constants, *program.aliases] for n in _and_parents(fqn)}
        names |= {n: None for node in program.graph.nodes for n in _and_parents(node.meta.get("fqn") or "")}
        for pattern in self.skip:
            if not any(_matches(pattern, name) for name in names):
                wanted = pattern.removeprefix("re:").strip("*.^$")
                layers = list(dict.fromkeys(layer_name(n) for n in names if not n.endswith(".bias")))
                near = difflib.get_close_matches(wanted, layers, n=3, cutoff=0.4) or layers[:3]
                raise UsageError(
                    f"the pattern {pattern!r} matches no layer of the model",
                    where="skip",
                    hint=f"there are, for instance, {', '.join(near)}; 'fxc inspect' lists all",
                )


def _and_parents(fqn: str) -> list[str]:
    parts = fqn.split(".") if fqn else []
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _matches(pattern: str, fqn: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], fqn) is not None
        except re.error as error:
            raise UsageError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    # From a dot on, so that "*.lm_head" is also the one of a model that has it at the top.
    globs = (pattern, f".{pattern}", f"*.{pattern}")
    return any(fnmatch.fnmatchcase(f".{name}", glob) for name in _and_parents(fqn) for glob in globs)


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
    rounds: ClassVar[bool] = False
    """Of a mechanism: whether it computes new constants, which are rounded to the dtype of the weights."""
    registry: ClassVar[dict[str, type[Pass]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.name:
            Pass.registry[cls.name] = cls

    def run(self, program: Program, context: Context) -> Result:
        """Rewrite `program` in place."""
        raise NotImplementedError

    def uses_data(self) -> bool:
        """Whether the pass, with its options, learns from `Context.samples`."""
        return False

    def needs_data(self) -> str | None:
        """What the pass, with its options, cannot do without `Context.samples`, in words."""
        return None

    def may_change_nothing(self) -> bool:
        """Whether that nothing could be changed is an answer, and no fault of what was asked."""
        return False

    def __str__(self) -> str:
        """The pass as it is written in `--passes`, with the options that are not at their defaults."""
        options = [
            f":{f.name}={_print_option(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + "".join(options)


def parse_passes(spec: str | Iterable[str | Pass]) -> list[Pass]:
    """The passes in "int8:mode=weight_only,prune:heads=0.25". Raises `UsageError` for a name, an option or a value that
    does not exist, with what there is."""
    items = [s for s in spec.split(",") if s.strip()] if isinstance(spec, str) else list(spec)
    return [item if isinstance(item, Pass) else _parse_pass(item.strip()) for item in items]


def check_data_is_given(passes: Iterable[Pass], is_given: bool) -> None:
    """Raises `UsageError` for the first pass that cannot do without calibration data."""
    for each in passes:
        if not is_given and (what := each.needs_data()):
            hint = "--calib FILE, in Python calib=..."
            raise UsageError(f"{what} measured on calibration data, and there is none", where=each.name, hint=hint)


def _parse_pass(text: str) -> Pass:
    name, *options = text.split(":")
    cls = Pass.registry.get(name)
    if cls is None:
        raise UsageError(f"there is no pass {name!r}", hint=f"{_did_you_mean(name, Pass.registry)}'fxc passes' lists them")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in fields or not equals:
            known = ", ".join(fields) or "none"
            raise UsageError(f"the pass {name} has no option {option!r}", hint=f"its options: {known}")
        values[key] = _parse_option(f"{name}:{key}", types[key], value)
    return cls(**values)


def _parse_option(where: str, kind: Any, value: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
        values = ", ".join(filter(None, typing.get_args(kind)))
        raise UsageError(f"{value!r} is not a value of it", where=where, hint=f"one of {values}")
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if kind in (int, float, str):
        try:
            return kind(value)
        except ValueError:
            pass
    raise UsageError(f"{value!r} is not a {kind.__name__}", where=where)


def _print_option(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
